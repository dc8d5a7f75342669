"""Masked reductions against numpy on the selected entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.methods import masked

values = st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=6)
masks = st.lists(st.booleans(), min_size=6, max_size=6)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


@jax.jit
def everything(x, mask):
    reductions = {
        "sum": masked.masked_sum,
        "mean": masked.masked_mean,
        "std": masked.masked_std,
        "min": masked.masked_min,
        "max": masked.masked_max,
    }
    whole = {name: f(x, mask) for name, f in reductions.items()}
    whole["quantile"] = masked.masked_quantile(x, mask, 0.3)
    rows = {name: f(x.reshape(2, 3), mask.reshape(2, 3), axis=1) for name, f in reductions.items()}
    smooth = lambda x: masked.masked_std(x, mask) + masked.masked_mean(x, mask) + masked.masked_sum(x, mask)  # noqa: E731
    return whole, rows, jax.grad(smooth)(x)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(values, masks, st.floats())
def test_reductions_equal_numpy_and_never_see_masked_entries(x, mask, garbage):
    x, mask = np.array(x), np.array(mask)
    whole, rows, grad = everything(jnp.where(mask, x, garbage), jnp.asarray(mask))
    assert np.isfinite(grad).all() and (np.asarray(grad)[~mask] == 0).all()

    def check(got, x):
        want = {name: getattr(x, name)() if x.size else 0.0 for name in ("sum", "mean", "min", "max")}
        want["std"] = x.std(ddof=1) if x.size > 1 else 0.0
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-9, atol=1e-9, err_msg=name)

    check(whole, x[mask])
    np.testing.assert_allclose(whole["quantile"], np.quantile(x[mask], 0.3) if mask.any() else 0, rtol=1e-9, atol=1e-9)
    for b in range(2):
        check({name: value[b] for name, value in rows.items()}, x.reshape(2, 3)[b][mask.reshape(2, 3)[b]])


def test_masks_broadcast_weigh_and_widen():
    x = jnp.arange(6.0).reshape(2, 3)
    assert masked.masked_mean(x, jnp.array([[True], [False]])) == 1.0
    assert masked.masked_mean(x, jnp.array([1, 0, 1])) == 2.5
    assert masked.masked_mean(x[0], jnp.array([0.5, 0.0, 1.5])) == 1.5
    assert masked.masked_count(jnp.array([0.5, 0.0, 1.5])) == 2
    many = jnp.full(4096, 1.01, jnp.bfloat16)  # bfloat16 cannot count beyond 256
    total = masked.masked_sum(many, jnp.ones(4096, jnp.bfloat16))
    assert total.dtype == jnp.float32 and float(total) == pytest.approx(4096 * float(many[0]))


def test_safe_exp_is_finite_and_exact_in_range():
    x = jnp.array([-1e4, -1.0, 0.0, 59.0, 1e4], jnp.float32)
    assert jnp.isfinite(masked.safe_exp(x) ** 1.4).all()
    np.testing.assert_allclose(masked.safe_exp(x)[1:4], np.exp(x[1:4]), rtol=1e-6)
    assert jnp.isfinite(jax.grad(lambda x: masked.safe_exp(x).sum())(x)).all()
