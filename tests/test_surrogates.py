"""KL estimators, verl's losses, rollout correction and the masks of the GRPO family, each against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.methods.grpo import correction, terms
from jaxmllm.methods.grpo.loss import GRPOOptions
from tests.support.grpo_reference import B, Case, T, draw, rollout_weights


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_dual_clip_is_the_two_sided_clip():
    """For c above 1 + epsilon_high the same loss and gradient as `delta = c`; verl's shares by brute force."""
    arrays = draw(12)
    arrays["logps"] = arrays["old_logps"] + np.random.default_rng(1).normal(0, 1.0, (B, T))
    used = {name: arrays[name] for name in ("logps", "old_logps", "advantages", "mask")}
    two_sided = Case(used, GRPOOptions(delta=1.5), {})
    inputs = [jnp.asarray(arrays[name]) for name in ("logps", "old_logps", "advantages", "mask")]
    dual = lambda lp: terms.dual_clip_policy_loss(lp, *inputs[1:], clip_ratio_c=1.5)  # noqa: E731
    (value, metrics), dual_grad = jax.jit(jax.value_and_grad(dual, has_aux=True))(inputs[0])
    np.testing.assert_allclose(value, two_sided.loss(arrays["logps"]))
    np.testing.assert_allclose(dual_grad, two_sided.gradient(), rtol=1e-6, atol=1e-9)
    rho = np.exp(arrays["logps"] - arrays["old_logps"])
    adv = np.broadcast_to(arrays["advantages"][:, None], rho.shape)
    m = arrays["mask"] > 0
    clipped = ((rho > 1.2) & (adv > 0)) | ((rho < 0.8) & (adv < 0))
    np.testing.assert_allclose(metrics["pg_clipfrac"], clipped[m].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["pg_clipfrac_lower"], ((rho > 1.5) & (adv < 0))[m].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["ppo_kl"], -np.log(rho[m]).mean(), rtol=1e-6)
    with pytest.raises(ValueError, match="clip_ratio_c"):
        terms.dual_clip_policy_loss(*inputs, clip_ratio_c=1.0)


@pytest.mark.parametrize("mode", terms.AGGREGATION_MODES)
def test_aggregation_modes(mode):
    arrays = draw(13)
    loss, mask = arrays["logps"], arrays["mask"] > 0
    rows = [row[keep] for row, keep in zip(loss, mask, strict=True) if keep.any()]  # empty rows are left out
    want = {
        "token-mean": loss[mask].mean(),
        "token-sum": loss[mask].sum(),
        "seq-mean-token-sum": np.mean([row.sum() for row in rows]),
        "seq-mean-token-mean": np.mean([row.mean() for row in rows]),
        "seq-mean-token-sum-norm": np.mean([row.sum() for row in rows]) / T,
    }[mode]
    dirty = jnp.where(mask, loss, jnp.nan)
    np.testing.assert_allclose(terms.aggregate_loss(dirty, jnp.asarray(mask), mode), want)
    assert terms.aggregate_loss(dirty, jnp.zeros((B, T)), mode) == 0
    scaled = terms.aggregate_loss(dirty, jnp.asarray(mask), mode, loss_scale_factor=10.0)
    np.testing.assert_allclose(scaled, want * (T / 10 if mode == "seq-mean-token-sum-norm" else 1))
    with pytest.raises(ValueError, match="loss_agg_mode"):
        terms.aggregate_loss(dirty, jnp.asarray(mask), "mean")


def test_expected_gradient_of_the_kl_estimators():
    """On-policy over a whole categorical: k1 has zero expected gradient, k2 and k3+ the true one, k3 another."""
    logits, ref = jnp.array([0.3, -1.2, 0.8]), jnp.array([-0.5, 0.4, 0.1])
    p, log_ref = jax.nn.softmax(logits), jax.nn.log_softmax(ref)

    def expected(kind):
        def loss(x):
            lp = jax.nn.log_softmax(x)[None]
            return jnp.sum(p * terms.kl_estimate(lp, log_ref[None], jnp.ones((1, 3)), kind)[0])

        return jax.jit(jax.grad(loss))(logits)

    true = jax.jit(jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - log_ref))))(logits)
    np.testing.assert_allclose(expected("k1"), 0, atol=1e-12)
    np.testing.assert_allclose(expected("k2"), true, atol=1e-12)
    np.testing.assert_allclose(expected("k3+"), true, atol=1e-12)
    assert np.abs(expected("k3") - true).max() > 1e-2


def test_kl_values_aliases_and_clip():
    x = jnp.array([[-30.0, -3.0, 1e-9, 2.0, 30.0]])
    ones, zero = jnp.ones_like(x), jnp.zeros_like(x)
    k3 = terms.kl_estimate(x, zero, ones, "k3")
    np.testing.assert_allclose(k3[0, [1, 3]], np.exp([3.0, -2.0]) + [-3 - 1, 2 - 1])
    np.testing.assert_allclose(k3[0, 2], 0.5e-18, rtol=1e-6, atol=1e-17)
    assert (k3 >= 0).all()
    np.testing.assert_allclose(terms.kl_estimate(x, zero, ones, "low_var_kl", clip=True)[0, [0, 4]], [10, 10])
    for kind, alias in (("k1", "kl"), ("k2", "mse"), ("k3", "k3+")):
        want = terms.kl_estimate(x, zero, ones, kind)
        np.testing.assert_allclose(terms.kl_estimate(x, zero, ones, alias), want, rtol=1e-14)
    with pytest.raises(ValueError, match="kl_loss_type"):
        terms.kl_estimate(x, zero, ones, "full")


@pytest.mark.parametrize("mode", correction.WEIGHT_MODES)
@pytest.mark.parametrize("interval", [(None, 3.0), (0.95, 1.05), (None, None), (0.9, None), (1.1, 1.2)])
def test_rollout_weights(mode, interval):
    arrays = draw(14)
    inputs = [arrays["old_logps"], arrays["sampling_logps"], arrays["mask"]]
    want = np.array(rollout_weights(*inputs, mode, *interval))
    got = correction.importance_sampling_weights(*map(jnp.asarray, inputs), mode, *interval)
    assert got.shape == ((B, 1) if mode.startswith("sequence") else (B, T))
    np.testing.assert_allclose(np.broadcast_to(got, want.shape), want, rtol=1e-12)


def test_rollout_diagnostics_of_equal_policies():
    rollout_diagnostics = jax.jit(correction.rollout_diagnostics)
    lp, mask = jnp.log(jnp.full((2, 3), 0.25)), jnp.ones((2, 3))
    diagnostics = rollout_diagnostics(lp, lp, mask)
    want = {"training_ppl": 4.0, "rollout_ppl": 4.0, "ppl_ratio": 1.0, "ess": 1.0}
    for name, value in diagnostics.items():
        assert float(value) == pytest.approx(want.get(name, 0.0)), name
    empty = rollout_diagnostics(lp, lp - 50, jnp.zeros((2, 3)))
    assert all(np.isfinite(float(value)) for value in empty.values())
    # one token carries all the weight: an effective share of one in six
    one = rollout_diagnostics(lp.at[0, 0].add(15.0), lp, mask)
    assert float(one["ess"]) == pytest.approx(1 / 6, rel=1e-4)


keep = jax.jit(correction.high_entropy_mask, static_argnums=2)


def test_entropy_mask_keeps_a_share_and_its_maximum():
    rng = np.random.default_rng(3)
    entropies, mask = jnp.asarray(rng.permutation(20.0 + np.arange(20)).reshape(4, 5)), jnp.ones((4, 5))
    assert keep(entropies, mask, 1.0).sum() == 20
    assert keep(entropies, mask, 0.0).sum() == 1
    for p in (0.1, 0.25, 0.5):
        assert keep(entropies, mask, p).sum() == pytest.approx(20 * p, abs=1)
    assert keep(entropies, jnp.zeros((4, 5)), 0.5).sum() == 0


def test_entropy_mask_includes_a_token_exactly_on_the_quantile():
    """0.7 * 10 is 6.9999998 or 7.0000002 in float32; the eighth of eleven tokens is on the quantile and is kept."""
    entropies = jnp.asarray(np.arange(11.0)[None], jnp.float32)
    assert keep(entropies, jnp.ones((1, 11)), 0.3).sum() == 4


def test_truncated_rows():
    ids = jnp.array([[5, 6, 7], [5, 2, 0], [5, 6, 2], [5, 6, 9]])
    mask = jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]])
    truncated = correction.truncated_rows(ids, mask, end_ids=(2, 0))
    assert truncated.tolist() == [True, False, False, False]
    assert correction.mask_truncated(mask, truncated).tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]]
