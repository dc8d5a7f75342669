"""Items about the order of events are closed: what a nearest-neighbour solver on true places makes of each view of them."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.world.quadruples import ORDERS, OrderQuadruples, OrderSpec, places
from jaxmllm.world.scenes import SceneSpec
from tests.support.blind_solver import label_accuracy

ITEMS = 400


@pytest.fixture(scope="module")
def records():
    source = OrderQuadruples(length=4 * ITEMS)
    source._draw = lambda *_: None  # the solver is given the places
    return [source[k] for k in range(4 * ITEMS)]


def nearest(views, answers):
    """Share of the second half answered as their nearest neighbours of the first half are.

    Neighbours at equal distance vote; a tie counts a half.
    """
    views, answers = np.asarray(views, float).reshape(len(answers), -1), np.asarray(answers)
    half = len(answers) // 2
    tree = cKDTree(views[:half])
    distance, _ = tree.query(views[half:])
    right = []
    for view, d, answer in zip(views[half:], distance, answers[half:], strict=True):
        votes = answers[:half][tree.query_ball_point(view, d + 1e-9)]
        share = np.mean(votes == "A")
        right.append(0.5 if share == 0.5 else float((share > 0.5) == (answer == "A")))
    return float(np.mean(right))


def test_only_the_whole_clip_in_order_answers(records):
    seen = np.stack([places(r) for r in records])
    answers = [r["messages"][-1]["content"] for r in records]
    for frame in range(seen.shape[1]):
        assert nearest(seen[:, frame], answers) == pytest.approx(0.5, abs=1e-9)
    unordered = np.sort(seen.view([("", seen.dtype)] * 8)[..., 0], axis=1).view(seen.dtype).reshape(seen.shape)
    assert nearest(unordered, answers) == pytest.approx(0.5, abs=1e-9)
    moves = np.abs(np.diff(seen, axis=1)).reshape(len(seen), -1, 2, 4).sum(-1) > 0  # who moves when
    assert nearest(moves, answers) == 1.0


def test_the_four_clips_of_an_item(records):
    for item in range(0, len(records), 4):
        four = [places(r) for r in records[item : item + 4]]
        questions = {r["messages"][0]["content"][-1]["text"] for r in records[item : item + 4]}
        assert len(questions) == 1 and [r["order"] for r in records[item : item + 4]] == list(ORDERS)
        np.testing.assert_array_equal(four[0][0], four[1][0])
        np.testing.assert_array_equal(four[0][-1], four[1][-1])
        np.testing.assert_array_equal(four[0][::-1], four[2])
        np.testing.assert_array_equal(four[1][::-1], four[3])
        assert [r["messages"][-1]["content"] for r in records[item : item + 4]] == ["A", "B", "B", "A"]
        moved = np.flatnonzero(np.abs(np.diff(four[0], axis=0)).sum(-1))
        assert len(moved) == 2 and (np.diff(four[0], axis=0)[moved[0], :4] != 0).any()  # A first


def test_words_alone_stay_at_chance(records):
    texts = [r["messages"][0]["content"][-1]["text"] for r in records]
    accuracy, chance = label_accuracy(texts, [r["messages"][-1]["content"] for r in records])
    assert chance == 0.5 and accuracy == pytest.approx(0.5, abs=0.03)


def test_pictures_show_the_places_and_splits_differ():
    source = OrderQuadruples("val", length=8)
    record = source[2]
    assert places(open_source("order:val?length=8")[2]).tolist() == places(record).tolist()
    images = [part["image"] for part in record["messages"][0]["content"] if part["type"] == "image"]
    assert len(images) == 6 and images[0].shape == (84, 84, 3)
    same = np.abs(images[0].astype(int) - images[1]).mean()
    step = np.abs(images[1].astype(int) - images[2]).mean()
    assert step > 1.4 * same  # between holds only the noise changes
    assert places(record).tolist() != places(OrderQuadruples("train", length=8)[2]).tolist()
    with pytest.raises(InputError, match="two objects"):
        OrderSpec(scene=SceneSpec(objects=(1, 2)))
