"""From rewards to advantages: the group is its own baseline.

Rows are completions; the `num_generations` rows of one group are adjacent. Rewards are a table `[B, K]` with one column
per reward function, NaN (None on the host, see `reward_table`) where a function does not apply to a row. A row with
NaN in every column is unscorable: it takes no part in any mean or deviation and its advantage is 0. Deviations are
sample deviations (divided by count - 1). Source: grpo.md sections 2 and 8; TRL `GRPOTrainer`, verl `core_algos`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmllm.methods.grpo.options import GRPOOptions
from jaxmllm.methods.masked import masked_count, masked_max, masked_mean, masked_min, masked_std, zero_masked

EPS = 1e-4  # added to every deviation that divides, as TRL, ms-swift and VLM-R1 do (verl and EasyR1: 1e-6)
ZERO_STD = 1e-8  # a deviation up to this is logged as "no spread"

Metrics = dict[str, Float[Array, ""]]


def reward_table(rows: Sequence[Sequence[float | None]] | Sequence[float | None]) -> np.ndarray:
    """Host rewards as a float array `[B, K]` (`[B, 1]` for one value a row), None as NaN.

    Raises ValueError if rows differ in length.
    """
    table = np.asarray(rows, dtype=float)
    return table[:, None] if table.ndim == 1 else table


def weighted_rewards(
    rewards_per_func: Float[Array, "B K"], reward_weights: Sequence[float] | None = None
) -> Float[Array, "B"]:
    """`sum_k w_k R[b, k]` over the entries that apply; NaN for an unscorable row. An infinite reward does not apply.

    Raises ValueError if `reward_weights` has not one weight per column.
    """
    scored = jnp.isfinite(rewards_per_func)
    total = jnp.sum(zero_masked(rewards_per_func, scored) * _weights(reward_weights, rewards_per_func.shape[1]), axis=1)
    return jnp.where(scored.any(axis=1), total, jnp.nan)


def group_advantages(
    rewards_per_func: Float[Array, "B K"],
    num_generations: int,
    reward_weights: Sequence[float] | None = None,
    scale_rewards: str | bool = "group",
    multi_objective_aggregation: str = "sum_then_normalize",
) -> tuple[Float[Array, "B"], Metrics]:
    """GRPO advantages and the metrics `reward`, `reward_std`, `frac_reward_zero_std`.

    `scale_rewards`: `group` (or True) divides by the deviation of the group, `batch` by that of all scorable rows,
    `none` (or False) does not divide (Dr. GRPO). `multi_objective_aggregation="normalize_then_sum"` is GDPO: each
    column is standardised in its group, the weighted sum over the batch; `scale_rewards` has no effect there.
    `reward` and `reward_std` are NaN where they do not exist (no scorable row, fewer than two).

    Raises ValueError, naming the field, for a group below 2, a batch that does not divide into groups, weights of the
    wrong length, or an unknown name.
    """
    _check_groups(rewards_per_func.shape[0], num_generations)
    rewards = weighted_rewards(rewards_per_func, reward_weights)
    if multi_objective_aggregation == "sum_then_normalize":
        advantages, spread = _sum_then_normalize(rewards, num_generations, scale_rewards)
    elif multi_objective_aggregation == "normalize_then_sum":
        advantages, spread = _normalize_then_sum(rewards_per_func, num_generations, reward_weights)
    else:
        raise ValueError(
            f"multi_objective_aggregation={multi_objective_aggregation!r}: use sum_then_normalize or normalize_then_sum"
        )
    metrics = {
        "reward": jnp.where(jnp.isfinite(rewards).any(), masked_mean(rewards, jnp.isfinite(rewards)), jnp.nan),
        "reward_std": _std(rewards, axis=None),
        "frac_reward_zero_std": jnp.mean((spread <= ZERO_STD).astype(rewards.dtype)),  # NaN <= x is False
    }
    return advantages, metrics


def rloo_advantages(rewards: Float[Array, "B"], num_generations: int) -> Float[Array, "B"]:
    """Leave-one-out: `r_i - mean_{j != i} r_j` over the scored members; 0 for an unscored or the only scored member."""
    grouped, scored = _grouped(rewards, num_generations)
    count = masked_count(scored, axis=1, keepdims=True)
    # r_i - (S - r_i) / (n - 1) = (r_i - S / n) * n / (n - 1), which is exactly 0 where all members are equal.
    advantages = _centred(grouped, axis=1) * count / jnp.maximum(count - 1, 1)
    return advantages.reshape(-1)


def reinforce_baseline_advantages(rewards: Float[Array, "B"], num_generations: int) -> Float[Array, "B"]:
    """REINFORCE++ with baseline: the group mean taken off, then whitened over all scorable rows of the batch."""
    grouped, scored = _grouped(rewards, num_generations)
    centred = jnp.where(scored, _centred(grouped, axis=1), jnp.nan)
    return _standardised(centred, axis=None).reshape(-1)


def pass_at_k_advantages(rewards: Float[Array, "B"], num_generations: int) -> Float[Array, "B"]:
    """Only the best member of a group gets `(max - second max) / (std + EPS)`, the others 0 (arXiv 2503.19595).

    0 for all where fewer than two members are scored or the best is not alone.
    """
    grouped, scored = _grouped(rewards, num_generations)
    best = jnp.argmax(jnp.where(scored, grouped, -jnp.inf), axis=1, keepdims=True)
    is_best = jnp.arange(num_generations) == best
    highest = masked_max(grouped, scored & is_best, axis=1, keepdims=True)
    others = scored & ~is_best
    second = jnp.where(others.any(axis=1, keepdims=True), masked_max(grouped, others, axis=1, keepdims=True), highest)
    scaled = (highest - second) / (masked_std(grouped, scored, axis=1, keepdims=True) + EPS)
    return jnp.where(is_best & scored, scaled, 0).reshape(-1)


ADVANTAGE_ESTIMATORS = {
    "rloo": rloo_advantages,
    "reinforce_plus_plus_baseline": reinforce_baseline_advantages,
    "grpo_passk": pass_at_k_advantages,
}


def estimate_advantages(
    rewards_per_func: Float[Array, "B K"], options: GRPOOptions
) -> tuple[Float[Array, "B"], Metrics]:
    """Advantages by `options.adv_estimator` (`grpo`, which includes GDPO, or a name of `ADVANTAGE_ESTIMATORS`).

    Metrics and errors as `group_advantages`; an estimator other than `grpo` acts on the weighted sum of the rewards.
    """
    estimator = options.adv_estimator
    if estimator != "grpo" and estimator not in ADVANTAGE_ESTIMATORS:
        raise ValueError(f"adv_estimator={estimator!r}: use grpo or one of {list(ADVANTAGE_ESTIMATORS)}")
    advantages, metrics = group_advantages(
        rewards_per_func,
        options.num_generations,
        options.reward_weights,
        options.scale_rewards,
        options.multi_objective_aggregation,
    )
    if estimator != "grpo":
        rewards = weighted_rewards(rewards_per_func, options.reward_weights)
        advantages = ADVANTAGE_ESTIMATORS[estimator](rewards, options.num_generations)
    return advantages, metrics


def dynamic_sampling_keep(rewards: Float[Array, "B"], num_generations: int, tol: float = 1e-6) -> Bool[Array, "groups"]:
    """DAPO's dynamic sampling: keep a group iff the sample deviation of its scored rewards exceeds `tol`.

    The tolerance is there because continuous rewards such as IoU are never exactly equal.
    """
    grouped, scored = _grouped(rewards, num_generations)
    return masked_std(grouped, scored, axis=1) > tol


def reward_metrics(rewards_per_func: Float[Array, "B K"], names: Sequence[str]) -> Metrics:
    """`rewards/<name>/mean` and `rewards/<name>/std` over the rows each function applies to; NaN where none exists.

    Raises ValueError if there is not one name per column.
    """
    if len(names) != rewards_per_func.shape[1]:
        raise ValueError(f"names: {len(names)} names for {rewards_per_func.shape[1]} reward functions")
    scored = jnp.isfinite(rewards_per_func)
    means = jnp.where(scored.any(axis=0), masked_mean(rewards_per_func, scored, axis=0), jnp.nan)
    stds = _std(rewards_per_func, axis=0)[0]
    return {
        f"rewards/{name}/{kind}": value
        for k, name in enumerate(names)
        for kind, value in (("mean", means[k]), ("std", stds[k]))
    }


def completion_metrics(lengths: Int[Array, "B"], terminated: Bool[Array, "B"]) -> Metrics:
    """`completions/...` of TRL: lengths in tokens, of all rows and of those ended by EOS (0 if there are none)."""
    everything = jnp.ones_like(terminated)
    metrics = {"completions/clipped_ratio": 1 - masked_mean(terminated, everything)}
    for suffix, rows in (("length", everything), ("terminated_length", terminated)):
        for kind, reduce in (("mean", masked_mean), ("min", masked_min), ("max", masked_max)):
            metrics[f"completions/{kind}_{suffix}"] = reduce(lengths, rows)
    return metrics


def soft_overlong_punishment(lengths: Sequence[int], max_completion_len: int, soft_punish_cache: int) -> list[float]:
    """DAPO's length reward: 0 up to `max_completion_len - soft_punish_cache` tokens, then falling to -1 at the maximum.

    Lengths in tokens; -1 beyond the maximum. With a cache of 0 the step from 0 to -1 is at the maximum.
    """
    free = max_completion_len - soft_punish_cache

    def punishment(length: int) -> float:
        if length <= free:
            return 0.0
        return (free - length) / soft_punish_cache if length <= max_completion_len else -1.0

    return [punishment(length) for length in lengths]


def repetition_penalty(
    completion_ids: Sequence[Sequence[int]], ngram_size: int = 3, max_penalty: float = -1.0
) -> list[float]:
    """`max_penalty * (1 - unique / total)` over the token n-grams of each completion; 0 if shorter than one n-gram.

    Raises ValueError if `ngram_size` is below 1 or `max_penalty` above 0.
    """
    if ngram_size < 1 or max_penalty > 0:
        raise ValueError(f"ngram_size={ngram_size} must be at least 1 and max_penalty={max_penalty} not positive")

    def penalty(ids: Sequence[int]) -> float:
        ngrams = list(zip(*(ids[i:] for i in range(ngram_size)), strict=False))
        repeated = len(ngrams) - len(set(ngrams))
        return max_penalty * repeated / len(ngrams) if repeated else 0.0

    return [penalty(ids) for ids in completion_ids]


def _weights(reward_weights: Sequence[float] | None, columns: int) -> Float[Array, "K"]:
    weights = [1.0] * columns if reward_weights is None else reward_weights
    if len(weights) != columns:
        raise ValueError(f"reward_weights: {len(weights)} weights for {columns} reward functions")
    return jnp.asarray(weights, float)


def _check_groups(rows: int, num_generations: int) -> None:
    if num_generations < 2:
        raise ValueError(f"num_generations={num_generations}: a group needs at least 2 completions to compare")
    if rows % num_generations:
        raise ValueError(f"num_generations={num_generations} does not divide the batch of {rows} completions")


def _grouped(
    rewards: Float[Array, "B"], num_generations: int
) -> tuple[Float[Array, "groups G"], Bool[Array, "groups G"]]:
    """Rewards by group, and which of them exist."""
    _check_groups(rewards.shape[0], num_generations)
    grouped = rewards.reshape(-1, num_generations)
    return grouped, jnp.isfinite(grouped)


def _centred(values: Float[Array, "..."], axis: int | None) -> Float[Array, "..."]:
    """Difference to the mean along `axis`, exactly 0 where all finite entries are equal; 0 where not finite."""
    scored = jnp.isfinite(values)
    # Relative to the largest entry: the float mean of equal numbers may miss them by an ulp, and dividing by
    # a deviation of about 0 would make an advantage out of that.
    shifted = zero_masked(values - masked_max(values, scored, axis, keepdims=True), scored)
    return zero_masked(shifted - masked_mean(shifted, scored, axis, keepdims=True), scored)


def _std(values: Float[Array, "..."], axis: int | None) -> Float[Array, "..."]:
    """Sample deviation of the finite entries, NaN where fewer than two exist; keeps `axis`, scalar without one."""
    scored = jnp.isfinite(values)
    std = masked_std(values, scored, axis, keepdims=axis is not None)
    return jnp.where(masked_count(scored, axis, keepdims=axis is not None) > 1, std, jnp.nan)


def _standardised(values: Float[Array, "..."], axis: int | None) -> Float[Array, "..."]:
    """`(x - mean) / (std + EPS)` along `axis`; 0 where x, or a deviation to divide by, does not exist."""
    return jnp.nan_to_num(_centred(values, axis) / (_std(values, axis) + EPS), nan=0.0)


def _sum_then_normalize(
    rewards: Float[Array, "B"], num_generations: int, scale_rewards: str | bool
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Advantages, and each row's deviation for the log (of its group for `none`; NaN where it does not exist)."""
    scale = {True: "group", False: "none"}[scale_rewards] if isinstance(scale_rewards, bool) else scale_rewards
    grouped, _ = _grouped(rewards, num_generations)
    centred = _centred(grouped, axis=1)
    spread = jnp.broadcast_to(_std(grouped, axis=None if scale == "batch" else 1), grouped.shape)
    if scale in ("group", "batch"):
        advantages = jnp.nan_to_num(centred / (spread + EPS), nan=0.0)
    elif scale == "none":
        advantages = centred
    else:
        raise ValueError(f"scale_rewards={scale_rewards!r}: use group, batch or none")
    return advantages.reshape(-1), spread.reshape(-1)


def _normalize_then_sum(
    rewards_per_func: Float[Array, "B K"], num_generations: int, reward_weights: Sequence[float] | None
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """GDPO advantages, and the deviation of the summed scores over the batch, once per row."""
    rows, columns = rewards_per_func.shape
    scores = _standardised(rewards_per_func.reshape(-1, num_generations, columns), axis=1).reshape(rows, columns)
    summed = jnp.sum(scores * _weights(reward_weights, columns), axis=1)
    summed = jnp.where(jnp.isfinite(rewards_per_func).any(axis=1), summed, jnp.nan)
    return _standardised(summed, axis=None), jnp.broadcast_to(_std(summed, axis=None), summed.shape)
