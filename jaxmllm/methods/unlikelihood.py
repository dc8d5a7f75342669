"""Reflective unlikelihood of RePer: a reward splits each answer's weight between log p and log(1 - p).

Sheet reper.md section 4; "Perception in Reflection", arXiv 2504.07165, Eq. 2. A dialogue holds up to T answers of the
policy to one image. Answer t with normalised reward sigma_t in [0, 1] costs, per supervised token of probability p,

    l = -[sigma_t log p + alpha (1 - sigma_t) m log max(1 - p, eps)]

with m the exemption mask (0: likelihood only, recommended on the end-of-turn token so that early turns do not learn to
run on). Each token is a soft-label binary cross-entropy whose minimum is `token_optimum`.

Shapes: S tokens of a dialogue (questions, answers and feedback), T answers; `*B` any leading axes, so dialogues that
share an image may be [B, G, S]. `turn_id` is 0 on context and padding and 1..T on the answers; only answers are
supervised, and whatever stands elsewhere (NaN, infinity, target -100) never reaches the loss or its gradient. A
`turn_id` above T has no sigma and makes the token-level loss NaN.
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
from jaxmllm.methods.masked import accumulator_dtype, masked_count, masked_mean, masked_sum, zero_masked
from jaxmllm.methods.method import Context, Facts, Layout, Method
from jaxmllm.methods.shapes import Program, Sizes, Traced, trained_products
from jaxmllm.methods.update import Metrics, Update, update_on_answers
from jaxmllm.rollout.reflect import SOURCES
from jaxmllm.types import Completions, Prompts, TrainState

REDUCTIONS = ("dialogue", "token", "turn_mean", "sum")
LEVELS = ("token", "seq", "seq_geo")


def log1mexp(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`log(1 - exp(x))` for x <= 0 without cancellation at either end; -inf (and gradient 0) for x >= 0.

    Source: Maechler, "Accurately computing log(1 - exp(-|a|))"; the branch point is -log 2.
    """
    x = x.astype(accumulator_dtype(x))
    below = x < 0
    safe = jnp.where(below, x, -1.0)
    near = safe > -jnp.log(2.0)
    value = jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, safe, -0.5))),
        jnp.log1p(-jnp.exp(jnp.where(near, -1.0, safe))),
    )
    return jnp.where(below, value, -jnp.inf)


def target_logps(
    logits: Float[Array, "*B S V"], targets: Int[Array, "*B S"], mask: Shaped[Array, "*B S"]
) -> tuple[Float[Array, "*B S"], Float[Array, "*B S"]]:
    """log p and log(1 - p) of the targets, both from the logits; logits already aligned, 0 where `mask` is 0.

    log(1 - p) is the log-sum of the *other* logits minus the log-sum of all: exact even where log p rounds to 0, and
    its gradient stays bounded as p goes to 1, where the chain through log p gives inf * 0. Holds three arrays of the
    logits' size; with a large vocabulary compute log p in chunks and call `reflective_unlikelihood`.
    """
    z = zero_masked(logits, mask[..., None])
    is_target = jnp.where(mask != 0, targets, 0)[..., None] == jnp.arange(z.shape[-1])
    others = jnp.where(is_target, -jnp.inf, z)
    # Every other logit at -inf leaves nothing to sum: that row gets log(1 - p) = -inf outright, without a NaN gradient.
    possible = jnp.isfinite(jnp.max(others, axis=-1, keepdims=True))
    total = jax.nn.logsumexp(z, axis=-1)
    logps = jnp.sum(jnp.where(is_target, z, 0), axis=-1) - total
    rest = jax.nn.logsumexp(jnp.where(possible, others, 0), axis=-1) - total
    return zero_masked(logps, mask), zero_masked(jnp.where(possible[..., 0], rest, -jnp.inf), mask)


def _scaled(weight: Array, value: Array) -> Array:
    """weight * value, where a weight of 0 removes an infinite value and its gradient too."""
    return weight * jnp.where(weight != 0, value, 0)


def _weighted_terms(logp: Array, log1mp: Array, sigma: Array, unlikelihood: Array, eps: float | Array) -> Array:
    """-[sigma log p + unlikelihood log max(1 - p, eps)]; a floored entry has no unlikelihood gradient."""
    floor = jnp.log(jnp.asarray(eps, log1mp.dtype))
    return -(_scaled(sigma, logp) + _scaled(unlikelihood, jnp.where(log1mp > floor, log1mp, floor)))


def reflective_unlikelihood_sums(
    logps: Float[Array, "*B S"],
    turn_id: Int[Array, "*B S"],
    sigma: Float[Array, "*B T"],
    *,
    alpha: float | Float[Array, ""] = 10.0,
    reduction: str = "dialogue",
    level: str = "token",
    ul_mask: Shaped[Array, "*B S"] | None = None,
    eps: float | Float[Array, ""] = 1e-5,
    log1mps: Float[Array, "*B S"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Numerator and denominator of `reflective_unlikelihood`.

    Added up over microbatches or devices *before* the division, they give the loss of the whole batch.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; use one of {', '.join(REDUCTIONS)}")
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; use one of {', '.join(LEVELS)}")
    supervised = turn_id > 0
    logps = zero_masked(logps, supervised)
    sigma = sigma.astype(accumulator_dtype(logps, sigma))
    in_turn = turn_id[..., None] == jnp.arange(1, sigma.shape[-1] + 1)  # [*B, S, T]
    dialogues = masked_count(jnp.any(supervised, axis=-1))

    if level != "token":
        total = masked_sum(logps[..., None], in_turn, axis=-2)  # [*B, T]
        count = masked_count(in_turn, axis=-2)
        score = total if level == "seq" else total / jnp.maximum(count, 1)
        has_turn = count > 0
        terms = _weighted_terms(score, log1mexp(jnp.where(has_turn, score, -1.0)), sigma, alpha * (1 - sigma), eps)
        return masked_sum(terms, has_turn), dialogues

    log1mps = log1mexp(jnp.where(supervised, logps, -1.0)) if log1mps is None else zero_masked(log1mps, supervised)
    weight = jnp.take_along_axis(sigma, jnp.where(supervised, turn_id - 1, 0), axis=-1)
    exempt = 1 if ul_mask is None else ul_mask
    losses = zero_masked(_weighted_terms(logps, log1mps, weight, alpha * (1 - weight) * exempt, eps), supervised)
    if reduction == "dialogue":
        return jnp.sum(masked_mean(losses, supervised, axis=-1)), dialogues
    if reduction == "turn_mean":
        return jnp.sum(masked_mean(losses[..., None], in_turn, axis=-2)), dialogues
    return jnp.sum(losses), masked_count(supervised) if reduction == "token" else dialogues


def reflective_unlikelihood(
    logps: Float[Array, "*B S"],
    turn_id: Int[Array, "*B S"],
    sigma: Float[Array, "*B T"],
    *,
    alpha: float | Float[Array, ""] = 10.0,
    reduction: str = "dialogue",
    level: str = "token",
    ul_mask: Shaped[Array, "*B S"] | None = None,
    eps: float | Float[Array, ""] = 1e-5,
    log1mps: Float[Array, "*B S"] | None = None,
) -> Float[Array, ""]:
    """Reflective unlikelihood loss from token log-probabilities (sheet reper.md 4.2).

    Args:
        logps: log p of the target tokens, nats.
        turn_id: 0 on context and padding, 1..T on the tokens of answer t and their end-of-turn token.
        sigma: normalised reward of each answer, 0..1 (`normalize_rewards`).
        alpha: weight of the unlikelihood term; 0 leaves reward-weighted likelihood.
        reduction: `dialogue` mean over dialogues of the mean over their tokens; `token` mean over all tokens;
            `turn_mean` mean over dialogues of the sum over turns of the mean over tokens; `sum` mean over dialogues of
            the sum over tokens. Dialogues without a supervised token count nowhere; none at all gives 0.
        level: `token`, or one term per answer: `seq` with log p of the whole answer, `seq_geo` with its mean; these
            two sum over answers, average over dialogues and ignore `ul_mask` and `reduction`.
        ul_mask: 0 exempts a token from unlikelihood; None exempts none. Denominators do not depend on it.
        eps: floor of 1 - p. A hard maximum: a floored token has no unlikelihood gradient. 0 switches it off.
        log1mps: log(1 - p) where the caller has it more exactly than `log1mexp(logps)`.

    Raises:
        ValueError: unknown reduction or level.
    """
    numerator, denominator = reflective_unlikelihood_sums(
        logps, turn_id, sigma, alpha=alpha, reduction=reduction, level=level, ul_mask=ul_mask, eps=eps, log1mps=log1mps
    )
    return numerator / jnp.maximum(denominator, 1)


def reper_loss(
    logits: Float[Array, "*B S V"],
    targets: Int[Array, "*B S"],
    turn_id: Int[Array, "*B S"],
    sigma: Float[Array, "*B T"],
    alpha: float | Float[Array, ""] = 10.0,
    reduction: str = "dialogue",
    level: str = "token",
    ul_mask: Shaped[Array, "*B S"] | None = None,
    eps: float | Float[Array, ""] = 1e-5,
) -> Float[Array, ""]:
    """`reflective_unlikelihood` from logits; position s predicts targets[s] (sheet reper.md 4.2)."""
    logps, log1mps = target_logps(logits, targets, turn_id > 0)
    return reflective_unlikelihood(
        logps, turn_id, sigma, alpha=alpha, reduction=reduction, level=level, ul_mask=ul_mask, eps=eps, log1mps=log1mps
    )


def reper_logit_grad(logits: Float[Array, "*B S V"], *args, **kwargs) -> Float[Array, "*B S V"]:
    """d loss / d logits, with the arguments of `reper_loss`; closed form of the token level: sheet reper.md 4.3."""
    return jax.grad(reper_loss)(logits, *args, **kwargs)


def normalize_rewards(
    r: Float[Array, "*B T"],
    mode: str,
    r_max: float | Float[Array, ""] | None = None,
) -> Float[Array, "*B T"]:
    """Rewards of each dialogue's answers as sigma (sheet reper.md 4.2 and gap G2).

    `source_max` clips r / r_max to [0, 1] (recommended for a judge's 0..10 scale; with the data set's largest reward as
    `r_max` it is the data-set maximum). `dialogue_max` divides by the dialogue's largest reward, so that its best
    answer is fully imitated (recommended for rule rewards, whose best is far below 1). A divisor <= 0 gives zeros.

    Raises:
        ValueError: unknown mode, or `source_max` without `r_max`.
    """
    r = r.astype(accumulator_dtype(r))
    if mode == "source_max":
        if r_max is None:
            raise ValueError("source_max needs r_max, the largest reward the source can give")
        divisor = jnp.asarray(r_max, r.dtype)
    elif mode == "dialogue_max":
        divisor = jnp.max(r, axis=-1, keepdims=True)
    else:
        raise ValueError(f"unknown mode {mode!r}; use source_max or dialogue_max")
    sigma = jnp.where(divisor > 0, r / jnp.where(divisor > 0, divisor, 1), 0)
    return jnp.clip(sigma, 0, 1) if mode == "source_max" else sigma


def token_optimum(sigma: Float[Array, "*B"], alpha: float | Float[Array, "*B"] = 10.0) -> Float[Array, "*B"]:
    """Token probability p* = sigma / (sigma + alpha (1 - sigma)) at which the loss is least; 0 at sigma = 0.

    Source: sheet reper.md 4.3. With alpha = 10 an answer rated 9/10 still pushes down every token with p > 0.47.
    """
    sigma = sigma.astype(accumulator_dtype(sigma))
    divisor = sigma + alpha * (1 - sigma)
    return jnp.where(sigma > 0, sigma / jnp.where(divisor > 0, divisor, 1), 0)


def exempt_tokens(targets: Int[Array, "*B S"], *token_ids: int) -> Bool[Array, "*B S"]:
    """`ul_mask` that frees the given tokens (the end of turn) from unlikelihood (sheet reper.md gap G4)."""
    return ~jnp.isin(targets, jnp.asarray(token_ids, targets.dtype))


def answer_turns(weights: Shaped[Array, "*B S"]) -> Int[Array, "*B S"]:
    """`turn_id` of completions in which exactly the answers have weights: 1, 2, .. on the runs of weights above 0.

    Between two answers there is always the user's turn, so each run is one answer with its end-of-turn token.
    """
    inside = weights > 0
    before = jnp.pad(inside, [(0, 0)] * (inside.ndim - 1) + [(1, 0)])[..., :-1]
    return jnp.where(inside, jnp.cumsum(inside & ~before, axis=-1), 0)


def turn_probabilities(logps: Float[Array, "*B S"], turn_id: Int[Array, "*B S"], num_turns: int) -> Float[Array, "T"]:
    """Mean token probability of each answer index over the batch, to watch during training (sheet reper.md 4.3)."""
    in_turn = turn_id[..., None] == jnp.arange(1, num_turns + 1)
    p = jnp.exp(zero_masked(logps, turn_id > 0))
    return masked_mean(p[..., None], in_turn, axis=tuple(range(turn_id.ndim)))


def dialogue_sigma(
    dialogue: Mapping[str, Any], mode: str | None = None, r_max: float | None = None
) -> Float[np.ndarray, "T"]:
    """sigma of each answer for `reflective_unlikelihood`, by the rule of the dialogue's source.

    `mode` and `r_max` (see `normalize_rewards`) replace that rule's, for example `source_max` with the largest reward
    of a rule-scored data set. Look at the histogram before training: answers below sigma 0.91 are mostly pushed down.
    """
    rules = SOURCES[dialogue["source"]]
    rewards = jnp.asarray([turn["reward"] for turn in dialogue["turns"]], jnp.float32)
    largest = rules.r_max if r_max is None else r_max
    return np.asarray(normalize_rewards(rewards, rules.normalisation if mode is None else mode, largest))


def answer_sigmas(rows: Sequence[Sequence[Mapping[str, Any]]]) -> Float[np.ndarray, "B 1 R"]:
    """Normalised rewards of the answers of each row's dialogue; 1 where it has fewer than R = MAX_TURNS."""
    sigmas = np.ones((len(rows), 1, MAX_TURNS), np.float32)
    for row, (dialogue,) in enumerate(rows):
        sigmas[row, 0, : len(dialogue["turns"])] = dialogue_sigma(dialogue)
    return sigmas


@dataclasses.dataclass(frozen=True)
class UnlikelihoodLoss:
    """The part of the options that decides the program."""

    alpha: float = 10.0
    """Weight of log(1 - p); 0 leaves reward-weighted likelihood."""
    reduction: Literal["dialogue", "token", "turn_mean", "sum"] = "dialogue"
    """What is averaged, see `reflective_unlikelihood`."""
    level: Literal["token", "seq", "seq_geo"] = "token"
    """A term a token, or one an answer."""


@functools.partial(jax.jit, static_argnames=("update", "options", "spared"), donate_argnames="state")
def unlikelihood_step(
    state: TrainState,
    prompts: Prompts,
    completions: Completions,
    sigma: Float[Array, "B G R"],
    *,
    update: Update,
    options: UnlikelihoodLoss,
    spared: tuple[int, ...] = (),
) -> tuple[TrainState, Metrics]:
    """One reflective-unlikelihood update on dialogues of up to R answers (sheet reper.md 4.2).

    Args:
        sigma: normalised reward of each answer, 0..1; anything where a dialogue has fewer.
        spared: tokens that are never pushed down (the end of turn, gap G4).

    Metrics besides those of SFT: `probability/answer_1` .., the mean probability of the tokens of each answer.
    """

    def sums(logps, completions, sigma):
        turns = answer_turns(completions.weights)
        mask = exempt_tokens(completions.tokens, *spared) if spared else None
        chosen = {"alpha": options.alpha, "reduction": options.reduction, "level": options.level}
        return reflective_unlikelihood_sums(logps, turns, sigma, ul_mask=mask, **chosen)

    _, total = sums(jnp.zeros_like(completions.weights), completions, sigma)
    answers = sigma.shape[-1]

    def numerator(logps, micro):
        turns = answer_turns(micro[1].weights)
        tokens = jnp.stack([jnp.sum(turns == k) for k in range(1, answers + 1)]).astype(jnp.float32)
        mean = turn_probabilities(jax.lax.stop_gradient(logps), turns, answers)
        return sums(logps, *micro[1:])[0], {"probability": mean * tokens, "tokens": tokens}

    state, metrics = update_on_answers(state, (prompts, completions, sigma), update, jnp.maximum(total, 1), numerator)
    means = metrics.pop("probability") / jnp.maximum(metrics.pop("tokens"), 1)
    return state, metrics | {f"probability/answer_{k + 1}": means[k] for k in range(answers)}


class UnlikelihoodWork(given.AnswerWork):
    def __init__(self, method: "Unlikelihood", context: Context):
        super().__init__(context, given.answer_batches(context), questions=1)
        self.options = method.loss
        self.spared = () if method.penalise_end else context.model.stop_ids

    def update(self, state: TrainState, prompts: Prompts, completions: Completions, batch: Batch) -> tuple[Any, dict]:
        sigmas = shard_batch(answer_sigmas(batch.records), self.context.mesh)
        return unlikelihood_step(
            state, prompts, completions, sigmas, update=self.context.update, options=self.options, spared=self.spared
        )


@dataclasses.dataclass(frozen=True)
class Unlikelihood(Method, UnlikelihoodLoss):
    """Reflective unlikelihood of dialogues (RePer)."""

    figures = given.HELD_OUT

    penalise_end: bool = False  # push down the end-of-turn token of bad answers too, as published: they then run on

    @property
    def loss(self) -> UnlikelihoodLoss:
        return UnlikelihoodLoss(self.alpha, self.reduction, self.level)

    def problems(self, facts: Facts) -> list[str]:
        found = given.sources_problems(facts, "reflection", self.name)
        if not 0 <= self.alpha < float("inf"):
            found.append(f"method.alpha = {self.alpha}: must be a finite number of at least 0")
        return found

    def work(self, context: Context) -> UnlikelihoodWork:
        return UnlikelihoodWork(self, context)

    def programs(self, sizes: Sizes, state: TrainState, layout: Layout) -> Generator[Program, Any, None]:
        prompts, completions = given.arguments(sizes, layout)
        batch = (prompts, completions, given.per_row(sizes, layout, MAX_TURNS))
        options: dict[str, Any] = dict(update=layout.update, options=self.loss)
        yield Program(
            "update",
            lambda: unlikelihood_step.lower(state, *batch, **options),
            Traced(lambda state, *x: unlikelihood_step(state, *x, **options), (state, *batch)),
            trained_products(given.forward(state, layout, prompts, completions), layout.lora),
        )
