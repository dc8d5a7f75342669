"""What changes between updates besides the weights: adaptive coefficients and a reference that follows the policy."""

from typing import Any

import jax.numpy as jnp

from jaxmllm.methods.grpo.options import GRPOOptions
from jaxmllm.methods.grpo.schedules import (
    adaptive_entropy_coef,
    adaptive_kl_coef,
    applied_entropy_coef,
    sync_reference,
)
from jaxmllm.methods.method import Own
from jaxmllm.methods.optim import split
from jaxmllm.types import TrainState


def first(options: GRPOOptions) -> Own:
    """The coefficients before the first update; float32 from the start, since another type would be another program."""
    return {
        "kl_coef": jnp.asarray(options.beta, jnp.float32),
        "entropy_coef": jnp.asarray(options.entropy_coef, jnp.float32),
        "entropy": jnp.asarray(jnp.inf, jnp.float32),  # of the update before, nats a token
    }


def coefficients(own: Own, options: GRPOOptions) -> tuple[Any, Any]:
    """(entropy_coef, beta) of the next update; None where the options' constants hold."""
    entropy = None
    if options.use_adaptive_entropy:
        entropy = applied_entropy_coef(own["entropy_coef"], own["entropy"], options.entropy_target)
    return entropy, own["kl_coef"] if options.kl_ctrl == "adaptive" else None


def moved(own: Own, options: GRPOOptions, metrics: dict[str, Any], completions: int) -> Own:
    """The coefficients after an update on so many completions."""
    own = dict(own)
    if options.kl_ctrl == "adaptive":
        own["kl_coef"] = adaptive_kl_coef(
            own["kl_coef"], metrics["kl"], options.target_kl, completions, options.horizon
        )
    if options.use_adaptive_entropy:
        own["entropy"] = metrics["entropy_kept"]
        bounds = (options.entropy_coef_delta, options.entropy_coef_min, options.entropy_coef_max)
        own["entropy_coef"] = adaptive_entropy_coef(
            own["entropy_coef"], own["entropy"], options.entropy_target, *bounds
        )
    return own


def synchronised(state: TrainState, options: GRPOOptions, trainable: str) -> TrainState:
    """The state with its reference moved towards the policy every `ref_model_sync_steps` updates."""
    if not options.sync_ref_model or state.reference is None or int(state.step) % options.ref_model_sync_steps:
        return state
    train, _ = split(state.params, trainable)
    return state.replace(reference=sync_reference(train, state.reference, options.ref_model_mixup_alpha))
