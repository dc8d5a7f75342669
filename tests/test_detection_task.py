"""Perception-R1 detection: printed numbers, the released bugs and their corrections, brute-force matching."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.geometry import pairwise_iou
from jaxmllm.tasks import detection
from tests.support.answer_texts import element, fenced, near

pytestmark = pytest.mark.filterwarnings("error")

T2 = ([1, 18], [[100, 100, 200, 300], [300, 150, 400, 250]])
PERSON, DOG_BOX = [100, 100, 200, 300], [300, 150, 400, 250]


def released(text, penalty=False, targets=T2, matching="hungarian", **weights):
    return detection.released_reward(text, *targets, detection.Weights(penalty=penalty, **weights), matching)


@pytest.mark.parametrize(
    ("text", "off", "on"),
    [
        (fenced(element(DOG_BOX, "dog"), element(PERSON, "person")), 3, 3),
        (
            json.dumps([element(PERSON, "person"), element([102, 100, 200, 300], "person"), element(DOG_BOX, "dog")]),
            2.85,
            2.6833332,
        ),
        (json.dumps([element([110, 100, 200, 300], "person")]), 2.65, 2.4),
        (json.dumps([element(PERSON, "person"), element(DOG_BOX, "unicorn")]), 2.625, 2.375),
        (json.dumps([element([500, 500, 520, 520], "person")]), 0.25, 0.25),
        ("[]", 0, 0),
        (json.dumps(element(PERSON, "person")), 0, 0),  # a bare object
        (json.dumps([element(PERSON, "unicorn")]), 0, 0),  # no valid element
        ("Here: " + json.dumps([element(PERSON, "person")]), 0, 0),
        (json.dumps([element(PERSON, "person")])[:-1], 0, 0),
        (json.dumps([element(PERSON, "person"), element([200, 100, 100, 300], "person")]), 0, 0),  # inverted
        (json.dumps([element(PERSON, "person"), element([1, 2, 3], "person")]), 0, 0),
        (json.dumps([element(PERSON, "person"), element(PERSON, "toothbrush")]), 0, 0),  # id 90
        (json.dumps([element(PERSON, "person"), element(DOG_BOX, "cat")]), 2.5, 2.5),  # wrong class, right place
        (json.dumps([element([100, 100, 200, 200], "person")]), 0.25, 0.25),  # IoU of exactly one half is not enough
        (json.dumps([element(PERSON, "person"), 5, "x", None, [1]]), 2.55, 2.3),  # f = 1/5
    ],
)
def test_released_detection_reward(text, off, on):
    assert released(text) == near(off)
    assert released(text, penalty=True) == near(on)


def test_released_detection_without_targets():
    assert released(json.dumps([element(PERSON, "person")]), targets=([], [])) == near(0.25)
    assert released(json.dumps([element(PERSON, "person"), 5]), targets=([], [])) == near(0.125)
    assert released("[]", targets=([], [])) == 0
    # Then the boxes are never looked at, except that they must form one array.
    assert released(json.dumps([element([1, 2, 3], "dog"), element([4, 3, 2], "dog")]), targets=([], [])) == near(0.25)
    assert released(json.dumps([element([9, 9, 1, 1], "toothbrush")]), targets=([], [])) == near(0.25)
    for broken in ([1, 2, 3], None, "a", [1, 2, "3", 4]):
        text = json.dumps([element(PERSON, "person"), element(broken, "dog")])
        assert released(text, targets=([], [])) == 0


def test_released_detection_switches():
    perfect = json.dumps([element(PERSON, "person"), element(DOG_BOX, "dog")])
    assert released(perfect, size=True) == near(2.5)  # two perfect large boxes: location 0.5
    assert released(perfect, coverage=0.5) == near(3.5)  # added after the clamp
    assert released(json.dumps([element(PERSON, "person")]), coverage=1.0) == near(2.75 + 0.5)
    assert released(perfect, f1=0.5, label=0.25, iou=0.125) == near(0.25 + 0.5 + 0.25 + 0.125)
    spam = json.dumps([element(PERSON, "cat")] + [element([500, 0, 510, 10], "cat")] * 9)
    f1 = 2 * 0.1 * 0.5 / 0.6
    assert released(spam, penalty=True) == near(0.25 + 0.75 * f1 + 0 + 1 - 0.5 * (0.9 + 0.5))


def test_released_matching_bugs():
    # Raw-pixel L1 gives the target to the second box (90 against 129), whose IoU 0.4 then fails; the first had 0.54.
    target = ([1], [[0, 0, 100, 100]])
    better, closer = [0, 0, 186, 100], [0, 0, 100, 40]
    text = json.dumps([element(better, "person"), element(closer, "person")])
    assert released(text, targets=target) == near(0.25)
    record = {"boxes": target[1], "labels": ["person"], "size": [1000, 1000]}
    assert detection.reward(text, record)["iou"] == near(100 / 186)
    # Equal boxes, neighbouring ids: targets sit one column to the left, so bicycle (2) is given to car (3).
    twins = ([2, 3], [PERSON, PERSON])
    text = json.dumps([element(PERSON, "bicycle"), element(PERSON, "car")])
    assert released(text, targets=twins) == near(2)
    record = {"boxes": [PERSON, PERSON], "labels": ["bicycle", "car"], "size": [640, 480]}
    assert detection.reward(text, record)["reward"] == near(3)


PETS = {"boxes": [PERSON, DOG_BOX], "labels": ["person", "dog"], "size": [640, 480]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (fenced(element(DOG_BOX, "dog"), element(PERSON, "person")), 3),
        (fenced(element(PERSON, "person"), element([200, 100, 100, 300], "person")), 0.125 + 0.75 * 2 / 3 + 2),
        (fenced(element(PERSON, "person"), element([1, 2, 3], "person")), 0.125 + 0.75 * 2 / 3 + 2),
        (fenced(element(PERSON, "person"), element(DOG_BOX, "dog"), element([0, 0, 9, 9], "toothbrush")), 2.85),
        (fenced(), 0),
        (fenced(element([200, 100, 100, 300], "person")), 0),
        (fenced(element([500, 400, 520, 420], "person")), 0.25),
        ("Here: " + fenced(element(PERSON, "person")), 0),
        ("", 0),
    ],
)
def test_corrected_detection_reward(text, expected):
    assert detection.reward(text, PETS)["reward"] == near(expected)


def test_corrected_detection_switches_and_empty_images():
    one = fenced(element(PERSON, "person"))
    assert detection.reward(one, PETS)["reward"] == near(2.75)
    assert detection.reward(one, PETS, weights=detection.Weights(penalty=True))["reward"] == near(2.5)
    spam = fenced(element(PERSON, "person"), element(DOG_BOX, "dog"), *[element([0, 0, 9, 9], "cat")] * 2)
    plain, fined = (detection.reward(spam, PETS, weights=detection.Weights(penalty=p))["reward"] for p in (False, True))
    assert plain == fined == near(0.25 + 0.75 * 2 / 3 + 2)  # the corrected penalty is for misses only
    perfect = fenced(element(PERSON, "person"), element(DOG_BOX, "dog"))
    assert detection.reward(perfect, PETS, weights=detection.Weights(size=True))["reward"] == near(3)
    sized = fenced(element([100, 100, 120, 120], "dog"), element([300, 100, 500, 260], "dog"))
    record = {"boxes": [[100, 100, 120, 120], [300, 100, 500, 300]], "labels": ["dog"] * 2, "size": [640, 480]}
    assert detection.reward(sized, record, weights=detection.Weights(size=True))["iou"] == near((3 * 1 + 0.8) / 4)
    nothing = {"boxes": [], "labels": [], "size": [640, 480]}
    assert detection.reward("[]", nothing)["reward"] == 3
    assert detection.reward(one, nothing)["reward"] == near(0.25)
    assert detection.reward(one, {**PETS, "categories": ["dog"]})["reward"] == 0  # a name that was not asked for


coordinate = st.integers(0, 60)
real_boxes = st.tuples(coordinate, coordinate, st.integers(10, 40), st.integers(10, 40)).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


@given(st.lists(real_boxes, min_size=1, max_size=4), st.lists(real_boxes, min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_corrected_matching_finds_as_many_pairs_as_possible(predicted, target, data):
    record = {"boxes": target, "labels": ["dog"] * len(target), "size": [100, 100]}
    parts = detection.reward(json.dumps([element(b, "dog") for b in predicted]), record)
    eligible = pairwise_iou(predicted, target) > 0.5
    small = min(len(predicted), len(target))
    most = max(
        sum(eligible[i, j] for i, j in zip(rows, columns, strict=True))
        for rows in itertools.permutations(range(len(predicted)), small)
        for columns in itertools.combinations(range(len(target)), small)
    )
    assert parts["f1"] == pytest.approx(2 * most / (len(predicted) + len(target)) if most else 0, abs=1e-6)
    shuffled = data.draw(st.permutations(predicted))
    again = detection.reward(json.dumps([element(b, "dog") for b in shuffled]), record)
    assert again["reward"] == pytest.approx(parts["reward"])


def test_detection_in_order():
    straight, mixed = (
        json.dumps([element(b, n) for b, n in pairs])
        for pairs in ([(PERSON, "person"), (DOG_BOX, "dog")], [(DOG_BOX, "dog"), (PERSON, "person")])
    )
    assert detection.reward(straight, PETS, matching="order")["reward"] == near(3)
    assert detection.reward(mixed, PETS, matching="order")["reward"] == near(0.25)
    assert released(straight, matching="order") == near(3)
    assert released(mixed, matching="order") == near(0.25)


def test_detection_metric_by_hand():
    texts = [
        fenced(element(PERSON, "person"), element(DOG_BOX, "cat"), element([0, 0, 9, 9], "dog")),
        'cut off: [{"bbox_2d": [300, 150, 400, 250], "label": "dog"}, {"bbox_2d": [1, 2',
    ]
    figures = detection.Detection().metric(texts, [PETS, PETS])
    assert figures == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "mean_iou": near(1), "boxes": 2.0}
    strict = detection.Detection(rules="released").metric(texts, [PETS, PETS])
    assert (strict["precision"], strict["recall"]) == (near(1 / 3), 0.25)
    tagged = f"<think>x</think><answer>{fenced(element(PERSON, 'person'))}</answer>"
    assert detection.Detection(rules="released").metric([tagged], [PETS])["recall"] == 0.5
