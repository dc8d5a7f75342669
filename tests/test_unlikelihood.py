"""Reflective unlikelihood against a plain float64 reference, finite differences and the sheet's closed forms."""

import decimal
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from jaxmllm.methods import unlikelihood as ul
from jaxmllm.methods.sft import cross_entropy

B, S, V, T = 3, 7, 5, 3
REDUCTIONS = ("dialogue", "token", "turn_mean", "sum")


def reference(logits, targets, turn_id, sigma, alpha, reduction, level, ul_mask, eps):
    """Sheet 4.2 written as loops over Python floats."""
    per_dialogue, tokens, total = [], 0, 0.0
    for b in range(len(logits)):
        losses, turn_losses = [], 0.0
        for t in range(1, len(sigma[b]) + 1):
            s, terms, logps = sigma[b][t - 1], [], []
            for j in range(len(logits[b])):
                if turn_id[b][j] != t:
                    continue
                z = logits[b][j]
                p = math.exp(z[targets[b][j]]) / sum(math.exp(x) for x in z)
                m = 1 if ul_mask is None else ul_mask[b][j]
                logps.append(math.log(p))
                terms.append(-(s * math.log(p) + alpha * (1 - s) * m * math.log(max(1 - p, eps))))
            if not terms:
                continue
            losses += terms
            if level != "token":
                q = sum(logps) / (1 if level == "seq" else len(logps))
                turn_losses += -(s * q + alpha * (1 - s) * math.log(max(1 - math.exp(q), eps)))
            elif reduction == "turn_mean":
                turn_losses += sum(terms) / len(terms)
        if not losses:
            continue
        tokens, total = tokens + len(losses), total + sum(losses)
        if level != "token" or reduction == "turn_mean":
            per_dialogue.append(turn_losses)
        else:
            per_dialogue.append(sum(losses) / (len(losses) if reduction == "dialogue" else 1))
    if not per_dialogue:
        return 0.0
    if level == "token" and reduction == "token":
        return total / tokens
    return sum(per_dialogue) / len(per_dialogue)


VARIANTS = [("token", r) for r in REDUCTIONS] + [("seq", "sum"), ("seq_geo", "sum")]


def batch(seed, scale=2.0):
    rng = np.random.default_rng(seed)
    return {
        "logits": rng.normal(0, scale, (B, S, V)),
        "targets": rng.integers(0, V, (B, S)),
        "turn_id": rng.integers(0, T + 1, (B, S)) * rng.integers(0, 2, (B, 1)),  # some dialogues hold no answer
        "sigma": rng.choice([0.0, 0.3, 0.5, 0.9, 1.0], (B, T)),
        "ul_mask": rng.integers(0, 2, (B, S)).astype(float),
    }


@functools.cache
def compiled(level, reduction):
    """float64 value and gradient, one program for all tests: (logits, targets, turn_id, sigma, alpha, ul_mask, eps)."""

    def loss(logits, targets, turn_id, sigma, alpha, ul_mask, eps):
        return ul.reper_loss(logits, targets, turn_id, sigma, alpha, reduction, level, ul_mask, eps)

    return jax.jit(jax.value_and_grad(loss))


def run(example, level="token", reduction="dialogue", alpha=10.0, eps=1e-5):
    with jax.enable_x64(True):
        order = ("logits", "targets", "turn_id", "sigma", "ul_mask")
        logits, targets, turn_id, sigma, ul_mask = (jnp.asarray(example[name]) for name in order)
        value, gradient = compiled(level, reduction)(logits, targets, turn_id, sigma, alpha, ul_mask, eps)
        return float(value), np.asarray(gradient)


def f32(example):
    """The arguments of `reper_loss` in float32, without exemptions."""
    out = {name: jnp.asarray(value) for name, value in example.items() if name != "ul_mask"}
    return out | {"logits": out["logits"].astype(jnp.float32), "sigma": out["sigma"].astype(jnp.float32)}


TURNS = np.array([[0, 1, 1, 2, 0, 3, 3], [1, 1, 0, 2, 2, 0, 0], [0] * S])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 10.0]), st.sampled_from([1e-5, 0.3]))
def test_every_reduction_and_level_equals_the_reference(seed, alpha, eps):
    example = batch(seed)
    for level, reduction in VARIANTS:
        got, _ = run(example, level, reduction, alpha, eps)
        want = reference(**example, alpha=alpha, reduction=reduction, level=level, eps=eps)
        assert got == pytest.approx(want, rel=1e-9, abs=1e-9), (level, reduction)


@pytest.mark.parametrize("level,reduction", VARIANTS)
def test_gradient_equals_finite_differences(level, reduction):
    example = batch(3) | {"turn_id": TURNS}
    _, gradient = run(example, level, reduction)
    assert np.abs(gradient).max() > 1e-3
    step, numeric = 1e-6, np.zeros((B, S, V))
    for index in np.ndindex(B, S, V):
        for sign in (1, -1):
            moved = example["logits"].copy()
            moved[index] += sign * step
            numeric[index] += sign * run(example | {"logits": moved}, level, reduction)[0] / (2 * step)
    np.testing.assert_allclose(gradient, numeric, atol=5e-8)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 20))
def test_gradient_has_the_closed_form(seed, alpha):
    example = batch(seed) | {"ul_mask": np.ones((B, S)), "turn_id": np.ones((B, S), int)}
    _, gradient = run(example, "token", "sum", alpha, eps=0.0)
    p = np.exp(example["logits"]) / np.exp(example["logits"]).sum(-1, keepdims=True)
    hit = np.arange(V) == example["targets"][..., None]
    own = p[hit].reshape(B, S, 1)
    sigma = example["sigma"][:, :1, None]
    want = np.where(
        hit, -sigma * (1 - own) + alpha * (1 - sigma) * own, p * (sigma - alpha * (1 - sigma) * own / (1 - own))
    )
    np.testing.assert_allclose(gradient, want / B, atol=1e-9)


def test_the_loss_is_least_at_the_token_optimum():
    table = {0: 0, 0.3: 0.0411, 0.5: 0.0909, 0.6: 0.1304, 0.7: 0.1892, 0.8: 0.2857, 0.9: 0.4737, 0.95: 0.6552}
    table |= {0.99: 0.9083, 1: 1}
    optimum = ul.token_optimum(jnp.asarray(list(table)), 10.0)
    np.testing.assert_allclose(optimum, list(table.values()), atol=5e-5)
    assert float(ul.token_optimum(jnp.asarray(0.0), 0.0)) == 0
    example = batch(0) | {"turn_id": np.ones((B, S), int), "targets": np.zeros((B, S), int)}
    for sigma, want in table.items():
        if sigma not in (0, 1):

            def loss(z, sigma=sigma):
                logits = np.full((B, S, V), -1e9)
                logits[..., 0], logits[..., 1] = z, 0
                filled = {"logits": logits, "sigma": np.full((B, T), sigma), "ul_mask": np.ones((B, S))}
                return run(example | filled)[0]

            best = minimize_scalar(loss, bounds=(-10, 10), options={"xatol": 1e-7}).x
            assert 1 / (1 + math.exp(-best)) == pytest.approx(want, abs=1e-4)


def corner(logits, sigma, **options):
    """Loss and gradient of the first token; the others are context."""
    example = {"logits": np.zeros((B, S, V)), "targets": np.zeros((B, S), int), "turn_id": np.zeros((B, S), int)}
    example |= {"sigma": np.full((B, T), sigma), "ul_mask": np.ones((B, S))}
    example["logits"][0, 0], example["turn_id"][0, 0] = logits, 1
    value, gradient = run(example, **options)
    return value, gradient[0, 0]


def test_floored_tokens_get_likelihood_gradient_only():
    logits = [20, 0, 0, -np.inf, -np.inf]
    value, gradient = corner(logits, 0.9)
    np.testing.assert_array_equal(gradient, corner(logits, 0.9, alpha=0.0)[1])
    assert value == pytest.approx(-math.log(1e-5), rel=1e-6)


@pytest.mark.parametrize("top", [30.0, 200.0, 1e4])
def test_without_floor_the_gradient_stays_bounded_as_p_goes_to_one(top):
    _, gradient = corner([top, 0, 0, -np.inf, -np.inf], 0.0, eps=0.0)
    np.testing.assert_allclose(gradient, [10, -5, -5, 0, 0], rtol=1e-6)


def test_masked_vocabulary_is_finite():
    """Logits at -inf (tokens that are never sampled) beside the target, and a target that is the only choice."""
    for logits in ([0.5, -np.inf, 0.1, 0, 0], [3.0] + [-np.inf] * 4):
        value, gradient = corner(logits, 0.5)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_log_one_minus_p_keeps_its_digits_where_log_p_rounds():
    """At 1 - p = 2e-8 float32 log p is 0 or one ulp; the complement of the logits still has 6 digits."""
    logits = jnp.asarray([[[18.0, 0.0, 0.3]]], jnp.float32)
    one = jnp.ones((1, 1), int)
    _, rest = ul.target_logps(logits, one * 0, one)
    want = math.log((1 + math.exp(0.3)) / (math.exp(18) + 1 + math.exp(0.3)))
    assert float(rest[0, 0]) == pytest.approx(want, rel=1e-6)


LOG1MEXP = jax.jit(jax.value_and_grad(ul.log1mexp))


@settings(max_examples=60, deadline=None)
@given(st.floats(-80, -1e-30))
def test_log1mexp_equals_exact_arithmetic(x):
    with decimal.localcontext() as context:
        context.prec = 80
        want = float((1 - decimal.Decimal(x).exp()).ln())
    with jax.enable_x64(True):
        value, slope = LOG1MEXP(jnp.asarray(x, jnp.float64))
    assert float(value) == pytest.approx(want, rel=1e-14)
    assert float(slope) == pytest.approx(-1 / math.expm1(-x), rel=1e-12)


def test_log1mexp_ends():
    value, gradient = jax.vmap(jax.value_and_grad(ul.log1mexp))(jnp.asarray([0.0, 1e-8, -jnp.inf]))
    np.testing.assert_array_equal(value, [-np.inf, -np.inf, 0])
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("level,reduction", VARIANTS)
def test_unsupervised_positions_never_leak(level, reduction):
    turn_id = np.minimum(TURNS, 2)
    example = batch(5) | {"turn_id": turn_id}
    value, gradient = run(example, level, reduction)
    assert np.isfinite(value) and np.isfinite(gradient).all() and gradient.any() and not gradient[turn_id == 0].any()
    for garbage in (np.nan, np.inf, -np.inf, 1e300):
        dirty = {
            "logits": np.where((turn_id > 0)[..., None], example["logits"], garbage),
            "targets": np.where(turn_id > 0, example["targets"], -100),
            # no dialogue has a third answer, the last has none at all
            "sigma": np.where([[1, 1, 0], [1, 1, 0], [0, 0, 0]], example["sigma"], garbage),
            "ul_mask": np.where(turn_id > 0, example["ul_mask"], garbage),
        }
        got_value, got_gradient = run(example | dirty, level, reduction)
        assert got_value == value
        np.testing.assert_array_equal(got_gradient, gradient)


@pytest.mark.parametrize("level,reduction", VARIANTS)
def test_nothing_supervised_gives_zero(level, reduction):
    value, gradient = run(batch(1) | {"turn_id": np.zeros((B, S), int)}, level, reduction)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padding_order_layout_and_microbatches_do_not_matter(reduction):
    example = f32(batch(8))
    example["turn_id"] = jnp.asarray([[0, 1, 1, 2, 0, 3, 3], [1, 1, 0, 2, 2, 0, 0], [0, 0, 0, 0, 1, 0, 2]])
    logps, rest = jax.jit(ul.target_logps)(example["logits"], example["targets"], example["turn_id"] > 0)

    @jax.jit
    def sums(logps, rest, turn_id, sigma):
        return ul.reflective_unlikelihood_sums(logps, turn_id, sigma, reduction=reduction, log1mps=rest)

    columns = (logps, rest, example["turn_id"], example["sigma"])
    top, bottom = sums(*columns)
    whole = float(top / bottom)
    pad = [jnp.pad(c, ((0, 2), (0, 4))) if k < 3 else jnp.pad(c, ((0, 2), (0, 0))) for k, c in enumerate(columns)]
    grouped = [c[None, :, :] for c in columns]
    order = [c[jnp.asarray([2, 0, 1])] for c in columns]
    for variant in (pad, grouped, order):
        top, bottom = sums(*variant)
        assert float(top / bottom) == pytest.approx(whole, rel=1e-6)
    parts = [sums(*[c[k : k + 1] for c in columns]) for k in range(B)]
    assert float(sum(a for a, _ in parts) / sum(b for _, b in parts)) == pytest.approx(whole, rel=1e-6)


def test_full_reward_is_plain_supervised_training():
    example = f32(batch(2)) | {"turn_id": jnp.asarray(TURNS)}

    @jax.jit
    def both(logits, targets, turn_id, sigma):
        logps, _ = ul.target_logps(logits, targets, turn_id > 0)
        mask, out = turn_id > 0, []
        for reduction, norm in (("dialogue", "sample"), ("token", "token")):
            got = ul.reflective_unlikelihood(logps, turn_id, sigma, reduction=reduction)
            out.append((got, cross_entropy(logps, mask, norm)))
        return out

    for got, want in both(**example | {"sigma": jnp.ones((B, T))}):
        assert float(got) == pytest.approx(float(want), rel=1e-6)


def test_bfloat16_logits_are_reduced_in_float32():
    example = f32(batch(4, scale=1.0)) | {"turn_id": jnp.asarray(TURNS)}
    low = example | {"logits": example["logits"].astype(jnp.bfloat16)}
    high = low | {"logits": low["logits"].astype(jnp.float32)}
    run_both = jax.jit(lambda e: jax.value_and_grad(lambda z: ul.reper_loss(**e | {"logits": z}))(e["logits"]))
    (value, gradient), (want, exact) = run_both(low), run_both(high)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    assert float(value) == pytest.approx(float(want), rel=1e-6)
    np.testing.assert_allclose(gradient.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)
    precise, _ = run(batch(4, scale=1.0) | {"turn_id": TURNS, "ul_mask": np.ones((B, S))})
    assert float(run_both(example)[0]) == pytest.approx(precise, rel=1e-5)
    assert float(value) == pytest.approx(precise, rel=2e-2)


def test_answer_levels_ignore_reduction_and_exemptions():
    example = f32(batch(6)) | {"turn_id": jnp.asarray(TURNS)}

    @jax.jit
    def losses(logits, targets, turn_id, sigma):
        logps, _ = ul.target_logps(logits, targets, turn_id > 0)
        options = [
            {"reduction": reduction, "ul_mask": mask} for reduction in REDUCTIONS for mask in (None, turn_id % 2)
        ]
        return {
            level: [ul.reflective_unlikelihood(logps, turn_id, sigma, level=level, **given) for given in options]
            for level in ("seq", "seq_geo")
        }

    for level, values in losses(**example).items():
        assert len(set(map(float, values))) == 1
        want, _ = run(batch(6) | {"turn_id": TURNS}, level, "sum")
        assert float(values[0]) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("level,reduction", [("token", "turn_mean"), ("seq_geo", "sum")])
def test_logit_gradient_takes_the_arguments_of_the_loss(level, reduction):
    example = batch(7) | {"turn_id": TURNS}
    with jax.enable_x64(True):
        logits, *rest = (jnp.asarray(example[name]) for name in ("logits", "targets", "turn_id", "sigma"))
        mask = jnp.asarray(example["ul_mask"])
        gradient = jax.jit(functools.partial(ul.reper_logit_grad, reduction=reduction, level=level))
        got = gradient(logits, *rest, ul_mask=mask, alpha=4.0, eps=0.2)
    np.testing.assert_allclose(got, run(example, level, reduction, 4.0, 0.2)[1], atol=1e-12)


def test_whole_caption_unlikelihood_is_inert():
    """Gap G1: 100 tokens at p = .9 leave 1.3e-4 nats of unlikelihood at level `seq` against 5.3 of likelihood."""

    @functools.partial(jax.jit, static_argnums=1)
    def loss(alpha, level):
        logps, turn_id = jnp.full((1, 100), jnp.log(0.9)), jnp.ones((1, 100), int)
        return ul.reflective_unlikelihood(logps, turn_id, jnp.asarray([[0.5]]), alpha=alpha, level=level)

    likelihood = float(loss(0.0, "seq"))
    assert likelihood == pytest.approx(5.3, abs=0.05)
    assert 1e-4 < float(loss(10.0, "seq")) - likelihood < 1.6e-4
    assert float(loss(10.0, "token")) > 10


def test_exemption_of_the_end_token_and_turn_probabilities():
    targets, turn_id = jnp.asarray([[7, 3, 9, 4, 9]]), jnp.asarray([[1, 1, 1, 2, 2]])
    p, sigma = np.array([[0.2, 0.4, 0.9, 0.5, 0.7]]), np.array([0.3, 0.8])

    @jax.jit
    def everything(logps, sigma):
        mask = ul.exempt_tokens(targets, 9)
        loss = ul.reflective_unlikelihood(logps, turn_id, sigma, ul_mask=mask)
        return mask, loss, ul.turn_probabilities(logps, turn_id, 3)

    mask, loss, probabilities = everything(jnp.log(jnp.asarray(p)), jnp.asarray([sigma]))
    np.testing.assert_array_equal(mask, [[True, True, False, True, False]])
    np.testing.assert_allclose(probabilities, [0.5, 0.6, 0], rtol=1e-6)
    want = -(np.log(p) * sigma[[0, 0, 0, 1, 1]]).sum()
    want -= 10 * (0.7 * np.log(1 - p[0, :2]).sum() + 0.2 * np.log(1 - p[0, 3]))
    assert float(loss) == pytest.approx(want / 5, rel=1e-5)


def test_reward_normalisation():
    r = jnp.asarray([[5.0, 12.0, -1.0], [0.3, 0.6, 0.0]])
    np.testing.assert_allclose(ul.normalize_rewards(r, "source_max", 10.0), [[0.5, 1, 0], [0.03, 0.06, 0]], rtol=1e-6)
    np.testing.assert_allclose(ul.normalize_rewards(r[1], "dialogue_max"), [0.5, 1, 0], rtol=1e-6)
    np.testing.assert_array_equal(ul.normalize_rewards(-r[1:], "dialogue_max"), jnp.zeros((1, 3)))
    np.testing.assert_array_equal(ul.normalize_rewards(r, "source_max", 0.0), jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="r_max"):
        ul.normalize_rewards(r, "source_max")
    with pytest.raises(ValueError, match="dialogue_max"):
        ul.normalize_rewards(r, "max")


def test_a_turn_without_sigma_is_loud_and_unknown_names_are_refused():
    logps, turn_id, sigma = -jnp.ones((1, 2)), jnp.asarray([[1, 2]]), jnp.ones((1, 1))
    assert np.isnan(jax.jit(ul.reflective_unlikelihood)(logps, turn_id, sigma))
    with pytest.raises(ValueError, match="turn_mean"):
        ul.reflective_unlikelihood(logps, turn_id, sigma, reduction="mean")
    with pytest.raises(ValueError, match="seq_geo"):
        ul.reflective_unlikelihood(logps, turn_id, sigma, level="sequence")
