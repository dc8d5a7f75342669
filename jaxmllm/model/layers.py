"""The few layers that the tower and the decoder share. They only declare parameters; names follow Hugging Face's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmllm.machine.mesh import gathered

RESIDUAL_GAIN = 0.2  # of layers that write to the residual stream: at first they must not drown the tokens' embeddings
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class Linear(nn.Module):
    """`x @ kernel + bias` in the dtype of `x`, plus a low-rank update when the "lora" collection holds one.

    The product is taken on a 2-D view: XLA's CPU backend is up to 1.6 times slower on `[B, T, D] @ W`.
    """

    features: tuple[int, ...]
    use_bias: bool = True
    gain: float = 1.0  # of the initial weights

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "..."]:
        width = x.shape[-1]
        # fan-in: 0.02 at a width of 2,500, and attention that is not uniform at a width of 128
        kernel = self.param("kernel", nn.initializers.normal(self.gain * width**-0.5), (width, *self.features))
        flat = x.reshape(-1, width)

        def product(rows, matrix):
            return jax.lax.dot_general(rows, matrix.astype(x.dtype), (((1,), (0,)), ((), ())))

        out = product(flat, gathered(kernel, "/".join(("", *self.path, "kernel")), x.dtype))
        if self.has_variable("lora", "a"):
            low = product(flat, self.get_variable("lora", "a")) * self.get_variable("lora", "scale").astype(x.dtype)
            out = out + product(low, self.get_variable("lora", "b"))
        if self.use_bias:
            out = out + self.param("bias", nn.initializers.zeros, self.features).astype(x.dtype)
        return out.reshape(*x.shape[:-1], *self.features)


class RMSNorm(nn.Module):
    """Root-mean-square norm with float32 statistics."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return scale.astype(x.dtype) * x32.astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm with float32 statistics (Qwen2-VL's tower)."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        x32 = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class GatedMLP(nn.Module):
    """SwiGLU: `down(act(gate(x)) * up(x))`."""

    width: int
    act: str
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        gate = Linear((self.width,), self.use_bias, name="gate_proj")(x)
        up = Linear((self.width,), self.use_bias, name="up_proj")(x)
        return Linear((x.shape[-1],), self.use_bias, RESIDUAL_GAIN, name="down_proj")(ACTIVATIONS[self.act](gate) * up)


def rotate(
    x: Float[Array, "*b X N H"], cos: Float[Array, "*b X half"], sin: Float[Array, "*b X half"]
) -> Float[Array, "*b X N H"]:
    """Rotary embedding in float32: the first half of a head pairs with the second."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


def stack(block: type[nn.Module], length: int, remat: str, unroll: bool, in_axes, **attributes) -> nn.Module:
    """`length` blocks with parameters stacked on a leading axis, run by one scan (or unrolled) with the remat policy."""
    if remat != "none":
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=unroll)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        unroll=length if unroll else 1,
    )
    return scanned(**attributes)
