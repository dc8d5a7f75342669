"""Perception-R1 grounding, counting and the common protocol: printed numbers, corner cases by hand, brute force."""

import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.errors import InputError
from jaxmllm.tasks import answers, counting, detection, grounding, names, ocr
from jaxmllm.tasks import get as get_task
from tests.support.answer_texts import END, IMAGE, PAD, box, element, fenced, near, ref

pytestmark = pytest.mark.filterwarnings("error")

STYLES = tuple(answers.STYLES)


# --- registry and protocol ------------------------------------------------------------------------------------------


def test_registry():
    assert {"grounding", "counting", "detection", "ocr"} <= set(names())
    assert get_task("ocr") == ocr.OCR()
    with pytest.raises(InputError, match="'dog' is unknown.*grounding"):
        get_task("dog")


@pytest.mark.parametrize("option", ["style", "rules", "matching"])
def test_unknown_option_values_name_the_choices(option):
    record = {"label": "x", "points": [[1, 1]], "count": 1, **IMAGE}
    with pytest.raises(ValueError, match=f"{option}='nonsense'.*use one of"):
        counting.reward("", record, **{option: "nonsense"})


def test_prompts_are_the_published_ones():
    text = grounding.prompt({"expression": "red cup"}, "qwen2_vl")
    assert text == "Output the bounding box of the red cup in the image."
    assert counting.prompt({"label": "birds"}, "qwen2_vl") == "Output all the bounding boxes of the birds"
    text = detection.prompt({})
    assert text.startswith("Please output bbox coordinates and names of person, bicycle, car, ")
    assert text.endswith(", hair drier, toothbrush.") and text.count(",") == 79
    assert detection.prompt({"categories": ["RBC", "WBC"]}, wording="evaluation") == (
        "Locate every item from the category list in the image and output the coordinates in JSON format. "
        "The category set includes RBC, WBC."
    )
    assert ocr.prompt({}) == "OCR this image."
    assert ocr.prompt({}, wording="evaluation") == "<image>\nOCR this image: "
    suffix = " Output the thinking process in <think> </think> and final answer (number) in <answer> </answer> tags."
    assert counting.prompt({"label": "birds"}, "qwen2_vl", thinking=True).endswith("of the birds" + suffix)
    assert answers.SYSTEM == "You are a helpful assistant. "


def test_coco_ids():
    ids = detection.COCO_IDS
    assert (ids["person"], ids["stop sign"], ids["toothbrush"], len(ids)) == (1, 13, 90, 80)
    assert list(ids.values()) == sorted(ids.values())
    assert (ids["dog"], ids["backpack"], ids["dining table"], ids["toilet"], ids["tv"], ids["book"]) == (
        18, 27, 67, 70, 72, 84,
    )  # fmt: skip


# --- thinking format ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "released", "corrected"),
    [
        ("<think>a</think><answer>b</answer>", True, True),
        ("<think></think><answer></answer>", True, True),
        ("<think>a</think> <answer>b</answer>", False, True),
        ("<think>a\nb</think><answer>c</answer>", False, True),
        ("<think>a</think><answer>b</answer>\n", True, True),
        ("<think>a</think><answer>b</answer>\n\n", False, True),
        (" <think>a</think><answer>b</answer>", False, True),
        ("<think>a</think><answer>b</answer>.", False, False),
        ("x<think>a</think><answer>b</answer>", False, False),
        ("<think>a</think>x<answer>b</answer>", False, False),
        ("<think>a</think><answer>b</answer>c</answer>", True, False),
        ("<think>a</think><answer>b", False, False),
        ("<think></think><answer>", False, False),
        ("<answer>b</answer><think>a</think>", False, False),
        ("", False, False),
    ],
)
def test_thinking_format(text, released, corrected):
    assert answers.thinking_format(text, "released") is released
    assert answers.thinking_format(text) is corrected


# --- grounding ------------------------------------------------------------------------------------------------------

DOG = ref("the dog") + box(100, 200, 300, 400) + END


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        (DOG, "[150, 250, 350, 450]", 0.1531191),
        (DOG + PAD * 2, "[120, 200, 300, 380]", 0.6561),
        ("I cannot find it." + END, "[150, 250, 350, 450]", 0),
        ("[0.1, 0.2, 0.5, 0.65]", "[100, 200, 500, 600]", 0.7901235),
        ("[0.1234567, 0.2, 0.5, 0.6]", [123, 200, 500, 600], 1),  # fractions are cut to whole numbers
        ("[100, 200, 300, 400]", [100, 200, 300, 400], 0),  # pixels are taken as fractions
        (ref("x") + "(1,2,3,4) [100, 200, 300, 400]<|box_start|>", [100, 200, 300, 400], 1),  # square brackets first
        (ref("x") + "(5,6),(7,8) (100,200,300,400)<|box_start|>", [100, 200, 300, 400], 1),  # then four in round ones
        (ref("x") + box(100, 200, 300, 400) + box(1, 2, 3, 4), [100, 200, 300, 400], 1),  # the first box counts
        ("<|box_start|>( 100, 200),( 300, 400)", [100, 200, 300, 400], 1),
        ("<|box_start|>(100, 200 ),(300,400)", [100, 200, 300, 400], 0),  # no blank before ) in the pair form
        ("<|box_start|>(100,200), (300,400 )", [100, 200, 300, 400], 0),
        ("<|box_start|>(100,200) ,(300,400)", [100, 200, 300, 400], 0),  # nor before a comma
        ("<|box_start|>[ 100, 200, 300, 400 ]", [100, 200, 300, 400], 1),
        ("<|box_start|>[100 ,200,300,400]", [100, 200, 300, 400], 0),
        ("<|box_start|>( 100,200,300,400\n)", [100, 200, 300, 400], 1),
        ("<|box_start|>[100.5, 200, 300.5, 400]", [100.5, 200, 300.5, 400], 1),
        ("<|box_start|>[.5, 200, 300, 400]", [0.5, 200, 300, 400], 0),
        ("<|box_start|>[1e2, 200, 300, 400]", [100, 200, 300, 400], 0),
        ("<|box_start|>[100., 200, 300, 400]", [100, 200, 300, 400], 0),
        ("<|box_start|>[-100, 0, 100, 100]", [0, 0, 100, 100], 0.25),
        ("<|box_start|>[300,400,100,200]", [100, 200, 300, 400], 0),  # both axes inverted
        ("<|box_start|>[300,200,100,400]", [100, 200, 300, 400], 0),  # one: the published union is 0
        ("<|box_start|>[1" + PAD + "00,200,300,400]", [100, 200, 300, 400], 1),  # padding is deleted first
    ],
)
def test_released_grounding_reward(text, target, expected):
    assert grounding.released_reward(text, target) == near(expected)


@pytest.mark.parametrize("target", ["[100, 200, 300, 400]", "(100., 200, 3e2, +400.0)", " 100,200,300,400,\n"])
def test_grounding_target_as_python_writes_it(target):
    assert grounding.released_reward(DOG, target) == 1


@pytest.mark.parametrize(
    "target",
    [
        "__import__('os')",
        "[1, 2, 3]",
        "[1, 2, 3, NaN]",
        [1, 2, 3],
        "",
        "[1, 2, 3, 4",
        "[1, 2, 3, 4)",
        "[1, 2, 3, 1e999]",
    ],
)
def test_bad_grounding_target_is_refused(target):
    with pytest.raises(ValueError, match="four numbers"):
        grounding.released_reward("x", target)


@pytest.mark.parametrize(
    "head", ["<", "object_ref_start", "object_ref_end", "box_start", "box_end", "im_end", "><", ">"]
)
def test_released_grounding_format_passes_any_text_that_starts_so(head):
    assert grounding.released_format(head + " anything") == 1
    assert grounding.released_format(PAD + head) == 1
    assert grounding.released_format(" " + head) == grounding.released_format("x" + head) == 0


# on the 0..1000 grid 100 100 500 500, in resized pixels 64.4 47.6 322 238
CUP = {"expression": "red cup", "box": [64, 48, 320, 240], **IMAGE}


@pytest.mark.parametrize(
    ("text", "style", "expected"),
    [
        (ref("red cup") + box(100, 100, 500, 500) + END, "qwen2_vl", (1, 1)),
        (ref("red cup") + box(100, 100, 500, 500), "qwen2_vl", (1, 1)),
        (ref("red cup") + box(100, 100, 500, 500) + box(1, 2, 3, 4), "qwen2_vl", (0, 1)),
        (ref("red cup") + box(500, 100, 100, 500), "qwen2_vl", (0, 0)),
        (box(100, 100, 500, 500), "qwen2_vl", (0, 1)),
        ("<anything", "qwen2_vl", (0, 0)),
        ("(100,100),(500,500)", "qwen2_vl", (0, 1)),
        ("[0.1, 0.1, 0.5, 0.5]", "qwen2_vl", (0, 1)),
        (fenced(element([64.4, 47.6, 322, 238], "red cup")), "qwen2_5_vl", (1, 1)),
        (json.dumps([element([64.4, 47.6, 322, 238], "red cup")]), "qwen2_5_vl", (1, 1)),
        ("It is " + fenced(element([64.4, 47.6, 322, 238], "red cup")), "qwen2_5_vl", (0, 1)),
        (fenced(element([64.4, 47.6, 322, 238], "red cup"), element([1, 2, 3, 4], "a")), "qwen2_5_vl", (0, 1)),
        (fenced({"bbox_2d": [64.4, 47.6, 322, 238]}), "qwen2_5_vl", (0, 1)),
        (fenced(element([64, 48, 320, 240], "red cup")), "qwen2_5_vl", (1, 48564 / 49635.04)),  # original pixels
        (fenced(element([True, False, 2, 3], "red cup")), "qwen2_5_vl", (0, 0)),
        ("[64.4, 47.6, 322, 238]", "qwen2_5_vl", (0, 1)),
    ],
)
def test_corrected_grounding_reward(text, style, expected):
    parts = grounding.reward(text, CUP, style=style)
    form, iou = expected
    assert (parts["format"], parts["iou"]) == (form, near(iou))
    assert parts["reward"] == near(form + iou**2)


def test_grounding_rules_and_power_are_choices():
    text = ref("red cup") + box(100, 100, 500, 300) + END  # IoU one half
    assert grounding.reward(text, CUP, style="qwen2_vl") == {"reward": near(1.25), "format": 1, "iou": near(0.5)}
    assert grounding.reward(text, CUP, style="qwen2_vl", power=1)["reward"] == near(1.5)
    assert grounding.reward("<" + text, CUP, rules="released")["reward"] == near(1.25)
    assert grounding.reward("x" + text, CUP, rules="released")["reward"] == near(0.25)


def test_grounding_metric_by_hand():
    good, half = ref("c") + box(100, 100, 500, 500), ref("c") + box(100, 100, 500, 300)
    far = ref("c") + box(600, 600, 700, 700)
    figures = grounding.Grounding("qwen2_vl").metric([good, half, far, "nothing"], [CUP] * 4)
    assert figures["IoU"] == near(1.5 / 4)
    assert figures["Acc@0.3"] == 0.5
    assert figures["Acc@0.5"] == 0.25  # an exact half is a miss, as published
    assert figures["Acc@avg"] == 0.25 and figures["center_acc"] == 0.5
    assert grounding.Grounding().metric([], []) == {}


# --- counting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clicks", "expected"),
    [
        (ref("bird") + box(290, 390, 310, 410) + box(90, 190, 110, 210) + END, [[100, 200], [300, 400]], 1),
        (
            ref("bird") + box(100, 200, 200, 300) + box(700, 100, 800, 300) + END,
            [[160, 250], [750, 230], [400, 900]],
            0.6572386,
        ),
        (
            ref("bird") + box(90, 190, 110, 210) + box(290, 390, 310, 410) + box(500, 500, 600, 600) + END,
            [[300, 400], [100, 200]],
            2 / 3,
        ),
        (ref("b") + box(290, 390, 310, 410) + "\n" + box(90, 190, 110, 210) + END, [[100, 200], [300, 400]], 0),
        (ref("b") + box(0, 0, 20, 20), [[10, 10]], 0),  # no end token
        (" " + ref("b") + box(0, 0, 20, 20) + END, [[10, 10]], 0),
        (ref("b") + END, [[10, 10]], 0),
        (ref("b<") + box(0, 0, 20, 20) + END, [[10, 10]], 0),
        (ref("b") + box(0, 0, 20, 20) + END + PAD * 3 + "x", [[10, 10]], 1),
        (ref("b") + box(0, 0, 20, 20) + END + box(0, 0, 20, 20), [[10, 10]], 0.5),  # boxes after the end are counted
        (ref("b") + box(0, 0, 20, 20) + box("x", 0, 20, 20) + END, [[10, 10]], 1),  # unreadable: skipped silently
        (ref("b") + box(0, 0, 20, 20) + box("0\n", 0, 20, 20) + END, [[10, 10]], 1),  # so is one with a line break
        (ref("b") + box("x", 0, 20, 20) + END, [[10, 10]], 0),
        (ref("b") + box(0, 0, 20, 20) + END, [], 0),
        (ref("b") + box(20, 20, 0, 0) + END, [[10, 10]], 1),  # only the centre is judged
        (ref("b") + box("012", 0, 20, 20) + END, [[10, 10]], 0),  # not a number to eval
        (ref("b") + "<|box_start|> [0,0] , (20.,2e1), <|box_end|>" + END, [[10, 10]], 1),  # but this is
        (ref("b") + box(2000, 0, 2000, 0) + END, [[0, 0]], 1 - math.sqrt(2)),  # off the grid: below 0
        (ref("b") + box("1e999", 0, 20, 20) + END, [[10, 10]], 0),
    ],
)
def test_released_counting_reward(text, clicks, expected):
    assert counting.released_reward(text, clicks) == near(expected)


BIRDS = {
    "label": "bird",
    "points": [[64, 96], [192, 192], [320, 240]],
    "count": 3,
    **IMAGE,
}  # 100 200, 300 400, 500 500


def points_answer(points, style):
    if style == "qwen2_vl":
        return ref("bird") + "".join(box(x, y, x, y) for x, y in points) + END
    across, down = (0.644, 0.476) if answers.STYLES[style].frame == "resized" else (1, 1)
    return fenced(*({"point_2d": [x * across, y * down], "label": "bird"} for x, y in points))


@pytest.mark.parametrize("style", STYLES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_corrected_counting_reward_is_the_best_pairing(style, data):
    grid = st.tuples(st.integers(0, 1000), st.integers(0, 1000))
    predicted = data.draw(st.lists(grid, min_size=0, max_size=4))
    target = [(100, 200), (300, 400), (500, 500)]
    parts = counting.reward(points_answer(predicted, style), BIRDS, style=style)
    small = min(len(predicted), 3)
    closest = min(
        sum(math.dist(p, q) for p, q in zip(left, right, strict=True))
        for left in itertools.permutations(predicted, small)
        for right in itertools.combinations(target, small)
    )
    ratio = small / max(len(predicted), 3)
    expected = ratio * (1 - closest / small / (1000 * math.sqrt(2))) if small else 0
    assert parts["reward"] == near(expected)
    if predicted and style == "qwen2_vl":
        assert counting.released_reward(points_answer(predicted, style), target) == near(expected)


def test_counting_order_matters_only_without_matching():
    points = [(100, 200), (300, 400), (500, 500)]
    straight, mixed = (points_answer(order, "qwen2_vl") for order in (points, points[::-1]))
    for text in (straight, mixed):
        assert counting.reward(text, BIRDS, style="qwen2_vl")["reward"] == near(1)
    in_order = [counting.reward(t, BIRDS, style="qwen2_vl", matching="order")["reward"] for t in (straight, mixed)]
    assert in_order == [near(1), near(1 - 2 * math.dist(points[0], points[2]) / 3 / (1000 * math.sqrt(2)))]
    assert counting.released_reward(mixed, points, matching="order") == near(in_order[1])


def test_counting_reach():
    text = points_answer([(100, 200), (300, 400), (500, 600)], "qwen2_vl")  # the last one is 100 away
    assert counting.reward(text, BIRDS, style="qwen2_vl", reach=200)["closeness"] == near(1 - 0.5 / 3)
    assert counting.reward(text, BIRDS, style="qwen2_vl", reach=50)["closeness"] == near(2 / 3)


def test_corrected_counting_differences():
    def score(text, **changes):
        record = {"label": "b", "count": 1, "points": [[6.4, 4.8]], **IMAGE, **changes}
        return counting.reward(text, record, style="qwen2_vl")

    right = ref("b") + box(0, 0, 20, 20)
    assert score(right)["reward"] == near(1) == score(right + END + PAD)["reward"]
    assert score(right + box("x", 0, 20, 20))["reward"] == near(0.5)  # unreadable: a wrong prediction
    assert score(right + box(20, 20, 0, 0))["reward"] == near(0.5)  # inverted: likewise
    assert score(right + END + box(0, 0, 20, 20))["reward"] == 0
    assert score(right + " and more")["reward"] == 0
    assert score(ref("b") + box(5000, 0, 5000, 0))["reward"] == 0  # never below 0
    assert score(ref("b"), points=[], count=0)["reward"] == 1
    assert score(right, points=[], count=0)["reward"] == 0
    assert score("", points=[], count=0)["reward"] == 0
    assert counting.reward("[]", {"label": "b", "points": [], "count": 0, **IMAGE})["reward"] == 1


def test_counting_metric_by_hand():
    records = [BIRDS, BIRDS, {**BIRDS, "points": [], "count": 0}]
    three = "any text " + box(0, 0, 1, 1) * 3
    figures = counting.Counting("qwen2_vl").metric([three, box(0, 0, 1, 1), "none"], records)
    assert figures == {"accuracy": near(2 / 3), "mae": near(2 / 3)}
    released = counting.Counting("qwen2_vl", rules="released").metric([three, box(0, 0, 1, 1), "none"], records)
    assert released["accuracy"] == near(1 / 3)  # a true 0 can never be right


# --- both styles, all frames ----------------------------------------------------------------------------------------

RECORDS = {
    grounding: {"expression": "red cup", "box": [63.7, 40.2, 321.5, 255.9]},
    counting: {"label": "bird", "points": [[10.2, 20], [300, 400.7], [0, 480]], "count": 3},
    detection: {
        "boxes": [[10, 20, 300, 300], [300, 330.7, 350, 410], [400, 0, 640, 480]],
        "labels": ["a b", "a b", "c"],
    },
    ocr: {"text": "A page\nof  text."},
}
BEST = {grounding: 2.0, counting: 1.0, detection: 3.0, ocr: 1.0}


@pytest.mark.parametrize("resized", [None, [644, 476], [308, 224], [1288, 952]])
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("task", RECORDS, ids=lambda m: m.__name__.rsplit(".")[-1])
def test_the_gold_answer_earns_nearly_everything(task, style, thinking, resized):
    record = {**RECORDS[task], "size": [640, 480]} | ({"resized": resized} if resized else {})
    options = {"thinking": thinking} | ({} if task is ocr else {"style": style})
    value = task.reward(task.answer(record, **options), record, **options)
    total = value["reward"] if isinstance(value, dict) else value
    assert BEST[task] - 0.06 < total <= BEST[task]
    if thinking:
        bare = task.answer(record, **{**options, "thinking": False})
        value = task.reward(bare, record, **options)
        assert (value["reward"] if isinstance(value, dict) else value) == 0


@pytest.mark.parametrize("task", [grounding, counting, detection], ids=lambda m: m.__name__.rsplit(".")[-1])
def test_released_rules_need_the_released_format(task):
    record = {**RECORDS[task], **IMAGE}
    if task is detection:
        record["labels"] = ["dog", "dog", "cat"]
    text = task.answer(record, style="qwen2_5_vl" if task is detection else "qwen2_vl")
    text += "" if task is detection else END
    assert BEST[task] - 0.03 < task.reward(text, record, rules="released")["reward"] <= BEST[task]
