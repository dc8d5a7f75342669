"""Masked reductions shared by every loss.

Three promises hold for all of them: sums run in at least float32 (float64 stays float64), a value under a zero of the
mask never reaches the result or the gradient even if it is NaN, infinite or huge, and an empty selection gives a
finite number instead of 0/0. A mask broadcasts against the values, as in numpy. Masks may be bool, int or float.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

Axis = int | tuple[int, ...] | None


def accumulator_dtype(*arrays: Array) -> jnp.dtype:
    """float32, or float64 if any of the arrays is float64."""
    return jnp.result_type(jnp.float32, *arrays)


def zero_masked(x: Shaped[Array, "..."], mask: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """`x` in the accumulator dtype, broadcast against `mask`, exactly 0 (also in gradient) where `mask` is 0.

    Call it on raw inputs before any `exp` or product: `0 * inf` is NaN, in the value or in the backward pass.
    """
    return jnp.where(mask != 0, x.astype(accumulator_dtype(x)), 0)


def masked_count(mask: Shaped[Array, "..."], axis: Axis = None, keepdims: bool = False) -> Float[Array, "..."]:
    """Number of counted entries (entries of `mask` that are not 0), as a float."""
    return jnp.sum((mask != 0).astype(accumulator_dtype()), axis=axis, keepdims=keepdims)


def masked_sum(
    x: Shaped[Array, "..."], mask: Shaped[Array, "..."], axis: Axis = None, keepdims: bool = False
) -> Float[Array, "..."]:
    """`sum(x * mask)`; a fractional mask acts as weights."""
    return jnp.sum(zero_masked(x, mask) * mask, axis=axis, keepdims=keepdims)


def masked_mean(
    x: Shaped[Array, "..."], mask: Shaped[Array, "..."], axis: Axis = None, keepdims: bool = False
) -> Float[Array, "..."]:
    """`sum(x * mask) / sum(mask)`, 0 where nothing is counted; a fractional mask acts as weights."""
    values = zero_masked(x, mask)
    total = jnp.sum(jnp.broadcast_to(mask, values.shape).astype(values.dtype), axis=axis, keepdims=keepdims)
    return jnp.sum(values * mask, axis=axis, keepdims=keepdims) / jnp.where(total > 0, total, 1)


def masked_std(
    x: Shaped[Array, "..."],
    mask: Shaped[Array, "..."],
    axis: Axis = None,
    keepdims: bool = False,
    ddof: int = 1,
) -> Float[Array, "..."]:
    """Deviation of the counted entries, divided by `count - ddof` (1: the sample deviation); 0 where that is not > 0.

    The gradient is 0, not NaN, where all counted entries are equal.
    """
    keep = (mask != 0) & jnp.ones(jnp.shape(x), bool)
    count = masked_count(keep, axis, keepdims=True)
    centred = zero_masked(x - masked_mean(x, keep, axis, keepdims=True), keep)
    variance = jnp.sum(centred**2, axis=axis, keepdims=True) / jnp.maximum(count - ddof, 1)
    std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
    std = jnp.where(count > ddof, std, 0)
    return std if keepdims else jnp.squeeze(std, axis)


def masked_min(
    x: Shaped[Array, "..."], mask: Shaped[Array, "..."], axis: Axis = None, empty: float = 0.0
) -> Float[Array, "..."]:
    """Smallest counted entry, `empty` where nothing is counted."""
    smallest = jnp.min(jnp.where(mask != 0, x.astype(accumulator_dtype(x)), jnp.inf), axis=axis)
    return jnp.where(jnp.any((mask != 0) & jnp.ones(jnp.shape(x), bool), axis=axis), smallest, empty)


def masked_max(
    x: Shaped[Array, "..."], mask: Shaped[Array, "..."], axis: Axis = None, empty: float = 0.0
) -> Float[Array, "..."]:
    """Largest counted entry, `empty` where nothing is counted."""
    return -masked_min(-x.astype(accumulator_dtype(x)), mask, axis, -empty)


def masked_quantile(x: Shaped[Array, "..."], mask: Shaped[Array, "..."], q: float) -> Float[Array, ""]:
    """Linearly interpolated `q` quantile (0 to 1) of all counted entries, as `numpy.quantile`; 0 if none is counted."""
    keep = (mask != 0) & jnp.ones(jnp.shape(x), bool)
    count = jnp.sum(keep)
    ordered = jnp.sort(jnp.where(keep, x.astype(accumulator_dtype(x)), jnp.inf), axis=None)
    position = jnp.asarray(q, ordered.dtype) * jnp.maximum(count - 1, 0)
    low = jnp.floor(position).astype(count.dtype)
    high = jnp.minimum(low + 1, jnp.maximum(count - 1, 0))
    below, above = ordered[low], ordered[high]
    value = below + (position - low) * (above - below)
    return jnp.where(count > 0, value, 0)
