"""One forward, three uses: shared prompts, cached decoding and padding change nothing."""

import dataclasses
import functools

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.data.images import PixelConfig
from jaxmllm.model import embedding, family
from jaxmllm.model.logprobs import Sampling
from jaxmllm.rollout.scorer import score
from jaxmllm.types import Prompts
from tests.support import tiny

KINDS = ("qwen2_5_vl", "qwen2_vl")
G, T = 3, 5
ATOL = 1e-5


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    """(config, parameters, prompts with images and videos, completions, their log-probabilities)."""
    cfg = tiny.config(request.param)
    params = tiny.params(cfg)
    prompts, completions = tiny.prompts(cfg), tiny.completions(len(tiny.MIXED), G, T)
    return cfg, params, prompts, completions, logps(params, cfg, prompts, completions)


def logps(params, cfg, prompts, completions):
    return np.asarray(SCORE(params, cfg, prompts, completions, Sampling())[0])


SCORE = jax.jit(score, static_argnums=(1, 4))


def close(a, b, lengths):
    """Equal on the real tokens of every completion."""
    real = np.arange(T) < lengths[..., None]
    np.testing.assert_allclose(np.where(real, a, 0)[..., :T], np.where(real, b, 0), atol=ATOL)


def repeat_rows(prompts: Prompts, times: int) -> Prompts:
    return jax.tree.map(lambda x: np.repeat(x, times, axis=0), prompts)


# ---------------------------------------------------------------- shared = unshared


def test_shared_equals_repeated_prompts(model):
    """Every completion with its own copy of the prompt, G = 1."""
    cfg, params, prompts, completions, shared = model
    alone = jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), completions)
    got = logps(params, cfg, repeat_rows(prompts, G), alone)
    close(got.reshape(shared.shape), shared, completions.lengths)


def test_shared_equals_one_plain_sequence(model):
    """Prompt and completion joined to one prompt: no completion part at all, one causal mask, no cache."""
    cfg, params, prompts, completions, shared = model
    rows, s = len(prompts.lengths), prompts.tokens.shape[1]
    joined = repeat_rows(prompts, G)
    tokens = np.zeros((rows * G, s + T), np.int32)
    positions = np.zeros((rows * G, 3, s + T), np.int32)
    index = np.full((rows * G, s + T), -1, np.int32)
    for i in range(rows * G):
        n = joined.lengths[i]
        tokens[i, :n], tokens[i, n : n + T] = joined.tokens[i, :n], completions.tokens.reshape(-1, T)[i]
        positions[i, :, :n] = joined.positions[i, :, :n]
        positions[i, :, n : n + T] = joined.next_position[i] + np.arange(T)
        index[i, :n] = joined.vision_index[i, :n]
    joined = joined.replace(tokens=tokens, positions=positions, vision_index=index, lengths=joined.lengths + T)

    @jax.jit
    def plain(params, joined):
        hidden, _ = family.forward(params, cfg, joined)
        return jax.nn.log_softmax(embedding.logits(params, hidden), axis=-1)

    log_probs = np.asarray(plain(params, joined))
    got = np.zeros((rows * G, T))
    for i, t in np.ndindex(*got.shape):
        at = joined.lengths[i] - T + t
        got[i, t] = log_probs[i, at - 1, tokens[i, at]]
    close(got.reshape(shared.shape), shared, completions.lengths)


def test_gradient_of_shared_equals_repeated_prompts(model):
    """Of every parameter, the tower included."""
    cfg, params, prompts, completions, _ = model
    weights = np.random.default_rng(0).normal(size=completions.weights.shape) * completions.weights

    def gradient(prompts, completions, weights):
        def loss(params):
            return jnp.sum(score(params, cfg, prompts, completions, Sampling())[0] * weights)

        return jax.jit(jax.grad(loss))(params)

    shared = gradient(prompts, completions, weights)
    alone = jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), completions)
    repeated = gradient(repeat_rows(prompts, G), alone, weights.reshape(-1, 1, T))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(shared))
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(repeated), strict=True):
        np.testing.assert_allclose(a, b, atol=ATOL * largest)


# ---------------------------------------------------------------- cached = full


def test_cached_decode_equals_full_forward(model):
    """Token by token after a prefill; logits and not only the chosen token's probability."""
    cfg, params, prompts, completions, _ = model

    @jax.jit
    def full(params, prompts, completions):
        return embedding.logits(params, family.forward(params, cfg, prompts, completions)[1])

    @jax.jit
    def cached(params, prompts, tokens):
        hidden, cache = family.prefill(params, cfg, prompts, G, T)

        def one(cache, step):
            hidden, cache = family.decode(params, cfg, tokens[:, :, step], step, cache)
            return cache, hidden

        _, later = jax.lax.scan(one, cache, jnp.arange(T - 1))
        first = jnp.broadcast_to(hidden[:, None], later.shape[1:])
        return embedding.logits(params, jnp.concatenate([first[None], later]).transpose(1, 2, 0, 3))

    got, expected = cached(params, prompts, completions.tokens), full(params, prompts, completions)
    np.testing.assert_allclose(got, expected, atol=ATOL)


# ---------------------------------------------------------------- what must not matter


def test_padding_does_not_matter(model):
    """Wider buckets of tokens, frames, windows and completions, all filled with garbage."""
    cfg, params, _, completions, expected = model
    wide = tiny.prompts(cfg, s=80, f=7, w=9)
    extra = np.random.default_rng(3).integers(0, 500, (*completions.lengths.shape, 4)).astype(np.int32)
    longer = completions.replace(tokens=np.concatenate([completions.tokens, extra], axis=-1))
    close(logps(params, cfg, wide, longer)[..., :T], expected, completions.lengths)


def test_order_of_rows_and_completions_does_not_matter(model):
    cfg, params, prompts, completions, expected = model
    rows, groups = np.array([2, 0, 3, 1]), np.array([1, 2, 0])
    turned = jax.tree.map(lambda x: x[rows][:, groups], completions)
    got = logps(params, cfg, jax.tree.map(lambda x: x[rows], prompts), turned)
    close(got, expected[rows][:, groups], completions.lengths[rows][:, groups])


@functools.cache
def value_and_gradient(**run):
    cfg = tiny.config()
    params, prompts, completions = tiny.params(cfg), tiny.prompts(cfg, [[3, (4, 6), 2]]), tiny.completions(1, 2, T)
    cfg = dataclasses.replace(cfg, **run)
    return jax.jit(jax.value_and_grad(lambda p: jnp.mean(score(p, cfg, prompts, completions, Sampling())[0])))(params)


@pytest.mark.parametrize("run", [{"remat": "full"}, {"remat": "dots"}, {"unroll": True}], ids=str)
def test_how_it_runs_does_not_matter(run):
    """Recomputation and loop form: the same value and the same gradient."""
    expected, got = value_and_gradient(), value_and_gradient(**run)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, atol=ATOL)


def test_a_given_tower_output_is_used(model):
    cfg, params, prompts, completions, expected = model
    tokens = jax.jit(family.encode, static_argnums=1)(params, cfg, prompts.vision)
    got = jax.jit(score, static_argnums=(1, 4))(params, cfg, prompts, completions, Sampling(), tokens)[0]
    close(got, expected, completions.lengths)


def test_bfloat16_activations_stay_near(model):
    cfg, params, prompts, completions, expected = model
    half = dataclasses.replace(cfg, dtype="bfloat16")
    hidden, _ = jax.eval_shape(lambda p: family.forward(p, half, prompts, completions), params)
    assert hidden.dtype == jnp.bfloat16
    gap = np.abs(logps(params, half, prompts, completions) - expected) * completions.weights
    assert 0 < gap.sum() / completions.weights.sum() < 0.1


def test_a_prompts_pictures_are_its_own(model):
    """Changing one row's pixels changes that row alone; changing the order of its pictures changes it too."""
    cfg, params, prompts, completions, expected = model
    patches = prompts.vision.patches.copy()
    patches[1] += 1
    got = logps(params, cfg, prompts.replace(vision=prompts.vision.replace(patches=patches)), completions)
    changed = np.abs(got - expected).max((1, 2)) > 1e-3
    assert changed.tolist() == [False, True, False, False]


# ---------------------------------------------------------------- compilation


def test_pictures_of_many_sizes_run_as_one_program():
    """Rows of other sizes, counts and kinds inside one bucket are data, not shapes."""
    cfg = tiny.config()
    params, pixels = tiny.params(cfg), PixelConfig(2, 2, 2, 8)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiled.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
    )
    run = jax.jit(lambda params, prompts, completions: score(params, cfg, prompts, completions, Sampling()))
    rng = np.random.default_rng(0)
    for number in range(20):
        rows = []
        for _ in range(2):
            h, w = 2 * rng.integers(1, 5, 2)
            parts = [int(rng.integers(1, 9)), (h, w), int(rng.integers(0, 5))]
            if rng.random() < 0.5:
                parts.insert(1, tiny.video(int(rng.integers(1, 3)), 4, 6))
            rows.append(tiny.row(parts, pixels, rng))
        run(params, tiny.pad(rows, pixels, s=64, f=3, w=6), tiny.completions(2, G, T, number))
        if number == 0:
            assert compiled
            compiled.clear()
        assert not compiled, f"batch {number} compiled again"
