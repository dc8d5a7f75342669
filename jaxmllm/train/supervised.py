"""One supervised step: cross-entropy of the gold answers, several questions of an image sharing its prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxmllm.data.examples import Weigh
from jaxmllm.data.pipeline import Batch
from jaxmllm.mesh import shard_batch
from jaxmllm.train.config import TrainConfig
from jaxmllm.train.step import sft_step

if TYPE_CHECKING:
    from jaxmllm.train.setup import Run


def first_corner(tokenizer: Any, weight: float) -> Weigh | None:
    """Weighs the first two numbers after each opening bracket, which decide what object is meant. None for weight 1.

    Meant for tokenizers that write a number as one token.
    """
    if weight == 1:
        return None
    pieces = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    opening = {i for i, piece in enumerate(pieces) if piece.endswith("[")}
    number = {i for i, piece in enumerate(pieces) if piece.strip().isdecimal()}

    def weigh(record: dict[str, Any], tokens: Sequence[int]) -> list[float]:
        weights, expected = [], 0
        for token in tokens:
            chosen = expected > 0 and token in number
            weights.append(weight if chosen else 1.0)
            expected = 2 if token in opening else expected - chosen
        return weights

    return weigh


class Supervised:
    """Callable `(run, batch) -> metrics` that replaces `run.state`."""

    def __init__(self, config: TrainConfig):
        self.config = config

    def __call__(self, run: Run, batch: Batch) -> dict[str, Any]:
        prompts, completions = shard_batch((batch.prompts, batch.completions), run.mesh)
        run.state, metrics = sft_step(
            run.state, prompts, completions, update=run.update, loss_norm=self.config.loss_norm
        )
        return metrics

    def get_state(self) -> dict[str, float]:
        return {}

    def set_state(self, state: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass
