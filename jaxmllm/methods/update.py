"""Updates as pure functions `(state, batch) -> (state, metrics)`; the state is donated.

The loss of a whole update does not depend on how it is cut: microbatches are scanned, their losses summed, and every
normaliser is counted over the update first. Microbatch k takes every K-th prompt, so that each device keeps its rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from jaxmllm.config import ModelConfig
from jaxmllm.machine.mesh import row_parts
from jaxmllm.methods.cross_entropy import cross_entropy_sums
from jaxmllm.methods.grpo.correction import entropy_threshold
from jaxmllm.methods.grpo.loss import grpo_loss, pool_metrics
from jaxmllm.methods.grpo.options import GRPOOptions
from jaxmllm.methods.optim import join, kept_layout, split
from jaxmllm.methods.preference import dpo_loss, implicit_rewards, lipo_lambda_loss, widest_pair
from jaxmllm.methods.unlikelihood import answer_turns, exempt_tokens, reflective_unlikelihood_sums, turn_probabilities
from jaxmllm.model import qwen_vl
from jaxmllm.model.logprobs import Sampling, seen_tokens, token_logprobs
from jaxmllm.training.config import DPOConfig, UnlikelihoodConfig
from jaxmllm.types import Completions, Prompts, TrainState

Metrics = dict[str, Any]


class Rollout(struct.PyTreeNode):
    """Prompts with G completions each and all that the policy loss needs. `completions.weights` is the loss mask."""

    prompts: Prompts
    completions: Completions
    advantages: Float[Array, "B G"]
    vision_tokens: Float[Array, "B V D"] | None = None  # of a frozen tower
    old_logps: Float[Array, "B G T"] | None = None  # None: on-policy, the ratio is 1
    ref_logps: Float[Array, "B G T"] | None = None  # None: no KL term
    sampling_logps: Float[Array, "B G T"] | None = None
    short: int = struct.field(pytree_node=False, default=0)  # see `score`


def score(
    params: dict,
    cfg: ModelConfig,
    prompts: Prompts,
    completions: Completions,
    sampling: Sampling,
    vision_tokens: Float[Array, "B V D"] | None = None,
    short: int = 0,
) -> tuple[Float[Array, "B G T"], Float[Array, "B G T"]]:
    """Log-probabilities of the completions' tokens under `sampling`, and entropies.

    `short`: where not 0, the first half of every device's prompts have completions of at most so many tokens; what is
    beyond is not computed, and 0.
    """
    if short:
        parts = row_parts(prompts.tokens)
        front, back = _halves((prompts, completions, vision_tokens), parts)
        cut = jax.tree.map(lambda x: x[..., :short] if x.ndim == 3 else x, front[1])
        first = score(params, cfg, front[0], cut, sampling, front[2])
        pad = completions.tokens.shape[-1] - short
        padded = [jnp.pad(x, ((0, 0), (0, 0), (0, pad))) for x in first]
        second = score(params, cfg, back[0], back[1], sampling, back[2])
        logps, entropies = (_joined(a, b, parts) for a, b in zip(padded, second, strict=True))
        return logps, entropies
    _, hidden = qwen_vl.forward(params, cfg, prompts, completions, vision_tokens)
    assert hidden is not None
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = seen_tokens(prompts.tokens, prompts.lengths, cfg.text.vocab_size)
        seen = jnp.repeat(seen[:, None], completions.tokens.shape[1], axis=1)
    return token_logprobs(hidden, qwen_vl.head_kernel(params, cfg.dtype), completions.tokens, sampling, seen=seen)


def _halves(tree: Any, parts: int) -> tuple[Any, Any]:
    """The first half of the rows of each of `parts` blocks, and the rest."""
    blocks = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), tree)
    half = jax.tree.leaves(blocks)[0].shape[1] // 2

    def rows(which: slice) -> Any:
        return jax.tree.map(lambda x: x[:, which].reshape(-1, *x.shape[2:]), blocks)

    return rows(slice(half)), rows(slice(half, None))


def _joined(first: Array, rest: Array, parts: int) -> Array:
    """The inverse of `_halves`, of one array."""
    blocks = [x.reshape(parts, -1, *x.shape[1:]) for x in (first, rest)]
    return jnp.concatenate(blocks, axis=1).reshape(-1, *first.shape[1:])


score_jit = jax.jit(score, static_argnames=("cfg", "sampling", "short"))
encode_jit = jax.jit(qwen_vl.encode, static_argnames="cfg")


def microbatches(batch: Any, count: int) -> Any:
    """[B, ...] -> [count, B / count, ...]; microbatch k takes rows k, k + count, ..."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


@dataclasses.dataclass(frozen=True)
class Update:
    """What is static about an update; hashable, so that one program serves every step."""

    cfg: ModelConfig
    tx: optax.GradientTransformation
    trainable: str
    accumulation_steps: int = 1
    skip_idle: bool = False  # leave out microbatches whose advantages are all 0, where nothing else teaches


def apply_gradients(
    state: TrainState,
    update: Update,
    loss_fn: Callable[[dict, Any], tuple[Float[Array, ""], Metrics]],
    batch: Any,
    teaches: Callable[[Any], Bool[Array, ""]] | None = None,
) -> tuple[TrainState, Float[Array, ""], Metrics]:
    """One optimiser step on the sum of `loss_fn` over microbatches. A step whose gradient is not finite changes nothing.

    `teaches(microbatch)`: False where loss and gradient are known to be 0; it is then not computed, and its metrics are 0.
    Returns the new state, the loss and the metrics of every microbatch, stacked.
    """
    train, frozen = split(state.params, update.trainable)
    differentiate = jax.value_and_grad(lambda part, micro: loss_fn(join(part, frozen), micro), has_aux=True)

    def add(total, micro):
        (loss, metrics), grads = differentiate(train, micro)
        return jax.tree.map(jnp.add, total, (loss, grads)), metrics

    def add_if_it_teaches(total, micro):
        _, metrics = jax.eval_shape(add, total, micro)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)
        return jax.lax.cond(teaches(micro), lambda: add(total, micro), lambda: (total, nothing))

    if update.accumulation_steps == 1:
        (loss, metrics), grads = differentiate(train, batch)
        metrics = jax.tree.map(lambda x: x[None], metrics)
    else:
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, train))
        one = add_if_it_teaches if teaches else add
        (loss, grads), metrics = jax.lax.scan(one, zero, microbatches(batch, update.accumulation_steps))
    norm = optax.tree.norm(grads)
    updates, opt_state = update.tx.update(grads, state.opt_state, train)
    stepped = optax.apply_updates(train, updates)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)

    def keep(new, old):
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    train, opt_state = kept_layout(keep(stepped, train), keep(opt_state, state.opt_state))
    state = state.replace(step=state.step + 1, params=join(train, frozen), opt_state=opt_state)
    return state, loss, metrics | {"grad_norm": norm[None], "nonfinite": (~finite).astype(jnp.float32)[None]}


def _flat(x: Float[Array, "B G *T"] | None) -> Any:
    """[B * G, *T], or None."""
    return None if x is None else x.reshape(-1, *x.shape[2:])


@functools.partial(jax.jit, static_argnames=("update", "options", "sampling"), donate_argnames="state")
def grpo_step(
    state: TrainState,
    rollout: Rollout,
    entropy_coef: Float[Array, ""] | None = None,
    beta: Float[Array, ""] | None = None,
    *,
    update: Update,
    options: GRPOOptions,
    sampling: Sampling,
) -> tuple[TrainState, Metrics]:
    """One policy update on a rollout; metrics are TRL's, of the whole update.

    `entropy_coef`, `beta`: the coefficients where they are adaptive (verl's `kl_coef` is then logged).
    """
    count = update.accumulation_steps
    items = jnp.sum(rollout.completions.weights)
    threshold = None
    if options.top_entropy_quantile < 1 and count > 1:  # of the whole update, not of a microbatch
        _, entropies = score(
            state.params, update.cfg, rollout.prompts, rollout.completions, sampling, rollout.vision_tokens
        )
        mask = _flat(rollout.completions.weights)
        threshold = entropy_threshold(_flat(entropies), mask, options.top_entropy_quantile)

    def loss_fn(params, micro: Rollout):
        given = (micro.prompts, micro.completions, sampling, micro.vision_tokens, micro.short)
        logps, entropies = score(params, update.cfg, *given)
        mask = _flat(micro.completions.weights)
        loss, metrics = grpo_loss(
            _flat(logps),
            advantages=_flat(micro.advantages),
            mask=mask,
            options=options,
            old_logps=_flat(micro.old_logps),
            ref_logps=_flat(micro.ref_logps),
            sampling_logps=_flat(micro.sampling_logps),
            entropies=_flat(entropies),
            num_items_in_batch=items,
            accumulation_steps=count,
            beta=beta,
            entropy_coef=entropy_coef,
            entropy_threshold=threshold,
        )
        if micro.sampling_logps is not None:
            gap = jnp.where(mask > 0, jnp.abs(_flat(logps) - _flat(micro.sampling_logps)), 0)
            metrics["sampling/sampling_logp_difference/max"] = gap.max()
        return loss, metrics | {"counted": mask.sum(), "ran": jnp.ones(())}

    def teaches(micro: Rollout):
        return (micro.advantages != 0).any()

    state, loss, metrics = apply_gradients(state, update, loss_fn, rollout, teaches if update.skip_idle else None)
    once = {name: metrics.pop(name)[0] for name in ("grad_norm", "nonfinite")}
    counted, ran = metrics.pop("counted"), metrics.pop("ran")
    pooled = pool_metrics(metrics, counted, options, ran=ran)
    if beta is not None:
        once["kl_coef"] = beta
    return state, pooled | once | {"loss": loss}


def _supervised(
    state: TrainState,
    batch: tuple[Any, ...],
    update: Update,
    total: Float[Array, ""],
    numerator: Callable[[Float[Array, "B G T"], Any], tuple[Float[Array, ""], Metrics]],
) -> tuple[TrainState, Metrics]:
    """One update on given completions; `batch` begins with prompts and completions.

    `numerator(logps, microbatch)`: its part of what is divided by `total`, and metrics to add up.
    """

    def loss_fn(params, micro):
        logps, entropies = score(params, update.cfg, micro[0], micro[1], Sampling())
        counted = micro[1].weights > 0
        loss, metrics = numerator(logps, micro)
        return loss / total, metrics | {
            "entropy": jnp.where(counted, entropies, 0).sum(),
            "num_tokens": counted.sum().astype(jnp.float32),
        }

    state, loss, metrics = apply_gradients(state, update, loss_fn, batch)
    once = {name: metrics.pop(name)[0] for name in ("grad_norm", "nonfinite")}
    summed = jax.tree.map(lambda x: x.sum(0), metrics)
    entropy = summed.pop("entropy") / jnp.maximum(summed["num_tokens"], 1)
    return state, summed | once | {"loss": loss, "entropy": entropy}


@functools.partial(jax.jit, static_argnames=("update", "loss_norm"), donate_argnames="state")
def sft_step(
    state: TrainState, prompts: Prompts, completions: Completions, *, update: Update, loss_norm: str = "token"
) -> tuple[TrainState, Metrics]:
    """One supervised update: weighted cross-entropy of the completions (several questions an image share its prefix)."""
    _, total = cross_entropy_sums(jnp.zeros_like(completions.weights), completions.weights, loss_norm)

    def numerator(logps, micro):
        return cross_entropy_sums(logps, micro[1].weights, loss_norm)[0], {}

    return _supervised(state, (prompts, completions), update, jnp.maximum(total, 1), numerator)


@functools.partial(jax.jit, static_argnames=("update", "options", "spared"), donate_argnames="state")
def unlikelihood_step(
    state: TrainState,
    prompts: Prompts,
    completions: Completions,
    sigma: Float[Array, "B G R"],
    *,
    update: Update,
    options: UnlikelihoodConfig,
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

    state, metrics = _supervised(state, (prompts, completions, sigma), update, jnp.maximum(total, 1), numerator)
    means = metrics.pop("probability") / jnp.maximum(metrics.pop("tokens"), 1)
    return state, metrics | {f"probability/answer_{k + 1}": means[k] for k in range(answers)}


@functools.partial(jax.jit, static_argnames=("update", "options"), donate_argnames="state")
def dpo_step(
    state: TrainState,
    prompts: Prompts,
    completions: Completions,
    rewards: Float[Array, "B G"],
    ref_logps: Float[Array, "B G T"],
    *,
    update: Update,
    options: DPOConfig,
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
    return _supervised(state, batch, update, total, numerator)
