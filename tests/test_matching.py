"""Matching losses against plain loops, under garbage in masked places, and their gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.methods.rcrn import loss
from jaxmllm.methods.rcrn.network import MAX_LOG_SCALE, decode_deltas

B, N = 5, 6


def batch(seed, garbage=np.nan):
    """A batch as `matching_losses` takes it, `garbage` wherever a mask says that nothing is there."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 50, (B, 2))
    gt = np.concatenate([low, low + rng.uniform(10, 60, (B, 2))], 1)
    match = rng.random(B) < 0.6
    valid = rng.random((B, N)) < 0.7
    valid[:, 0] = True
    gt_idx = np.where(rng.random(B) < 0.2, -1, 0)
    return {
        "b_root": np.where(valid, rng.random((B, N)), garbage),
        "valid": valid,
        "gt_idx": gt_idx,
        "scale": 4.0,
        "match_logit": rng.normal(size=B) * 3,
        "match": match,
        "proposal": gt + rng.normal(0, 5, (B, 4)),
        "gt_box": np.where(match[:, None], gt, garbage),
        "pred_delta": np.where(match[:, None], rng.normal(0, 0.2, (B, 4)), garbage),
    }


def as_jax(values, dtype=jnp.float32):
    return {k: jnp.asarray(v, dtype) if np.asarray(v).dtype.kind == "f" else jnp.asarray(v) for k, v in values.items()}


def expected(v):
    grd, reg, match = [], [], []
    for b in range(B):
        z, y = v["match_logit"][b], v["match"][b]
        match.append(-np.log(1 / (1 + np.exp(-z if y else z))))
        if not y:
            continue
        if v["gt_idx"][b] >= 0:
            e = np.exp(4.0 * v["b_root"][b][v["valid"][b]])
            grd.append(-np.log(np.exp(4.0 * v["b_root"][b, v["gt_idx"][b]]) / e.sum()))
        p, g = v["proposal"][b], v["gt_box"][b]
        iw, ih = (min(p[k + 2], g[k + 2]) - max(p[k], g[k]) + 1 for k in (0, 1))
        inter = max(iw, 0) * max(ih, 0)
        union = sum((q[2] - q[0] + 1) * (q[3] - q[1] + 1) for q in (p, g)) - inter
        if inter / union > 0.5:
            pw, ph, gw, gh = p[2] - p[0], p[3] - p[1], g[2] - g[0], g[3] - g[1]
            want = [
                (g[0] + g[2] - p[0] - p[2]) / 2 / pw,
                (g[1] + g[3] - p[1] - p[3]) / 2 / ph,
                np.log(gw / pw),
                np.log(gh / ph),
            ]
            reg.append(np.abs(v["pred_delta"][b] - want).sum())
    mean = [np.mean(x) if x else 0.0 for x in (grd, match, reg)]
    return dict(zip(("L_grd", "L_match", "L_reg", "total"), [*mean, mean[0] + 3 * mean[1] + mean[2]], strict=True))


losses = jax.jit(loss.matching_losses)  # everything is compiled: op by op, a busy machine takes minutes
match_loss = jax.jit(loss.match_loss, static_argnames="smoothing")
gold_candidate = jax.jit(loss.gold_candidate)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([np.nan, np.inf, -1e30, 0.0]))
def test_losses_equal_loops_whatever_stands_at_masked_places(seed, garbage):
    values = batch(seed, garbage)
    got = losses(**as_jax(values))
    for name, want in expected(values).items():
        np.testing.assert_allclose(got[name], want, rtol=2e-4, atol=1e-5, err_msg=name)


def test_gradients_equal_finite_differences_and_ignore_garbage():
    names = ("b_root", "match_logit", "pred_delta", "scale")
    with jax.enable_x64(True):
        values = as_jax(batch(3), jnp.float64)

        def total(*parts):
            return loss.matching_losses(**values | dict(zip(names, parts, strict=True)))["total"]

        parts = [values[name] for name in names]
        total, gradients = jax.jit(total), jax.jit(jax.grad(total, (0, 1, 2, 3)))(*parts)
        rng = np.random.default_rng(0)
        for i, (part, gradient) in enumerate(zip(parts, gradients, strict=True)):
            assert jnp.isfinite(gradient).all() and jnp.abs(gradient).max() > 0, names[i]
            assert not gradient[~jnp.isfinite(part)].any()
            way = np.where(np.isfinite(part), rng.normal(size=part.shape), 0)
            ends = [total(*parts[:i], part + sign * 1e-6 * way, *parts[i + 1 :]) for sign in (1, -1)]
            np.testing.assert_allclose((gradient * way).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-6, err_msg=names[i])


def test_bfloat16_agrees_with_float32():
    values = as_jax(batch(3, 0.0), jnp.bfloat16)
    half = losses(**values)
    full = losses(**{k: v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v for k, v in values.items()})
    for name in ("L_grd", "L_match"):  # boxes are never bfloat16: 8 bits do not hold a pixel
        assert half[name].dtype == jnp.float32
        np.testing.assert_allclose(half[name], full[name], rtol=1e-3, err_msg=name)


def test_padding_and_row_order_change_nothing():
    values = as_jax(batch(11, 0.0))
    want = losses(**values)
    order = np.array([3, 0, 4, 1, 2])
    shuffled = {k: v if k == "scale" else v[order] for k, v in values.items()}
    wider = values | {
        "b_root": jnp.pad(values["b_root"], ((0, 0), (0, 3)), constant_values=9.0),
        "valid": jnp.pad(values["valid"], ((0, 0), (0, 3))),
    }
    for other in (losses(**shuffled), losses(**wider)):
        for name in want:
            np.testing.assert_allclose(other[name], want[name], rtol=1e-5, err_msg=name)


def test_empty_batches_weights_and_smoothing():
    values = as_jax(batch(0)) | {"match": jnp.zeros(B, bool)}
    got = losses(**values)
    assert got["L_grd"] == got["L_reg"] == 0 and got["total"] == pytest.approx(3 * float(got["L_match"]))
    none = jax.jit(partial(loss.matching_losses, weights={"match": 0.0}))(**values)
    assert none["total"] == 0
    with pytest.raises(ValueError, match="mrr"):
        loss.matching_losses(**values, weights={"mrr": 1.0})
    z = jnp.array([3.0, -40.0, 1000.0])
    y = jnp.array([True, False, True])
    np.testing.assert_allclose(match_loss(z, y), np.mean([np.log1p(np.exp(-3)), np.exp(-40), 0]), rtol=1e-5)
    p = 1 / (1 + np.exp(-3.0))
    want = -(0.975 * np.log(p) + 0.025 * np.log(1 - p))
    np.testing.assert_allclose(match_loss(z[:1], y[:1], smoothing=0.05), want, rtol=1e-5)


def test_gold_candidate_needs_half_an_overlap():
    boxes = jnp.asarray([[[0, 0, 9, 9], [0, 0, 9, 19], [50, 50, 59, 59]]] * 3, jnp.float32)
    gt = jnp.asarray([[0, 0, 9, 9], [0, 0, 9, 29], [0, 0, 9, 49]], jnp.float32)
    valid = jnp.asarray([[True, True, True], [True, True, True], [True, True, True]])
    assert gold_candidate(boxes, valid, gt).tolist() == [0, 1, -1]
    assert gold_candidate(boxes, valid.at[1, 1].set(False), gt).tolist() == [0, -1, -1]


@jax.jit
def moved_onto(box, target):
    return decode_deltas(box, loss.encode_deltas(box, target))


@given(*[st.tuples(st.floats(0, 50), st.floats(0, 50), st.floats(5, 60), st.floats(5, 60))] * 2)
@settings(max_examples=50, deadline=None)
def test_coding_of_boxes_is_inverted_by_the_model(a, b):
    with jax.enable_x64(True):
        box, target = (jnp.asarray([x, y, x + w, y + h], jnp.float64) for x, y, w, h in (a, b))
        np.testing.assert_allclose(moved_onto(box, target), target, atol=1e-9)


def test_predicted_sizes_are_clamped():
    box = jnp.asarray([0.0, 0.0, 16.0, 16.0])
    np.testing.assert_allclose(decode_deltas(box, jnp.asarray([0.0, 0, 50, 50])), [-492, -492, 508, 508], rtol=1e-5)
    assert MAX_LOG_SCALE == pytest.approx(np.log(1000 / 16))


# ---- the token-level baseline


def test_token_baseline_equals_loops():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 6, 2))
    mask = np.array([[1, 1, 0, 0, 0, 0], [1] * 6, [0, 1, 1, 1, 0, 0], [0] * 6], bool)
    logits[~mask] = np.nan
    match = np.array([True, False, True, False])
    want = []
    for row, keep, y in zip(logits, mask, match, strict=True):
        if keep.any():
            top = row[keep].max(0)
            want.append(np.log(np.exp(top).sum()) - top[int(y)])
    args = jnp.asarray(logits), jnp.asarray(mask), jnp.asarray(match)
    value, gradient = jax.jit(jax.value_and_grad(loss.token_match_loss))(*args)
    np.testing.assert_allclose(value, np.mean(want), rtol=1e-5)
    assert np.isfinite(gradient).all() and not gradient[~args[1]].any()
    phrases = np.zeros((4, 3, 6), bool)
    phrases[0, 0, :2], phrases[1, 0, :3], phrases[1, 1, 3:], phrases[2, 1, 1:4] = True, True, True, True
    score, edge = jax.jit(loss.token_mismatch_phrase)(args[0], jnp.asarray(phrases))
    p = 1 / (1 + np.exp(logits[..., 1] - logits[..., 0]))
    np.testing.assert_allclose(score[1], [p[1, :3].max(), p[1, 3:].max(), -1], rtol=1e-5)
    assert edge.tolist() == [0, int(p[1, 3:].max() > p[1, :3].max()), 1, 0]
