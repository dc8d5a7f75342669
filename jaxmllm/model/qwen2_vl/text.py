"""The decoder: one stack of scanned blocks over [prompt | completions], or over one new token a completion."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxmllm.model import attention
from jaxmllm.model.config import ModelConfig
from jaxmllm.model.layers import RESIDUAL_GAIN, GatedMLP, Linear, RMSNorm, rotate, stack


class Shared(struct.PyTreeNode):
    """What every layer of one pass reads."""

    cos: Float[Array, "B X half"]
    sin: Float[Array, "B X half"]
    prompt_lengths: Int[Array, "B"]
    mask: Bool[Array, "1 1 1 U"] | None = None  # decode: which own keys a completion's query sees
    step: Int[Array, ""] | None = None  # decode: index of the token being written


def rope(positions: Int[Array, "B 3 X"], cfg: ModelConfig) -> tuple[Float[Array, "B X half"], Float[Array, "B X half"]]:
    """M-RoPE: each frequency turns with the temporal, height or width position, by `mrope_section`."""
    half = cfg.text.head_dim // 2
    inv_freq = 1.0 / cfg.text.rope_theta ** (np.arange(half, dtype=np.float32) * 2 / cfg.text.head_dim)
    component = np.repeat(np.arange(3), cfg.text.mrope_section)
    angles = positions[:, component].transpose(0, 2, 1).astype(jnp.float32) * inv_freq
    return jnp.cos(angles), jnp.sin(angles)


class Attention(nn.Module):
    cfg: ModelConfig
    prompt_len: int
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "B X D"], cache, prompt_kv, layer: Int[Array, ""], shared: Shared):
        text = self.cfg.text
        b, n, d = x.shape
        heads, h = text.num_attention_heads, text.head_dim
        q = Linear((heads * h,), name="q_proj")(x).reshape(b, n, heads, h)
        k = Linear((text.num_key_value_heads * h,), name="k_proj")(x).reshape(b, n, -1, h)
        v = Linear((text.num_key_value_heads * h,), name="v_proj")(x).reshape(b, n, -1, h)
        q, k = rotate(q, shared.cos, shared.sin), rotate(k, shared.cos, shared.sin)

        kept = None
        if cache is None:
            s = self.prompt_len
            out = attention.shared(q, k, v, shared.prompt_lengths, s, self.groups, self.cfg.attention)
            kept = (k[:, :s], v[:, :s])
        else:

            def grouped(a):
                return a.reshape(b, self.groups, -1, *a.shape[2:])

            # written in place: the whole cache is the scan's carry, never its output
            def write(all_layers, new):
                return jax.lax.dynamic_update_slice(all_layers, grouped(new)[None], (layer, 0, 0, shared.step, 0, 0))

            cache = write(cache[0], k), write(cache[1], v)
            own_k, own_v = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in cache)
            prompt_k, prompt_v = prompt_kv
            assert shared.mask is not None
            out = attention.completion(grouped(q), own_k, own_v, shared.mask, prompt_k, prompt_v, shared.prompt_lengths)
        return Linear((d,), use_bias=False, gain=RESIDUAL_GAIN, name="o_proj")(out.reshape(b, n, -1)), cache, kept


class Block(nn.Module):
    cfg: ModelConfig
    prompt_len: int
    groups: int
    keep_prompt: bool  # return the prompt's keys and values (prefill)

    @nn.compact
    def __call__(self, carry, prompt_kv, layer, shared: Shared):
        x, cache = carry
        text = self.cfg.text
        normed = RMSNorm(text.rms_norm_eps, name="input_layernorm")(x)
        attend = Attention(self.cfg, self.prompt_len, self.groups, name="self_attn")
        out, cache, kept = attend(normed, cache, prompt_kv, layer, shared)
        x = x + out
        normed = RMSNorm(text.rms_norm_eps, name="post_attention_layernorm")(x)
        x = x + GatedMLP(text.intermediate_size, "silu", use_bias=False, name="mlp")(normed)
        return (x, cache), kept if self.keep_prompt else None


class Decoder(nn.Module):
    """Embedded tokens to final hidden states (after the last norm)."""

    cfg: ModelConfig
    prompt_len: int = 0
    groups: int = 0
    keep_prompt: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B X D"],
        positions: Int[Array, "B 3 X"],
        shared_lengths: Int[Array, "B"],
        cache=None,
        prompt_kv=None,
        step: Int[Array, ""] | None = None,
    ):
        text = self.cfg.text
        cos, sin = rope(positions, self.cfg)
        mask = None if step is None else (jnp.arange(cache[0].shape[3]) <= step)[None, None, None]
        shared = Shared(cos, sin, shared_lengths, mask, step)
        layers = stack(
            Block,
            text.num_hidden_layers,
            self.cfg.remat if step is None else "none",
            self.cfg.unroll,
            (0, 0, nn.broadcast),
            cfg=self.cfg,
            prompt_len=self.prompt_len,
            groups=self.groups,
            keep_prompt=self.keep_prompt,
            name="layers",
        )
        index = jnp.arange(text.num_hidden_layers)
        (x, cache), kept = layers((x, cache), prompt_kv, index, shared)
        return RMSNorm(text.rms_norm_eps, name="norm")(x), cache, kept
