"""TPU splash attention, a fused kernel that skips the blocks of scores which a mask leaves empty.

No [X, X] array is ever in main memory. The compiler cannot partition the kernel, so on several devices each runs it on its own
rows and heads. Lengths are padded to whole blocks and heads to whole lanes; queries that share a key head are one call.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Bool, Float

from jaxmllm.machine.mesh import ROWS, P, mesh_of

LANES = 128


@dataclasses.dataclass(frozen=True)
class Visible(masks.Mask):
    """Who sees whom in `length` tokens: all see all, or causally a prompt of `prompt` tokens and behind it each run of `own`
    tokens itself."""

    length: int
    prompt: int | None = None  # None: all see all
    own: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.length, self.length

    def __getitem__(self, index: tuple[slice, slice]) -> Bool[np.ndarray, "q k"]:
        q, k = (np.arange(self.length)[one] for one in index)
        q, k = q[:, None], k[None]
        if self.prompt is None:
            return np.ones(np.broadcast_shapes(q.shape, k.shape), bool)
        run = max(self.own, 1)
        return (k <= q) & ((k < self.prompt) | ((q - self.prompt) // run == (k - self.prompt) // run))


@functools.cache
def visible_blocks(mask: Visible, size: int) -> int:
    """Blocks of size x size scores that hold a visible one: those that the kernel computes."""
    cuts = [slice(i, i + size) for i in range(0, mask.length, size)]
    return sum(bool(mask[q, k].any()) for q in cuts for k in cuts)


def block_size(length: int) -> int:
    """Of the scores that are computed at once: large enough for the matrix unit, with little padding."""
    return 512 if length >= 1024 else 256 if length >= 512 else LANES


def attend(
    q: Float[Array, "B X N H"],
    k: Float[Array, "B X K H"],
    v: Float[Array, "B X K H"],
    valid: Bool[Array, "B X"],
    *,
    prompt: int | None = None,
    own: int = 0,
) -> Float[Array, "B X N H"]:
    """Attention to the `valid` keys that `Visible` shows. A query that sees none returns a finite garbage."""
    x, n, h = q.shape[1:]
    size = block_size(x)
    length, width = size * math.ceil(x / size), LANES * math.ceil(h / LANES)
    scale = h**-0.5

    def padded(a):
        return jnp.pad(a, [(0, 0), (0, length - x), (0, 0), (0, width - h)])

    mask = Visible(length, prompt, own)

    def local(q, k, v, seen):
        return _local(q, k, v, seen, mask, size)

    arrays = (padded(q * scale), padded(k), padded(v), jnp.pad(valid, [(0, 0), (0, length - x)]).astype(jnp.int32))
    mesh = mesh_of(q)
    if mesh is None or mesh.size == 1:
        out = local(*arrays)
    else:
        heads = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
        split = P(ROWS, None, heads, None)
        # check_vma: the kernel's outputs carry no annotation of what they vary over
        run = jax.shard_map(
            local, mesh=mesh, in_specs=(split, split, split, P(ROWS, None)), out_specs=split, check_vma=False
        )
        out = run(*arrays)
    return out[:, :x, :, :h]


def _local(q, k, v, seen, mask: Visible, size: int):
    b, x, n, h = q.shape
    heads = k.shape[2]
    q = q.reshape(b, x, heads, n // heads, h).transpose(0, 2, 3, 1, 4)
    k, v = (a.transpose(0, 2, 1, 3) for a in (k, v))
    # a kernel of its own for the queries' gradient: the fused one writes a copy of it for every block of keys
    sizes = splash.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
    )
    # built anew in every trace: it holds arrays that belong to the trace
    kernel = splash.make_splash_mqa_single_device(masks.MultiHeadMask([mask] * (n // heads)), block_sizes=sizes)
    of_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))

    def of_row(q, k, v, seen):
        return of_heads(q, k, v, splash.SegmentIds(jnp.ones_like(seen), seen))

    # the name tells whoever counts operations (jaxmllm.plan.flops) what no compiler knows
    with jax.named_scope(f"splash_{b * n * visible_blocks(mask, size)}_blocks_of_{size}"):
        out = jax.vmap(of_row)(q, k, v, seen)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, x, n, h)
