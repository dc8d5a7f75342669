"""Geometry against pixel counting, pycocotools, brute-force assignment and printed numbers."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from jaxmllm import geometry as geo
from jaxmllm.geometry import Boxes, FrameError, Points

pytestmark = pytest.mark.filterwarnings("error")

GRID = 24
corner = st.integers(0, GRID)
boxes = st.tuples(corner, corner, corner, corner).map(
    lambda c: [min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3])]
)
real_boxes = boxes.filter(lambda b: b[0] < b[2] and b[1] < b[3])
numbers = st.floats(allow_nan=True, allow_infinity=True)


def raster(box):
    cells = np.zeros((GRID, GRID), bool)
    cells[box[1] : box[3], box[0] : box[2]] = True
    return cells


@given(boxes, boxes)
def test_iou_and_area_count_pixels(a, b):
    union = (raster(a) | raster(b)).sum()
    inter = (raster(a) & raster(b)).sum()
    assert geo.box_area(a) == raster(a).sum()
    assert geo.box_intersection(a, b) == inter
    assert geo.box_iou(a, b) == pytest.approx(inter / union if inter else 0.0, abs=1e-12)


@given(real_boxes, real_boxes)
def test_giou_counts_pixels_of_the_hull(a, b):
    union, inter = (raster(a) | raster(b)).sum(), (raster(a) & raster(b)).sum()
    hull = raster([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])]).sum()
    value = float(geo.box_giou(a, b))
    assert value == pytest.approx(inter / union - (hull - union) / hull, abs=1e-12)
    assert -1 <= value <= float(geo.box_iou(a, b)) + 1e-12


@given(st.lists(real_boxes, min_size=1, max_size=5), st.lists(real_boxes, min_size=1, max_size=5))
def test_pairwise_iou_equals_pycocotools(a, b):
    as_xywh = [np.array([[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in side], float) for side in (a, b)]
    expected = coco_mask.iou(*as_xywh, [0] * len(b))
    np.testing.assert_allclose(geo.pairwise_iou(a, b), expected, atol=1e-12)


@given(st.lists(numbers, min_size=4, max_size=4), st.lists(numbers, min_size=4, max_size=4))
def test_any_numbers_give_a_defined_value(a, b):
    iou, giou = float(geo.box_iou(a, b)), float(geo.box_giou(a, b))
    assert 0 <= iou <= 1 + 1e-9
    assert -1 - 1e-9 <= giou <= 1 + 1e-9
    if not (geo.box_valid(a) and geo.box_valid(b)):
        assert (iou, giou) == (0, -1)


@given(real_boxes, real_boxes, st.floats(0.1, 10), st.floats(0.1, 10))
def test_rescaling_an_axis_leaves_iou(a, b, sx, sy):
    scale = np.array([sx, sy, sx, sy])
    assert geo.box_iou(a * scale, b * scale) == pytest.approx(geo.box_iou(a, b), abs=1e-9)


def test_inverted_and_empty_boxes():
    assert geo.box_iou([10, 10, 0, 0], [0, 0, 10, 10]) == 0  # both axes: the naive product of sides is positive
    assert geo.box_iou([10, 0, 0, 10], [0, 0, 10, 10]) == 0
    assert geo.box_iou([0, 0, 0, 0], [0, 0, 0, 0]) == 0
    assert geo.pairwise_iou([], [[0, 0, 1, 1]]).shape == (0, 1)
    assert geo.pairwise_distance([], []).shape == (0, 0)
    assert len(Boxes([], "pixel")) == 0 and Boxes([], "norm1000").array.shape == (0, 4)


# --- frames ---------------------------------------------------------------------------------------------------------

IMAGE = {"size": (640, 480), "resized": (644, 476)}


def test_conversions_by_hand():
    box = Boxes([[64, 48, 320, 480]], "pixel", **IMAGE)
    assert box.to("norm1000").tolist() == [[100, 100, 500, 1000]]
    np.testing.assert_allclose(box.to("resized").array, [[64.4, 47.6, 322, 476]])
    point = Points([322, 119], "resized", **IMAGE)
    np.testing.assert_allclose(point.to("pixel").array, [320, 120])
    same = Boxes(np.arange(100.0).reshape(-1, 4), "pixel", (90, 70), (90, 70))
    np.testing.assert_array_equal(same.to("resized").array, same.array)  # bit for bit: thresholds must not move
    np.testing.assert_allclose(point.to("norm1000").array, [500, 250])


@given(st.lists(real_boxes, max_size=4), st.permutations(geo.FRAMES))
def test_conversion_cycle_is_the_identity(values, frames):
    start = Boxes(np.array(values, float).reshape(-1, 4), frames[0], **IMAGE)
    there = start.to(frames[1]).to(frames[2])
    np.testing.assert_allclose(there.array, start.to(frames[2]).array, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(there.to(frames[0]).array, start.array, rtol=1e-12, atol=1e-12)


def test_mixed_frames_raise():
    pixel = Boxes([[0, 0, 10, 10]], "pixel", **IMAGE)
    grid = pixel.to("norm1000")
    for mixed in (
        lambda: pixel.iou(grid),
        lambda: pixel.giou(grid),
        lambda: pixel.pairwise_iou(grid),
        lambda: pixel.match(grid),
        lambda: pixel.centers.distance(grid.centers),
        lambda: pixel.centers.pairwise_distance(grid.centers),
        lambda: pixel.centers.inside(grid),
    ):
        with pytest.raises(FrameError, match="convert one with"):
            mixed()
    with pytest.raises(FrameError, match="640"):
        pixel.iou(Boxes([[0, 0, 10, 10]], "pixel", (320, 240)))
    with pytest.raises(FrameError, match="size"):
        Boxes([[0, 0, 10, 10]], "norm1000").to("pixel")
    assert pixel.iou(grid.to("pixel"))[0] == pytest.approx(1)


def test_bad_arguments_name_the_problem():
    with pytest.raises(ValueError, match="frame"):
        Boxes([[0, 0, 1, 1]], "pixels")
    with pytest.raises(ValueError, match="last axis of 4"):
        Boxes([[0, 0, 1]], "pixel")
    with pytest.raises(ValueError, match="size"):
        Boxes([[0, 0, 1, 1]], "pixel", (0, 10))
    with pytest.raises(ValueError, match="frame"):
        Boxes([[0, 0, 1, 1]], "pixel", (10, 10)).to("norm")


def test_record_without_resized_uses_its_size():
    box = Boxes.of({"size": [200, 100]}, [[0, 0, 100, 50]])
    assert box.to("resized").tolist() == box.tolist()
    assert box.to("norm1000").tolist() == [[0, 0, 500, 500]]
    assert Boxes.of({"size": [200, 100]}, [[-5, 0, 300, 50]]).clip().tolist() == [[0, 0, 200, 50]]


# --- matching and curves --------------------------------------------------------------------------------------------

costs = st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda s: st.lists(st.lists(st.integers(-9, 9), min_size=s[1], max_size=s[1]), min_size=s[0], max_size=s[0])
)


def assignments(rows, columns):
    """Every one-to-one assignment of min(rows, columns) pairs."""
    small = min(rows, columns)
    for chosen in itertools.combinations(range(rows), small):
        for order in itertools.permutations(range(columns), small):
            yield list(zip(chosen, order, strict=True))


@given(costs)
def test_hungarian_is_optimal(cost):
    cost = np.array(cost, float)
    rows, columns = geo.hungarian(cost)
    best = min(sum(cost[i, j] for i, j in pairs) for pairs in assignments(*cost.shape))
    assert len(rows) == min(cost.shape) and len(set(columns)) == len(rows) == len(set(rows))
    assert cost[rows, columns].sum() == best


@given(costs, st.sampled_from([0.0, 0.3, 0.5]))
def test_match_iou_is_the_best_of_the_eligible_pairs(cost, threshold):
    iou = (np.array(cost, float) + 9) / 18
    rows, columns = geo.match_iou(iou, threshold)
    eligible = np.where(iou > threshold, iou, 0)
    best = max(sum(eligible[i, j] for i, j in pairs) for pairs in assignments(*iou.shape))
    assert (iou[rows, columns] > threshold).all()
    assert iou[rows, columns].sum() == pytest.approx(best)


def test_hungarian_refuses_what_cannot_be_compared():
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            geo.hungarian([[0.0, bad]])
    assert [len(side) for side in geo.hungarian(np.zeros((0, 3)))] == [0, 0]


def test_success_and_precision_curves():
    assert geo.success_curve(np.ones(7)).mean() == pytest.approx(20 / 21)  # IoU > 1 is impossible
    np.testing.assert_array_equal(geo.success_curve([0.5, 0.6, np.nan, 0.0], [0.0, 0.5, 0.55]), [0.5, 0.25, 0.25])
    at = np.arange(21)
    np.testing.assert_array_equal(geo.success_curve([0.6]), (at < 12).astype(float))  # 0.6 > 0.6 is false
    np.testing.assert_array_equal(geo.precision_curve([20.0, 20.1, np.nan, 0.0], [0, 20]), [0.25, 0.5])
    assert np.isnan(geo.success_curve([])).all() and np.isnan(geo.precision_curve([])).all()


def test_center_errors():
    gt, pred = [[0, 0, 10, 20]], [[3, 4, 13, 24]]
    np.testing.assert_allclose(geo.center_error(pred, gt), [5])
    np.testing.assert_allclose(geo.normalized_center_error(pred, gt), [np.hypot(0.3, 0.2)])
    assert np.isinf(geo.normalized_center_error(pred, [[0, 0, 0, 0]])).all()
