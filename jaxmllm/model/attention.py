"""Shared-prompt attention: one routine for prefill, decode, scoring and training.

A sequence is a prompt part of S tokens followed by G completions of T tokens. The prompt attends causally to itself;
completion g attends to its prompt and causally to itself:

              prompt   c0    c1          prefill : G = 0
    prompt      \\                       training: all three blocks
    c0          ##     \\                decode  : one query a completion, against the cache
    c1          ##           \\

The completion part is two score blocks with one softmax; the prompt's keys are never repeated G times. Fused kernels
(`kernel`): on TPU one for all three blocks and for the tower's full frames, on GPU for the prompt's block and full frames.
Everything else is dense.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

BACKENDS = {"gpu": "cudnn", "tpu": "splash"}  # the fused kernel of each
SCORES = 1 << 21  # taken at once by dense attention: 8 MiB
MASKED = -1e30  # finite, so that a fully masked row gives a finite (unused) output instead of NaN


def choose_kernel(kernel: str, length: int, head_dim: int, dtype) -> str:
    """Which implementation attends over `length` tokens: `kernel`, or by backend for `auto`; dense where it does not fit."""
    if kernel == "auto":
        kernel = BACKENDS.get(jax.default_backend(), "dense")
    fits = {
        "dense": True,
        "cudnn": dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128,
        "splash": length >= 128,  # a block; shorter ones are mostly padding
    }
    return kernel if fits[kernel] else "dense"


def _heads_first(q: Float[Array, "B X N H"], kv_heads: int) -> Float[Array, "B K RX H"]:
    """Queries that share a key/value head, side by side: attention is then one batched matrix product a key head."""
    b, x, n, h = q.shape
    return q.reshape(b, x, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, -1, h)


def _heads_last(out: Float[Array, "B K RX H"], x: int) -> Float[Array, "B X N H"]:
    b, k, rx, h = out.shape
    return out.reshape(b, k, rx // x, x, h).transpose(0, 3, 1, 2, 4).reshape(b, x, -1, h)


def _scores(q: Float[Array, "*b RX H"], k: Float[Array, "*b Y H"], scale: float) -> Float[Array, "*b RX Y"]:
    return jnp.einsum("...xh,...yh->...xy", q, k, preferred_element_type=jnp.float32) * scale


def dense(
    q: Float[Array, "B X N H"],
    k: Float[Array, "B Y K H"],
    v: Float[Array, "B Y K H"],
    mask: Bool[Array, "#B #X Y"] | None = None,
) -> Float[Array, "B X N H"]:
    """Plain attention with a float32 softmax; `mask` is True where a query may look.

    Many scores are taken some queries at a time, and again in the backward pass: they then stay in a processor's cache.
    """
    b, x, n, _ = q.shape
    some = queries_at_once(x, b * n * k.shape[1])
    if some == x:
        return _dense(q, k, v, mask)

    def cut(a):
        return a.reshape(a.shape[0], -1, some, *a.shape[2:]).swapaxes(0, 1)

    def part(_, inputs):
        queries, rows = inputs
        return None, _dense(queries, k, v, mask if rows is None else rows)

    rows = cut(mask) if mask is not None and mask.shape[1] == x else None
    _, out = jax.lax.scan(jax.checkpoint(part), None, (cut(q), rows))
    return out.swapaxes(0, 1).reshape(q.shape)


def queries_at_once(queries: int, scores: int) -> int:
    """The largest divisor of `queries`, of at least 64, with at most SCORES scores, each query having `scores`; or all."""
    sizes = [n for n in range(64, queries) if queries % n == 0]
    few = [n for n in sizes if n * scores <= SCORES]
    return queries if queries * scores <= SCORES or not sizes else max(few, default=sizes[0])


def _dense(q, k, v, mask):
    x, heads = q.shape[1], k.shape[2]
    queries, k, v = _heads_first(q, heads), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = _scores(queries, k, q.shape[-1] ** -0.5)
    if mask is not None:
        grouped = scores.reshape(*scores.shape[:2], -1, x, scores.shape[-1])
        scores = jnp.where(mask[:, None, None], grouped, MASKED).reshape(scores.shape)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = weights.astype(v.dtype) @ v / weights.sum(-1, keepdims=True)
    return _heads_last(out.astype(q.dtype), x)


def causal_mask(length: int) -> Bool[Array, "1 X X"]:
    return jnp.asarray(np.tril(np.ones((1, length, length), bool)))


def causal(
    q: Float[Array, "B S N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], kernel: str = "auto"
) -> Float[Array, "B S N H"]:
    """Causal self-attention of the prompt. Rows are right-padded, so no real token ever sees padding."""
    kernel = choose_kernel(kernel, q.shape[1], q.shape[-1], q.dtype)
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    if kernel == "splash":
        return _splash(q, k, v, jnp.ones(q.shape[:2], bool), prompt=q.shape[1])
    return dense(q, k, v, causal_mask(q.shape[1]))


def full(
    q: Float[Array, "B X N H"],
    k: Float[Array, "B X N H"],
    v: Float[Array, "B X N H"],
    valid: Bool[Array, "B X"],
    kernel: str = "auto",
) -> Float[Array, "B X N H"]:
    """Attention between all valid tokens of a row (a window or a frame of the vision tower)."""
    kernel = choose_kernel(kernel, q.shape[1], q.shape[-1], q.dtype)
    if kernel == "cudnn":
        mask = jnp.broadcast_to(valid[:, None, None, :], (q.shape[0], 1, q.shape[1], q.shape[1]))
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    if kernel == "splash":
        return _splash(q, k, v, valid)
    return dense(q, k, v, valid[:, None, :])


def shared(
    q: Float[Array, "B X N H"],
    k: Float[Array, "B X K H"],
    v: Float[Array, "B X K H"],
    prompt_lengths: Int[Array, "B"],
    prompt: int,
    groups: int,
    kernel: str = "auto",
) -> Float[Array, "B X N H"]:
    """A whole sequence: the prompt's causal self-attention and, behind its `prompt` tokens, `groups` completions."""
    if groups == 0:
        return causal(q, k, v, kernel)
    b, x = q.shape[:2]
    own = (x - prompt) // groups
    if choose_kernel(kernel, x, q.shape[-1], q.dtype) == "splash":
        place = jnp.arange(x)
        valid = (place < prompt_lengths[:, None]) | (place >= prompt)
        return _splash(q, k, v, valid, prompt=prompt, own=own)
    first = causal(q[:, :prompt], k[:, :prompt], v[:, :prompt], kernel)
    own_q, own_k, own_v = (a[:, prompt:].reshape(b, groups, own, *a.shape[2:]) for a in (q, k, v))
    out = completion(own_q, own_k, own_v, causal_mask(own)[None], k[:, :prompt], v[:, :prompt], prompt_lengths)
    return jnp.concatenate([first, out.reshape(b, -1, *out.shape[3:])], axis=1)


def completion(
    q: Float[Array, "B G T N H"],
    k: Float[Array, "B G U K H"],
    v: Float[Array, "B G U K H"],
    mask: Bool[Array, "#B #G T U"],
    prompt_k: Float[Array, "B S K H"],
    prompt_v: Float[Array, "B S K H"],
    prompt_lengths: Int[Array, "B"],
) -> Float[Array, "B G T N H"]:
    """Completions attend to their prompt and to themselves under one softmax.

    `mask[..., t, u]` is True where query t may see the completion's own key u (causal in training, `u <= step` in decode).
    """
    b, g, t, n, h = q.shape
    s, heads = prompt_k.shape[1], k.shape[3]
    # [B, K, G, R T, H]: the same array serves both blocks, only grouped differently
    queries = q.reshape(b, g, t, heads, n // heads, h).transpose(0, 3, 1, 4, 2, 5).reshape(b, heads, g, -1, h)
    k, v = k.transpose(0, 3, 1, 2, 4), v.transpose(0, 3, 1, 2, 4)
    prompt_k, prompt_v = prompt_k.transpose(0, 2, 1, 3), prompt_v.transpose(0, 2, 1, 3)

    own = _scores(queries, k, h**-0.5).reshape(b, heads, g, n // heads, t, -1)
    own = jnp.where(mask[:, None, :, None], own, MASKED).reshape(b, heads, g, (n // heads) * t, -1)
    shared = _scores(queries.reshape(b, heads, -1, h), prompt_k, h**-0.5)
    visible = jnp.arange(s) < prompt_lengths[:, None]
    shared = jnp.where(visible[:, None, None], shared, MASKED).reshape(*own.shape[:-1], s)

    top = jnp.maximum(own.max(-1, keepdims=True), shared.max(-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    own, shared = jnp.exp(own - top), jnp.exp(shared - top)
    total = own.sum(-1, keepdims=True) + shared.sum(-1, keepdims=True)
    from_prompt = shared.reshape(b, heads, -1, s).astype(v.dtype) @ prompt_v
    out = own.astype(v.dtype) @ v + from_prompt.reshape(queries.shape)
    out = (out / total).astype(q.dtype)
    return out.reshape(b, heads, g, n // heads, t, h).transpose(0, 2, 4, 1, 3, 5).reshape(q.shape)


def _splash(*arrays, **visible):
    from jaxmllm.model import splash  # Pallas's TPU part: a second to import, and not everywhere there

    return splash.attend(*arrays, **visible)
