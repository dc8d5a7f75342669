"""DPO and LiPO-lambda against numpy loops and finite differences."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.methods import dpo as preference

RNG = np.random.default_rng(1)
B, G, T = 4, 5, 6
LOGPS, REF = (-RNG.exponential(size=(B, G, T)) for _ in range(2))
MASK = (np.arange(T) < RNG.integers(1, T + 1, (B, G, 1))).astype(int)
REWARDS = RNG.choice([0.0, 0.25, 0.5, 1.0], (B, G))
REWARDS[2] = 0.5  # nothing to prefer
VALID = np.ones((B, G), bool)
VALID[0, 3:] = False
VALID[3, 1:] = False  # a single answer


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0)


def dpo_reference(s, smoothing):
    losses = []
    for b in range(B):
        usable = [g for g in range(G) if VALID[b, g]]
        best = max(usable, key=lambda g: (REWARDS[b, g], -g))
        worst = min(usable, key=lambda g: (REWARDS[b, g], g))
        if REWARDS[b, best] > REWARDS[b, worst]:
            margin = s[b, best] - s[b, worst]
            losses.append((1 - smoothing) * softplus(-margin) + smoothing * softplus(margin))
    return np.mean(losses)


def lipo_reference(s):
    losses = []
    for b in range(B):
        usable = [g for g in range(G) if VALID[b, g]]
        rank = {g: k + 1 for k, g in enumerate(sorted(usable, key=lambda g: (-s[b, g], g)))}
        total, pairs = 0.0, 0
        for i, j in itertools.permutations(usable, 2):
            if REWARDS[b, i] > REWARDS[b, j]:
                gain = abs(2 ** REWARDS[b, i] - 2 ** REWARDS[b, j])
                delta = gain * abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
                total, pairs = total + delta * softplus(-(s[b, i] - s[b, j])), pairs + 1
        if pairs:
            losses.append(total)
    return np.mean(losses)


def scores(logps):
    return 0.3 * ((logps - REF) * MASK).sum(-1)


@jax.jit
def losses(logps, ref, rewards, mask, valid):
    s = preference.implicit_rewards(logps, ref, mask, 0.3)
    dpo, metrics = preference.dpo_loss(s, rewards, valid, label_smoothing=0.1)
    return jnp.stack([dpo, preference.lipo_lambda_loss(s, rewards, valid)]), metrics


def test_values_gradients_and_masked_garbage():
    with jax.enable_x64(True):
        call = jax.jit(lambda *a: (*losses(*a), jax.jacrev(lambda *b: losses(*b)[0])(*a)))
        rest = tuple(map(jnp.asarray, (REF, REWARDS, MASK, VALID)))
        values, metrics, gradient = call(jnp.asarray(LOGPS), *rest)
        s = scores(LOGPS)
        np.testing.assert_allclose(values, [dpo_reference(s, 0.1), lipo_reference(s)], rtol=1e-12)
        assert float(metrics["rewards/margins"]) == pytest.approx(
            float(metrics["rewards/chosen"] - metrics["rewards/rejected"]), abs=1e-12
        )
        numeric = np.zeros((2, B, G, T))
        for index in np.ndindex(B, G, T):
            for sign in (1, -1):
                moved = LOGPS.copy()
                moved[index] += sign * 1e-6
                s = scores(moved)
                numeric[(slice(None), *index)] += sign * np.array([dpo_reference(s, 0.1), lipo_reference(s)]) / 2e-6
        np.testing.assert_allclose(gradient, numeric, atol=1e-8)
        assert np.abs(numeric).max() > 1e-3
        keep = (MASK != 0) & VALID[..., None]
        for garbage in (np.nan, np.inf, 1e300):
            dirty = call(
                jnp.asarray(np.where(keep, LOGPS, garbage)), jnp.asarray(np.where(keep, REF, -garbage)),
                jnp.asarray(np.where(VALID, REWARDS, garbage)), *rest[2:],
            )  # fmt: skip
            np.testing.assert_array_equal(dirty[0], values)
            np.testing.assert_array_equal(dirty[2], gradient)


def test_the_reference_gets_no_gradient_and_nothing_to_prefer_is_zero():
    arguments = [jnp.asarray(x, jnp.float32) for x in (LOGPS, REF)]
    total = jax.jit(lambda logps, ref: losses(logps, ref, jnp.asarray(REWARDS), MASK, VALID)[0].sum())
    assert not jax.grad(total, 1)(*arguments).any() and jax.grad(total)(*arguments).any()
    flat, _ = losses(*arguments, jnp.full((B, G), 0.5), MASK, VALID)
    np.testing.assert_array_equal(flat, 0)


def test_bfloat16_agrees_with_float32():
    low = [jnp.asarray(x, jnp.bfloat16) for x in (LOGPS, REF)]
    high = [x.astype(jnp.float32) for x in low]
    rest = (jnp.asarray(REWARDS), jnp.asarray(MASK), jnp.asarray(VALID))
    got, want = losses(*low, *rest)[0], losses(*high, *rest)[0]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_equal_policies_give_log_two_and_training_orders_the_answers():
    loss, _ = jax.jit(preference.dpo_loss)(jnp.zeros((1, 3)), jnp.asarray([[0.0, 1.0, 0.5]]))
    assert float(loss) == pytest.approx(math.log(2))
    rewards, s = jnp.asarray([[0.1, 0.9, 0.5, 0.3]]), jnp.asarray([[0.4, 0.1, 0.2, 0.3]])
    step = jax.jit(lambda s: s - 0.5 * jax.grad(preference.lipo_lambda_loss)(s, rewards))
    for _ in range(60):
        s = step(s)
    assert list(np.argsort(-s[0])) == [1, 2, 3, 0]
