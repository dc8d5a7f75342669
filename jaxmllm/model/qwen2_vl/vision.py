"""The vision tower, on frames laid out by the host in window order (see `jaxmllm.types.Vision`).

Attention never crosses a frame, so frames are a batch axis; a windowed block attends inside each window of P patches, a
full block over all W * P patches of the frame, and the 2 x 2 merge is a reshape. No gather, no sequence-length table.
Qwen2.5-VL: RMSNorm, SwiGLU, windowed blocks. Qwen2-VL: LayerNorm, quick-GELU MLP, all blocks full.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxmllm.model import attention
from jaxmllm.model.config import ModelConfig
from jaxmllm.model.layers import ACTIVATIONS, RESIDUAL_GAIN, GatedMLP, LayerNorm, Linear, RMSNorm, rotate, stack
from jaxmllm.types import Vision

NORM_EPS = 1e-6  # fixed in both models, not part of config.json


def _norm(cfg: ModelConfig, name: str) -> nn.Module:
    return (LayerNorm if cfg.model_type == "qwen2_vl" else RMSNorm)(NORM_EPS, name=name)


class PlainMLP(nn.Module):
    """fc1, activation, fc2 (Qwen2-VL)."""

    width: int
    act: str

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        hidden = ACTIVATIONS[self.act](Linear((self.width,), name="fc1")(x))
        return Linear((x.shape[-1],), gain=RESIDUAL_GAIN, name="fc2")(hidden)


class VisionAttention(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R W P D"],
        is_full: Bool[Array, ""],
        cos: Float[Array, "R W P half"],
        sin: Float[Array, "R W P half"],
        valid: Bool[Array, "R W P"],
    ) -> Float[Array, "R W P D"]:
        r, w, p, d = x.shape
        heads = self.cfg.vision.num_heads
        qkv = Linear((3, d), name="qkv")(x).reshape(r, w, p, 3, heads, d // heads)
        q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)

        def over(*lead, kernel):
            def run(q, k, v):
                rows = (a.reshape(*lead, *a.shape[3:]) for a in (q, k, v))
                return attention.full(*rows, valid.reshape(lead), kernel).reshape(q.shape)

            return run

        in_frame = over(r, w * p, kernel=self.cfg.attention)
        in_window = over(r * w, p, kernel="dense")
        full_blocks = len(self.cfg.vision.fullatt_block_indexes)
        if full_blocks == self.cfg.vision.depth:
            out = in_frame(q, k, v)
        elif full_blocks == 0:
            out = in_window(q, k, v)
        else:  # one scanned body for both kinds of block
            out = jax.lax.cond(is_full, in_frame, in_window, q, k, v)
        return Linear((d,), gain=RESIDUAL_GAIN, name="proj")(out.reshape(x.shape))


class VisionBlock(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self, x, is_full, cos, sin, valid):
        vision = self.cfg.vision
        x = x + VisionAttention(self.cfg, name="attn")(_norm(self.cfg, "norm1")(x), is_full, cos, sin, valid)
        if self.cfg.model_type == "qwen2_vl":
            mlp = PlainMLP(vision.intermediate_size, vision.hidden_act, name="mlp")
        else:
            mlp = GatedMLP(vision.intermediate_size, vision.hidden_act, use_bias=True, name="mlp")
        return x + mlp(_norm(self.cfg, "norm2")(x)), None


class Tower(nn.Module):
    """Patches to merged vision tokens in the decoder's width."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, vision: Vision) -> Float[Array, "B V D"]:
        cfg = self.cfg.vision
        b, f, w, p, _ = vision.patches.shape
        dtype = jnp.dtype(self.cfg.dtype)
        x = vision.patches.reshape(b * f, w, p, -1).astype(dtype)
        x = Linear((cfg.hidden_size,), use_bias=False, name="patch_embed")(x)

        positions = vision.positions.reshape(b * f, w, p, 2)
        valid = positions[..., 0] >= 0
        half = cfg.hidden_size // cfg.num_heads // 2
        inv_freq = 1.0 / cfg.rope_theta ** (np.arange(0, half, 2, dtype=np.float32) / half)
        angles = positions[..., None].astype(jnp.float32) * inv_freq
        angles = angles.reshape(*positions.shape[:-1], half)  # row frequencies, then column frequencies

        is_full = np.isin(np.arange(cfg.depth), cfg.fullatt_block_indexes)
        in_axes = (0, nn.broadcast, nn.broadcast, nn.broadcast)
        blocks = stack(VisionBlock, cfg.depth, self.cfg.remat, self.cfg.unroll, in_axes, cfg=self.cfg, name="blocks")
        x, _ = blocks(x, jnp.asarray(is_full), jnp.cos(angles), jnp.sin(angles), valid)

        merged = cfg.hidden_size * cfg.spatial_merge_size**2
        x = _norm(self.cfg, "ln_q")(x).reshape(b, -1, merged)
        x = ACTIVATIONS["gelu"](Linear((merged,), name="merger_fc1")(x))
        return Linear((cfg.out_hidden_size,), name="merger_fc2")(x)
