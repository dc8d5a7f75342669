"""Scoring: log-probabilities of given completions, by the same forward that samples and trains."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmllm.machine.mesh import row_parts
from jaxmllm.model import embedding, family
from jaxmllm.model.config import ModelConfig
from jaxmllm.model.logprobs import Sampling, seen_tokens, token_logprobs
from jaxmllm.types import Completions, Prompts


def score(
    params: dict,
    cfg: ModelConfig,
    prompts: Prompts,
    completions: Completions,
    sampling: Sampling,
    vision_tokens: Float[Array, "B V D"] | None = None,
) -> tuple[Float[Array, "B G T"], Float[Array, "B G T"]]:
    """Log-probabilities of the completions' tokens under `sampling`, and entropies."""
    _, hidden = family.forward(params, cfg, prompts, completions, vision_tokens)
    assert hidden is not None
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = seen_tokens(prompts.tokens, prompts.lengths, cfg.text.vocab_size)
        seen = jnp.repeat(seen[:, None], completions.tokens.shape[1], axis=1)
    return token_logprobs(hidden, embedding.head_kernel(params, cfg.dtype), completions.tokens, sampling, seen=seen)


def score_halves(
    params: dict,
    cfg: ModelConfig,
    prompts: Prompts,
    completions: Completions,
    sampling: Sampling,
    vision_tokens: Float[Array, "B V D"] | None = None,
    short: int = 0,
) -> tuple[Float[Array, "B G T"], Float[Array, "B G T"]]:
    """`score`, cheaper where half of the completions are short.

    `short`: where not 0, the first half of every device's prompts have completions of at most so many tokens; what is
    beyond is not computed, and 0.
    """
    if not short:
        return score(params, cfg, prompts, completions, sampling, vision_tokens)
    parts = row_parts(prompts.tokens)
    front, back = _halves((prompts, completions, vision_tokens), parts)
    cut = jax.tree.map(lambda x: x[..., :short] if x.ndim == 3 else x, front[1])
    first = score(params, cfg, front[0], cut, sampling, front[2])
    pad = completions.tokens.shape[-1] - short
    padded = [jnp.pad(x, ((0, 0), (0, 0), (0, pad))) for x in first]
    second = score(params, cfg, back[0], back[1], sampling, back[2])
    logps, entropies = (_joined(a, b, parts) for a, b in zip(padded, second, strict=True))
    return logps, entropies


def _halves(tree: Any, parts: int) -> tuple[Any, Any]:
    """The first half of the rows of each of `parts` blocks, and the rest."""
    blocks = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), tree)
    half = jax.tree.leaves(blocks)[0].shape[1] // 2

    def rows(which: slice) -> Any:
        return jax.tree.map(lambda x: x[:, which].reshape(-1, *x.shape[2:]), blocks)

    return rows(slice(half)), rows(slice(half, None))


def _joined(first: Array, rest: Array, parts: int) -> Array:
    """The inverse of `_halves`, of one array."""
    blocks = [x.reshape(parts, -1, *x.shape[1:]) for x in (first, rest)]
    return jnp.concatenate(blocks, axis=1).reshape(-1, *first.shape[1:])


score_jit = jax.jit(score_halves, static_argnames=("cfg", "sampling", "short"))
encode_jit = jax.jit(family.encode, static_argnames="cfg")
