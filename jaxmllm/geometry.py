"""Boxes and points that know their coordinate frame, and the measures between them. numpy only.

Three frames occur in this library, and confusing them is the most reported failure of perception training:

| frame      | unit                                                   | extent (x, y)          |
|------------|--------------------------------------------------------|------------------------|
| `pixel`    | pixels of the original image (data sets, COCO files)   | `size` = (W, H)        |
| `resized`  | pixels of the image the model sees (Qwen2.5-VL text)   | `resized` = (w, h)     |
| `norm1000` | 0..1000 on both axes (Qwen2-VL text, trajectories)     | (1000, 1000)           |

`Boxes` and `Points` carry their frame and refuse to be compared across frames or images: convert with `.to(frame)`.
The functions in lower case work on bare arrays, for callers that have already fixed one frame.

Coordinates are continuous (no +1): the box [0, 0, 10, 10] has area 100. A box with x2 <= x1, y2 <= y1 or a coordinate
that is not finite is *invalid*: its area and every IoU with it are 0, its GIoU is -1. No measure returns NaN or warns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

FRAMES = ("pixel", "resized", "norm1000")
SUCCESS_THRESHOLDS = np.arange(21) / 20  # 0, 0.05 .. 1; k / 20 is the double nearest to the printed threshold
PRECISION_THRESHOLDS = np.arange(51.0)  # pixels


class FrameError(ValueError):
    """Two coordinates of different frames or images were mixed, or a conversion lacks the image size."""


C = TypeVar("C", bound="_Coordinates")


def _wh(value: Sequence[float] | None, name: str) -> tuple[float, float] | None:
    if value is None:
        return None
    pair = tuple(float(v) for v in value)
    if len(pair) != 2 or not all(np.isfinite(v) and v > 0 for v in pair):
        raise ValueError(f"{name} must be two positive numbers (width, height), got {value!r}")
    return pair


@dataclass(frozen=True, eq=False, init=False)
class _Coordinates:
    """Arrays of (x, y) pairs along the last axis, with the frame they are measured in."""

    array: Float[np.ndarray, "*N D"]  # float64; D = 4 for boxes, 2 for points
    frame: str  # one of FRAMES
    size: tuple[float, float] | None  # (W, H) of the original image, pixels
    resized: tuple[float, float] | None  # (w, h) of the image the model sees; `size` when left out

    _width = 0  # length of the last axis, set by the subclass

    def __init__(
        self,
        array: ArrayLike,
        frame: str,
        size: Sequence[float] | None = None,
        resized: Sequence[float] | None = None,
    ):
        if frame not in FRAMES:
            raise ValueError(f"unknown frame {frame!r}; use one of {FRAMES}")
        values = np.asarray(array, dtype=np.float64)
        if values.size == 0:  # an empty list has no last axis yet
            values = values.reshape(*(values.shape[:-1] if values.ndim > 1 else (0,)), self._width)
        if values.ndim == 0 or values.shape[-1] != self._width:
            raise ValueError(f"{type(self).__name__} needs a last axis of {self._width}, got shape {values.shape}")
        object.__setattr__(self, "array", values)
        object.__setattr__(self, "frame", frame)
        object.__setattr__(self, "size", _wh(size, "size"))
        object.__setattr__(self, "resized", _wh(size if resized is None else resized, "resized"))

    @classmethod
    def of(cls: type[C], record: Mapping[str, Any], array: ArrayLike, frame: str = "pixel") -> C:
        """Coordinates of `record`, taking `size` and `resized` from it (`resized` = `size` when absent)."""
        return cls(array, frame, record.get("size"), record.get("resized"))

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self: C, index: Any) -> C:
        return replace(self, array=self.array[index])

    def extent(self, frame: str | None = None) -> tuple[float, float]:
        """Width and height of the image in `frame` (default: the own one), in that frame's unit.

        Raises:
            FrameError: the size needed for this frame is unknown.
        """
        frame = self.frame if frame is None else frame
        if frame not in FRAMES:
            raise ValueError(f"unknown frame {frame!r}; use one of {FRAMES}")
        if frame == "norm1000":
            return (1000.0, 1000.0)
        wh = self.size if frame == "pixel" else self.resized
        if wh is None:
            raise FrameError(f"the {frame!r} frame needs the image's {'size' if frame == 'pixel' else 'resized size'}")
        return wh

    def to(self: C, frame: str) -> C:
        """The same places in another frame; scaling per axis, no rounding to whole numbers.

        Raises:
            FrameError: an image size needed for the conversion is unknown.
        """
        if frame == self.frame:
            return self
        source, target = (np.tile(self.extent(f), self._width // 2) for f in (self.frame, frame))
        with np.errstate(over="ignore"):  # equal extents keep every bit, so that a threshold on IoU falls alike
            array = np.where(source == target, self.array, self.array * target / source)
        return replace(self, array=array, frame=frame)

    def check_same(self, other: "_Coordinates") -> None:
        """Raise FrameError unless `other` has this frame and, where both know it, this image's sizes."""
        if self.frame != other.frame:
            raise FrameError(
                f"cannot compare {self.frame!r} with {other.frame!r} coordinates; convert one with .to({self.frame!r})"
            )
        for name in ("size", "resized"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None and theirs is not None and mine != theirs:
                raise FrameError(f"cannot compare coordinates of images with {name} {mine} and {theirs}")

    def clip(self: C) -> C:
        """Coordinates clipped to the image."""
        return replace(self, array=np.clip(self.array, 0.0, np.tile(self.extent(), self._width // 2)))

    def tolist(self) -> list:
        """Nested lists of floats in the own frame."""
        return self.array.tolist()


@dataclass(frozen=True, eq=False, init=False)
class Boxes(_Coordinates):
    """Boxes [x1, y1, x2, y2], shape [*N, 4], in one frame of one image.

    >>> a = Boxes([[64, 48, 320, 240]], "pixel", size=(640, 480), resized=(644, 476))
    >>> a.to("norm1000").tolist()
    [[100.0, 100.0, 500.0, 500.0]]
    """

    _width = 4

    @property
    def xyxy(self) -> Float[np.ndarray, "*N 4"]:
        return self.array

    @property
    def valid(self) -> Bool[np.ndarray, "*N"]:
        return box_valid(self.array)

    @property
    def area(self) -> Float[np.ndarray, "*N"]:
        """Areas in squared units of the frame; 0 for invalid boxes."""
        return box_area(self.array)

    @property
    def centers(self) -> "Points":
        return Points(box_center(self.array), self.frame, self.size, self.resized)

    def iou(self, other: "Boxes") -> Float[np.ndarray, "*N"]:
        """IoU row by row (shapes broadcast). Raises FrameError on mixed frames."""
        self.check_same(other)
        return box_iou(self.array, other.array)

    def giou(self, other: "Boxes") -> Float[np.ndarray, "*N"]:
        """Generalised IoU row by row. Raises FrameError on mixed frames."""
        self.check_same(other)
        return box_giou(self.array, other.array)

    def pairwise_iou(self, other: "Boxes") -> Float[np.ndarray, "P G"]:
        """IoU of every pair. Raises FrameError on mixed frames."""
        self.check_same(other)
        return pairwise_iou(self.array, other.array)

    def match(self, other: "Boxes", threshold: float = 0.0) -> tuple[Int[np.ndarray, "M"], Int[np.ndarray, "M"]]:
        """One-to-one pairs (own index, other's index) of largest summed IoU; see `match_iou`."""
        return match_iou(self.pairwise_iou(other), threshold)


@dataclass(frozen=True, eq=False, init=False)
class Points(_Coordinates):
    """Points [x, y], shape [*N, 2], in one frame of one image."""

    _width = 2

    @property
    def xy(self) -> Float[np.ndarray, "*N 2"]:
        return self.array

    def distance(self, other: "Points") -> Float[np.ndarray, "*N"]:
        """Euclidean distances row by row, in the frame's unit. Raises FrameError on mixed frames."""
        self.check_same(other)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(np.linalg.norm(self.array - other.array, axis=-1))

    def pairwise_distance(self, other: "Points") -> Float[np.ndarray, "P G"]:
        """Euclidean distance of every pair, in the frame's unit. Raises FrameError on mixed frames."""
        self.check_same(other)
        return pairwise_distance(self.array, other.array)

    def inside(self, boxes: Boxes) -> Bool[np.ndarray, "*N"]:
        """Whether each point lies in its box, border included. Raises FrameError on mixed frames."""
        self.check_same(boxes)
        low, high = boxes.array[..., :2], boxes.array[..., 2:]
        return np.asarray(((self.array >= low) & (self.array <= high)).all(-1))


def _array(values: ArrayLike, width: int) -> np.ndarray:
    """float64 array with a last axis of `width`; an empty list becomes [0, width]."""
    array = np.asarray(values, dtype=np.float64)
    return array.reshape(0, width) if array.size == 0 and array.ndim < 2 else array


def box_valid(boxes: ArrayLike) -> Bool[np.ndarray, "*N"]:
    """x2 > x1, y2 > y1 and all four finite, for boxes [*N, 4]."""
    b = _array(boxes, 4)
    return np.asarray(np.isfinite(b).all(-1) & (b[..., 2] > b[..., 0]) & (b[..., 3] > b[..., 1]))


def _sides(boxes: np.ndarray) -> np.ndarray:
    """Widths and heights [*N, 2], 0 for invalid boxes."""
    with np.errstate(all="ignore"):
        return np.where(box_valid(boxes)[..., None], boxes[..., 2:] - boxes[..., :2], 0.0)


def box_area(boxes: ArrayLike) -> Float[np.ndarray, "*N"]:
    """Areas of boxes [*N, 4]; 0 where invalid."""
    with np.errstate(over="ignore"):
        return np.asarray(_sides(_array(boxes, 4)).prod(-1))


def box_center(boxes: ArrayLike) -> Float[np.ndarray, "*N 2"]:
    """Centres of boxes [*N, 4]."""
    b = _array(boxes, 4)
    return b[..., :2] / 2 + b[..., 2:] / 2


def box_intersection(a: ArrayLike, b: ArrayLike) -> Float[np.ndarray, "*N"]:
    """Area shared by boxes a and b (shapes broadcast); 0 where either is invalid."""
    a, b = _array(a, 4), _array(b, 4)
    with np.errstate(all="ignore"):
        low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
        inter = np.clip(high - low, 0.0, None).prod(-1)
    return np.where(box_valid(a) & box_valid(b), inter, 0.0)


def _ratio(top: ArrayLike, bottom: ArrayLike) -> np.ndarray:
    """top / bottom, 0 where bottom is 0 or overflowed."""
    bottom = np.asarray(bottom)
    good = np.isfinite(bottom) & (bottom > 0)
    return np.asarray(np.where(good, top, 0.0) / np.where(good, bottom, 1.0))


def box_iou(a: ArrayLike, b: ArrayLike) -> Float[np.ndarray, "*N"]:
    """Intersection over union of boxes a and b (shapes broadcast), in 0..1; 0 where either is invalid."""
    inter = box_intersection(a, b)
    with np.errstate(over="ignore", invalid="ignore"):
        return _ratio(inter, box_area(a) + box_area(b) - inter)


def box_giou(a: ArrayLike, b: ArrayLike) -> Float[np.ndarray, "*N"]:
    """Generalised IoU (arXiv 1902.09630), -1..1: IoU minus the empty share of the hull; -1 where either is invalid."""
    a, b = _array(a, 4), _array(b, 4)
    inter = box_intersection(a, b)
    with np.errstate(all="ignore"):
        union = box_area(a) + box_area(b) - inter
        hull = (np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])).prod(-1)
        value = _ratio(inter, union) - _ratio(hull - union, hull)
    return np.where(box_valid(a) & box_valid(b) & np.isfinite(hull), value, -1.0)


def pairwise_iou(a: ArrayLike, b: ArrayLike) -> Float[np.ndarray, "P G"]:
    """IoU of every pair of boxes [P, 4] and [G, 4]."""
    return box_iou(_array(a, 4)[:, None], _array(b, 4)[None])


def pairwise_giou(a: ArrayLike, b: ArrayLike) -> Float[np.ndarray, "P G"]:
    """Generalised IoU of every pair of boxes [P, 4] and [G, 4]."""
    return box_giou(_array(a, 4)[:, None], _array(b, 4)[None])


def pairwise_distance(a: ArrayLike, b: ArrayLike) -> Float[np.ndarray, "P G"]:
    """Euclidean distance of every pair of points [P, 2] and [G, 2]."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.linalg.norm(_array(a, 2)[:, None] - _array(b, 2)[None], axis=-1)


def hungarian(cost: ArrayLike) -> tuple[Int[np.ndarray, "M"], Int[np.ndarray, "M"]]:
    """One-to-one assignment of least total cost: (rows ascending, their columns), M = min(P, G).

    Raises:
        ValueError: the cost [P, G] holds NaN or infinity.
    """
    cost = np.asarray(cost, dtype=np.float64)
    if cost.size == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if not np.isfinite(cost).all():
        raise ValueError("the assignment cost must be finite")
    rows, columns = linear_sum_assignment(cost)
    return rows.astype(np.int64), columns.astype(np.int64)


def match_iou(
    iou: Float[np.ndarray, "P G"], threshold: float = 0.0
) -> tuple[Int[np.ndarray, "M"], Int[np.ndarray, "M"]]:
    """One-to-one pairs of largest summed IoU among the pairs with IoU > threshold.

    Pairs at or under the threshold are worth nothing *before* the assignment, so they never keep a good pair apart.
    """
    eligible = iou > threshold
    rows, columns = hungarian(-np.where(eligible, iou, 0.0))
    keep = eligible[rows, columns]
    return rows[keep], columns[keep]


def center_error(pred: ArrayLike, gt: ArrayLike) -> Float[np.ndarray, "*N"]:
    """Distance of box centres, in the unit of the boxes."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.linalg.norm(box_center(pred) - box_center(gt), axis=-1))


def normalized_center_error(pred: ArrayLike, gt: ArrayLike) -> Float[np.ndarray, "*N"]:
    """Distance of box centres after dividing each axis by the target's width or height; inf for an invalid target."""
    sides = _sides(_array(gt, 4))
    good = box_valid(gt)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.linalg.norm((box_center(pred) - box_center(gt)) / np.where(good[..., None], sides, 1.0), axis=-1)
    return np.where(good, error, np.inf)


def success_curve(iou: ArrayLike, thresholds: ArrayLike = SUCCESS_THRESHOLDS) -> Float[np.ndarray, "K"]:
    """Share of frames with IoU > threshold (strict), per threshold; NaN IoUs are misses.

    The mean over the default 21 thresholds is the LaSOT Success score: a perfect tracker gets 20 / 21. NaN if no frame.
    """
    values = np.asarray(iou, dtype=np.float64).reshape(-1)
    thresholds = np.asarray(thresholds, dtype=np.float64)
    if values.size == 0:
        return np.full(thresholds.shape, np.nan)
    return (values[None] > thresholds[:, None]).mean(-1)


def precision_curve(error: ArrayLike, thresholds: ArrayLike = PRECISION_THRESHOLDS) -> Float[np.ndarray, "K"]:
    """Share of frames with centre error <= threshold, per threshold; NaN errors are misses. NaN if no frame."""
    values = np.asarray(error, dtype=np.float64).reshape(-1)
    thresholds = np.asarray(thresholds, dtype=np.float64)
    if values.size == 0:
        return np.full(thresholds.shape, np.nan)
    return (values[None] <= thresholds[:, None]).mean(-1)


def turned(values: Float[np.ndarray, "*N D"], orientation: int, size: Sequence[float]) -> Float[np.ndarray, "*N D"]:
    """Points (D = 2) or boxes [x1, y1, x2, y2] (D = 4) on stored pixels, as they lie once the picture is turned upright.

    `orientation` is EXIF's, 1 to 8 (EXIF 2.32, tag 0x0112); `size` (W, H) is that of the stored picture.
    """
    width, height = size
    pairs = np.asarray(values, np.float64).reshape(-1, 2)
    x, y = pairs[:, 0], pairs[:, 1]
    if orientation in (2, 3, 7, 8):
        x = width - x
    if orientation in (3, 4, 6, 7):
        y = height - y
    found = np.stack((y, x) if orientation >= 5 else (x, y), axis=-1)
    if np.shape(values)[-1] == 4:
        corners = found.reshape(-1, 2, 2)
        found = np.concatenate([corners.min(1), corners.max(1)], axis=-1)
    return found.reshape(np.shape(values))
