"""Qwen2-VL and Qwen2.5-VL as pure functions of (params, cfg, arrays).

`params` is a plain nested dict: {"vision": ..., "text": ..., "embed": [vocab, D], "head": [D, vocab] unless tied, and
optionally "lora"}. `forward`, `prefill` and `decode` run the same blocks on the same attention routine, so what the
sampler reports and what the trainer scores agree to rounding.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float, Int, Key

from jaxmllm.machine.mesh import CACHE, lay_out
from jaxmllm.model.config import ModelConfig
from jaxmllm.model.embedding import embed
from jaxmllm.model.qwen2_vl.text import Decoder
from jaxmllm.model.qwen2_vl.vision import Tower
from jaxmllm.types import Completions, KVCache, Prompts, Vision

Params = dict


def init(key: Key[Array, ""], cfg: ModelConfig) -> Params:
    """Random float32 parameters. Wrap in `jax.eval_shape` for shapes alone, in `jax.jit` to create them sharded."""
    keys = jax.random.split(key, 4)
    vision = Vision(
        jnp.zeros((1, 1, 1, cfg.vision.window_patches, cfg.vision.patch_pixels)),
        jnp.zeros((1, 1, 1, cfg.vision.window_patches, 2), jnp.int32),
    )
    width, vocab = cfg.text.hidden_size, cfg.text.vocab_size
    token, position = jnp.zeros((1, 1, width)), jnp.zeros((1, 3, 1), jnp.int32)
    params = {
        "vision": Tower(cfg).init(keys[0], vision)["params"],
        "text": Decoder(cfg, prompt_len=1).init(keys[1], token, position, jnp.ones(1, jnp.int32))["params"],
        "embed": width**-0.5 * jax.random.normal(keys[2], (vocab, width)),
    }
    if not cfg.text.tie_word_embeddings:
        params["head"] = width**-0.5 * jax.random.normal(keys[3], (width, vocab))
    return params


def _apply(module: nn.Module, params: Params, part: str, *arguments, **named) -> Any:
    """A module's outputs with its part of the parameters."""
    variables = {"params": params[part], "lora": params.get("lora", {}).get(part, {})}
    return module.apply(variables, *arguments, **named)


def encode(params: Params, cfg: ModelConfig, vision: Vision) -> Float[Array, "B V D"]:
    """Images and videos to vision tokens. A frame's tokens are in window order; padding gives finite garbage."""
    return _apply(Tower(cfg), params, "vision", vision)


def embed_prompts(
    params: Params, cfg: ModelConfig, prompts: Prompts, vision_tokens: Float[Array, "B V D"] | None = None
) -> Float[Array, "B S D"]:
    """Token embeddings with the vision tokens in their places; runs the tower unless its output is given."""
    x = embed(params, cfg, prompts.tokens)
    if vision_tokens is None and prompts.vision is not None:
        vision_tokens = encode(params, cfg, prompts.vision)
    return x if vision_tokens is None else _placed(x, vision_tokens, prompts.vision_index)


def _placed(
    x: Float[Array, "B S D"], vision_tokens: Float[Array, "B V D"], vision_index: Int[Array, "B S"]
) -> Float[Array, "B S D"]:
    """`x` with the vision tokens where the index is not -1."""
    index = vision_index[..., None]
    # a gather inside each row: stays on the row's device
    placed = jnp.take_along_axis(vision_tokens.astype(x.dtype), jnp.maximum(index, 0), axis=1)
    return jnp.where(index >= 0, placed, x)


def _last_hidden(hidden: Float[Array, "B S D"], lengths: Int[Array, "B"]) -> Float[Array, "B D"]:
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]


def forward(
    params: Params,
    cfg: ModelConfig,
    prompts: Prompts,
    completions: Completions | None = None,
    vision_tokens: Float[Array, "B V D"] | None = None,
) -> tuple[Float[Array, "B S D"], Float[Array, "B G T D"] | None]:
    """One pass over prompts and their completions.

    Returns the prompt's hidden states [B, S, D] and, with completions, `hidden` [B, G, T, D] such that `hidden[b, g, t]`
    predicts `completions.tokens[b, g, t]` (position 0 is predicted by the last prompt token).
    """
    if completions is not None and completions.vision_index is not None and vision_tokens is None:
        assert prompts.vision is not None
        vision_tokens = encode(params, cfg, prompts.vision)  # once, for both parts
    x, positions = embed_prompts(params, cfg, prompts, vision_tokens), prompts.positions
    s = x.shape[1]
    groups = length = 0
    if completions is not None:
        _, groups, length = completions.tokens.shape
        tail = embed(params, cfg, completions.tokens)
        tail = rearrange(tail, "b g t d -> b (g t) d")
        if completions.vision_index is not None and vision_tokens is not None:
            tail = _placed(tail, vision_tokens, rearrange(completions.vision_index, "b g t -> b (g t)"))
        x = jnp.concatenate([x, tail], axis=1)
        if completions.positions is not None:
            after = rearrange(completions.positions, "b g c t -> b c (g t)")
        else:
            after = prompts.next_position[:, None] + jnp.arange(length)
            after = repeat(after, "b t -> b c (g t)", c=3, g=groups)
        positions = jnp.concatenate([positions, after], axis=2)
    decoder = Decoder(cfg, prompt_len=s, groups=groups)
    hidden, _, _ = _apply(decoder, params, "text", x, positions, prompts.lengths)
    if completions is None:
        return hidden, None
    first = repeat(_last_hidden(hidden, prompts.lengths), "b d -> b g 1 d", g=groups)
    rest = rearrange(hidden[:, s:], "b (g t) d -> b g t d", g=groups)[:, :, :-1]
    return hidden[:, :s], jnp.concatenate([first, rest], axis=2)


def prefill(
    params: Params,
    cfg: ModelConfig,
    prompts: Prompts,
    num_generations: int,
    max_new_tokens: int,
    vision_tokens: Float[Array, "B V D"] | None = None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """The prompt's last hidden state and a cache with room for `max_new_tokens` tokens of each completion."""
    x = embed_prompts(params, cfg, prompts, vision_tokens)
    decoder = Decoder(cfg, prompt_len=x.shape[1], keep_prompt=True)
    hidden, _, (k, v) = _apply(decoder, params, "text", x, prompts.positions, prompts.lengths)
    own = (k.shape[0], k.shape[1], num_generations, max_new_tokens, *k.shape[3:])
    own_k, own_v = (lay_out(jnp.zeros(own, a.dtype), CACHE, prompts.tokens) for a in (k, v))
    cache = KVCache(k, v, prompts.lengths, prompts.next_position, own_k, own_v)
    return _last_hidden(hidden, prompts.lengths), cache


def decode(
    params: Params, cfg: ModelConfig, tokens: Int[Array, "B G"], step: Int[Array, ""], cache: KVCache
) -> tuple[Float[Array, "B G D"], KVCache]:
    """Reads token number `step` of every completion, writes its keys and values, returns the next hidden state."""
    x = embed(params, cfg, tokens)
    position = jnp.broadcast_to((cache.next_position + step)[:, None, None], (x.shape[0], 3, x.shape[1]))
    decoder = Decoder(cfg, groups=tokens.shape[1])
    hidden, (k, v), _ = _apply(
        decoder,
        params,
        "text",
        x,
        position,
        cache.prompt_lengths,
        cache=(cache.k, cache.v),
        prompt_kv=(cache.prompt_k, cache.prompt_v),
        step=step,
    )
    return hidden, cache.replace(k=k, v=v)
