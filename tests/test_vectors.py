"""The vectors' dispatcher: every field of the sheets' signatures reaches the library, and what is absent has its default.

The numbers themselves are asserted in the tests of the library; here two spellings of one call must agree.
"""

import json

import numpy as np
import pytest

from tests.vectors import evaluate

SOLUTION = {"target_id": [1, 18], "target_box": [[100, 100, 200, 300], [300, 150, 400, 250]]}
PERSON = json.dumps([{"bbox_2d": [110, 100, 200, 300], "label": "person"}])
DOG = {"completion": "<|box_start|>(100,200),(300,400)<|box_end|>", "solution": "[100, 200, 300, 400]"}
TRACK = {"1": [10, 10, 50, 50], "2": [20, 10, 60, 50], "3": [30, 10, 70, 50]}
NEAR = {"1": [10, 10, 50, 50], "2": [23, 10, 63, 50], "4": [30, 10, 70, 50]}
ANSWER = "<answer>Track1: fox<Id1>Frame1:[10,10,50,50];Frame2:[23,10,63,50]</Id1><attr>action=run</attr></answer>"
TRUTH = {"T": 3, "tracks": {"1": {"names": ["fox"], "boxes": TRACK}}, "attrs": {"action": ["run"]}}
PATH = {"1": TRACK}
READOUT = {"score_bp": [0.27, 0.75, 0.79], "score_td": [0.84, 0.35, 0.83], "edges": [[0, 1], [1, 2]]}
COUNTS = {
    "match_gt": [1, 0, 0], "match_pred": [1, 0, 1], "iou": [0.8, 0, 0], "foil_gt": [-1, 0, 1], "foil_pred": [0, 0, 1],
}  # fmt: skip


def same(a, b):
    assert json.dumps(plain(a)) == json.dumps(plain(b))


def plain(x):
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, list):
        return [plain(v) for v in x]
    return np.asarray(x).tolist() if hasattr(x, "shape") else x


@pytest.mark.parametrize(
    ("function", "short", "long"),
    [
        ("tpl_score", {"logp_full": [-1, -2.0], "logp_frames": [[-2, -3.0]]}, {"mask": None}),
        ("tpl_score", {"logp_full": [-1, -2.0], "logp_frames": [[-2, -3.0]]}, {"mask": [1, 1]}),
        ("frame_activation", {"attn_LHQK": [[[[0.1, 0.4, 0.5]]]], "spans": [[0, 1], [1, 3]]}, {"rho": 0.5}),
        ("trajectory_iou/lift", {"pred": NEAR, "gt": TRACK}, {"exclude": [], "query_frame": None}),
        ("trajectory_iou/lift", {"pred": NEAR, "gt": TRACK, "query_frame": 1, "exclude": ["1"]}, {"exclude": [1]}),
        ("identity_reward", {"pred": {"4": NEAR}, "gt": PATH}, {"iou_thr": 0.5, "exclude": []}),
        ("attribute_reward / temporal_iou", {"attr": [["a fox", "fox"]]}, {"time": []}),
        ("utr_reward", {"text": ANSWER, "gt": TRUTH}, {"weights": [0.5, 0.25, 0.25], "lam_fmt": 0.1, "iou_thr": 0.5}),
        ("utr_reward", {"text": ANSWER, "gt": TRUTH}, {"gt": TRUTH | {"query": None}}),
        ("encode_box", {"box": [1, 2, 30, 40], "w": 64, "h": 48}, {"mode": "resize", "box_format": "xyxy"}),
        ("decode_box", {"q": [1, 2, 30, 40], "w": 64, "h": 48}, {"mode": "resize"}),
        ("parse_boxes", {"text": "[9,9,1,1]"}, {"repair": "none"}),
        ("ade_fde", {"pred": NEAR, "gt": TRACK}, {"missing": "hold"}),
        ("trajectory_reward", {"text": ANSWER, "gt": PATH}, {"given_first": True}),
        ("readout", READOUT, {"root": 0, "mrr_on": "logit"}),
        ("readout", READOUT, {"root": None}),
        ("metrics", COUNTS, {"length": None, "max_train_len": None}),
        ("pr1_detection_reward", {"completion": PERSON, "solution": SOLUTION}, {"matching": "hungarian"}),
        (
            "pr1_detection_reward",
            {"completion": PERSON, "solution": SOLUTION},
            {"F1_SCALE": "0.75", "CLS_COE": 1.0, "IOU_COE": "1.0", "COVERAGE_SCALE": 0, "IS_SIZE_WEIGHT": "False"},
        ),
    ],
)
def test_what_is_absent_has_its_default(function, short, long):
    same(evaluate(function, short), evaluate(function, short | long))


@pytest.mark.parametrize(
    ("function", "inputs", "change"),
    [
        ("tpl_score", {"logp_full": [-1, -2.0], "logp_frames": [[-2, -3.0]]}, {"mask": [1, 0]}),
        ("frame_activation", {"attn_LHQK": [[[[0.1, 0.4, 0.5]]]], "spans": [[0, 1], [1, 3]]}, {"rho": 0.1}),
        ("trajectory_iou/lift", {"pred": NEAR, "gt": TRACK}, {"exclude": [1]}),
        ("identity_reward", {"pred": {"4": NEAR}, "gt": PATH}, {"iou_thr": 0.99}),
        ("identity_reward", {"pred": {"4": NEAR}, "gt": PATH}, {"exclude": [2]}),
        ("utr_reward", {"text": ANSWER, "gt": TRUTH}, {"weights": [1, 0, 0]}),
        ("utr_reward", {"text": ANSWER, "gt": TRUTH}, {"lam_fmt": 0.5}),
        ("utr_reward", {"text": ANSWER, "gt": TRUTH}, {"iou_thr": 0.99}),
        ("utr_reward", {"text": ANSWER, "gt": TRUTH}, {"gt": TRUTH | {"query": {"id": 1, "frame": 1}}}),
        ("encode_box", {"box": [1, 2, 30, 40], "w": 64, "h": 48}, {"mode": "pad"}),
        ("encode_box", {"box": [1, 2, 30, 40], "w": 64, "h": 48}, {"box_format": "xywh"}),
        ("decode_box", {"q": [1, 2, 30, 40], "w": 64, "h": 48}, {"mode": "pad"}),
        ("parse_boxes", {"text": "[9,9,1,1]"}, {"repair": "drop"}),
        ("parse_boxes", {"text": "[9,9,1,1]"}, {"repair": "xywh"}),
        ("ade_fde", {"pred": NEAR, "gt": TRACK}, {"missing": "max"}),
        ("trajectory_reward", {"text": ANSWER, "gt": PATH}, {"given_first": False}),
        ("metrics", COUNTS, {"length": [9, 12, 12], "max_train_len": 11}),
        ("pr1_detection_reward", {"completion": PERSON, "solution": SOLUTION}, {"F1_SCALE": 0.5}),
        ("pr1_detection_reward", {"completion": PERSON, "solution": SOLUTION}, {"CLS_COE": 0.5}),
        ("pr1_detection_reward", {"completion": PERSON, "solution": SOLUTION}, {"IOU_COE": "0.5"}),
        ("pr1_detection_reward", {"completion": PERSON, "solution": SOLUTION}, {"COVERAGE_SCALE": 1}),
        ("pr1_detection_reward", {"completion": PERSON, "solution": SOLUTION}, {"IS_SIZE_WEIGHT": "True"}),
    ],
)
def test_what_is_there_counts(function, inputs, change):
    assert json.dumps(plain(evaluate(function, inputs))) != json.dumps(plain(evaluate(function, inputs | change)))


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        ("pr1_grounding_reward", DOG),
        ("pr1_grounding_format_reward", "<a"),
        ("pr1_ocr_reward", {"completion": "a b", "solution": "a c"}),
        ("pr1_detection_reward", {"completion": PERSON, "solution": SOLUTION}),
        ("parse_boxes", {"text": "[1,2,3,4]"}),
        ("identity_reward", {"pred": {"4": NEAR}, "gt": PATH}),
        ("readout", READOUT),
    ],
)
def test_a_list_of_arguments_gives_a_list_of_results(function, inputs):
    same(evaluate(function, [inputs, inputs]), [plain(evaluate(function, inputs))] * 2)


def test_names_of_released_arguments():
    bird = "<|object_ref_start|>b<|object_ref_end|><|box_start|>(0,0),(20,20)<|box_end|><|im_end|>"
    by_either_name = [
        evaluate("pr1_counting_reward", {"completion": bird, name: [[10, 10]]}) for name in ("clicks", "solution")
    ]
    assert by_either_name == [1, 1]
    loss = {"logp": [[-1.0, -2.0]], "mask": [[1, 1]], "advantages": [1.0]}
    same(
        evaluate("pr1_policy_loss", loss), evaluate("pr1_policy_loss", loss | {"ref_logp": loss["logp"], "beta": 0.04})
    )
    with pytest.raises(KeyError, match="no function 'pr2'.*pr1_counting_reward"):
        evaluate("pr2", {})
