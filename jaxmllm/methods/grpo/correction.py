"""Which tokens count and how much, when the text was drawn by an engine or policy other than the one being trained.

Notation of grpo.md: `old` log-probability under the policy at the start of the update round, `smp` the same as reported
by the engine that drew the text. Nothing here carries a gradient. Source: grpo.md sections 5, 7 and 8; TRL
`GRPOTrainer`, verl `rollout_corr_helper`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxmllm.methods.masked import (
    masked_count,
    masked_max,
    masked_mean,
    masked_min,
    masked_quantile,
    masked_sum,
    mean_over,
    safe_exp,
    zero_masked,
)

Metrics = dict[str, Float[Array, ""]]
Mask = Shaped[Array, "B T"]  # bool, int or float; a token counts where it is not 0

SEQUENCE_LOG_LIMIT = 20.0  # verl's bound on a summed log-ratio in diagnostics: exp(2 * 20) still fits float32


def truncate_weights(weights: Float[Array, "B ..."], low: float | None, high: float | None) -> Float[Array, "B ..."]:
    """Weights clipped to `[low, high]`."""
    return jnp.clip(weights, low, high)


def reject_weights(weights: Float[Array, "B ..."], low: float | None, high: float | None) -> Float[Array, "B ..."]:
    """Weights outside `[low, high]` become 0."""
    outside = jnp.zeros_like(weights, bool)
    outside |= False if low is None else weights < low
    outside |= False if high is None else weights > high
    return jnp.where(outside, 0, weights)


WEIGHT_MODES = {  # name: (one weight a row?, what the interval does)
    "token_truncate": (False, truncate_weights),
    "token_mask": (False, reject_weights),
    "sequence_truncate": (True, truncate_weights),
    "sequence_mask": (True, reject_weights),
}


def importance_sampling_weights(
    old_logps: Float[Array, "B T"],
    sampling_logps: Float[Array, "B T"],
    mask: Mask,
    mode: str = "sequence_mask",
    clip_min: float | None = None,
    clip_max: float | None = 3.0,
) -> Float[Array, "B ..."]:
    """Rollout importance weights `exp(old - smp)`: `[B, T]` in token modes, `[B, 1]` in sequence modes.

    A sequence weight is the product of its token weights (the sum of the log differences, not their mean).
    `*_truncate` clips to `[clip_min, clip_max]`, `*_mask` puts weights outside it to 0; None is no bound. A masked
    position has weight 1 before that rule.

    Raises ValueError for an unknown mode.
    """
    if mode not in WEIGHT_MODES:
        raise ValueError(f"importance_sampling_mode={mode!r}: use one of {list(WEIGHT_MODES)}")
    per_sequence, bound = WEIGHT_MODES[mode]
    log_weights = _gap(old_logps, sampling_logps, mask)
    if per_sequence:
        log_weights = jnp.sum(log_weights, axis=1, keepdims=True)
    return bound(safe_exp(log_weights), clip_min, clip_max)


def off_policy_sequence_mask(
    advantages: Float[Array, "B ..."],
    logps: Float[Array, "B T"],
    sampling_logps: Float[Array, "B T"],
    mask: Mask,
    threshold: float,
) -> Float[Array, "B ..."]:
    """1 to keep, 0 to drop: rows with a negative advantage that the policy has left by more than `threshold`.

    A row is kept iff `A >= 0` or `mean_t(smp - lp) <= threshold` (nats per counted token; arXiv 2512.02556).
    Same shape as `advantages`, `[B]` or per token `[B, T]`.
    """
    drift = masked_mean(_gap(sampling_logps, logps, mask), mask, axis=1)
    near = (drift <= threshold).reshape(-1, *(1,) * (advantages.ndim - 1))
    return ((advantages >= 0) | near).astype(drift.dtype)


def entropy_threshold(entropies: Float[Array, "B T"], mask: Mask, top_entropy_quantile: float) -> Float[Array, ""]:
    """Linearly interpolated `1 - top_entropy_quantile` quantile (nats) of the entropies of all counted tokens.

    Take it over the whole optimizer step, not a micro-batch, so that it does not depend on how the batch is cut.
    """
    return masked_quantile(jax.lax.stop_gradient(entropies), mask, 1 - top_entropy_quantile)


def high_entropy_mask(
    entropies: Float[Array, "B T"],
    mask: Mask,
    top_entropy_quantile: float,
    threshold: Float[Array, ""] | None = None,
) -> Float[Array, "B T"]:
    """1 on counted tokens with an entropy at or above `threshold` (default: `entropy_threshold` of these tokens).

    `top_entropy_quantile=0.2` keeps about the 20 % with the highest entropy, 0 the maximum only, 1 every counted token
    (arXiv 2506.01939).
    """
    entropies = zero_masked(jax.lax.stop_gradient(entropies), mask)
    if threshold is None:
        threshold = entropy_threshold(entropies, mask, top_entropy_quantile)
    return ((entropies >= threshold) & (mask != 0)).astype(entropies.dtype)


def truncated_rows(
    completion_ids: Int[Array, "B T"], completion_mask: Mask, end_ids: Sequence[int]
) -> Bool[Array, "B"]:
    """Rows whose last token is not one of `end_ids` (EOS and pad ids): the length limit cut them off.

    The mask is the completion mask, with the tokens of tools in. A row without tokens is not truncated.
    """
    positions = jnp.arange(completion_ids.shape[1])
    last = jnp.max(jnp.where(completion_mask != 0, positions, -1), axis=1, keepdims=True)
    last_ids = jnp.take_along_axis(completion_ids, jnp.maximum(last, 0), axis=1)
    return ((last >= 0) & ~jnp.isin(last_ids, jnp.asarray(end_ids)))[:, 0]


def mask_truncated(mask: Mask, truncated: Bool[Array, "B"]) -> Mask:
    """Overlong filtering: rows cut off by the length limit get mask 0 (they stay in the advantage statistics)."""
    return jnp.where(truncated[:, None], 0, mask)


def sampling_metrics(
    old_logps: Float[Array, "B T"],
    sampling_logps: Float[Array, "B T"],
    mask: Mask,
    weights: Float[Array, "B ..."],
    per_row: bool,
) -> Metrics:
    """TRL's `sampling/...`: the log-probability gap on counted tokens, the weights on those or, `per_row`, on rows.

    `sampling/raw_importance_sampling_ratio/...` is the ratio before the interval rule: bounded numbers hide the drift.
    """
    mode = "sequence_truncate" if per_row else "token_truncate"
    raw = importance_sampling_weights(old_logps, sampling_logps, mask, mode, None, None)
    counted = (masked_count(mask, axis=1, keepdims=True) > 0) if per_row else mask
    gap = jnp.abs(_gap(old_logps, sampling_logps, mask))
    metrics = {
        "sampling/sampling_logp_difference/mean": masked_mean(gap, mask),
        "sampling/sampling_logp_difference/max": masked_max(gap, mask),
    }
    for name, ratio in (("importance_sampling_ratio", weights), ("raw_importance_sampling_ratio", raw)):
        metrics[f"sampling/{name}/min"] = masked_min(ratio, counted)
        metrics[f"sampling/{name}/mean"] = mean_over(ratio, mask, per_row)
        metrics[f"sampling/{name}/max"] = masked_max(ratio, counted)
    return metrics


def rollout_diagnostics(old_logps: Float[Array, "B T"], sampling_logps: Float[Array, "B T"], mask: Mask) -> Metrics:
    """How far the engine that drew the text is from the trainer, with verl's names.

    `kl`, `k3_kl`, `chi2_token` are means over counted tokens; `training_ppl`, `rollout_ppl`, `ppl_ratio`,
    `log_ppl_abs_diff`, `chi2_seq` means over rows (a row without counted tokens has mean log-probability 0); `ess` is
    the effective share of the counted tokens, `(sum w)^2 / (N sum w^2)` with `w = exp(old - smp)`, 1 when all agree.
    """
    old, smp = (zero_masked(jax.lax.stop_gradient(x), mask) for x in (old_logps, sampling_logps))
    gap = old - smp
    ratio = safe_exp(jnp.minimum(gap, SEQUENCE_LOG_LIMIT))
    mean_old, mean_smp = masked_mean(old, mask, axis=1), masked_mean(smp, mask, axis=1)
    sequence_gap = jnp.clip(jnp.sum(gap, axis=1), -SEQUENCE_LOG_LIMIT, SEQUENCE_LOG_LIMIT)
    squares = masked_sum(ratio**2, mask)
    return {
        "kl": masked_mean(-gap, mask),
        "k3_kl": masked_mean(ratio - gap - 1, mask),
        "training_ppl": jnp.mean(safe_exp(-mean_old)),
        "rollout_ppl": jnp.mean(safe_exp(-mean_smp)),
        "ppl_ratio": jnp.mean(safe_exp(mean_smp - mean_old)),
        "log_ppl_abs_diff": jnp.mean(jnp.abs(mean_smp - mean_old)),
        "chi2_token": masked_mean(ratio**2 - 1, mask),
        "chi2_seq": jnp.mean(jnp.exp(2 * sequence_gap) - 1),
        "ess": masked_sum(ratio, mask) ** 2 / jnp.where(squares > 0, masked_count(mask) * squares, 1),
    }


def _gap(left: Float[Array, "B T"], right: Float[Array, "B T"], mask: Mask) -> Float[Array, "B T"]:
    """`left - right` without gradient, 0 where masked; each is widened first, as bfloat16 loses a small difference."""
    return jax.lax.stop_gradient(zero_masked(left, mask) - zero_masked(right, mask))
