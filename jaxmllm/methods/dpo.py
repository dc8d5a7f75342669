"""Preference optimisation: DPO and the listwise LiPO-lambda, which RePer compares reflective unlikelihood with.

Both work on implicit rewards s = beta log(pi / pi_ref) of G answers to one prompt. Sources: sheet reper.md 4.4 and 5.4;
DPO: arXiv 2305.18290, Eq. 7; LiPO: arXiv 2402.01878, lambda-loss with DCG weights.
"""

import dataclasses
import functools
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxmllm.data.dialogues import MAX_TURNS
from jaxmllm.data.pipeline import Batch
from jaxmllm.machine.mesh import shard_batch
from jaxmllm.methods import given
from jaxmllm.methods.masked import accumulator_dtype, masked_max, masked_mean, masked_min, masked_sum, zero_masked
from jaxmllm.methods.method import Context, Facts, Layout, Method
from jaxmllm.methods.optim import reference_params
from jaxmllm.methods.shapes import Program, Sizes, Traced, trained_products
from jaxmllm.methods.update import Metrics, Update, update_on_answers
from jaxmllm.model.logprobs import Sampling
from jaxmllm.rollout.scorer import score_jit
from jaxmllm.types import Completions, Prompts, TrainState


def implicit_rewards(
    logps: Float[Array, "B G T"], ref_logps: Float[Array, "B G T"], mask: Shaped[Array, "B G T"], beta: float = 0.1
) -> Float[Array, "B G"]:
    """s = beta * sum over the answer's tokens of log pi - log pi_ref; the reference gets no gradient."""
    return beta * masked_sum(
        zero_masked(logps, mask) - zero_masked(jax.lax.stop_gradient(ref_logps), mask), mask != 0, axis=-1
    )


def widest_pair(
    rewards: Float[Array, "B G"], valid: Bool[Array, "B G"] | None = None
) -> tuple[Int[Array, "B"], Int[Array, "B"], Bool[Array, "B"]]:
    """(best, worst, whether their rewards differ) of each prompt: the pair DPO is trained on; ties go to the first."""
    valid = jnp.ones(rewards.shape, bool) if valid is None else valid
    best = jnp.argmax(jnp.where(valid, rewards, -jnp.inf), axis=-1)
    worst = jnp.argmin(jnp.where(valid, rewards, jnp.inf), axis=-1)
    return best, worst, masked_max(rewards, valid, axis=-1) > masked_min(rewards, valid, axis=-1)


def dpo_loss(
    scores: Float[Array, "B G"],
    rewards: Float[Array, "B G"],
    valid: Bool[Array, "B G"] | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """-log sigmoid(s_chosen - s_rejected) on each prompt's best and worst answer, mean over prompts that have two.

    Args:
        scores: implicit rewards s.
        rewards: rewards that rank the answers; any scale.
        valid: False on padding answers; None: all count.
        label_smoothing: chance that a pair is labelled the wrong way round (conservative DPO); 0 is DPO.

    Returns:
        The loss, and TRL's metrics `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies`.
    """
    best, worst, differ = widest_pair(rewards, valid)
    chosen, rejected = (jnp.take_along_axis(scores, i[:, None], axis=-1)[:, 0] for i in (best, worst))
    margin = zero_masked(chosen, differ) - zero_masked(rejected, differ)
    loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
    metrics = {
        "rewards/chosen": masked_mean(chosen, differ),
        "rewards/rejected": masked_mean(rejected, differ),
        "rewards/margins": masked_mean(margin, differ),
        "rewards/accuracies": masked_mean((margin > 0).astype(margin.dtype), differ),
    }
    return masked_mean(loss, differ), metrics


def lipo_lambda_loss(
    scores: Float[Array, "B G"], labels: Float[Array, "B G"], valid: Bool[Array, "B G"] | None = None
) -> Float[Array, ""]:
    """sum over pairs psi_i > psi_j of Delta_ij log(1 + exp(-(s_i - s_j))), mean over prompts that have such a pair.

    Delta_ij = |G_i - G_j| |1 / D_i - 1 / D_j| is the change of DCG if i and j swapped places: gain G = 2^psi - 1,
    discount D = log(1 + rank) with rank 1.. in the order of the current scores (ties: earlier first). It is a weight,
    not a path for gradients.

    Args:
        scores: implicit rewards s.
        labels: psi, meant to lie in 0..1; the gain grows as 2^psi, so divide a 0..10 rating by its maximum first.
        valid: False on padding answers; None: all count.
    """
    valid = jnp.ones(scores.shape, bool) if valid is None else valid
    s, psi = zero_masked(scores, valid), zero_masked(labels, valid)
    order = jnp.argsort(-jnp.where(valid, jax.lax.stop_gradient(s), -jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1) + 1
    inverse_discount = 1 / jnp.log1p(rank.astype(accumulator_dtype(s)))
    gain = jnp.exp2(psi) - 1
    delta = jnp.abs(gain[:, :, None] - gain[:, None, :]) * jnp.abs(
        inverse_discount[:, :, None] - inverse_discount[:, None, :]
    )
    pairs = (psi[:, :, None] > psi[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    per_prompt = masked_sum(-delta * jax.nn.log_sigmoid(s[:, :, None] - s[:, None, :]), pairs, axis=(1, 2))
    return masked_mean(per_prompt, jnp.any(pairs, axis=(1, 2)))


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """The part of DPO's options that decides its program; names are TRL's."""

    loss_type: Literal["sigmoid", "lipo"] = "sigmoid"
    """`sigmoid`: DPO on the best and worst answer; `lipo`: LiPO-lambda on the whole ranking."""
    beta: float = 0.1
    """Scale of the implicit rewards."""
    label_smoothing: float = 0.0
    """Of `sigmoid`: chance that a pair is labelled the wrong way round, below 0.5."""


@functools.partial(jax.jit, static_argnames=("update", "options"), donate_argnames="state")
def dpo_step(
    state: TrainState,
    prompts: Prompts,
    completions: Completions,
    rewards: Float[Array, "B G"],
    ref_logps: Float[Array, "B G T"],
    *,
    update: Update,
    options: PreferenceLoss,
) -> tuple[TrainState, Metrics]:
    """One DPO or LiPO update on each prompt's completions; metrics besides those of SFT are TRL's, of best and worst.

    `rewards`: 0..1, anything where a prompt has fewer completions. `ref_logps`: log-probabilities of the completions under
    the reference.
    """

    def pairs(rewards, given):
        return jnp.sum(widest_pair(rewards, given.lengths > 0)[2]).astype(jnp.float32)

    total = jnp.maximum(pairs(rewards, completions), 1)

    def numerator(logps, micro):
        _, given, ranks, reference = micro
        scores = implicit_rewards(logps, reference, given.weights, options.beta)
        loss, metrics = dpo_loss(scores, ranks, given.lengths > 0, options.label_smoothing)
        if options.loss_type == "lipo":
            loss = lipo_lambda_loss(scores, ranks, given.lengths > 0)
        count = pairs(ranks, given)
        return loss * count, {name: value * count / total for name, value in metrics.items()}

    batch = (prompts, completions, rewards, ref_logps)
    return update_on_answers(state, batch, update, total, numerator)


def answer_rewards(rows: Sequence[Sequence[Mapping[str, Any]]], answers: int) -> Float[np.ndarray, "B G"]:
    """Reward of each ranked answer; 0 where a prompt has fewer."""
    rewards = np.zeros((len(rows), answers), np.float32)
    for row, ranked in enumerate(rows):
        rewards[row, : len(ranked)] = [record["reward"] for record in ranked]
    return rewards


class DPOWork(given.AnswerWork):
    def __init__(self, method: "DPO", context: Context):
        super().__init__(context, given.answer_batches(context, method.ranked), method.ranked)
        self.options, self.answers = method.loss, method.ranked

    def update(self, state: TrainState, prompts: Prompts, completions: Completions, batch: Batch) -> tuple[Any, dict]:
        context = self.context
        rewards = shard_batch(answer_rewards(batch.records, self.answers), context.mesh)
        reference = reference_params(state, context.update.trainable)
        ref_logps, _ = score_jit(reference, context.cfg, prompts, completions, Sampling())
        return dpo_step(state, prompts, completions, rewards, ref_logps, update=context.update, options=self.options)

    def figures(self, state: TrainState, batch: Batch, logps: np.ndarray) -> dict[str, tuple[float, float]]:
        """TRL's `rewards/accuracies` and `rewards/margins` of the held-out pairs, besides the loss of their tokens."""
        assert batch.completions is not None
        reference = self.score(reference_params(state, self.context.update.trainable), batch)
        rows = len(batch.records)
        weights = np.asarray(batch.completions.weights)[:rows]
        scores = self.options.beta * ((logps - reference)[:rows] * (weights > 0)).sum(-1)
        ranks, asked = jnp.asarray(answer_rewards(batch.records, self.answers)), jnp.asarray(weights.any(-1))
        best, worst, differ = (np.asarray(x) for x in widest_pair(ranks, asked))
        margins = (scores[np.arange(rows), best] - scores[np.arange(rows), worst])[differ]
        count = float(len(margins))
        return super().figures(state, batch, logps) | {
            "rewards/accuracies": (float((margins > 0).sum()), count),
            "rewards/margins": (float(margins.sum()), count),
        }


@dataclasses.dataclass(frozen=True)
class DPO(Method, PreferenceLoss):
    """Preference optimisation; names are TRL's. The reference is the model that the run starts from."""

    figures = {**given.HELD_OUT, "rewards/accuracies": "higher", "rewards/margins": "higher"}

    @property
    def loss(self) -> PreferenceLoss:
        return PreferenceLoss(self.loss_type, self.beta, self.label_smoothing)

    @property
    def ranked(self) -> int:
        """Answers of each prompt, at most."""
        return 2 if self.loss_type == "sigmoid" else MAX_TURNS

    def problems(self, facts: Facts) -> list[str]:
        found = given.sources_problems(facts, "preference", self.name)
        if not 0 < self.beta < float("inf"):
            found.append(f"method.beta = {self.beta}: must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            found.append(f"method.label_smoothing = {self.label_smoothing}: must be at least 0 and below 0.5")
        if self.loss_type == "lipo" and self.label_smoothing:
            found.append("method.label_smoothing: goes with loss_type sigmoid")
        if self.ranked == 2 and any("answers=all" in spec for spec in facts.sources):
            found.append("data.train: answers=all goes with method.loss_type lipo; sigmoid learns from pairs")
        return found

    def lengths(self) -> tuple[int, int | None]:
        return self.ranked, None

    def reference(self, lora: bool) -> bool:
        return not lora

    def work(self, context: Context) -> DPOWork:
        return DPOWork(self, context)

    def programs(self, sizes: Sizes, state: TrainState, layout: Layout) -> Generator[Program, Any, None]:
        prompts, completions = given.arguments(sizes, layout)
        batch = (prompts, completions, given.per_row(sizes, layout), given.per_row(sizes, layout, sizes.new_tokens))
        options: dict[str, Any] = dict(update=layout.update, options=self.loss)
        forward = given.forward(state, layout, prompts, completions)
        # the parameters it reads are the reference's, the policy's lie beside
        beside = ("optimiser",) if layout.lora else ("parameters", "optimiser")
        yield Program(
            "score",
            lambda: score_jit.lower(state.params, layout.cfg, prompts, completions, Sampling()),
            forward,
            beside=beside,
        )
        yield Program(
            "update",
            lambda: dpo_step.lower(state, *batch, **options),
            Traced(lambda state, *x: dpo_step(state, *x, **options), (state, *batch)),
            trained_products(forward, layout.lora),
        )
