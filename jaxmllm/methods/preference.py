"""Preference losses that RePer compares reflective unlikelihood with: DPO and the listwise LiPO-lambda.

Both work on implicit rewards s = beta log(pi / pi_ref) of G answers to one prompt. Sources: sheet reper.md 4.4 and 5.4;
DPO: arXiv 2305.18290, Eq. 7; LiPO: arXiv 2402.01878, lambda-loss with DCG weights.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxmllm.methods.masked import accumulator_dtype, masked_max, masked_mean, masked_min, masked_sum, zero_masked


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
