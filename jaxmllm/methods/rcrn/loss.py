"""Losses of grounded image-text matching with mismatched relations (GITM-MR; gitm_mr.md 3).

`L = 1 L_grd + 3 L_match + 1 L_reg`. The wrong relation is never supervised: the edge label is read in evaluation only.
Axes: B samples, N candidate boxes, T tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmllm.methods.masked import masked_mean, zero_masked

WEIGHTS = {"grd": 1.0, "match": 3.0, "reg": 1.0}


def inclusive_iou(a: Float[Array, "*#B 4"], b: Float[Array, "*#B 4"]) -> Float[Array, "*B"]:
    """IoU of boxes [x1, y1, x2, y2] whose last row and column belong to the box (w = x2 - x1 + 1)."""

    def area(box):
        return jnp.maximum(box[..., 2:] - box[..., :2] + 1, 0).prod(-1)

    low, high = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
    inter = area(jnp.concatenate([low, high], -1))
    union = area(a) + area(b) - inter
    return jnp.where(union > 0, inter / jnp.where(union > 0, union, 1), 0)


def encode_deltas(boxes: Float[Array, "*B 4"], target: Float[Array, "*B 4"]) -> Float[Array, "*B 4"]:
    """(dx, dy, dw, dh) that move `boxes` onto `target`: R-CNN coding with weights 1 and widths x2 - x1."""
    sides, wanted = boxes[..., 2:] - boxes[..., :2], target[..., 2:] - target[..., :2]
    shift = (target[..., :2] + wanted / 2 - boxes[..., :2] - sides / 2) / sides
    return jnp.concatenate([shift, jnp.log(wanted / sides)], -1)


def gold_candidate(
    boxes: Float[Array, "B N 4"], valid: Bool[Array, "B N"], gt_box: Float[Array, "B 4"]
) -> Int[Array, "B"]:
    """Candidate of largest inclusive IoU with the gold box; -1 under 0.5, where training would teach a wrong box."""
    iou = jnp.where(valid, inclusive_iou(boxes, gt_box[:, None]), -1)
    return jnp.where(iou.max(-1) >= 0.5, jnp.argmax(iou, -1), -1)


def grounding_loss(
    b_root: Float[Array, "B N"],
    valid: Bool[Array, "B N"],
    gt_idx: Int[Array, "B"],
    match: Bool[Array, "B"],
    scale: Float[Array, ""] | float,
) -> Float[Array, ""]:
    """Mean over matched samples of -log softmax(scale b_root) at the gold box, over the real boxes only.

    A gold index that is negative or names a padding box skips the sample. 0 if no sample counts.
    """
    log_p = jax.nn.log_softmax(jnp.where(valid, scale * zero_masked(b_root, valid), -1e30), -1)
    gold = jnp.clip(gt_idx, 0, valid.shape[-1] - 1)[:, None]
    counted = match & (gt_idx >= 0) & jnp.take_along_axis(valid, gold, 1)[:, 0]
    return -masked_mean(jnp.take_along_axis(log_p, gold, 1)[:, 0], counted)


def match_loss(
    logit: Float[Array, "B"], match: Bool[Array, "B"], smoothing: float = 0.0, mask: Bool[Array, "B"] | None = None
) -> Float[Array, ""]:
    """Mean binary cross-entropy of the matching logit (the smallest node score); matched is 1.

    `smoothing` s moves the targets to s/2 and 1 - s/2, for mismatches nobody verified (gitm_mr.md 5, gap 14: 0.05).
    """
    mask = jnp.ones(logit.shape, bool) if mask is None else mask
    logit = zero_masked(logit, mask)
    target = match * (1 - smoothing) + smoothing / 2
    return masked_mean(jax.nn.softplus(logit) - target * logit, mask)


def regression_loss(
    pred_delta: Float[Array, "B 4"],
    proposal: Float[Array, "B 4"],
    gt_box: Float[Array, "B 4"],
    match: Bool[Array, "B"],
) -> Float[Array, ""]:
    """Sum over the four coordinates of |pred - target| (smooth L1, beta 0), averaged over the samples that count.

    A sample counts if it is matched and the box the model chose overlaps the gold box with inclusive IoU > 0.5; else 0.
    """
    # Unmatched samples have no gold box; one unit box keeps the logarithm finite in value and gradient.
    unit = jnp.array([0.0, 0.0, 1.0, 1.0])
    proposal, gt_box = (jnp.where(match[:, None], x, unit) for x in (proposal, gt_box))
    counted = match & (inclusive_iou(proposal, gt_box) > 0.5)
    proposal, gt_box = (jnp.where(counted[:, None], x, unit) for x in (proposal, gt_box))
    error = jnp.abs(zero_masked(pred_delta, counted[:, None]) - encode_deltas(proposal, gt_box)).sum(-1)
    return masked_mean(error, counted)


def matching_losses(
    b_root: Float[Array, "B N"],
    valid: Bool[Array, "B N"],
    gt_idx: Int[Array, "B"],
    scale: Float[Array, ""] | float,
    match_logit: Float[Array, "B"],
    match: Bool[Array, "B"],
    proposal: Float[Array, "B 4"],
    gt_box: Float[Array, "B 4"],
    pred_delta: Float[Array, "B 4"],
    weights: dict[str, float] | None = None,
    smoothing: float = 0.0,
) -> dict[str, Float[Array, ""]]:
    """`L_grd`, `L_match`, `L_reg` and their weighted sum `total`; `weights` replaces some of `WEIGHTS`.

    A curriculum starts with `weights={"match": 0.0}` (released: 40k iterations or 10 epochs; the port: 2 epochs).

    Raises:
        ValueError: unknown name in `weights`.
    """
    unknown = set(weights or {}) - WEIGHTS.keys()
    if unknown:
        raise ValueError(f"unknown loss weights {sorted(unknown)}; known: {sorted(WEIGHTS)}")
    parts = {
        "L_grd": grounding_loss(b_root, valid, gt_idx, match, scale),
        "L_match": match_loss(match_logit, match, smoothing),
        "L_reg": regression_loss(pred_delta, proposal, gt_box, match),
    }
    factors = WEIGHTS | (weights or {})
    return parts | {"total": sum((factor * parts[f"L_{name}"] for name, factor in factors.items()), jnp.zeros(()))}


def token_match_loss(
    logits: Float[Array, "B T 2"], mask: Bool[Array, "B T"], match: Bool[Array, "B"]
) -> Float[Array, ""]:
    """The UNITER baseline: cross-entropy of token logits max-pooled over the expression (class 0 mismatch, 1 match).

    `mask` leaves out special tokens; a sample without tokens is skipped.
    """
    some = mask.any(-1)
    pooled = jnp.where(mask[..., None], zero_masked(logits, mask[..., None]), -jnp.inf).max(1)
    log_p = jax.nn.log_softmax(jnp.where(some[:, None], pooled, 0), -1)
    return -masked_mean(jnp.take_along_axis(log_p, match.astype(jnp.int32)[:, None], 1)[:, 0], some)


def token_mismatch_phrase(
    logits: Float[Array, "B T 2"], phrases: Bool[Array, "B E T"]
) -> tuple[Float[Array, "B E"], Int[Array, "B"]]:
    """The UNITER baseline's relation answer: (largest mismatch probability of each phrase's tokens, its arg max).

    `phrases` marks the tokens of each relation; a phrase without tokens scores -1, a sample without phrases gives 0.
    """
    p = jax.nn.softmax(zero_masked(logits, phrases.any(1)[..., None]), -1)[..., 0]
    score = jnp.where(phrases, p[:, None], -1).max(-1)
    return score, jnp.argmax(score, -1)
