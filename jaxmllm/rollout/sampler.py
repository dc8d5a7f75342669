"""Sampling: prefill once a prompt, then one `while_loop` that decodes every completion of the batch together.

The loop can be left and entered again (`advance` up to a step), which is how text is streamed. `sample` runs it to the end
and, where much may still be written, leaves behind prompts whose completions are all finished.
"""

import functools
import math

import jax
import jax.numpy as jnp
from einops import repeat
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmllm.machine.mesh import ROWS, P, lay_out, row_parts
from jaxmllm.model import embedding, family
from jaxmllm.model.config import ModelConfig
from jaxmllm.model.logprobs import Sampling, add_seen, seen_tokens, warp
from jaxmllm.types import KVCache, Prompts, Samples

WORTH = 64  # tokens that an open completion may still get, for which it pays to leave finished prompts behind
HALVINGS = 2  # of the prompts in a loop: each is a program to compile


class State(struct.PyTreeNode):
    """Everything the loop carries. Donated: the cache is written in place."""

    step: Int[Array, ""]  # tokens written so far
    keys: Key[Array, "B G"]  # one stream of randomness a completion
    tokens: Int[Array, "B G T"]
    logps: Float[Array, "B G T"]
    lengths: Int[Array, "B G"]
    stopped: Bool[Array, "B G"]  # wrote a stop token
    done: Bool[Array, "B G"]  # stopped, or never wanted
    seen: Bool[Array, "B G V"] | None  # for the repetition penalty
    cache: KVCache


def row_keys(seed: Key[Array, ""], ids: Int[Array, "B"], num_generations: int) -> Key[Array, "B G"]:
    """A key for every completion, from the prompt's id and the completion's number: the batch around it plays no part."""
    one = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(lambda i: one(jax.random.fold_in(seed, i), jnp.arange(num_generations)))(ids)


def _block(vocab: int) -> int:
    """Tokens of the vocabulary summed together: its divisor nearest to its root. (Padding costs more than the exponentials.)"""
    return min((n for n in range(1, vocab + 1) if vocab % n == 0), key=lambda n: abs(math.log(n * n / vocab)))


def draw(keys: Key[Array, "R"], x: Float[Array, "R V"]) -> tuple[Int[Array, "R"], Float[Array, "R"]]:
    """One token a row and its log-probability, by the inverse of the distribution function of the log-weights `x`.

    In two levels, so that float32 sums stay exact enough: a block of the vocabulary, then a token in it. One pass of
    exponentials gives both the sums of the blocks and the norm; two uniforms a row replace one Gumbel variate an entry.
    """
    rows, vocab = x.shape
    block = _block(vocab)
    x = lay_out(x, P(ROWS), x)  # a vocabulary split over devices is gathered here, once
    top = x.max(-1, keepdims=True)
    sums = jnp.exp(x - top).reshape(rows, -1, block).sum(-1)
    u = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)

    def pick(weights, u):
        cumulated = jnp.cumsum(weights, axis=-1)
        # a parallel sum is not quite monotone: without the second test an entry of no weight could be crossed at
        beyond = (cumulated > u[:, None] * cumulated[:, -1:]) & (weights > 0)
        # u * total can round up to the total: then take the likeliest, which has weight
        return jnp.where(beyond.any(-1), beyond.argmax(-1), weights.argmax(-1))

    first = pick(sums, u[:, 0])[:, None] * block
    inside = jnp.take_along_axis(x, first + jnp.arange(block), axis=-1) - top
    token = pick(jnp.exp(inside), u[:, 1])[:, None]
    logp = jnp.take_along_axis(inside, token, axis=-1)[:, 0] - jnp.log(sums.sum(-1))
    return (first + token)[:, 0].astype(jnp.int32), logp


def _write(params, sampling: Sampling, stop_ids: tuple[int, ...], hidden: Float[Array, "B G D"], state: State) -> State:
    """Draws token number `step` of every completion that is not done."""
    b, g, _ = hidden.shape
    raw = embedding.logits(params, hidden).reshape(b * g, -1)
    seen = None if state.seen is None else state.seen.reshape(b * g, -1)
    scored = warp(raw, sampling.scored, seen)
    if sampling.temperature == 0:
        token = jnp.argmax(warp(raw, sampling, seen), axis=-1).astype(jnp.int32)
        logp = jnp.take_along_axis(scored, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(scored, axis=-1)
    else:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys.reshape(-1), state.step)
        token, logp = draw(step_keys, scored)
    seen = None if seen is None else add_seen(seen, token).reshape(b, g, -1)
    token, logp = token.reshape(b, g), logp.reshape(b, g)

    def put(array, value):
        old = jax.lax.dynamic_index_in_dim(array, state.step, axis=2, keepdims=False)
        new = jnp.where(state.done, old, value.astype(array.dtype))
        return jax.lax.dynamic_update_index_in_dim(array, new, state.step, axis=2)

    ends = jnp.isin(token, jnp.asarray(stop_ids, jnp.int32)) & ~state.done
    return state.replace(
        step=state.step + 1,
        tokens=put(state.tokens, token),
        logps=put(state.logps, logp),
        lengths=state.lengths + ~state.done,
        stopped=state.stopped | ends,
        done=state.done | ends,
        seen=seen,
    )


@functools.partial(
    jax.jit, static_argnames=("cfg", "sampling", "num_generations", "max_new_tokens", "stop_ids", "pad_id")
)
def start(
    params,
    cfg: ModelConfig,
    prompts: Prompts,
    keys: Key[Array, "B G"],
    sampling: Sampling,
    *,
    num_generations: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
    counts: Int[Array, "B"] | None = None,
    vision_tokens: Float[Array, "B V D"] | None = None,
) -> State:
    """Encodes and prefills the prompts and writes the first token. `counts`: completions wanted of each prompt, at most G."""
    hidden, cache = family.prefill(params, cfg, prompts, num_generations, max_new_tokens, vision_tokens)
    b = hidden.shape[0]
    shape = (b, num_generations)
    done = jnp.zeros(shape, bool) if counts is None else jnp.arange(num_generations) >= counts[:, None]
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = seen_tokens(prompts.tokens, prompts.lengths, cfg.text.vocab_size)
        seen = repeat(seen, "b v -> b g v", g=num_generations)
    state = State(
        step=jnp.zeros((), jnp.int32),
        keys=keys,
        tokens=jnp.full((*shape, max_new_tokens), pad_id, jnp.int32),
        logps=jnp.zeros((*shape, max_new_tokens), jnp.float32),
        lengths=jnp.zeros(shape, jnp.int32),
        stopped=jnp.zeros(shape, bool),
        done=done,
        seen=seen,
        cache=cache,
    )
    hidden = jnp.broadcast_to(hidden[:, None], (*shape, hidden.shape[-1]))
    return _write(params, sampling, stop_ids, hidden, state)


@functools.partial(jax.jit, static_argnames=("cfg", "sampling", "stop_ids"), donate_argnames="state")
def advance(
    params,
    cfg: ModelConfig,
    state: State,
    until: Int[Array, ""],
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    few: Int[Array, ""] | int = 0,
) -> State:
    """Decodes until `until` tokens are written, or no device has more than `few` prompts with an open completion."""

    def unfinished(state: State):
        return (state.step < until) & (_open_prompts(state).sum(1).max() > few)

    def body(state: State):
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=2, keepdims=False)
        hidden, cache = family.decode(params, cfg, last, state.step - 1, state.cache)
        return _write(params, sampling, stop_ids, hidden, state.replace(cache=cache))

    return jax.lax.while_loop(unfinished, body, state)


def _open_prompts(state: State) -> Bool[Array, "parts rows"]:
    """Which prompts have an open completion, by the part of the mesh that they lie on."""
    return (~state.done.all(1)).reshape(row_parts(state.tokens), -1)


@functools.partial(jax.jit, static_argnames="keep")
def _leave_finished(state: State, keep: int) -> tuple[State, Int[Array, "parts keep"]]:
    """The state of `keep` prompts of each part of the mesh, open ones first, and their rows in the part."""
    kept = jnp.argsort(~_open_prompts(state), axis=1, stable=True)[:, :keep]

    def pick(x, axis: int = 0):
        cut = x.reshape(*x.shape[:axis], len(kept), -1, *x.shape[axis + 1 :])
        picked = jax.vmap(functools.partial(jnp.take, axis=axis), (axis, 0), axis)(cut, kept)
        return picked.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    cache = {name: pick(x, 1 if x.ndim > 1 else 0) for name, x in vars(state.cache).items()}
    rows = {name: jax.tree.map(pick, x) for name, x in vars(state).items() if name not in ("step", "cache")}
    return State(step=state.step, cache=KVCache(**cache), **rows), kept


@jax.jit
def _come_back(whole: Samples, part: Samples, kept: Int[Array, "parts keep"]) -> Samples:
    """`whole` with the rows that went on alone."""

    def put(old, new):
        old_cut, new_cut = (x.reshape(len(kept), -1, *x.shape[1:]) for x in (old, new))
        return jax.vmap(lambda old, new, rows: old.at[rows].set(new))(old_cut, new_cut, kept).reshape(old.shape)

    rows = {name: put(getattr(whole, name), new) for name, new in vars(part).items() if name != "steps"}
    return Samples(steps=part.steps, **rows)


def finish(state: State) -> Samples:
    return Samples(state.tokens, state.lengths, state.logps, state.stopped, state.step)


def _to_the_end(
    params, cfg: ModelConfig, state: State, sampling: Sampling, stop_ids: tuple[int, ...], halvings: int
) -> Samples:
    """Decodes until no completion is open; up to `halvings` times goes on with half of each device's prompts."""
    prompts, _, until = state.tokens.shape
    here = prompts // row_parts(state.tokens)
    run = functools.partial(advance, params, cfg, until=jnp.asarray(until), sampling=sampling, stop_ids=stop_ids)
    if not halvings or here < 2 or until <= WORTH:
        return finish(run(state))
    state = run(state, few=here // 2)
    if until - int(state.step) < WORTH or bool(state.done.all()):
        return finish(run(state))
    fewer, kept = _leave_finished(state, here // 2)
    return _come_back(finish(state), _to_the_end(params, cfg, fewer, sampling, stop_ids, halvings - 1), kept)


def sample(
    params,
    cfg: ModelConfig,
    prompts: Prompts,
    keys: Key[Array, "B G"],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...] | None = None,
    pad_id: int | None = None,
    counts: Int[Array, "B"] | None = None,
    vision_tokens: Float[Array, "B V D"] | None = None,
) -> Samples:
    """G completions of every prompt.

    `keys` [B, G] decide the randomness of each (see `row_keys`). Stops at `stop_ids` (default: the config's eos ids), which
    are kept in the text. Log-probabilities are those of the sampled distribution; a greedy run reports temperature 1.
    """
    stop_ids = cfg.eos_token_id if stop_ids is None else stop_ids
    pad_id = pad_id if pad_id is not None else cfg.pad_token_id if cfg.pad_token_id is not None else 0
    sampling = sampling.validate()
    state = start(
        params,
        cfg,
        prompts,
        keys,
        sampling,
        num_generations=keys.shape[1],
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        pad_id=pad_id,
        counts=counts,
        vision_tokens=vision_tokens,
    )
    return _to_the_end(params, cfg, state, sampling, stop_ids, HALVINGS)
