"""The GRPO family as one function of arrays: `grpo_loss`, steered by `GRPOOptions`.

Rows are completions `[B, T]`, right padded, the rows of a group adjacent. Option and metric names are TRL's. The parts
are in `surrogates` (ratio, KL, per-token losses), `correction` (rollout weights, masks) and `advantages`; here they are
put together in the order of grpo.md section 5: off-policy mask, entropy mask, rollout weights, KL.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmllm.methods.grpo.correction import (
    WEIGHT_MODES,
    high_entropy_mask,
    importance_sampling_weights,
    off_policy_sequence_mask,
    rollout_diagnostics,
    sampling_metrics,
)
from jaxmllm.methods.grpo.options import PUBLISHED, GRPOOptions
from jaxmllm.methods.grpo.terms import (
    RATIO_LEVELS,
    Mask,
    Metrics,
    RowsOrTokens,
    Terms,
    cispo,
    clean_advantages,
    clip_fractions,
    clipped_surrogate,
    gmpo_coefficients,
    kl_estimate,
    sapo,
    vespo_phi,
)
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

__all__ = ["LOSS_TYPES", "PUBLISHED", "GRPOOptions", "grpo_loss", "pool_metrics"]

Scalar = Float[Array, ""]
Entry = TypeVar("Entry")


# --- per-token policy loss of each loss_type: (terms, options, per_row) -> loss, metrics ----------------------------


def _clipped(terms: Terms, options: GRPOOptions, per_row: bool) -> tuple[RowsOrTokens, Metrics]:
    bounds = options.clip_range
    rho = terms.ratio if bounds.delta is None else jnp.minimum(terms.ratio, bounds.delta)
    below, above = rho < 1 - bounds.low, rho > 1 + bounds.high
    metrics = clip_fractions(below, above, terms.advantages, terms.mask, per_row)
    if bounds.delta is not None:
        held = (terms.ratio > bounds.delta) & (terms.advantages < 0)
        metrics["pg_clipfrac_lower"] = mean_over(held, terms.mask, per_row)
    return clipped_surrogate(terms, bounds), metrics


def _cispo(terms: Terms, options: GRPOOptions, per_row: bool) -> tuple[RowsOrTokens, Metrics]:
    ceiling = options.clip_range.high
    held = (terms.ratio > ceiling) & (terms.advantages > 0)
    return cispo(terms, ceiling), {"cispo_clip_ratio": mean_over(held, terms.mask, per_row)}


def _sapo(terms: Terms, options: GRPOOptions, per_row: bool) -> tuple[RowsOrTokens, Metrics]:
    return sapo(terms, options.sapo_temperature_pos, options.sapo_temperature_neg), {}


def _vespo(terms: Terms, options: GRPOOptions, per_row: bool) -> tuple[RowsOrTokens, Metrics]:
    phi = vespo_phi(terms, options.vespo_k_pos, options.vespo_lambda_pos, options.vespo_k_neg, options.vespo_lambda_neg)
    # phi is a row's whatever the ratio level, unless advantages are per token
    phi_per_row = terms.advantages.shape[1] == 1
    metrics = {"vespo/phi_seq_mean": mean_over(phi, terms.mask, phi_per_row)}
    return -phi * terms.advantages * terms.logps, metrics


def _gmpo(terms: Terms, options: GRPOOptions, per_row: bool) -> tuple[RowsOrTokens, Metrics]:
    bounds = options.clip_range
    coefficients = gmpo_coefficients(terms.log_ratio, terms.advantages, terms.keep, bounds)
    below, above = terms.log_ratio < -bounds.low, terms.log_ratio > bounds.high
    metrics = clip_fractions(below, above, terms.advantages, terms.mask, per_row=False)
    return -terms.advantages * coefficients, metrics


# --- normalisers: (per-token loss, mask, scope) -> loss of this micro-batch, to be summed over micro-batches --------


class Scope(NamedTuple):
    """What a normaliser needs to know beyond its micro-batch."""

    max_completion_length: int | None
    num_items_in_batch: Scalar | float  # N, counted tokens of the whole optimizer step
    num_processes: int  # P, whose gradients are averaged afterwards
    accumulation_steps: int  # K, micro-batches in the optimizer step


def _mean_of_row_means(loss: RowsOrTokens, mask: Mask, scope: Scope) -> Scalar:
    return jnp.mean(masked_mean(loss, mask, axis=1)) / scope.accumulation_steps


def _mean_of_row_sums(loss: RowsOrTokens, mask: Mask, scope: Scope) -> Scalar:
    return jnp.mean(masked_sum(loss, mask, axis=1)) / scope.accumulation_steps


def _local_token_mean(loss: RowsOrTokens, mask: Mask, scope: Scope) -> Scalar:
    return masked_mean(loss, mask) / scope.accumulation_steps


def _constant_length(loss: RowsOrTokens, mask: Mask, scope: Scope) -> Scalar:
    if not scope.max_completion_length:
        raise ValueError("max_completion_length: dr_grpo divides by it, give a length in tokens")
    return masked_sum(loss, mask) / (mask.shape[0] * scope.max_completion_length * scope.accumulation_steps)


def _global_token_mean(loss: RowsOrTokens, mask: Mask, scope: Scope) -> Scalar:
    return masked_sum(loss, mask) / (jnp.maximum(scope.num_items_in_batch, 1) / scope.num_processes)


class LossType(NamedTuple):
    """A row of the table of losses."""

    policy: Callable[[Terms, GRPOOptions, bool], tuple[RowsOrTokens, Metrics]]
    normalise: Callable[[RowsOrTokens, Mask, Scope], Scalar]
    takes_weights: bool = False  # rollout weights act inside the policy loss, not as a factor on it
    takes_entropy_mask: bool = False  # likewise the entropy mask


LOSS_TYPES = {
    "grpo": LossType(_clipped, _mean_of_row_means),
    "bnpo": LossType(_clipped, _local_token_mean),
    "dr_grpo": LossType(_clipped, _constant_length),
    "dapo": LossType(_clipped, _global_token_mean),
    "luspo": LossType(_clipped, _mean_of_row_sums),
    "cispo": LossType(_cispo, _global_token_mean),
    "sapo": LossType(_sapo, _mean_of_row_means),
    "vespo": LossType(_vespo, _global_token_mean, takes_weights=True),
    "gmpo": LossType(_gmpo, _mean_of_row_means, takes_entropy_mask=True),
}


# --- the loss ------------------------------------------------------------------------------------------------------


def grpo_loss(
    logps: Float[Array, "B T"],
    *,
    advantages: Float[Array, "B ..."],
    mask: Mask,
    options: GRPOOptions,
    old_logps: Float[Array, "B T"] | None = None,
    ref_logps: Float[Array, "B T"] | None = None,
    sampling_logps: Float[Array, "B T"] | None = None,
    entropies: Float[Array, "B T"] | None = None,
    tool_mask: Mask | None = None,
    rollout_is_weights: Float[Array, "B ..."] | None = None,
    num_items_in_batch: Scalar | float | None = None,
    num_processes: int = 1,
    accumulation_steps: int = 1,
    beta: Scalar | None = None,
    entropy_coef: Scalar | None = None,
    entropy_threshold: Scalar | None = None,
) -> tuple[Scalar, Metrics]:
    """Loss of one micro-batch, scaled so that micro-batches of an optimizer step are **summed**, and its metrics.

    Args:
      logps: log-probabilities (nats, at the sampling temperature) of the sampled tokens; the only argument, with
        `entropies`, that gradient flows through.
      advantages: one per row `[B]` or per token `[B, T]`.
      mask: 1 where a token was written by the model and counts (up to and including the first EOS).
      options: what to compute; static.
      old_logps: the same under the policy at the start of the update round; absent: on-policy, ratio exactly 1.
      ref_logps: the same under the reference model; needed if there is a KL term.
      sampling_logps: the same as reported by the engine that drew the text; gives rollout weights and diagnostics.
      entropies: nats per position, for the metric, the entropy mask and the bonus.
      tool_mask: 0 on text inserted by a tool or environment; multiplies `mask`.
      rollout_is_weights: `[B]`, `[B, 1]` or `[B, T]`, instead of those computed from `sampling_logps`; for `vespo`, which sums
        their logarithms over all positions, they must be 1 where masked.
      num_items_in_batch: N, counted tokens of the rows of the whole optimizer step (all micro-batches and processes),
        for the token-mean losses; default: this micro-batch.
      num_processes: P, if gradients are averaged over processes afterwards; 1 under one jitted global program.
      accumulation_steps: K, the number of equal micro-batches whose losses will be summed.
      beta: instead of `options.beta`, e.g. an adaptive coefficient.
      entropy_coef: instead of `options.entropy_coef`; needed with `use_adaptive_entropy`.
      entropy_threshold: from `correction.entropy_threshold` over the optimizer step; default: this micro-batch.

    Values at masked positions reach neither loss, gradient nor metrics. `grpo`, `dr_grpo`, `dapo` and their kind do not
    depend on how the batch is cut (equal cuts, N and the entropy threshold given); `bnpo` does by definition.

    Raises ValueError for unknown names, an argument that an option needs and `dr_grpo` without a length. It does not
    judge the numbers: call `options.validate()` once at start.
    """
    loss_type = _lookup(LOSS_TYPES, "loss_type", options.loss_type)
    use_kl = beta is not None or options.beta != 0
    use_entropy_mask = entropy_threshold is not None or options.top_entropy_quantile < 1
    use_bonus = entropy_coef is not None or options.use_adaptive_entropy or options.entropy_coef != 0
    stop = jax.lax.stop_gradient
    counted = (mask != 0) if tool_mask is None else (mask != 0) & (tool_mask != 0)
    lp = zero_masked(logps, counted)
    m = counted.astype(lp.dtype)
    old = stop(lp) if old_logps is None else stop(zero_masked(old_logps, counted))
    smp = None if sampling_logps is None else stop(zero_masked(sampling_logps, counted))
    adv = clean_advantages(advantages, counted)
    log_ratio = lp - old
    level = _lookup(RATIO_LEVELS, "importance_sampling_level", options.importance_sampling_level)
    ratio = safe_exp(level(lp, log_ratio, m))
    per_row = options.importance_sampling_level == "sequence" and advantages.ndim == 1

    keep = m
    if use_entropy_mask:
        seen = _required("entropies", entropies, "top_entropy_quantile is below 1")
        keep = high_entropy_mask(seen, counted, options.top_entropy_quantile, entropy_threshold)
    weights, metrics = _rollout_weights(old, smp, m, rollout_is_weights, options, loss_type.takes_weights)

    policy, policy_metrics = loss_type.policy(Terms(lp, log_ratio, ratio, adv, m, keep, weights), options, per_row)
    metrics |= policy_metrics
    if options.off_policy_mask_threshold is not None:
        behaviour = old if smp is None else smp
        policy *= off_policy_sequence_mask(adv, lp, behaviour, m, options.off_policy_mask_threshold)
    if use_entropy_mask and not loss_type.takes_entropy_mask:
        policy *= keep
    if weights is not None and not loss_type.takes_weights:
        policy *= weights
    if use_kl:
        ref = _required("ref_logps", ref_logps, "beta is not 0")
        kl = kl_estimate(lp, ref, m, options.kl_loss_type, options.kl_clip)
        kl = kl * ratio if options.use_bias_correction_kl else kl
        policy += (options.beta if beta is None else beta) * kl
        metrics["kl"] = masked_mean(kl, m)

    local_items = masked_count(m)
    items = local_items if num_items_in_batch is None else num_items_in_batch
    scope = Scope(options.max_completion_length, items, num_processes, accumulation_steps)
    loss = loss_type.normalise(policy, m, scope)
    metrics["policy_loss"] = loss
    if entropies is not None:
        metrics["entropy"] = masked_mean(entropies, m)
    if use_bonus:
        coef = options.entropy_coef if entropy_coef is None else entropy_coef
        if options.use_adaptive_entropy:
            coef = _required("entropy_coef", entropy_coef, "use_adaptive_entropy is set")
        kept = masked_mean(_required("entropies", entropies, "there is an entropy bonus"), keep)
        loss = loss - coef * kept * _micro_batch_share(loss_type, local_items, scope)
        metrics |= {"entropy_coef": jnp.asarray(coef, kept.dtype), "entropy_kept": kept}
    return loss, stop(metrics)


def pool_metrics(
    metrics: dict[str, Float[Array, "K"]],
    counted: Float[Array, "K"],
    options: GRPOOptions,
    token_advantages: bool = False,
    ran: Float[Array, "K"] | None = None,
) -> Metrics:
    """Metrics of K equal micro-batches, stacked, as those of the whole batch; `counted` holds their counted tokens.

    `policy_loss` is summed; minima and maxima are taken over micro-batches that count a token; means over rows are
    averaged; the rest, means over tokens, are weighted by `counted`. Approximate are `rollout_corr/ess`, which is no
    mean, and `entropy_kept` under an entropy mask. `token_advantages`: advantages were per token. `ran`: 0 for a
    micro-batch that was left out, whose `counted` is 0 too; default: all ran.
    """
    row_means = _row_means(options, token_advantages)

    def pool(name: str, values: Float[Array, "K"]) -> Scalar:
        if name == "policy_loss":
            return jnp.sum(values)
        if name.endswith(("_min", "/min")):
            return masked_min(values, counted)
        if name.endswith(("_max", "/max")):
            return masked_max(values, counted)
        return masked_mean(values, (jnp.ones_like(counted) if ran is None else ran) if name in row_means else counted)

    return {name: pool(name, values) for name, values in metrics.items()}


def _row_means(options: GRPOOptions, token_advantages: bool) -> set[str]:
    """Names of the metrics that are means over rows, not over counted tokens."""
    diagnostics = ("training_ppl", "rollout_ppl", "ppl_ratio", "log_ppl_abs_diff", "chi2_seq")
    names = {f"rollout_corr/{name}" for name in diagnostics}
    if not token_advantages:
        names.add("vespo/phi_seq_mean")
        if options.importance_sampling_level == "sequence" and options.loss_type != "gmpo":
            names |= {f"clip_ratio/{name}_mean" for name in ("low", "high", "region")}
            names |= {"cispo_clip_ratio", "pg_clipfrac_lower"}
    if WEIGHT_MODES[options.importance_sampling_mode][0]:
        names |= {f"sampling/{raw}importance_sampling_ratio/mean" for raw in ("", "raw_")}
    return names


def _rollout_weights(
    old: Float[Array, "B T"],
    smp: Float[Array, "B T"] | None,
    mask: Float[Array, "B T"],
    given: Float[Array, "B ..."] | None,
    options: GRPOOptions,
    keep_masked: bool,
) -> tuple[RowsOrTokens | None, Metrics]:
    """Rollout weights, None if there are none, and what is logged about the rollout engine."""
    weights, metrics = given, {}
    if smp is not None:
        if given is None and options.importance_sampling_correction:
            weights = importance_sampling_weights(
                old,
                smp,
                mask,
                options.importance_sampling_mode,
                options.importance_sampling_clip_min,
                options.importance_sampling_clip_max,
            )
            metrics = sampling_metrics(old, smp, mask, weights, WEIGHT_MODES[options.importance_sampling_mode][0])
        metrics |= {f"rollout_corr/{name}": value for name, value in rollout_diagnostics(old, smp, mask).items()}
    if weights is None:
        return None, metrics
    weights = jax.lax.stop_gradient(weights).astype(mask.dtype)
    weights = weights[:, None] if weights.ndim == 1 else weights
    if given is not None and keep_masked:
        return weights, metrics
    counted = mask if weights.shape == mask.shape else masked_count(mask, axis=1, keepdims=True)
    return jnp.where(counted > 0, weights, 1), metrics


def _micro_batch_share(loss_type: LossType, local_items: Scalar, scope: Scope) -> Scalar | float:
    """Share of the entropy bonus that falls to this micro-batch, so that the shares of an optimizer step sum to 1."""
    if loss_type.normalise is _global_token_mean:
        return local_items / (jnp.maximum(scope.num_items_in_batch, 1) / scope.num_processes)
    return 1 / scope.accumulation_steps


def _lookup(table: Mapping[str, Entry], field: str, name: str) -> Entry:
    if name not in table:
        raise ValueError(f"{field}={name!r}: use one of {list(table)}")
    return table[name]


def _required(name: str, value: Entry | None, why: str) -> Entry:
    if value is None:
        raise ValueError(f"{name} is needed: {why}")
    return value
