"""Single-object tracking measures and protocols: one-pass evaluation on LaSOT and GOT-10k (merlin.md 5.2).

Boxes are continuous [x1, y1, x2, y2] in pixels. A failed frame is a zero box, which overlaps nothing; it is never copied
forward before scoring. Measures of a clip answered in one generation are in `tasks.trajectories` and `tasks.foresight`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from jaxmllm.geometry import box_iou, box_valid, center_error, normalized_center_error, success_curve
from jaxmllm.tasks.trajectories import (
    GRID,
    box_in_range,
    constant_velocity,
    decode_box,
    parse_boxes,
    parse_trajectories,
)

ZERO = (0.0, 0.0, 0.0, 0.0)


def ope_metrics(pred: ArrayLike, gt: ArrayLike) -> dict[str, float]:
    """LaSOT's `success` (mean over 21 thresholds), `precision20` and `norm_precision20` of one video, in 0..1.

    Rows are frames; the first prediction is replaced by the truth. A frame whose target is absent (w <= 0 or h <= 0) is a
    miss of all three but stays in the denominator, so a perfect tracker gets a success of 20 / 21.

    Raises:
        ValueError: the arrays are not both [frames, 4], or hold no frame.
    """
    pred, gt = np.array(pred, np.float64), np.asarray(gt, np.float64)
    if pred.shape != gt.shape or gt.ndim != 2 or gt.shape[1] != 4 or not len(gt):
        raise ValueError(f"predictions and truth must both be [frames, 4], got {pred.shape} and {gt.shape}")
    pred[0] = gt[0]
    there = box_valid(gt)
    iou = np.where(there, box_iou(pred, gt), -1.0)  # an IoU of 0 is no hit either, but absent is not "overlap 0"
    return {
        "success": float(success_curve(iou).mean()),
        "precision20": float(np.mean(there & (center_error(pred, gt) <= 20))),
        "norm_precision20": float(np.mean(there & (normalized_center_error(pred, gt) <= 0.2))),
    }


def lasot(videos: Sequence[tuple[ArrayLike, ArrayLike]]) -> dict[str, float]:
    """Means of `ope_metrics` over (prediction, truth) videos, each video counting the same."""
    rows = [ope_metrics(pred, gt) for pred, gt in videos]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}


def got10k(videos: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """GOT-10k's `ao`, `sr50`, `sr75` pooled over frames: `pred`, `gt` [frames, 4], `size`, optional `visible` [frames].

    The first frame and frames of zero visibility are left out, boxes are bounded by the image, thresholds are strict. As in
    the set's toolkit (got10k 0.1.3, `rect_iou`), a box that begins before the image is moved to its border, not cut.
    """
    ious: list[float] = []
    for video in videos:
        pred, gt = (_bounded(video[name], video["size"]) for name in ("pred", "gt"))
        counted = np.asarray(video.get("visible", np.ones(len(gt))), np.float64) > 0
        counted[:1] = False
        ious += box_iou(pred, gt)[counted].tolist()
    if not ious:
        return {}
    return {"ao": float(np.mean(ious))} | {f"sr{100 * t:.0f}": float(np.mean(np.array(ious) > t)) for t in (0.5, 0.75)}


def _bounded(boxes: ArrayLike, size: Sequence[float]) -> Float[np.ndarray, "frames 4"]:
    boxes, limit = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(size, np.float64)
    low = np.clip(boxes[:, :2], 0, limit)
    return np.hstack([low, low + np.clip(boxes[:, 2:] - boxes[:, :2], 0, limit - low)])


def pairwise_track(
    ask: Callable[[int, int, list[float]], str],
    first_box: Sequence[float],
    frames: int,
    size: Sequence[float],
    extent: tuple[float, float] = GRID,
) -> Float[np.ndarray, "frames 4"]:
    """Track through a video two frames at a time, the query box being the tracker's own last answer.

    `ask(template, frame, box)` shows the frames with these indices and the template's box (pixels) and returns the
    reply. Its box of frame 2 counts, without trajectories its first box. If there is none that is valid, the frame gets
    the zero box, and the last good frame and box stay the template.
    """
    out = np.zeros((frames, 4))
    out[0] = first_box
    template = 0
    for frame in range(1, frames):
        box = _second_box(ask(template, frame, out[template].tolist()))
        if box is not None and box_in_range(box, extent):
            out[frame] = decode_box(box, size[0], size[1], extent=extent)
            template = frame
    return out


def _second_box(reply: str) -> list[float] | None:
    for block in parse_trajectories(reply):
        if 2 in block["frames"]:
            return block["frames"][2]
    if parse_trajectories(reply):
        return None  # the box of frame 1 is only a repetition of the question
    return next(iter(parse_boxes(reply)), None)


def static_track(gt: ArrayLike) -> Float[np.ndarray, "frames 4"]:
    """The first box in every frame: the baseline that measures how much a set moves."""
    gt = np.asarray(gt, np.float64)
    return np.repeat(gt[:1], len(gt), axis=0)


def velocity_track(gt: ArrayLike) -> Float[np.ndarray, "frames 4"]:
    """Each frame from the true boxes of the two before it at constant speed; the second frame repeats the first."""
    gt = np.asarray(gt, np.float64)
    rows = [gt[0]]
    for t in range(1, len(gt)):
        known = {k: gt[k] for k in (t - 2, t - 1) if k >= 0 and box_valid(gt[k])}
        rows.append(np.asarray(constant_velocity(known, [t])[t] if known else ZERO, np.float64))
    return np.array(rows)
