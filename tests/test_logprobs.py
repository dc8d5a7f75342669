"""Token log-probabilities against a plain log-softmax, the sampled distribution against transformers' logits processors."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.errors import InputError
from jaxmllm.model import logprobs
from jaxmllm.model.logprobs import MASKED, Sampling, seen_tokens, token_logprobs, warp
from jaxmllm.plan.flops import count

B, G, T, D, V = 2, 3, 7, 8, 50


def inputs(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, G, T, D)).astype(np.float32)
    kernel = (scale * rng.normal(size=(D, V))).astype(np.float32)
    return hidden, kernel, rng.integers(0, V, (B, G, T)).astype(np.int32)


def plain(hidden, kernel, targets):
    """Log-probabilities and entropies in one piece."""
    logits = hidden @ kernel
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return picked, -(jnp.exp(log_probs) * log_probs).sum(-1)


@pytest.mark.parametrize("chunk", [1, 3, T, 100, None])
def test_value_and_gradient_for_any_chunk(chunk):
    hidden, kernel, targets = inputs()
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(2, B, G, T)).astype(np.float32)

    def loss(function):
        def run(hidden, kernel):
            out = function(hidden, kernel, targets)
            return sum(jnp.sum(w * o) for w, o in zip(weights, out, strict=True)), out

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(hidden, kernel)

    (_, ours), our_grads = loss(lambda *a: token_logprobs(*a, chunk=chunk))
    (_, expected), grads = loss(plain)
    for a, b in zip([*ours, *our_grads], [*expected, *grads], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"banned": (7, 5000)}, {"temperature": 1.3, "banned": (0, 8191)}]
)
def test_gradient_over_blocks_of_the_vocabulary(options):
    """Against automatic differentiation of the whole distribution; one target is banned."""
    rng = np.random.default_rng(2)
    vocab, sampling = 4 * logprobs.BLOCK, Sampling(**options)
    hidden, kernel = (rng.normal(size=s).astype(np.float32) for s in ((3, T, D), (D, vocab)))
    targets = rng.integers(0, vocab, (3, T)).astype(np.int32)
    targets[0, 0] = 7
    weights = rng.normal(size=(2, 3, T)).astype(np.float32)
    assert logprobs.vocabulary_block(vocab, 3 * T) < vocab

    def whole(hidden, kernel, targets):
        log_probs = jax.nn.log_softmax(jax.vmap(lambda h: warp(h @ kernel, sampling))(hidden), axis=-1)
        picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        return picked, -(jnp.exp(log_probs) * log_probs).sum(-1)

    def gradients(function):
        def loss(hidden, kernel):
            return sum(jnp.sum(w * o) for w, o in zip(weights, function(hidden, kernel, targets), strict=True))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, kernel)

    for chunk in (None, 2):
        ours = gradients(lambda *a, chunk=chunk: token_logprobs(*a, sampling, chunk=chunk))
        for a, b in zip(ours, gradients(whole), strict=True):
            # float32 sums over the vocabulary: rounding grows with the largest entry, and differs between processors
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1, float(jnp.abs(b).max())))


def test_any_leading_axes():
    hidden, kernel, targets = inputs()
    whole = token_logprobs(hidden, kernel, targets)
    one = token_logprobs(hidden[1, 2], kernel, targets[1, 2], chunk=2)
    for a, b in zip(whole, one, strict=True):
        np.testing.assert_allclose(a[1, 2], b, atol=1e-6)


def test_bfloat16_gives_float32():
    hidden, kernel, targets = inputs()
    logps, entropies = token_logprobs(hidden.astype(jnp.bfloat16), kernel, targets)
    assert logps.dtype == entropies.dtype == jnp.float32
    np.testing.assert_allclose(logps, plain(hidden, kernel, targets)[0], atol=0.1)


def test_the_whole_vocabulary_times_time_is_never_held():
    rows, length, vocab = 4, 128, 4096
    hidden = jax.ShapeDtypeStruct((rows, length, D), jnp.float32)
    kernel = jax.ShapeDtypeStruct((D, vocab), jnp.float32)
    targets = np.zeros((rows, length), np.int32)

    def temporary(function):
        gradient = jax.grad(lambda h, k: jnp.sum(function(h, k, targets)[0]), argnums=(0, 1))
        return jax.jit(gradient).lower(hidden, kernel).compile().memory_analysis().temp_size_in_bytes

    whole = rows * length * vocab * 4
    assert temporary(plain) >= whole
    assert temporary(lambda *a: token_logprobs(*a, chunk=8)) < whole / 4


@pytest.mark.parametrize(("wanted", "products"), [((0,), 3), ((1,), 3), ((0, 1), 4)])
def test_logits_are_computed_twice_and_a_frozen_kernel_gets_no_gradient(wanted, products):
    hidden, kernel = np.zeros((4, 64, D), np.float32), np.zeros((D, 4 * logprobs.BLOCK), np.float32)
    targets = np.zeros((4, 64), np.int32)
    gradient = jax.grad(lambda *a: jnp.sum(token_logprobs(*a, targets, chunk=16)[0]), argnums=wanted)
    assert count(gradient, hidden, kernel) == products * 2 * 4 * 64 * kernel.size


def test_no_mask_of_the_whole_vocabulary_is_held(monkeypatch):
    monkeypatch.setattr(logprobs, "BLOCK_ELEMENTS", 1 << 19)
    rows, length, vocab = 4, 64, 32 * logprobs.BLOCK
    hidden = jax.ShapeDtypeStruct((rows, length, D), jnp.float32)
    kernel = jax.ShapeDtypeStruct((D, vocab), jnp.float32)
    targets = np.zeros((rows, length), np.int32)
    banned = Sampling(banned=(3, 17))
    gradient = jax.grad(lambda h, k: jnp.sum(token_logprobs(h, k, targets, banned)[0]), argnums=(0, 1))
    held = jax.jit(gradient).lower(hidden, kernel).compile().memory_analysis().temp_size_in_bytes
    assert held < rows * length * vocab  # a byte each


# ---------------------------------------------------------------- against transformers


def processors(sampling: Sampling):
    """transformers' processors of the same options in `generate`'s order."""
    lp = pytest.importorskip("transformers.generation.logits_process")
    out = []
    if sampling.repetition_penalty != 1.0:
        out.append(lp.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.banned:
        out.append(lp.SuppressTokensLogitsProcessor(list(sampling.banned), device="cpu"))
    if sampling.temperature != 1.0:
        out.append(lp.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        out.append(lp.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        out.append(lp.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        out.append(lp.MinPLogitsWarper(sampling.min_p))
    return out


def transformers_warp(logits, ids, sampling):
    torch = pytest.importorskip("torch")
    x = torch.tensor(logits)
    for processor in processors(sampling):
        x = processor(torch.tensor(ids), x)
    return x.numpy()


ONE = [
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 9},
    {"top_k": 1000},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7},
    {"banned": (3, 17)},
]
SEVERAL = [
    {"temperature": 0.8, "top_k": 12, "top_p": 0.9},
    {"temperature": 1.3, "top_p": 0.7, "min_p": 0.05},
    {"top_k": 5, "min_p": 0.3},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.2, "banned": (0, 49)},
]


@pytest.mark.parametrize("options", ONE + SEVERAL, ids=str)
def test_warp_equals_transformers(options):
    sampling = Sampling(**options).validate()
    rng = np.random.default_rng(5)
    logits = (3 * rng.normal(size=(16, V))).astype(np.float32)
    ids = rng.integers(0, V, (16, 10))
    seen = np.zeros((16, V), bool)
    seen[np.arange(16)[:, None], ids] = True
    expected = transformers_warp(logits, ids, sampling)
    got = np.asarray(warp(logits, sampling, seen))
    kept = np.isfinite(expected)
    np.testing.assert_array_equal(got > MASKED / 2, kept)
    np.testing.assert_allclose(got[kept], expected[kept], rtol=1e-6)


@pytest.mark.parametrize("options", [{}, *SEVERAL, {"repetition_penalty": 1.4}], ids=str)
def test_scores_under_the_sampled_distribution(options):
    """Token by token with transformers' processors, the repetition penalty's history growing with the completion."""
    sampling = Sampling(**options)
    hidden, kernel, targets = inputs(seed=2)
    prompt = np.random.default_rng(3).integers(0, V, (B, 6))
    lengths = np.array([6, 2], np.int32)
    seen = np.repeat(np.asarray(seen_tokens(prompt, lengths, V))[:, None], G, axis=1)
    logps, entropies = token_logprobs(hidden, kernel, targets, sampling, seen=seen)
    for b, g, t in itertools.product(range(B), range(G), range(T)):
        ids = [*prompt[b, : lengths[b]], *targets[b, g, :t]]
        x = transformers_warp((hidden[b, g, t] @ kernel)[None], np.array([ids]), sampling)[0].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            log_probs = x - np.log(np.exp(x - x.max()).sum()) - x.max()
            entropy = -np.nansum(np.exp(log_probs) * log_probs)
        np.testing.assert_allclose(entropies[b, g, t], entropy, atol=1e-5)
        if np.isfinite(log_probs[targets[b, g, t]]):
            np.testing.assert_allclose(logps[b, g, t], log_probs[targets[b, g, t]], atol=1e-5)
        else:
            assert logps[b, g, t] < MASKED / 2 and np.isfinite(logps[b, g, t])


def test_gradient_under_filters_is_finite_and_zero_outside_them():
    """A filter is a constant of the gradient: tokens it excludes get none."""
    sampling = Sampling(temperature=0.5, top_k=4, banned=(1,))
    logits = np.random.default_rng(0).normal(size=(1, V)).astype(np.float32)
    kept = np.asarray(warp(logits, sampling))[0] > MASKED / 2
    target = np.array([[int(np.flatnonzero(kept)[0])]], np.int32)

    def picked(logits):
        return token_logprobs(logits[:, None], jnp.eye(V), target, sampling)[0].sum()

    grad = np.asarray(jax.grad(picked)(logits))[0]
    probs = np.exp(logits[0] / 0.5) * kept
    expected = (np.eye(V)[target[0, 0]] - probs / probs.sum()) / 0.5
    np.testing.assert_allclose(grad, expected * kept, atol=1e-5)


def test_cold_temperatures_stay_finite():
    logits = np.random.default_rng(0).normal(size=(1, 3, V)).astype(np.float32)
    best = logits.argmax(-1).astype(np.int32)
    logps, entropies = token_logprobs(logits, jnp.eye(V), best, Sampling(temperature=1e-12, banned=(0,), top_k=3))
    np.testing.assert_allclose(logps, 0, atol=1e-6)
    np.testing.assert_allclose(entropies, 0, atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 30), st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999]), st.booleans())
def test_top_p_keeps_the_smallest_set(seed, scale, top_p, ties):
    """Against a sort in float64; entries as likely as the last kept one are all kept."""
    x = random_row(seed, scale, ties)
    kept = np.asarray(WARP(x, Sampling(top_p=top_p)))[0] > MASKED / 2
    probs = np.asarray(jax.nn.softmax(x, axis=-1), np.float64)[0]
    order = np.argsort(-probs)
    before = np.concatenate([[0], np.cumsum(probs[order])[:-1]])
    sure = np.abs(before - top_p) > 1e-5  # where rounding cannot decide
    if sure.all():
        expected = probs >= probs[order][before < top_p].min()
        np.testing.assert_array_equal(kept, expected & (x[0] > MASKED / 2))
    assert kept[order[0]] and probs[kept].sum() >= top_p - 1e-5


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1e30), st.sampled_from([1, 2, 7, 36]), st.booleans())
def test_top_k_keeps_the_largest(seed, scale, top_k, ties):
    """Against a sort; of any sign and size, entries equal to the last kept one are all kept."""
    x = random_row(seed, scale, ties)
    kept = np.asarray(WARP(x, Sampling(top_k=top_k)))[0] > MASKED / 2
    np.testing.assert_array_equal(kept, (x[0] >= np.sort(x[0])[-top_k]) & (x[0] > MASKED / 2))


def random_row(seed, scale, ties):
    """[1, 40] with four excluded entries."""
    x = np.random.default_rng(seed).normal(size=40)
    x = scale * (np.round(x) if ties else x)
    x[5:9] = MASKED
    return np.maximum(x, MASKED).astype(np.float32)[None]


WARP = jax.jit(warp, static_argnums=1)


def test_seen_tokens_stops_at_the_length():
    tokens = np.array([[3, 1, 3, 7], [2, 2, 9, 9]], np.int32)
    seen = np.asarray(seen_tokens(tokens, np.array([3, 2], np.int32), 10))
    assert [np.flatnonzero(row).tolist() for row in seen] == [[1, 3], [2]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("min_p", -0.2),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
    ],
)
def test_bad_options_are_named(field, value):
    with pytest.raises(InputError, match=field):
        dataclasses.replace(Sampling(), **{field: value}).validate()
