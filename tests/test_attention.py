"""The attention routines against a masked softmax over plain, unshared rows, in float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.machine.mesh import make_mesh, shard_batch
from jaxmllm.model import attention

B, G, S, T, N, K, H = 2, 3, 7, 4, 4, 2, 6
LENGTHS = np.array([7, 4], np.int32)


def random(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def attend(q, k, v, visible):
    """One row: q [X, N, H], k and v [Y, K, H], visible [X, Y]; a query head n reads key head n // (N / K)."""
    out = np.zeros(q.shape)
    for x, n in np.ndindex(q.shape[:2]):
        keys = np.flatnonzero(visible[x])
        head = n // (q.shape[1] // k.shape[1])
        scores = k[keys, head].astype(np.float64) @ q[x, n] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[x, n] = weights / weights.sum() @ v[keys, head]
    return out


def shared_inputs():
    return random((B, G, T, N, H), (B, G, T, K, H), (B, G, T, K, H), (B, S, K, H), (B, S, K, H))


def test_completions_see_their_prompt_and_themselves():
    q, k, v, prompt_k, prompt_v = shared_inputs()
    mask = attention.causal_mask(T)[None]
    got = jax.jit(attention.completion)(q, k, v, mask, prompt_k, prompt_v, LENGTHS)
    for b, g in np.ndindex(B, G):
        n = LENGTHS[b]
        keys, values = np.concatenate([prompt_k[b, :n], k[b, g]]), np.concatenate([prompt_v[b, :n], v[b, g]])
        visible = np.arange(n + T) <= n + np.arange(T)[:, None]
        np.testing.assert_allclose(got[b, g], attend(q[b, g], keys, values, visible), atol=2e-6)


def test_decode_sees_the_cache_up_to_its_step():
    """One query a completion; the cache has room for T tokens, those after `step` hold anything."""
    q, k, v, prompt_k, prompt_v = shared_inputs()
    step = 2
    mask = (np.arange(T) <= step)[None, None, None]
    got = jax.jit(attention.completion)(q[:, :, :1], k * 1, v, mask, prompt_k, prompt_v, LENGTHS)
    for b, g in np.ndindex(B, G):
        n = LENGTHS[b]
        keys = np.concatenate([prompt_k[b, :n], k[b, g, : step + 1]])
        values = np.concatenate([prompt_v[b, :n], v[b, g, : step + 1]])
        expected = attend(q[b, g, :1], keys, values, np.ones((1, n + step + 1), bool))
        np.testing.assert_allclose(got[b, g], expected, atol=2e-6)


def test_padding_and_the_other_completions_do_not_leak():
    q, k, v, prompt_k, prompt_v = shared_inputs()
    run = jax.jit(lambda *a: attention.completion(*a[:3], attention.causal_mask(T)[None], *a[3:], LENGTHS))
    before = np.asarray(run(q, k, v, prompt_k, prompt_v))  # finished before its arguments are overwritten
    prompt_k[1, 4:], prompt_v[1, 4:] = 1e4, -1e4  # behind the end of row 1
    k[:, 2], v[:, 2] = 50, 1e6  # another completion
    after = run(q, k, v, prompt_k, prompt_v)
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert np.abs(before[:, 2] - after[:, 2]).max() > 1


def test_gradient_equals_that_of_unshared_rows():
    """The shared prompt's gradient is the sum over its completions."""
    inputs = shared_inputs()
    weight = random((B, G, T, N, H), seed=1)[0]

    def shared(q, k, v, prompt_k, prompt_v):
        out = attention.completion(q, k, v, attention.causal_mask(T)[None], prompt_k, prompt_v, LENGTHS)
        return jnp.sum(out * weight)

    def unshared(q, k, v, prompt_k, prompt_v):
        total = 0.0
        for b in range(B):
            n = LENGTHS[b]
            for g in range(G):
                keys = jnp.concatenate([prompt_k[b, :n], k[b, g]])
                values = jnp.concatenate([prompt_v[b, :n], v[b, g]])
                heads = jnp.arange(N) // (N // K)
                scores = jnp.einsum("xnh,ynh->nxy", q[b, g], keys[:, heads]) / np.sqrt(H)
                visible = np.arange(n + T) <= n + np.arange(T)[:, None]
                weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
                total += jnp.sum(jnp.einsum("nxy,ynh->xnh", weights, values[:, heads]) * weight[b, g])
        return total

    ours = jax.jit(jax.grad(shared, argnums=range(5)))(*inputs)
    plain = jax.jit(jax.grad(unshared, argnums=range(5)))(*inputs)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_causal_prompt():
    q, k, v = random((B, S, N, H), (B, S, K, H), (B, S, K, H))
    got = jax.jit(attention.causal)(q, k, v)
    for b in range(B):
        np.testing.assert_allclose(got[b], attend(q[b], k[b], v[b], np.tri(S, dtype=bool)), atol=2e-6)


def test_few_queries_at_a_time(monkeypatch):
    """Values and gradients as with all scores at once."""
    q, k, v = random((B, 192, N, H), (B, 192, K, H), (B, 192, K, H))
    valid = np.arange(192) < np.array([[192], [50]])
    same = random((B, 192, N, H))[0]

    def run():
        def loss(q, k, v):
            out = attention.causal(q, k, v), attention.full(q, same, v.repeat(2, axis=2), valid)
            return sum(jnp.sum(jnp.sin(a)) for a in out), out

        grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return *grads, *out

    whole = run()
    monkeypatch.setattr(attention, "SCORES", 100 * B * N * 192)
    assert attention.queries_at_once(192, B * N * 192) == 96
    for a, b in zip(run(), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    ("queries", "limit", "expected"), [(1024, 1 << 21, 256), (1024, 1 << 40, 1024), (1024, 1, 64), (131, 1, 131)]
)
def test_queries_at_once(monkeypatch, queries, limit, expected):
    monkeypatch.setattr(attention, "SCORES", limit)
    assert attention.queries_at_once(queries, 8 * 1024) == expected


def test_full_attention_skips_padding():
    q, k, v = random((B, S, N, H), (B, S, N, H), (B, S, N, H))
    valid = np.array([[1, 1, 0, 1, 0, 0, 1], [0] * 7], bool)  # holes as in a window at the edge; a row of padding
    got = np.asarray(jax.jit(attention.full)(q, k, v, valid))
    visible = np.broadcast_to(valid[0], (S, S))
    np.testing.assert_allclose(got[0], attend(q[0], k[0], v[0], visible), atol=2e-6)
    assert np.isfinite(got).all()


def test_bfloat16_keeps_its_dtype_and_sums_in_float32():
    q, k, v, prompt_k, prompt_v = (a.astype(jnp.bfloat16) for a in shared_inputs())
    got = attention.completion(q, k, v, attention.causal_mask(T)[None], prompt_k, prompt_v, LENGTHS)
    wide = [np.asarray(a, np.float32) for a in (q, k, v, prompt_k, prompt_v)]
    expected = attention.completion(*wide[:3], attention.causal_mask(T)[None], *wide[3:], LENGTHS)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=0.03)


@pytest.mark.parametrize(
    ("backend", "length", "width", "dtype", "kernel"),
    [
        ("cpu", 1024, 128, "bfloat16", "dense"),
        ("gpu", 1000, 80, "bfloat16", "cudnn"),
        ("gpu", 1000, 128, "float32", "dense"),  # cuDNN has no float32 attention
        ("gpu", 1000, 256, "bfloat16", "dense"),
        ("tpu", 1024, 128, "bfloat16", "splash"),
        ("tpu", 1000, 80, "float32", "splash"),  # padded
        ("tpu", 127, 128, "bfloat16", "dense"),  # less than a block
    ],
)
def test_kernel_by_backend_and_shape(monkeypatch, backend, length, width, dtype, kernel):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert attention.choose_kernel("auto", length, width, jnp.dtype(dtype)) == kernel
    assert attention.choose_kernel("dense", length, width, jnp.dtype(dtype)) == "dense"
    assert attention.choose_kernel("splash", 64, width, jnp.dtype(dtype)) == "dense"  # asked for, but does not fit


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU kernel, interpreted on the CPU."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    real = splash.make_splash_mqa_single_device
    monkeypatch.setattr(splash, "make_splash_mqa_single_device", lambda *a, **k: real(*a, **k, interpret=True))


def splash_inputs(rows, kv_heads):
    q, k, v = random((rows, 128, 2, 128), (rows, 128, kv_heads, 128), (rows, 128, kv_heads, 128))
    return q, k, v, np.arange(128) < np.linspace(40, 128, rows)[:, None]


@pytest.mark.usefixtures("interpreted")
def test_splash_equals_dense():
    """Head grouping, scale, causal mask and padding; value and gradient, inside a scan that is rematerialised."""
    q, k, v, valid = splash_inputs(1, 1)

    def loss(kernel):
        def layer(x, _):
            return x + attention.causal(x, k, v, kernel), None

        def run(q):
            return jnp.sum(jax.lax.scan(jax.checkpoint(layer), q, None, length=2)[0] ** 2)

        return jax.jit(jax.value_and_grad(run))(q)

    for a, b in zip(loss("splash"), loss("dense"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)
    a, b = (attention.full(q, k, v, valid, kernel) for kernel in ("splash", "dense"))
    np.testing.assert_allclose(a[valid], b[valid], atol=2e-5)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("prompt", "own", "heads", "width"), [(256, 128, (2, 1), 128), (130, 61, (4, 2), 80)])
def test_splash_over_prompt_and_completions(prompt, own, heads, width):
    """All three blocks in one kernel: values and gradients of real tokens, with padding, lengths and heads of odd sizes."""
    groups, (n, kv) = 2, heads
    x = prompt + groups * own
    q, k, v, weight = random((2, x, n, width), (2, x, kv, width), (2, x, kv, width), (2, x, n, width))
    lengths = np.array([prompt, prompt - 29], np.int32)
    real = (np.arange(x) < lengths[:, None]) | (np.arange(x) >= prompt)
    weight *= real[..., None, None]

    def run(kernel):
        def loss(q, k, v):
            out = attention.shared(q, k, v, lengths, prompt, groups, kernel)
            return jnp.sum(out * weight), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return (out * real[..., None, None], *grads)

    for a, b in zip(run("splash"), run("dense"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_splash_on_a_mesh(kv_heads):
    """Rows and, where they divide, heads are split over the devices: the compiler could not do it."""
    q, k, v, _ = splash_inputs(4, kv_heads)
    mesh = make_mesh(replica=2, fsdp=2, tensor=2)
    lengths = np.full(4, 64, np.int32)

    def run(q, k, v, lengths, kernel):
        def layer(q, _):
            return attention.shared(q, k, v, lengths, 64, 2, kernel), None

        return jax.lax.scan(layer, q, None, length=2)[0]

    got = jax.jit(run, static_argnums=4)(*shard_batch((q, k, v, lengths), mesh), "splash")
    np.testing.assert_allclose(got, run(q, k, v, lengths, "dense"), atol=2e-5)
