"""Words for tracks by rule: where a subject is, how it moves, what colour it has (sheet utr.md 3.1)."""

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmllm.world.clips import STILL, place_of

HUES = (
    (15, "red"),
    (45, "orange"),
    (70, "yellow"),
    (165, "green"),
    (255, "blue"),
    (300, "purple"),
    (345, "pink"),
    (361, "red"),
)
SLOW = 0.15  # sizes of the box a second: below it a subject stands still


def places(boxes: Mapping[int, Sequence[float]], size: Sequence[int]) -> list[dict[str, Any]]:
    """Spans of the nine parts of the view that a track is in."""
    return _spans({t: place_of(box, size) for t, box in boxes.items()})


def motions(boxes: Mapping[int, Sequence[float]], fps: float) -> list[dict[str, Any]]:
    """Spans of moving left, right, up or down, or standing still, judged over a second each."""
    half, frames = max(round(fps / 2), 1), sorted(boxes)
    said = {}
    for t in frames:
        near = [s for s in frames if abs(s - t) <= half]
        a, b = (np.asarray(boxes[s], float) for s in (near[0], near[-1]))
        seconds = max(near[-1] - near[0], 1) / fps
        shift = (b[:2] + b[2:] - a[:2] - a[2:]) / 2
        speed = shift / (np.sqrt(np.prod(a[2:] - a[:2])) * seconds)
        axis = int(abs(speed[1]) > abs(speed[0]))
        way = (("moving left", "moving right"), ("moving up", "moving down"))[axis][int(speed[axis] > 0)]
        said[t] = way if abs(speed[axis]) >= SLOW else STILL
    return _spans(said)


def colour(crop: np.ndarray) -> str:
    """The word for the colour of most of the middle of a picture, uint8 [H, W, 3]."""
    height, width = crop.shape[:2]
    middle = crop[height // 4 : height - height // 4, width // 4 : width - width // 4].reshape(-1, 3)
    red, green, blue = np.median(middle if len(middle) else crop.reshape(-1, 3), axis=0) / 255
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    if value < 0.25:
        return "black"
    if saturation < 0.22:
        return "white" if value > 0.75 else "grey"
    return next(name for limit, name in HUES if hue * 360 < limit)


def _spans(values: Mapping[int, str]) -> list[dict[str, Any]]:
    """Runs of equal words over frames that follow each other."""
    spans: list[dict[str, Any]] = []
    for t in sorted(values):
        if spans and spans[-1]["text"] == values[t] and spans[-1]["span"][1] == t - 1:
            spans[-1]["span"][1] = t
        else:
            spans.append({"span": [t, t], "text": values[t]})
    return spans
