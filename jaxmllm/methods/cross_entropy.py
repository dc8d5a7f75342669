"""Token cross-entropy of supervised training: SFT, foresight pre-training (FPT) and instruction tuning (FIT).

Sources: sheet utr.md 3.4 (mean per sample), merlin.md 3.3 (mean over the unmasked targets). No auxiliary loss.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxmllm.methods.masked import masked_count, masked_mean, masked_sum


def cross_entropy_sums(
    logps: Float[Array, "*B T"], weights: Shaped[Array, "*B T"], loss_norm: str = "sample"
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Numerator and denominator of `cross_entropy`.

    Added up over microbatches or devices *before* the division, they give the loss of the whole batch.
    """
    if loss_norm == "sample":
        return jnp.sum(masked_mean(-logps, weights, axis=-1)), masked_count(jnp.any(weights != 0, axis=-1))
    if loss_norm == "token":
        return masked_sum(-logps, weights), masked_sum(weights, weights != 0)
    raise ValueError(f"unknown loss_norm {loss_norm!r}; use sample or token")


def cross_entropy(
    logps: Float[Array, "*B T"], weights: Shaped[Array, "*B T"], loss_norm: str = "sample"
) -> Float[Array, ""]:
    """Weighted mean of -log p over the answer tokens, nats; 0 if none is counted.

    Args:
        logps: log p of the target tokens. Values under a weight of 0 may be anything.
        weights: 0 on the prompt, vision tokens and padding, 1 (or a larger weight, >= 0) on answer tokens and the end.
        loss_norm: `sample` averages each sample's mean, so that long answers do not dominate (UTR's script, samples
            without a counted token left out); `token` is the mean over all counted tokens of the batch (Merlin).

    Raises:
        ValueError: unknown loss_norm.
    """
    numerator, denominator = cross_entropy_sums(logps, weights, loss_norm)
    return numerator / jnp.where(denominator > 0, denominator, 1)
