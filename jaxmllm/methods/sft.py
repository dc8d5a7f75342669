"""Supervised fine-tuning (SFT, FPT, FIT): token cross-entropy of gold answers; questions about an image share its prefix.

Sources: sheet utr.md 3.4 (mean per sample), merlin.md 3.3 (mean over the unmasked targets). No auxiliary loss.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Generator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxmllm.data.examples import Weigh
from jaxmllm.data.pipeline import Batch
from jaxmllm.data.sources import RecordSource, all_records
from jaxmllm.errors import InputError
from jaxmllm.methods import given
from jaxmllm.methods.masked import masked_count, masked_mean, masked_sum
from jaxmllm.methods.method import Context, Facts, Layout, Method
from jaxmllm.methods.shapes import Program, Sizes, Traced, trained_products
from jaxmllm.methods.update import Metrics, Update, update_on_answers
from jaxmllm.types import Completions, Prompts, TrainState

# of a gold answer in JSON or in Qwen2-VL's tokens: x1 and y1 of each box; the words of each label
FIRST_CORNER = re.compile(r"(?:\[|<\|box_start\|>\()(\d+)\D+?(\d+)")
LABEL = re.compile(r'"label": "([^"]*)|<\|object_ref_start\|>([^<]*)')


def cross_entropy_sums(
    logps: Float[Array, "*B T"], weights: Shaped[Array, "*B T"], loss_norm: str = "sample"
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Numerator and denominator of `cross_entropy`.

    Added up over microbatches or devices *before* the division, they give the loss of the whole batch.
    """
    if loss_norm == "sample":
        return jnp.sum(masked_mean(-logps, weights, axis=-1)), masked_count(jnp.any(weights != 0, axis=-1))
    if loss_norm == "token":
        return masked_sum(-logps, weights), masked_sum(weights, weights != 0)
    raise ValueError(f"unknown loss_norm {loss_norm!r}; use sample or token")


def cross_entropy(
    logps: Float[Array, "*B T"], weights: Shaped[Array, "*B T"], loss_norm: str = "sample"
) -> Float[Array, ""]:
    """Weighted mean of -log p over the answer tokens, nats; 0 if none is counted.

    Args:
        logps: log p of the target tokens. Values under a weight of 0 may be anything.
        weights: 0 on the prompt, vision tokens and padding, 1 (or a larger weight, >= 0) on answer tokens and the end.
        loss_norm: `sample` averages each sample's mean, so that long answers do not dominate (UTR's script, samples
            without a counted token left out); `token` is the mean over all counted tokens of the batch (Merlin).

    Raises:
        ValueError: unknown loss_norm.
    """
    numerator, denominator = cross_entropy_sums(logps, weights, loss_norm)
    return numerator / jnp.where(denominator > 0, denominator, 1)


@functools.partial(jax.jit, static_argnames=("update", "loss_norm"), donate_argnames="state")
def sft_step(
    state: TrainState, prompts: Prompts, completions: Completions, *, update: Update, loss_norm: str = "token"
) -> tuple[TrainState, Metrics]:
    """One supervised update: weighted cross-entropy of the completions (several questions an image share its prefix)."""
    _, total = cross_entropy_sums(jnp.zeros_like(completions.weights), completions.weights, loss_norm)

    def numerator(logps, micro):
        return cross_entropy_sums(logps, micro[1].weights, loss_norm)[0], {}

    return update_on_answers(state, (prompts, completions), update, jnp.maximum(total, 1), numerator)


def weigh_parts(tokenizer: Any, corner: float, label: float) -> Weigh | None:
    """Weights of an answer's tokens: `corner` where a box begins, which decides what object is meant, `label` where it is
    named, 1 elsewhere. None where both are 1.
    """
    if corner == label == 1:
        return None
    pieces = [tokenizer.decode([i]) for i in range(len(tokenizer))]

    def weigh(record: dict[str, Any], tokens: Sequence[int]) -> list[float]:
        written = [pieces[token] for token in tokens]
        text, ends = "".join(written), np.cumsum([len(piece) for piece in written])
        weights = np.ones(len(tokens))
        for pattern, weight in ((FIRST_CORNER, corner), (LABEL, label)):
            for start, end in (span for match in pattern.finditer(text) for span in match.regs[1:] if span[0] >= 0):
                first, last = np.searchsorted(ends, (start, end - 1), side="right")
                weights[first : last + 1] = weight
        return weights.tolist()

    return weigh


def check_questions(source: RecordSource, wanted: int, looks: int = 16) -> None:
    """InputError where no picture seems to have as many questions: the rest would be empty answers, which cost the same."""
    if wanted == 1 or not len(source):
        return
    counts = []
    for k in range(looks):
        with contextlib.suppress(InputError):  # a bad record: the pipeline's to judge
            counts.append(len(all_records(source, k * len(source) // looks)))
    if counts and (most := max(counts)) < wanted:
        raise InputError(
            f"method.questions_per_image = {wanted}: of {looks} pictures looked at in data.train none has more than "
            f"{most}; set it to {most}, or write questions={wanted} in a world: source"
        )


class SFTWork(given.AnswerWork):
    def __init__(self, method: "SFT", context: Context):
        weigh = weigh_parts(context.model.tokenizer, method.first_corner_weight, method.label_weight)
        super().__init__(
            context,
            given.answer_batches(context, method.questions_per_image, weigh, mask_history=method.mask_history),
            method.questions_per_image,
        )
        self.mask_history = method.mask_history
        self.loss_norm = method.loss_norm

    def update(self, state: TrainState, prompts: Prompts, completions: Completions, batch: Batch) -> tuple[Any, dict]:
        return sft_step(state, prompts, completions, update=self.context.update, loss_norm=self.loss_norm)


@dataclasses.dataclass(frozen=True)
class SFT(Method):
    """Cross-entropy of gold answers."""

    figures = given.HELD_OUT

    questions_per_image: int = 1  # that share one image and its prefix
    first_corner_weight: float = 1.0  # weight of the first two numbers of each box in the loss
    label_weight: float = 1.0  # weight of the words of each label in the loss
    loss_norm: Literal["sample", "token"] = "token"  # see `cross_entropy`
    mask_history: bool = False  # of a conversation learn the last answer alone, not those of all turns

    def problems(self, facts: Facts) -> list[str]:
        found = []
        if self.questions_per_image < 1:
            found.append(f"method.questions_per_image = {self.questions_per_image}: must be at least 1")
        for name in ("first_corner_weight", "label_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                found.append(f"method.{name} = {getattr(self, name)}: must be a finite number of at least 0")
        return found

    def lengths(self) -> tuple[int, int | None]:
        return self.questions_per_image, None

    def work(self, context: Context) -> SFTWork:
        check_questions(context.mixture, self.questions_per_image)
        return SFTWork(self, context)

    def programs(self, sizes: Sizes, state: TrainState, layout: Layout) -> Generator[Program, Any, None]:
        batch = given.arguments(sizes, layout)
        options: dict[str, Any] = dict(update=layout.update, loss_norm=self.loss_norm)
        yield Program(
            "update",
            lambda: sft_step.lower(state, *batch, **options),
            Traced(lambda state, *x: sft_step(state, *x, **options), (state, *batch)),
            trained_products(given.forward(state, layout, *batch), layout.lora),
        )
