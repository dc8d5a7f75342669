"""One policy update as a pure function of state and rollout; the state is donated."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxmllm.methods.grpo.correction import entropy_threshold
from jaxmllm.methods.grpo.loss import grpo_loss, pool_metrics
from jaxmllm.methods.grpo.options import GRPOOptions
from jaxmllm.methods.update import Metrics, Update, apply_gradients
from jaxmllm.model.logprobs import Sampling
from jaxmllm.rollout.scorer import score_halves
from jaxmllm.types import Completions, Prompts, TrainState


class Rollout(struct.PyTreeNode):
    """Prompts with G completions each and all that the policy loss needs. `completions.weights` is the loss mask."""

    prompts: Prompts
    completions: Completions
    advantages: Float[Array, "B G"]
    vision_tokens: Float[Array, "B V D"] | None = None  # of a frozen tower
    old_logps: Float[Array, "B G T"] | None = None  # None: on-policy, the ratio is 1
    ref_logps: Float[Array, "B G T"] | None = None  # None: no KL term
    sampling_logps: Float[Array, "B G T"] | None = None
    short: int = struct.field(pytree_node=False, default=0)  # see `score_halves`


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
        _, entropies = score_halves(
            state.params, update.cfg, rollout.prompts, rollout.completions, sampling, rollout.vision_tokens
        )
        mask = _flat(rollout.completions.weights)
        threshold = entropy_threshold(_flat(entropies), mask, options.top_entropy_quantile)

    def loss_fn(params, micro: Rollout):
        given = (micro.prompts, micro.completions, sampling, micro.vision_tokens, micro.short)
        logps, entropies = score_halves(params, update.cfg, *given)
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
