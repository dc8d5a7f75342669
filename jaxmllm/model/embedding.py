"""The two ends of a decoder, which all families share: tokens to vectors, and vectors to logits."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmllm.machine.mesh import gathered
from jaxmllm.model.config import ModelConfig


def embed(params: dict, cfg: ModelConfig, tokens: Int[Array, "*n"]) -> Float[Array, "*n D"]:
    dtype = jnp.dtype(cfg.dtype)
    return gathered(params["embed"], "embed", dtype)[tokens].astype(dtype)


def head_kernel(params: dict, dtype: Any) -> Float[Array, "D vocab"]:
    """The output projection: the transposed embedding when it is tied."""
    if "head" in params:
        return gathered(params["head"], "head", dtype)
    return gathered(params["embed"], "embed", dtype).T


def logits(params: dict, hidden: Float[Array, "*n D"]) -> Float[Array, "*n vocab"]:
    """float32 logits. Holds [*n, vocab]: for losses use `jaxmllm.model.logprobs`, which never does."""
    kernel = head_kernel(params, hidden.dtype).astype(hidden.dtype)
    flat = hidden.reshape(-1, hidden.shape[-1])
    out = jnp.einsum("nd,dv->nv", flat, kernel, preferred_element_type=jnp.float32)
    return out.reshape(*hidden.shape[:-1], -1)
