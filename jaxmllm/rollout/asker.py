"""Records in, greedy texts out: how evaluations, critics and judges ask a model."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxmllm import api
from jaxmllm.data.examples import Asking


def ask(
    model: api.Model,
    asking: Asking,
    records: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int,
    repetition_penalty: float = 1.0,
    batch_size: int | None = None,
) -> list[str]:
    """The model's greedy answer to each record. `batch_size`: prompts a program; None: all of them."""
    found = api.generate(
        model,
        [asking.conversation(dict(record)) for record in records],
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        repetition_penalty=repetition_penalty,
        batch_size=batch_size or max(len(records), 1),
    )
    return [group[0].text for group in found]
