"""Token log-probabilities and entropies, under exactly the distribution that is sampled, never holding [B, T, vocab].

The vocabulary product runs over chunks of time, rematerialised in the backward pass. Chunks are of time and not of rows so
that rows keep their place on the mesh. A distribution without filters is summed block by block of the vocabulary inside a
chunk: then chunks can be long, the kernel's gradient is written once instead of added up over many chunks, and what passes
between the few operations on a block stays in a processor's cache. Filters need the whole vocabulary of a token at once.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmllm.errors import InputError
from jaxmllm.machine.mesh import ROWS, P, lay_out, row_parts, vocabulary_parts

MASKED = -1e30  # log-weight of a token that cannot be drawn; finite, so that 0 * MASKED is 0 in the entropy
CHUNK_ELEMENTS = 1 << 25  # logits held at once on one device: 128 MiB of float32
BLOCK_ELEMENTS = 1 << 23  # the same where the vocabulary is cut in blocks: 32 MiB
BLOCK = 2048  # tokens of the vocabulary in a block at least


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The distribution tokens are drawn from; names and order of application are those of transformers' `generate`.

    Hashable: it is static under jit, since every option changes the program.
    """

    temperature: float = 1.0  # divides the logits; 0 is greedy
    top_k: int = 0  # keep the k likeliest tokens (ties kept); 0 keeps all
    top_p: float = 1.0  # keep the smallest set of likeliest tokens with at least this mass (ties kept)
    min_p: float | None = None  # keep tokens at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # divides positive (multiplies negative) logits of tokens already in the row
    banned: tuple[int, ...] = ()  # never drawn: vision placeholders

    def validate(self) -> "Sampling":
        """Raises InputError naming the option that is out of range."""
        for name, ok, need in (
            ("temperature", 0 <= self.temperature < math.inf, ">= 0"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "> 0"),
        ):
            if not ok:
                raise InputError(f"{name} = {getattr(self, name)}: must be {need}")
        return self

    @property
    def filters(self) -> bool:
        """Whether a token's weight depends on those of others, or on what is in the row."""
        return self.top_k > 0 or self.top_p < 1 or bool(self.min_p) or self.repetition_penalty != 1

    @property
    def scored(self) -> "Sampling":
        """The distribution whose log-probabilities a greedy run reports: temperature 1, no filter but the ban."""
        return self if self.temperature > 0 else Sampling(banned=self.banned)


def warp(
    logits: Float[Array, "R V"], sampling: Sampling, seen: Bool[Array, "R V"] | None = None
) -> Float[Array, "R V"]:
    """Logits of the sampled distribution (not normalised); excluded tokens are MASKED. `seen`: tokens in the row so far."""
    x = jnp.asarray(logits, jnp.float32)
    if sampling.repetition_penalty != 1.0:
        if seen is None:
            raise ValueError("a repetition penalty needs `seen`, the tokens of the row")
        penalised = jnp.where(x > 0, x / sampling.repetition_penalty, x * sampling.repetition_penalty)
        x = jnp.where(seen, penalised, x)
    if sampling.temperature not in (0.0, 1.0):
        x = x / sampling.temperature
    if sampling.banned:
        # not a scatter, for which accelerators copy the logits
        x = jnp.where(np.isin(np.arange(x.shape[-1]), sampling.banned), MASKED, x)
    if 0 < sampling.top_k < x.shape[-1]:
        order = _ordered_bits(jax.lax.stop_gradient(x))
        x = jnp.where(_largest(order, jnp.ones_like(x), sampling.top_k), x, MASKED)
    if sampling.top_p < 1.0:
        probs = jax.nn.softmax(jax.lax.stop_gradient(x), axis=-1)
        x = jnp.where(_largest(_ordered_bits(probs), probs, sampling.top_p), x, MASKED)
    if sampling.min_p:
        floor = jax.lax.stop_gradient(x.max(-1, keepdims=True)) + jnp.log(sampling.min_p)
        x = jnp.where(x >= floor, x, MASKED)
    return x


def _ordered_bits(x: Float[Array, "R V"]) -> Int[Array, "R V"]:
    """Integers in the order of the floats: their bits, those of negative ones turned round; -0 counts as 0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    # -0 by its bits: compared as a float, a subnormal number counts as 0 on some backends
    bits = jnp.where(bits == jnp.iinfo(jnp.int32).min, 0, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _largest(order: Int[Array, "R V"], weights: Float[Array, "R V"], target: float) -> Bool[Array, "R V"]:
    """True on the smallest set of largest entries with weight >= target (ties kept), by bisection over all integers.

    32 masked sums instead of a sort: several times faster at 150,000 tokens, exact, and rows stay on their device.
    """

    def halve(_, bounds):
        low, high = bounds  # weight(order >= low) >= target > weight(order >= high)
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        enough = jnp.where(order >= middle, weights, 0).sum(-1, keepdims=True) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    high = order.max(-1, keepdims=True) + 1
    low = jnp.full_like(high, jnp.iinfo(jnp.int32).min)
    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return order >= low


def seen_tokens(tokens: Int[Array, "R S"], lengths: Int[Array, "R"], vocab: int) -> Bool[Array, "R V"]:
    """Which tokens occur in the first `lengths` of each row."""
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    # row by row: a scatter over the rows' numbers would be gathered from all devices
    return jax.vmap(lambda row, is_real: jnp.zeros(vocab, bool).at[row].max(is_real))(tokens, real)


def add_seen(seen: Bool[Array, "R V"], tokens: Int[Array, "R"]) -> Bool[Array, "R V"]:
    """`seen` and one more token of each row."""
    return seen | (jnp.arange(seen.shape[1]) == tokens[:, None])


def token_logprobs(
    hidden: Float[Array, "*b T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "*b T"],
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    *,
    seen: Bool[Array, "*b V"] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "*b T"], Float[Array, "*b T"]]:
    """Log-probability of each target under `sampling` and entropy of that distribution (nats), both float32.

    `hidden[..., t, :]` predicts `targets[..., t]`. `seen`: tokens of the prompt, needed for a repetition penalty; the targets
    themselves are added as they come. `chunk`: positions of time at once, None picks one that holds CHUNK_ELEMENTS logits.
    """
    *lead, length, width = hidden.shape
    vocab = kernel.shape[1]
    hidden, targets = hidden.reshape(-1, length, width), targets.reshape(-1, length)
    rows = hidden.shape[0]
    sampling = sampling.scored
    penalised = sampling.repetition_penalty != 1.0
    parts, shares = row_parts(hidden), vocabulary_parts(hidden)
    parts = parts if rows % parts == 0 else 1
    shares = shares if vocab % shares == 0 else 1
    here = rows // parts  # rows of one device
    block = vocab // shares if sampling.filters else vocabulary_block(vocab // shares, here * (chunk or length))
    # Each part of the mesh has its own copy: the gradient is then summed over devices once, not in every chunk. Blocks are
    # rows of the transposed kernel, the embedding itself where it is tied; cut outside of the loops, where it costs no copy.
    if sampling.filters:
        weights, split_as = kernel, P(ROWS, None, "tensor")
    else:
        weights, split_as = kernel.T.reshape(shares, -1, block, width), P(ROWS, "tensor")
    if parts > 1:
        weights = lay_out(jnp.broadcast_to(weights, (parts, *weights.shape)), split_as, hidden)
    chunk = 1 if penalised else max(1, min(length, chunk or CHUNK_ELEMENTS // max(1, here * block)))
    pad = -length % chunk

    def split(a):
        a = jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(rows, -1, chunk, *a.shape[2:]).swapaxes(0, 1)

    def one_chunk(seen, inputs):
        h, target = inputs
        lead = (parts, -1) if parts > 1 else (-1,)
        h, flat = h.reshape(*lead, width), target.reshape(lead)
        outputs = (
            _whole(h, weights, flat, sampling, seen) if sampling.filters else _in_blocks(h, weights, flat, sampling)
        )
        if penalised:
            seen = add_seen(seen, target[:, 0])
        return seen, tuple(a.reshape(target.shape) for a in outputs)

    start = None
    if penalised:
        if seen is None:
            raise ValueError("a repetition penalty needs `seen`, the tokens of the prompt")
        start = seen.reshape(rows, vocab)
    if sampling.filters:  # without, `_in_blocks` sees to it
        one_chunk = jax.checkpoint(one_chunk)
    _, outputs = jax.lax.scan(one_chunk, start, (split(hidden), split(targets)))
    logps, entropies = (a.swapaxes(0, 1).reshape(rows, -1)[:, :length].reshape(*lead, length) for a in outputs)
    return logps, entropies


def _whole(
    hidden: Float[Array, "*parts R D"],
    kernel: Float[Array, "*parts D V"],
    targets: Int[Array, "*parts R"],
    sampling: Sampling,
    seen: Bool[Array, "rows V"] | None,
) -> tuple[Float[Array, "*parts R"], Float[Array, "*parts R"]]:
    """Log-probabilities and entropies of any distribution, over the whole vocabulary at once."""
    logits = jnp.einsum("...rd,...dv->...rv", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    x = warp(logits.reshape(-1, kernel.shape[-1]), sampling, seen)
    norm = jax.nn.logsumexp(x, axis=-1)
    picked = jnp.take_along_axis(x, targets.reshape(-1, 1), axis=-1)[:, 0]
    entropy = norm - (jnp.exp(x - norm[:, None]) * x).sum(-1)
    return (picked - norm).reshape(targets.shape), entropy.reshape(targets.shape)


def vocabulary_block(vocab: int, tokens: int) -> int:
    """Size of the blocks a vocabulary is cut in: a divisor of at least BLOCK, with at most BLOCK_ELEMENTS logits if it can be.

    The vocabulary itself where it has no such divisor or is not worth cutting.
    """
    fitting = [n for n in range(BLOCK, vocab // 2 + 1) if vocab % n == 0]
    return max((n for n in fitting if n * tokens <= BLOCK_ELEMENTS), default=min(fitting, default=vocab))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _in_blocks(
    hidden: Float[Array, "*parts R D"],
    table: Float[Array, "*parts shares blocks block D"],
    targets: Int[Array, "*parts R"],
    sampling: Sampling,
) -> tuple[Float[Array, "*parts R"], Float[Array, "*parts R"]]:
    """Log-probabilities and entropies of a distribution without filters, one pass over blocks of the vocabulary.

    Each of `shares` equal parts of the vocabulary, which may lie on other devices, is summed for itself until the end. The
    gradient is written by hand: with the norm known, a block's product is needed once more and not twice.
    """
    return _sums_in_blocks(hidden, table, targets, sampling)[0]


def _sums_in_blocks(hidden, table, targets, sampling: Sampling):
    tops, *sums = _each_share(_share_sums, table, sampling)(targets, hidden)  # [*parts, shares, R]
    top = tops.max(-2)
    shrink = jnp.exp(tops - top[..., None, :])
    total, weighted, picked = (sums[0] * shrink).sum(-2), (sums[1] * shrink).sum(-2), sums[2].sum(-2)
    norm = top + jnp.log(total)
    entropy = norm - weighted / total
    return (picked - norm, entropy), (hidden, table, targets, norm, entropy)


def _gradients_in_blocks(sampling: Sampling, saved, cotangents):
    hidden, table, targets, norm, entropy = saved
    of_shares = _each_share(_share_gradients, table, sampling)
    d_hidden, d_table = of_shares(targets, hidden, norm, entropy, *cotangents)
    return d_hidden.sum(-3).astype(hidden.dtype), d_table.reshape(table.shape), None


_in_blocks.defvjp(_sums_in_blocks, _gradients_in_blocks)


def _each_share(function, table: Float[Array, "*parts shares blocks block D"], sampling: Sampling):
    """`function(table, firsts, *arrays of rows)` of every share of the vocabulary: results have an axis `shares` after `parts`.

    `firsts` [blocks]: the token of each block's first row.
    """
    *parts, shares, blocks, block, _ = table.shape
    function = functools.partial(function, sampling=sampling)

    def call(targets, *rows):
        firsts = jnp.arange(0, shares * blocks * block, block).reshape(shares, blocks)
        # otherwise JAX computes what follows from `firsts` alone before all loops and keeps it: masks of [rows, vocabulary]
        firsts, targets = jax.lax.optimization_barrier((firsts, targets))
        each, cut = function, table
        if shares > 1:
            each = jax.vmap(each, in_axes=(0, 0, *(None for _ in (targets, *rows))))
        else:  # no axis of size 1: a processor's products are slower with one
            firsts, cut = firsts[0], table.reshape(*parts, *table.shape[-3:])
        if parts:
            each = jax.vmap(each, in_axes=(0, None, *(0 for _ in (targets, *rows))))
        found = each(cut, firsts, targets, *rows)
        return found if shares > 1 else jax.tree.map(lambda a: jnp.expand_dims(a, len(parts)), found)

    return call


def _block_logits(hidden, first, rows, sampling: Sampling):
    """Logits of a block whose first token is `first`, and which of its tokens are banned (None where none can be)."""
    x = jnp.einsum("rd,vd->rv", hidden, rows.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if sampling.temperature != 1:
        x = x / sampling.temperature
    here = first + jnp.arange(rows.shape[0])
    if not sampling.banned:
        return x, here, None
    banned = (here[:, None] == jnp.asarray(sampling.banned, jnp.int32)).any(-1)
    return jnp.where(banned, MASKED, x), here, banned


def _share_sums(
    table: Float[Array, "blocks block D"],
    firsts: Int[Array, "blocks"],
    targets: Int[Array, "R"],
    hidden: Float[Array, "R D"],
    sampling: Sampling,
) -> tuple[Float[Array, "R"], ...]:
    """Largest logit, then sums of exp(x - it), of x times that, and of x where it is the target's."""

    def add(carry, inputs):
        top, total, weighted, picked = carry
        x, here, _ = _block_logits(hidden, *inputs, sampling)
        new_top = jnp.maximum(top, x.max(-1))
        weight, shrink = jnp.exp(x - new_top[:, None]), jnp.exp(top - new_top)
        total = total * shrink + weight.sum(-1)
        weighted = weighted * shrink + (weight * x).sum(-1)
        picked = picked + jnp.where(here == targets[:, None], x, 0).sum(-1)
        return (new_top, total, weighted, picked), None

    zero = jnp.zeros(hidden.shape[0], jnp.float32)
    return jax.lax.scan(add, (zero + MASKED, zero, zero, zero), (firsts, table))[0]


def _share_gradients(
    table: Float[Array, "blocks block D"],
    firsts: Int[Array, "blocks"],
    targets: Int[Array, "R"],
    hidden: Float[Array, "R D"],
    norm: Float[Array, "R"],
    entropy: Float[Array, "R"],
    d_logp: Float[Array, "R"],
    d_entropy: Float[Array, "R"],
    sampling: Sampling,
) -> tuple[Float[Array, "R D"], Float[Array, "blocks block D"]]:
    """Gradients in `hidden` (float32) and in the table, from those in log-probability and entropy.

    With p = exp(x - norm): d logp / dx = [target] - p and d entropy / dx = -p (log p + entropy).
    """

    def add(d_hidden, inputs):
        x, here, banned = _block_logits(hidden, *inputs, sampling)
        x = x - norm[:, None]
        d = -jnp.exp(x) * (d_logp[:, None] + d_entropy[:, None] * (x + entropy[:, None]))
        is_target = here == targets[:, None]
        if banned is not None:
            is_target &= ~banned
        d = (d + jnp.where(is_target, d_logp[:, None], 0)) / sampling.temperature
        d, rows = d.astype(hidden.dtype), inputs[1].astype(hidden.dtype)
        d_rows = jnp.einsum("rv,rd->vd", d, hidden, preferred_element_type=jnp.float32)
        d_hidden = d_hidden + jnp.einsum("rv,vd->rd", d, rows, preferred_element_type=jnp.float32)
        return d_hidden, d_rows.astype(table.dtype)

    return jax.lax.scan(add, jnp.zeros(hidden.shape, jnp.float32), (firsts, table))
