"""`jaxmllm score`: log-probabilities of given completions."""

import json
from pathlib import Path

from tyro.conf import Positional

from jaxmllm import api
from jaxmllm.commands.options import BatchSize, Dtype, ModelName
from jaxmllm.errors import InputError
from jaxmllm.runfiles import read_lines


def run(
    conversations: Positional[Path],
    model: ModelName = "tiny",
    out: Path | None = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
) -> None:
    """Log-probabilities (nats) of every token of given completions.

    Args:
        conversations: JSON lines, each {"messages": [...], "completions": ["...", ...]}.
        out: JSON lines with "logprobs" added; standard output without it.
    """
    rows = read_lines(conversations)
    for number, row in enumerate(rows, 1):
        for field in ("messages", "completions"):
            if not isinstance(row.get(field), list):
                raise InputError(f"{conversations}, line {number}: field {field!r} must be a list")
    if not rows:
        raise InputError(f"{conversations}: no rows")
    scores = api.score(
        api.load(model, dtype=dtype),
        [row["messages"] for row in rows],
        [row["completions"] for row in rows],
        batch_size=batch_size,
    )
    lines = [
        json.dumps(row | {"logprobs": [logps.tolist() for logps in completions]})
        for row, completions in zip(rows, scores, strict=True)
    ]
    if out is None:
        print("\n".join(lines))
    else:
        out.write_text("\n".join(lines) + "\n")
