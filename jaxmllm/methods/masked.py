"""Masked reductions shared by every loss.

Three promises hold for all of them: sums run in at least float32 (float64 stays float64), a value under a zero of the
mask never reaches the result or the gradient even if it is NaN, infinite or huge, and an empty selection gives a
finite number instead of 0/0. A mask broadcasts against the values, as in numpy. Masks may be bool, int or float.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

Axis = int | tuple[int, ...] | None
EXPONENT_LIMIT = 60.0  # exp of it is 1e26: far beyond any meaning, and float32 still has room to square or sum it


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


def mean_over(x: Shaped[Array, "..."], mask: Shaped[Array, "B T"], per_row: bool) -> Float[Array, ""]:
    """Mean of `[B, 1]` over all rows if `per_row`, else of `[B, T]` over counted tokens (the shapes agree at T = 1)."""
    return jnp.mean(x.astype(accumulator_dtype(x))) if per_row else masked_mean(x, mask)


def masked_std(
    x: Shaped[Array, "..."],
    mask: Shaped[Array, "..."],
    axis: Axis = None,
    keepdims: bool = False,
    ddof: int = 1,
) -> Float[Array, "..."]:
    """Deviation of the counted entries, divided by `count - ddof` (1: the sample deviation); 0 where that is not > 0.

    Exactly 0 where all counted entries are equal (the mean of equal floats is not always that float, so entries are
    taken relative to one of them), and the gradient is then 0, not NaN.
    """
    keep = _selection(x, mask)
    origin = jax.lax.stop_gradient(masked_max(x, keep, axis, keepdims=True))
    shifted = zero_masked(x.astype(accumulator_dtype(x)) - origin, keep)
    centred = zero_masked(shifted - masked_mean(shifted, keep, axis, keepdims=True), keep)
    count = masked_count(keep, axis, keepdims=True)
    variance = jnp.sum(centred**2, axis=axis, keepdims=True) / jnp.maximum(count - ddof, 1)
    std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
    std = jnp.where(count > ddof, std, 0)
    return std if keepdims else jnp.squeeze(std, axis)


def masked_min(
    x: Shaped[Array, "..."],
    mask: Shaped[Array, "..."],
    axis: Axis = None,
    keepdims: bool = False,
    empty: float = 0.0,
) -> Float[Array, "..."]:
    """Smallest counted entry, `empty` where nothing is counted."""
    keep = _selection(x, mask)
    smallest = jnp.min(jnp.where(keep, x.astype(accumulator_dtype(x)), jnp.inf), axis=axis, keepdims=keepdims)
    return jnp.where(jnp.any(keep, axis=axis, keepdims=keepdims), smallest, empty)


def masked_max(
    x: Shaped[Array, "..."],
    mask: Shaped[Array, "..."],
    axis: Axis = None,
    keepdims: bool = False,
    empty: float = 0.0,
) -> Float[Array, "..."]:
    """Largest counted entry, `empty` where nothing is counted."""
    return -masked_min(-x.astype(accumulator_dtype(x)), mask, axis, keepdims, -empty)


def masked_quantile(x: Shaped[Array, "..."], mask: Shaped[Array, "..."], q: float) -> Float[Array, ""]:
    """Linearly interpolated `q` quantile (0 to 1) of all counted entries, as `numpy.quantile`; 0 if none is counted."""
    keep = _selection(x, mask)
    last = jnp.maximum(jnp.sum(keep) - 1, 0)
    ordered = jnp.sort(jnp.where(keep, x.astype(accumulator_dtype(x)), jnp.inf), axis=None)
    position = jnp.asarray(q, ordered.dtype) * last
    # `q * last` misses a whole number by a rounding error, which would put the quantile just above the entry it is.
    nearest = jnp.round(position)
    rounding = 4 * jnp.finfo(position.dtype).eps * jnp.maximum(position, 1)
    position = jnp.where(jnp.abs(position - nearest) <= rounding, nearest, position)
    low = jnp.floor(position).astype(last.dtype)
    below, above = ordered[low], ordered[jnp.minimum(low + 1, last)]
    return jnp.where(jnp.any(keep), below + (position - low) * (above - below), 0)


def safe_exp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`exp` that cannot overflow: arguments are capped at `EXPONENT_LIMIT`, with no gradient beyond it."""
    return jnp.exp(jnp.minimum(x, EXPONENT_LIMIT))


def _selection(x: Shaped[Array, "..."], mask: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Which entries of `x` count, as bool, in the shape of both broadcast together."""
    return jnp.broadcast_to(mask != 0, jnp.broadcast_shapes(jnp.shape(x), jnp.shape(mask)))
