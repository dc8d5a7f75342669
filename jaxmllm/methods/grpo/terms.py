"""The pieces of a GRPO-family loss before it is averaged: ratio levels, KL estimators, per-token losses, aggregation.

One function per idea; `policy.grpo_loss` composes them. A "row" array is `[B, 1]` (one value a completion), a "token"
array `[B, T]`; everything broadcasts between the two. Source: grpo.md sections 3 to 6 (notation: `lp` the policy being
trained, `old` the policy at the start of the update round, `m` the mask, `A` the advantage).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from jaxmllm.methods.masked import (
    masked_count,
    masked_max,
    masked_mean,
    masked_min,
    masked_sum,
    mean_over,
    safe_exp,
    zero_masked,
)

Metrics = dict[str, Float[Array, ""]]
Mask = Shaped[Array, "B T"]
RowsOrTokens = Float[Array, "B _"]  # [B, 1] or [B, T]

VESPO_LOG_MIN = math.log(1e-8)
VESPO_LOG_MAX = 20.0
DUAL_CLIP_LOG_LIMIT = 20.0


# --- importance ratio: log w of each level -------------------------------------------------------------------------


def token_log_ratio(logps: Float[Array, "B T"], log_ratio: Float[Array, "B T"], mask: Mask) -> Float[Array, "B T"]:
    """`lp - old` of each token."""
    return log_ratio


def sequence_log_ratio(logps: Float[Array, "B T"], log_ratio: Float[Array, "B T"], mask: Mask) -> Float[Array, "B 1"]:
    """GSPO: the mean of `lp - old` over the counted tokens of a row (arXiv 2507.18071)."""
    return masked_mean(log_ratio, mask, axis=1, keepdims=True)


def sequence_token_log_ratio(
    logps: Float[Array, "B T"], log_ratio: Float[Array, "B T"], mask: Mask
) -> Float[Array, "B T"]:
    """GSPO-token: the value of the sequence ratio, the gradient of each token's own log-probability."""
    stop = jax.lax.stop_gradient
    return stop(sequence_log_ratio(logps, log_ratio, mask)) + logps - stop(logps)


RATIO_LEVELS = {
    "token": token_log_ratio,
    "sequence": sequence_log_ratio,
    "sequence_token": sequence_token_log_ratio,
}


# --- KL to the reference -------------------------------------------------------------------------------------------


def _k3(x: Float[Array, "B T"], clip: bool) -> Float[Array, "B T"]:
    if not clip:
        return jnp.expm1(jnp.minimum(-x, 60.0)) + x  # expm1: exp(-x) - 1 + x cancels to noise for small x
    bounded = jnp.clip(x, -20, 20)
    return jnp.clip(jnp.expm1(-bounded) + bounded, -10, 10)


KL_KINDS: dict[str, Callable[[Float[Array, "B T"], bool], Float[Array, "B T"]]] = {
    "k1": lambda x, clip: x,
    "k2": lambda x, clip: x**2 / 2,
    "k3": _k3,
    "abs": lambda x, clip: jnp.abs(x),
}
KL_ALIASES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}  # verl's and EasyR1's names


def kl_estimate(
    logps: Float[Array, "B T"], ref_logps: Float[Array, "B T"], mask: Mask, kind: str = "k3", clip: bool = False
) -> Float[Array, "B T"]:
    """Per-token estimate of KL(policy, reference) from `x = lp - ref`, 0 at masked positions.

    `k1` x; `k2` x^2 / 2; `k3` exp(-x) + x - 1; `abs` |x|; verl's names `kl`, `mse`, `low_var_kl` mean k1, k2, k3.
    A `+` after the name (`k3+`) keeps the value and takes the gradient of k2, the true one on-policy: as a loss, k1 has
    zero expected gradient and k3 a biased one. `clip` bounds k3 as verl does: its exponent to +-20, the result to +-10.

    Raises ValueError for an unknown kind.
    """
    base = kind.removesuffix("+")
    base = KL_ALIASES.get(base, base)
    if base not in KL_KINDS:
        raise ValueError(f"kl_loss_type={kind!r}: use one of {[*KL_KINDS, *KL_ALIASES]}, with or without a +")
    x = zero_masked(logps, mask) - zero_masked(jax.lax.stop_gradient(ref_logps), mask)
    value = KL_KINDS[base](x, clip)
    if not kind.endswith("+"):
        return value
    stop, k2 = jax.lax.stop_gradient, x**2 / 2
    return stop(value) + k2 - stop(k2)


# --- per-token policy losses ---------------------------------------------------------------------------------------


class Terms(NamedTuple):
    """What a per-token loss sees; token arrays (`weights` aside, which are 1 there) hold 0 where masked."""

    logps: Float[Array, "B T"]
    log_ratio: Float[Array, "B T"]  # lp - old
    ratio: RowsOrTokens  # at the chosen level
    advantages: RowsOrTokens
    mask: Float[Array, "B T"]
    keep: Float[Array, "B T"]  # mask times the entropy mask
    weights: RowsOrTokens | None  # rollout importance weights


class ClipRange(NamedTuple):
    """Bounds of a per-token loss: `epsilon`, `epsilon_high` (resolved), `delta`."""

    low: float
    high: float
    delta: float | None = None


def clipped_surrogate(terms: Terms, bounds: ClipRange) -> RowsOrTokens:
    """`-min(rho' A, clip(rho, 1 - low, 1 + high) A)`, `rho' = min(rho, delta)`, which bounds rows with `A < 0`."""
    rho = terms.ratio if bounds.delta is None else jnp.minimum(terms.ratio, bounds.delta)
    clipped = jnp.clip(terms.ratio, 1 - bounds.low, 1 + bounds.high)
    return -jnp.minimum(rho * terms.advantages, clipped * terms.advantages)


def cispo(terms: Terms, ceiling: float) -> Float[Array, "B T"]:
    """`-sg(min(rho, ceiling)) A lp`: no floor, and no token loses its gradient (arXiv 2506.13585)."""
    return -jax.lax.stop_gradient(jnp.minimum(terms.ratio, ceiling)) * terms.advantages * terms.logps


def sapo(terms: Terms, temperature_pos: float, temperature_neg: float) -> RowsOrTokens:
    """`-(4 / tau) sigmoid(tau (rho - 1)) A`, one tau for `A > 0`, one for the rest (arXiv 2511.20347)."""
    tau = jnp.where(terms.advantages > 0, temperature_pos, temperature_neg)
    return -4 / tau * jax.nn.sigmoid(tau * (terms.ratio - 1)) * terms.advantages


def vespo_phi(terms: Terms, k_pos: float, lambda_pos: float, k_neg: float, lambda_neg: float) -> RowsOrTokens:
    """VESPO's gamma weight `exp(lam + k log W - lam W)`, W the ratio of the whole row; no gradient (arXiv 2602.10693).

    Rollout weights enter as the sum of their clipped logarithms over all positions, as published: `Terms.weights`
    must be 1 where masked, which is what `grpo_loss` computes.
    """
    log_w = masked_sum(jnp.clip(terms.log_ratio, -VESPO_LOG_MAX, VESPO_LOG_MAX), terms.mask, axis=1, keepdims=True)
    if terms.weights is not None:
        log_weights = jnp.log(jnp.clip(terms.weights, math.exp(VESPO_LOG_MIN), math.exp(VESPO_LOG_MAX)))
        log_w += jnp.sum(log_weights, axis=1, keepdims=True)
    log_w = jnp.clip(log_w, VESPO_LOG_MIN, VESPO_LOG_MAX)
    gains = terms.advantages >= 0
    k, lam = jnp.where(gains, k_pos, k_neg), jnp.where(gains, lambda_pos, lambda_neg)
    return jax.lax.stop_gradient(jnp.exp(lam + k * log_w - lam * jnp.exp(log_w)))


def gmpo_coefficients(
    log_ratio: Float[Array, "B T"], advantages: RowsOrTokens, mask: Mask, bounds: ClipRange
) -> Float[Array, "B 1"]:
    """GMPO: the geometric mean of a row's token ratios, each clipped in log space against its advantage.

    `bounds` are distances in log space (0.4 published), `[exp(-low), exp(high)]` for the ratio (arXiv 2507.20673).
    """
    clipped = jnp.clip(log_ratio, -bounds.low, bounds.high)
    bounded = jnp.where(advantages > 0, jnp.minimum(log_ratio, clipped), jnp.maximum(log_ratio, clipped))
    return safe_exp(masked_mean(bounded, mask, axis=1, keepdims=True))


# --- metrics of the clip -------------------------------------------------------------------------------------------


def clip_fractions(
    below: Bool[Array, "B _"], above: Bool[Array, "B _"], advantages: RowsOrTokens, mask: Mask, per_row: bool
) -> Metrics:
    """`clip_ratio/...` of TRL from where the ratio is below or above its range.

    Only the side that the advantage pushes to counts: low with `A < 0`, high with `A > 0`. `low_min` and `high_max` are
    the extremes of the rows' fractions, rows without counted tokens ignored.
    """
    low, high = below & (advantages < 0), above & (advantages > 0)
    rows = masked_count(mask, axis=1) > 0
    return {
        "clip_ratio/low_mean": mean_over(low, mask, per_row),
        "clip_ratio/low_min": masked_min(masked_mean(low, mask, axis=1), rows),
        "clip_ratio/high_mean": mean_over(high, mask, per_row),
        "clip_ratio/high_max": masked_max(masked_mean(high, mask, axis=1), rows),
        "clip_ratio/region_mean": mean_over(low | high, mask, per_row),
    }


# --- verl's aggregation modes and its dual-clip loss ---------------------------------------------------------------


def _mean_of_rows(row_losses: Float[Array, "B"], mask: Mask, scale: float | None) -> Float[Array, ""]:
    return masked_mean(row_losses, masked_count(mask, axis=1) > 0)


def _token_mean(loss: Float[Array, "B T"], mask: Mask, scale: float | None) -> Float[Array, ""]:
    return masked_mean(loss, mask)


def _token_sum(loss: Float[Array, "B T"], mask: Mask, scale: float | None) -> Float[Array, ""]:
    return masked_sum(loss, mask)


def _seq_mean_token_sum(loss: Float[Array, "B T"], mask: Mask, scale: float | None) -> Float[Array, ""]:
    return _mean_of_rows(masked_sum(loss, mask, axis=1), mask, scale)


def _seq_mean_token_mean(loss: Float[Array, "B T"], mask: Mask, scale: float | None) -> Float[Array, ""]:
    return _mean_of_rows(masked_mean(loss, mask, axis=1), mask, scale)


def _seq_mean_token_sum_norm(loss: Float[Array, "B T"], mask: Mask, scale: float | None) -> Float[Array, ""]:
    return _seq_mean_token_sum(loss, mask, scale) / (mask.shape[1] if scale is None else scale)


AGGREGATION_MODES = {
    "token-mean": _token_mean,
    "token-sum": _token_sum,
    "seq-mean-token-sum": _seq_mean_token_sum,
    "seq-mean-token-mean": _seq_mean_token_mean,
    "seq-mean-token-sum-norm": _seq_mean_token_sum_norm,
}


def aggregate_loss(
    loss_mat: Float[Array, "B T"], mask: Mask, mode: str = "token-mean", loss_scale_factor: float | None = None
) -> Float[Array, ""]:
    """verl's `agg_loss`: a mean or sum of per-token losses; rows without counted tokens are left out of row means.

    `loss_scale_factor` divides `seq-mean-token-sum-norm` (default: the padded width T, so the result then depends on
    the padding). Raises ValueError for an unknown mode.
    """
    if mode not in AGGREGATION_MODES:
        raise ValueError(f"loss_agg_mode={mode!r}: use one of {list(AGGREGATION_MODES)}")
    return AGGREGATION_MODES[mode](loss_mat, mask, loss_scale_factor)


def dual_clip_policy_loss(
    logps: Float[Array, "B T"],
    old_logps: Float[Array, "B T"],
    advantages: Float[Array, "B ..."],
    mask: Mask,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
    loss_scale_factor: float | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """PPO's clipped loss with a second bound for negative advantages, and verl's metrics (arXiv 1912.09729).

    `max(-A rho, -A clip(rho))`, and for `A < 0` at most `-A c`: for `c > 1 + clip_ratio_high` the same loss as
    `clipped_surrogate` with `delta = c`. Metrics: `pg_clipfrac` share of tokens where the clipped branch is strictly
    larger, `pg_clipfrac_lower` share with `A < 0` held by `c`, `ppo_kl` mean of `old - lp`.

    Raises ValueError if `clip_ratio_c` is not above 1 or the mode is unknown.
    """
    if clip_ratio_c <= 1:
        raise ValueError(f"clip_ratio_c={clip_ratio_c}: must be above 1, it bounds the ratio from above")
    log_ratio = zero_masked(logps, mask) - zero_masked(jax.lax.stop_gradient(old_logps), mask)
    log_ratio = jnp.clip(log_ratio, -DUAL_CLIP_LOG_LIMIT, DUAL_CLIP_LOG_LIMIT)
    ratio, adv = jnp.exp(log_ratio), clean_advantages(advantages, mask)
    plain, clipped, held = (
        -adv * ratio,
        -adv * jnp.clip(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high),
        -adv * clip_ratio_c,
    )
    worse = jnp.maximum(plain, clipped)
    loss = jnp.where(adv < 0, jnp.minimum(worse, held), worse)
    metrics = {
        "pg_clipfrac": masked_mean(clipped > plain, mask),
        "pg_clipfrac_lower": masked_mean((worse > held) & (adv < 0), mask),
        "ppo_kl": masked_mean(-log_ratio, mask),
    }
    return aggregate_loss(loss, mask, loss_agg_mode, loss_scale_factor), jax.lax.stop_gradient(metrics)


def clean_advantages(advantages: Float[Array, "B ..."], mask: Mask) -> RowsOrTokens:
    """Advantages `[B]` as `[B, 1]`, `[B, T]` as they are: no gradient, 0 where no token counts."""
    per_row = advantages.ndim == 1
    counted = masked_count(mask, axis=1, keepdims=True) if per_row else mask
    return zero_masked(jax.lax.stop_gradient(advantages[:, None] if per_row else advantages), counted)
