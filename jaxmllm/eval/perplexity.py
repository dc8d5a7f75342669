"""Temporal perplexity (TPL) and what attention says about frames and images. Metrics and filters, never a loss.

TPL asks how much of a text needs the whole video: its per-token surprise given one frame, minus that given all frames.
Low means that a single frame explains the text ("temporal hacking"). Source: sheet utr.md section 2; "Unhackable
Temporal Rewarding for Scalable Video MLLMs", arXiv 2502.12081, Eq. 6. Results carry no gradient: a policy could raise
TPL by making the text *less* likely under one frame.

Attention diagnostics: frame activation (utr.md 2.5) and image activation over reflection turns (reper.md 5.5).

Shapes: T answer tokens, K single frames tried, F frames, V image tokens, L layers, N heads, Q queries, S keys; `*B` any
leading axes.
"""

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped
from numpy.typing import ArrayLike

from jaxmllm.methods.masked import masked_count, masked_mean, masked_min, masked_sum, zero_masked


def token_nll(logps: Float[Array, "*B T"], mask: Shaped[Array, "*#B T"]) -> Float[Array, "*B"]:
    """Mean -log p over the counted tokens, nats a token; no gradient; 0 if none is counted."""
    return masked_mean(-jax.lax.stop_gradient(logps), mask, axis=-1)


def tpl_score(
    logps_full: Float[Array, "*B T"],
    logps_frames: Float[Array, "*B K T"],
    mask: Shaped[Array, "*B T"] | None = None,
    frame_mask: Shaped[Array, "*B K"] | None = None,
) -> dict[str, Float[Array, "..."]]:
    """Every form of TPL of one text (sheet utr.md 2.2).

    Args:
        logps_full: log p of the answer tokens given all frames, nats.
        logps_frames: the same tokens given each single frame.
        mask: 1 on answer tokens and the end, 0 on prompt, vision and padding; None: all count.
        frame_mask: 0 on padding along K; None: all count.

    Returns:
        `tpl_ppl_mean`, `tpl_ppl_min` (differences of perplexities, the reported metric), `tpl_nll_mean`, `tpl_nll_min`
        (nats a token, for filters and curves), all [*B], `ppl_full` [*B] and `ppl_frames` [*B, K]. High is good;
        negative where a single frame beats the video. `min` is the strict form: one sufficient frame is enough to hack.
    """
    mask = jnp.ones(logps_full.shape, bool) if mask is None else mask
    full, frames = token_nll(logps_full, mask), token_nll(logps_frames, mask[..., None, :])
    frame_mask = jnp.ones(frames.shape, bool) if frame_mask is None else frame_mask
    out = {"ppl_full": jnp.exp(full), "ppl_frames": jnp.exp(frames)}
    for mode, single, whole in (("ppl", out["ppl_frames"], out["ppl_full"]), ("nll", frames, full)):
        out[f"tpl_{mode}_mean"] = masked_mean(single, frame_mask, axis=-1) - whole
        out[f"tpl_{mode}_min"] = masked_min(single, frame_mask, axis=-1) - whole
    return out


def temporal_perplexity(
    logps_full: Float[Array, "*B T"],
    logps_frames: Float[Array, "*B K T"],
    mask: Shaped[Array, "*B T"] | None = None,
    frame_mask: Shaped[Array, "*B K"] | None = None,
    *,
    mode: str = "nll",
    reduce: str = "mean",
) -> Float[Array, "*B"]:
    """One form of `tpl_score`: mode `nll` or `ppl`, reduced by `mean` or `min`; KeyError on others.

    A corpus score is the unweighted mean of these.
    """
    return tpl_score(logps_full, logps_frames, mask, frame_mask)[f"tpl_{mode}_{reduce}"]


def leave_one_out(
    logps_full: Float[Array, "*B T"], logps_without: Float[Array, "*B F T"], mask: Shaped[Array, "*B T"] | None = None
) -> Float[Array, "*B F"]:
    """nll(video without frame t) - nll(video), nats a token: frame activation without attention weights.

    Clipped at 0 it can be given to `activation`.
    """
    mask = jnp.ones(logps_full.shape, bool) if mask is None else mask
    return token_nll(logps_without, mask[..., None, :]) - token_nll(logps_full, mask)[..., None]


def choose_frames(num_frames: int, k: int | None, rng: np.random.Generator, frames: str = "random") -> list[int]:
    """Indices (from 0, ascending) of the single frames to score: k of T without replacement; None or k >= T: all.

    `last` is the other reading of Eq. 6: the last frame only.

    Raises:
        ValueError: no frames, k < 1 or an unknown choice.
    """
    if num_frames < 1 or (k is not None and k < 1):
        raise ValueError(f"need at least one frame and k >= 1, got num_frames={num_frames}, k={k}")
    if frames == "last":
        return [num_frames - 1]
    if frames != "random":
        raise ValueError(f"unknown choice of frames {frames!r}; use random or last")
    if k is None or k >= num_frames:
        return list(range(num_frames))
    return sorted(int(i) for i in rng.choice(num_frames, k, replace=False))


def single_frame_clip(index: int, num_frames: int, single_mode: str = "single") -> list[int]:
    """Frame indices that stand for one frame on the video path, where two frames share a temporal cell.

    `single` doubles the frame so that no motion leaks in; `repeat` keeps the video's length and positions (the control
    run). Give both the full video's resolution per frame, or the single frame gets more detail (utr.md 2.3).
    """
    if single_mode not in ("single", "repeat"):
        raise ValueError(f"unknown single_mode {single_mode!r}; use single or repeat")
    return [index] * (2 if single_mode == "single" else num_frames)


def tpl_filter(
    scores: ArrayLike,
    lengths: ArrayLike,
    tasks: Sequence[Hashable] | None = None,
    tau: float | None = None,
    min_tokens: int = 8,
) -> Bool[np.ndarray, "N"]:
    """Which samples of a pool to keep: TPL_nll >= tau and at least `min_tokens` answer tokens (utr.md 2.4).

    tau None: the median of the samples that are long enough, taken inside each task when `tasks` is given, so that
    every task keeps its better half (comparisons across data sets mean little). Scores that are not finite are dropped.
    """
    scores = np.asarray(scores, np.float64)
    long_enough = (np.asarray(lengths) >= min_tokens) & np.isfinite(scores)
    if tau is not None:
        return long_enough & (scores >= tau)
    keep = np.zeros(scores.shape, bool)
    names = [0] * len(scores) if tasks is None else list(tasks)
    for name in dict.fromkeys(names):
        pool = long_enough & np.fromiter((other == name for other in names), bool, len(names))
        if pool.any():
            keep |= pool & (scores >= np.median(scores[pool]))
    return keep


def activation(
    mass: Float[Array, "*B F"], frame_mask: Shaped[Array, "*B F"] | None = None, rho: float | Float[Array, ""] = 0.5
) -> dict[str, Float[Array, "..."]]:
    """How many frames carry the weight (sheet utr.md 2.5).

    Returns:
        `p` [*B, F], the frames' shares; `n_active`, frames with p >= rho / F (equality up to rounding); `n_eff`, the
        exponential of the shares' entropy. A mass that is 0 everywhere gives p = 0 and n_active = 0.
    """
    frame_mask = jnp.ones(mass.shape, bool) if frame_mask is None else frame_mask
    mass = zero_masked(mass, frame_mask)
    total = jnp.sum(mass, axis=-1, keepdims=True)
    p = mass / jnp.where(total > 0, total, 1)
    threshold = rho / jnp.maximum(masked_count(frame_mask, axis=-1, keepdims=True), 1)
    active = (p >= threshold * (1 - 1e-6)) & (frame_mask != 0) & (total > 0)
    entropy = -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)
    return {"p": p, "n_active": masked_count(active, axis=-1), "n_eff": jnp.exp(entropy)}


def attention_to_keys(
    attn: Float[Array, "*B L N Q S"], query_mask: Shaped[Array, "*B Q"] | None = None
) -> Float[Array, "*B S"]:
    """Attention each key receives: mean over layers, heads and the counted queries (answer tokens; None: all)."""
    per_query = jnp.mean(attn.astype(jnp.result_type(jnp.float32, attn)), axis=(-4, -3))
    query_mask = jnp.ones(per_query.shape[:-1], bool) if query_mask is None else query_mask
    return masked_mean(per_query, query_mask[..., None], axis=-2)


def frame_activation(
    attn: Float[Array, "*B L N Q S"],
    spans: Int[Array, "*B F 2"],
    rho: float | Float[Array, ""] = 0.5,
    query_mask: Shaped[Array, "*B Q"] | None = None,
) -> dict[str, Float[Array, "..."]]:
    """`activation` of the frames whose tokens stand at keys spans[f, 0] <= s < spans[f, 1]; other keys are ignored.

    Empty spans are padding. Needs an attention path that returns its weights.
    """
    received = attention_to_keys(attn, query_mask)[..., None, :]
    key = jnp.arange(received.shape[-1])
    inside = (key >= spans[..., :1]) & (key < spans[..., 1:])
    return activation(masked_sum(received, inside, axis=-1), spans[..., 1] > spans[..., 0], rho)


def image_activation(attention: Float[Array, "*B V"], trim: float = 0.01) -> dict[str, Float[Array, "*B"]]:
    """What RePer plots over turns, and what it hides (sheet reper.md 5.5); `attention` from `attention_to_keys`.

    Returns:
        `avg_act`, 100 x mean of the map divided by its maximum, which measures flatness and is ruled by one sink token;
        `avg_act_trimmed`, the same without the `trim` largest share of tokens (at least one); `mass`, the total.
    """
    ordered = jnp.sort(attention.astype(jnp.result_type(jnp.float32, attention)), axis=-1)
    kept = ordered[..., : max(1, ordered.shape[-1] - int(np.ceil(trim * ordered.shape[-1])))]

    def flatness(a):
        return 100 * jnp.mean(a, axis=-1) / jnp.where(a[..., -1] > 0, a[..., -1], 1)

    return {"avg_act": flatness(ordered), "avg_act_trimmed": flatness(kept), "mass": jnp.sum(ordered, axis=-1)}


def focus_agreement(attention: Float[Array, "V"], target: Shaped[Array, "V"]) -> dict[str, Float[Array, ""]]:
    """Agreement of an attention map with where it should look (sheet reper.md 5.5 c).

    Args:
        attention: attention on each image token.
        target: fixations, a saliency map or a mask of the mentioned objects on the same grid; not 0 counts as a target.

    Returns:
        `nss`, mean standardised attention on targets; `auc`, chance that a target token gets more attention than
        another (ties half); `cc`, Pearson correlation with the map; `mass_ratio`, share of attention on targets over
        their share of the area. Chance level: 0, 0.5, 0, 1. What is undefined (no target, flat map) is at chance level.
    """
    a = attention.astype(jnp.result_type(jnp.float32, attention))
    hit = target != 0
    centred = a - jnp.mean(a)
    deviation = jnp.std(a)
    weight = target.astype(a.dtype) - jnp.mean(target.astype(a.dtype))
    spread = deviation * jnp.std(target.astype(a.dtype))
    wins = jnp.sign(a[:, None] - a[None, :]) / 2 + 0.5
    pairs = hit[:, None] & ~hit[None, :]
    share, area = masked_sum(a, hit), jnp.mean(hit.astype(a.dtype)) * jnp.sum(a)
    return {
        "nss": masked_mean(centred, hit) / jnp.where(deviation > 0, deviation, 1),
        "auc": jnp.where(jnp.any(pairs), masked_mean(wins, pairs), 0.5),
        "cc": jnp.mean(centred * weight) / jnp.where(spread > 0, spread, 1),
        "mass_ratio": jnp.where(area > 0, share / jnp.where(area > 0, area, 1), 1.0),
    }
