"""What changes between optimizer steps: adaptive coefficients and the reference model (grpo.md sections 5 and 8)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

Scalar = Float[Array, ""] | float


def adaptive_kl_coef(kl_coef: Scalar, current_kl: Scalar, target_kl: float, n_steps: int, horizon: int) -> Scalar:
    """verl's controller: the coefficient grows or shrinks by at most 20 % per `horizon` samples (arXiv 1909.08593).

    `n_steps` is the number of samples since the last call, KL in nats.
    """
    error = jnp.clip(jnp.asarray(current_kl) / target_kl - 1, -0.2, 0.2)
    return kl_coef * (1 + error * n_steps / horizon)


def adaptive_entropy_coef(
    entropy_coef: Scalar, entropy: Scalar, target: float, delta: float, lo: float, hi: float
) -> Scalar:
    """The entropy coefficient after a step: up by `delta` if `entropy <= target`, else down, within `[lo, hi]`.

    `entropy` is the mean over the tokens the policy learned from (`entropy_kept` of `grpo_loss`), in nats.
    """
    return jnp.clip(jnp.where(jnp.asarray(entropy) <= target, entropy_coef + delta, entropy_coef - delta), lo, hi)


def applied_entropy_coef(entropy_coef: Scalar, previous_entropy: Scalar, target: float) -> Scalar:
    """The coefficient to use in a step: 0 unless the previous step's entropy was at or below `target`.

    Start with `previous_entropy = inf`: no bonus in the first step.
    """
    return jnp.where(jnp.asarray(previous_entropy) <= target, entropy_coef, 0.0)


def sync_reference(policy: PyTree, ref: PyTree, alpha: float) -> PyTree:
    """TR-DPO: `alpha * policy + (1 - alpha) * ref` leaf by leaf, in the reference's dtypes (arXiv 2404.09656)."""
    return jax.tree.map(lambda p, r: jnp.asarray(alpha * p + (1 - alpha) * r, jnp.result_type(r)), policy, ref)
