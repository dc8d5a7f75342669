"""Temporal perplexity and attention diagnostics against numpy and the invariants of the sheet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr

from jaxmllm.eval import perplexity

K, T = 3, 6
SCORE = jax.jit(perplexity.tpl_score)
FOCUS, IMAGE, ACTIVATION = map(
    jax.jit, (perplexity.focus_agreement, perplexity.image_activation, perplexity.activation)
)
seeds = st.integers(0, 10**6)
relaxed = settings(max_examples=30, deadline=None)


def sample(seed):
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, T)
    mask[rng.integers(T)] = 1
    return -rng.exponential(size=T), -rng.exponential(size=(K, T)), mask


def score(full, frames, mask, frame_mask=None):
    frame_mask = np.ones(frames.shape[:-1], int) if frame_mask is None else frame_mask
    with jax.enable_x64(True):
        out = SCORE(*map(jnp.asarray, (full, frames, mask, frame_mask)))
    return {name: np.asarray(value) for name, value in out.items()}


@relaxed
@given(seeds)
def test_every_mode_equals_numpy(seed):
    full, frames, mask = sample(seed)
    out, keep = score(full, frames, mask), mask != 0
    nll, nlls = -full[keep].mean(), -frames[:, keep].mean(-1)
    assert out["ppl_full"] == pytest.approx(np.exp(nll))
    np.testing.assert_allclose(out["ppl_frames"], np.exp(nlls))
    assert out["tpl_ppl_mean"] == pytest.approx(np.exp(nlls).mean() - np.exp(nll))  # exponentiate, then average
    assert out["tpl_ppl_min"] == pytest.approx(np.exp(nlls).min() - np.exp(nll))
    assert out["tpl_nll_mean"] == pytest.approx(nlls.mean() - nll)
    assert out["tpl_nll_min"] == pytest.approx(nlls.min() - nll)
    assert out["tpl_nll_min"] <= out["tpl_nll_mean"] and out["tpl_ppl_min"] <= out["tpl_ppl_mean"]


@relaxed
@given(seeds, st.floats(-3, 3))
def test_a_common_shift_leaves_the_log_form(seed, c):
    full, frames, mask = sample(seed)
    before, after = score(full, frames, mask), score(full + c, frames + c, mask)
    for name in ("tpl_nll_mean", "tpl_nll_min"):
        assert after[name] == pytest.approx(before[name], abs=1e-12)


@relaxed
@given(seeds)
def test_equal_log_probabilities_give_zero(seed):
    full, _, mask = sample(seed)
    out = score(full, np.broadcast_to(full, (K, T)), mask)
    assert all(abs(out[name]) < 1e-12 for name in out if name.startswith("tpl"))


@relaxed
@given(seeds, st.sampled_from([np.nan, np.inf, -np.inf, 1e300]))
def test_padding_never_changes_a_score(seed, garbage):
    full, frames, mask = sample(seed)
    want = score(full, frames, mask)
    dirty = score(np.where(mask, full, garbage), np.where(mask, frames, garbage), mask)
    for name in want:
        np.testing.assert_array_equal(dirty[name], want[name])
    one_less = score(full, np.concatenate([frames[:2], np.full((1, T), garbage)]), mask, np.array([1, 1, 0]))
    direct = score(full, np.stack([frames[0], frames[1], frames[1]]), mask, np.array([1, 1, 0]))
    for name in want:
        if name.startswith("tpl"):
            assert one_less[name] == pytest.approx(direct[name], abs=1e-12)


def test_k_one_is_the_log_ratio_of_the_perplexities():
    full, frames, mask = sample(4)
    out = score(full, frames[:1], mask)
    assert out["tpl_nll_mean"] == pytest.approx(np.log(out["ppl_frames"][0] / out["ppl_full"]))


def test_batches_single_forms_and_no_gradient():
    samples = [sample(seed) for seed in range(4)]
    full, frames, mask = (np.stack(column).reshape(2, 2, *column[0].shape) for column in zip(*samples, strict=True))
    full, frames = jnp.asarray(full, jnp.float32), jnp.asarray(frames, jnp.float32)
    out = SCORE(full, frames, jnp.asarray(mask))
    for index in np.ndindex(2, 2):
        alone = SCORE(full[index], frames[index], jnp.asarray(mask[index]))
        for name in out:
            np.testing.assert_allclose(out[name][index], alone[name], rtol=1e-6)
    strict = jax.jit(lambda *a: perplexity.temporal_perplexity(*a, mode="ppl", reduce="min"))
    one = strict(full, frames, jnp.asarray(mask))
    np.testing.assert_allclose(one, out["tpl_ppl_min"], rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: perplexity.temporal_perplexity(x, frames, jnp.asarray(mask)).sum()))(full)
    assert not gradient.any()  # TPL must not be trainable: it rises when one frame explains the text worse
    low = SCORE(full.astype(jnp.bfloat16), frames.astype(jnp.bfloat16), jnp.asarray(mask))
    same = SCORE(*(x.astype(jnp.bfloat16).astype(jnp.float32) for x in (full, frames)), jnp.asarray(mask))
    np.testing.assert_allclose(low["tpl_nll_mean"], same["tpl_nll_mean"], rtol=1e-6)
    assert np.isfinite(SCORE(full, frames, jnp.zeros((2, 2, T)))["tpl_ppl_mean"]).all()


def test_leave_one_out_finds_the_frame_that_matters():
    full = np.log(np.array([0.5, 0.8, 0.9, 0.1]))
    without = np.stack([full, full - 1.0, full - 0.25])
    delta = jax.jit(perplexity.leave_one_out)(jnp.asarray(full), jnp.asarray(without), jnp.asarray([1, 1, 1, 0]))
    np.testing.assert_allclose(delta, [0, 1, 0.25], atol=1e-6)
    shares = ACTIVATION(jnp.maximum(delta, 0))
    np.testing.assert_allclose(shares["p"], [0, 0.8, 0.2], atol=1e-6)
    assert float(shares["n_active"]) == 2


# --- choosing frames and samples ------------------------------------------------------------------------------------


def test_frames_are_drawn_uniformly_without_replacement():
    rng = np.random.default_rng(0)
    drawn = [perplexity.choose_frames(6, 4, rng) for _ in range(600)]
    assert all(len(set(frames)) == 4 and frames == sorted(frames) and set(frames) <= set(range(6)) for frames in drawn)
    share = np.bincount(np.concatenate(drawn), minlength=6) / 600
    np.testing.assert_allclose(share, 4 / 6, atol=0.08)
    assert perplexity.choose_frames(5, None, rng) == perplexity.choose_frames(5, 9, rng) == [0, 1, 2, 3, 4]
    assert perplexity.choose_frames(5, 1, rng, frames="last") == [4]
    assert perplexity.single_frame_clip(2, 8) == [2, 2]
    assert perplexity.single_frame_clip(2, 4, "repeat") == [2] * 4
    for call in (
        lambda: perplexity.choose_frames(0, 1, rng),
        lambda: perplexity.choose_frames(4, 0, rng),
        lambda: perplexity.choose_frames(4, 1, rng, "first"),
        lambda: perplexity.single_frame_clip(0, 4, "both"),
    ):
        with pytest.raises(ValueError):
            call()


def test_filter_keeps_the_better_half_of_long_samples():
    scores, lengths = [0.1, 0.4, 0.2, 9.0, 0.3, np.nan], [8, 9, 30, 7, 8, 50]
    np.testing.assert_array_equal(perplexity.tpl_filter(scores, lengths), [0, 1, 0, 0, 1, 0])  # median .25 of the long
    np.testing.assert_array_equal(perplexity.tpl_filter(scores, lengths, tau=0.2), [0, 1, 1, 0, 1, 0])
    tasks = ["qa", "cap", "qa", "qa", "cap", "cap"]
    np.testing.assert_array_equal(perplexity.tpl_filter(scores, lengths, tasks), [0, 1, 1, 0, 0, 0])
    assert perplexity.tpl_filter([], []).shape == (0,)


# --- attention ------------------------------------------------------------------------------------------------------


@relaxed
@given(seeds)
def test_frame_activation_equals_numpy(seed):
    rng = np.random.default_rng(seed)
    attn = rng.dirichlet(np.ones(9), size=(2, 3, 4))
    spans, queries = np.array([[0, 3], [3, 4], [5, 8], [0, 0]]), np.array([1, 1, 0, 1])  # the last span is padding
    with jax.enable_x64(True):
        out = FRAMES(jnp.asarray(attn), jnp.asarray(spans), 0.5, jnp.asarray(queries))
    received = attn[:, :, queries > 0].mean((0, 1, 2))
    mass = np.array([received[0:3].sum(), received[3], received[5:8].sum()])
    p = mass / mass.sum()
    np.testing.assert_allclose(out["p"], [*p, 0], atol=1e-12)
    assert float(out["n_active"]) == (p >= 0.5 / 3).sum()
    assert float(out["n_eff"]) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


FRAMES = jax.jit(perplexity.frame_activation)


def test_activation_corners():
    uniform = ACTIVATION(jnp.full(7, 0.3), rho=1.0)
    assert float(uniform["n_active"]) == 7 and float(uniform["n_eff"]) == pytest.approx(7, rel=1e-6)
    assert float(ACTIVATION(jnp.ones(4), rho=1.0)["n_active"]) == 4  # a share equal to the threshold counts
    one = ACTIVATION(jnp.asarray([0.0, 2.0, 0.0]))
    assert float(one["n_active"]) == 1 and float(one["n_eff"]) == pytest.approx(1)
    nothing = ACTIVATION(jnp.zeros(3))
    assert float(nothing["n_active"]) == 0 and not nothing["p"].any()


def test_image_activation_is_ruled_by_one_sink_token():
    assert float(IMAGE(jnp.asarray([0.1, 0.2, 0.4, 0.1]))["avg_act"]) == pytest.approx(50)
    rng = np.random.default_rng(0)
    calm = rng.uniform(0.5, 1, 576) / 576
    sink = calm.copy()
    sink[17] = 0.5
    before, after = (IMAGE(jnp.asarray(a)) for a in (calm, sink))
    assert float(after["avg_act"]) < 1 < 60 < float(before["avg_act"])
    assert float(after["avg_act_trimmed"]) == pytest.approx(float(before["avg_act_trimmed"]), rel=0.02)
    assert float(after["mass"]) == pytest.approx(sink.sum(), rel=1e-5)
    top = np.sort(calm)[: 576 - 6]
    assert float(before["avg_act_trimmed"]) == pytest.approx(100 * top.mean() / top.max(), rel=1e-5)


def test_focus_agreement():
    rng = np.random.default_rng(0)
    a, target = rng.uniform(size=40), (rng.uniform(size=40) < 0.3) * rng.uniform(size=40)
    out = {k: float(v) for k, v in FOCUS(jnp.asarray(a), jnp.asarray(target)).items()}
    hit = target > 0
    assert out["nss"] == pytest.approx(((a - a.mean()) / a.std())[hit].mean(), rel=1e-4)
    assert out["cc"] == pytest.approx(pearsonr(a, target).statistic, rel=1e-4)
    wins = [(x > y) + 0.5 * (x == y) for x in a[hit] for y in a[~hit]]
    assert out["auc"] == pytest.approx(np.mean(wins), rel=1e-5)
    assert out["mass_ratio"] == pytest.approx(a[hit].sum() / a.sum() / hit.mean(), rel=1e-4)
    perfect = FOCUS(jnp.asarray(hit, jnp.float32), jnp.asarray(hit))
    assert float(perfect["auc"]) == 1 and float(perfect["cc"]) == pytest.approx(1, rel=1e-5)
    for attention, where in ((jnp.ones(4), jnp.asarray([1, 0, 0, 1])), (jnp.asarray([1.0, 2, 3, 4]), jnp.zeros(4))):
        flat = FOCUS(attention, where)
        assert {k: float(v) for k, v in flat.items()} == pytest.approx({"nss": 0, "auc": 0.5, "cc": 0, "mass_ratio": 1})
