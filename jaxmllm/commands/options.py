"""Flags that several commands share, with their line of help; and the check of numbers that have a least value."""

from typing import Annotated, Literal

from tyro.conf import arg

from jaxmllm.errors import InputError

ModelName = Annotated[str, arg(help='a checkpoint folder, a hub id, or "tiny", the embedded model.')]
Dtype = Annotated[
    Literal["float32", "bfloat16"] | None, arg(help="of parameters and activations; the checkpoint's without it.")
]
MinPixels = Annotated[int | None, arg(help="of a resized picture; the checkpoint's without it.")]
MaxPixels = Annotated[int | None, arg(help="of a resized picture; the checkpoint's without it.")]
MaxSourcePixels = Annotated[int | None, arg(help="of a picture as it is stored; a larger one is refused.")]
Style = Annotated[
    Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"] | None,
    arg(
        help="how boxes are written: tokens in 0-1000, JSON in resized pixels or in 0-1000; the model's own without it."
    ),
]
Thinking = Annotated[bool, arg(help="answers are <think>..</think><answer>..</answer>; questions ask for it.")]
MaxNewTokens = Annotated[int, arg(help="tokens of an answer; a longer one is cut.")]
BatchSize = Annotated[int, arg(help="prompts that are computed at once; it changes speed and memory only.")]
RepetitionPenalty = Annotated[float, arg(help="above 1 makes tokens that were said before less likely.")]
Seed = Annotated[int, arg(help="of everything that is drawn at random.")]


def at_least(least: int, **numbers: int | None) -> None:
    """Raises InputError for a number below `least`; the keywords are the flags' names."""
    for name, value in numbers.items():
        if value is not None and value < least:
            raise InputError(f"--{name} {value}: must be at least {least}")
