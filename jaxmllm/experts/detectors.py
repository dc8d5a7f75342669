"""Detectors: what is where in each frame of a video.

A detector is made anew for each video and called with its frames in order: `detector(frame) -> [Detection, ..]`, a frame
being uint8 [H, W, 3] in RGB. `open_detector("module:function")` takes the function of another package that makes one.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmllm.errors import InputError


class Detection(NamedTuple):
    """One object in one frame."""

    box: Sequence[float]  # [x1, y1, x2, y2], pixels
    score: float  # 0..1
    name: str


WARM_UP = 8  # frames in which the ground is learnt fast

Detector = Callable[[np.ndarray], Sequence[Detection]]


class MotionDetector:
    """What moves before a still background, by OpenCV's MOG2 (doi 10.1109/ICPR.2004.1333992). Needs no weights.

    Shadows are taken away. Blobs are closed, and those below `min_area` of the picture are left out.
    """

    def __init__(self, min_area: float = 0.0015, history: int = 300, threshold: float = 24.0):
        import cv2

        self._cv2, self.min_area, self.history = cv2, min_area, history
        self._model = cv2.createBackgroundSubtractorMOG2(history, threshold, detectShadows=True)
        self._seen = 0

    def __call__(self, frame: np.ndarray) -> list[Detection]:
        cv2 = self._cv2
        height, width = frame.shape[:2]
        self._seen += 1
        # left to itself, MOG2 learns so fast at first that what moves slowly is taken for ground at once
        rate = -1 if self._seen <= WARM_UP else 2 / self.history
        mask = self._model.apply(cv2.GaussianBlur(frame, (5, 5), 0), learningRate=rate)
        if self._seen < 3:  # there is no background yet
            return []
        mask = (mask == 255).astype(np.uint8)  # 127 is shadow
        side = max(round(min(height, width) / 120), 1)
        mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((side, side), np.uint8))
        # people are taller than wide, and fall apart at the waist
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((5 * side, 2 * side), np.uint8))
        _, _, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        found = []
        for x, y, w, h, area in stats[1:].tolist():  # the first is the background
            if w * h >= self.min_area * width * height:
                found.append(Detection([x, y, x + w, y + h], min(0.3 + area / (w * h), 1.0), "object"))
        return found


DETECTORS: dict[str, Callable[[], Detector]] = {"motion": MotionDetector}


def open_detector(name: str) -> Callable[[], Detector]:
    """The maker of a detector: one of `DETECTORS`, or `module:function`. InputError where it cannot be had."""
    if name in DETECTORS:
        return DETECTORS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise InputError(
            f"detector {name!r} is unknown; use {', '.join(DETECTORS)}, or module:function for one of your own"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of somebody else may raise anything
        raise InputError(f"detector {name!r} does not import ({type(error).__name__}: {error})") from None


def detect(detector: Detector, frame: np.ndarray, where: str) -> list[Detection]:
    """The detector's boxes cut to the frame, checked. InputError naming video and frame where it raises or gives no boxes."""
    try:
        found = [Detection(*row) for row in detector(frame)]
        values: list[tuple[Any, ...]] = [(*map(float, d.box), float(d.score)) for d in found]
    except Exception as error:
        raise InputError(f"{where}: the detector failed ({type(error).__name__}: {error})") from None
    if not all(len(row) == 5 and all(map(math.isfinite, row)) for row in values):
        raise InputError(f"{where}: the detector gave {values[:2]}, which are not four finite corners and a score")
    height, width = frame.shape[:2]
    cut = [
        Detection([max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)], score, str(d.name))
        for d, (x1, y1, x2, y2, score) in zip(found, values, strict=True)
    ]
    return [d for d in cut if d.box[0] < d.box[2] and d.box[1] < d.box[3]]
