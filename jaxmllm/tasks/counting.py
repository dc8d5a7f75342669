"""Counting by pointing: one box per object; the centres are matched with the target points (Perception-R1).

Source: perception_r1.md sections 2.2, 2.5 and 5. The reward is

    min(n, m) / max(n, m) * (1 - mean over matched pairs of d / (1000 sqrt 2))

for n predicted and m target points on the 0..1000 grid, d their distance: 1 for the perfect answer. Box sizes are never
judged. There is no separate format reward: an answer that fails the format gets 0. The forms differ so:

- Anchoring. Released: the format is checked at the start only, and boxes after the end token are counted too.
  Corrected: the whole answer must have the format.
- Unreadable box (broken, or spanning a line break). Released: skipped silently, so it costs nothing. Corrected: counted
  as a prediction that matches nothing; so is an inverted box.
- Empty target. Released: always 0. Corrected: 1 for an answer without boxes, which the format then allows, else 0.
- Coordinates off the grid. Released: the distance is unbounded, the reward can fall far under 0. Corrected: a pair is
  worth at least 0.
- Reading. Released: `eval` of the box content; here a number pattern in both forms.
- Qwen2.5-VL. Released: no reader. Corrected: JSON `bbox_2d` or `point_2d`, converted from resized pixels to the grid.

A known weakness of both: the right number of boxes, all at the image centre, earns about 0.7, because a pair is worth
nothing only at the far end of the diagonal. Counter: a shorter `reach` (corrected form).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from jaxmllm.geometry import Boxes, Points, hungarian
from jaxmllm.tasks import answers
from jaxmllm.tasks.task import Record, Reward, Row, Shown, Task, in_pixels

SCALE = 1000 * math.sqrt(2)  # the diagonal of the 0..1000 grid
POINT_BOX_HALF = 10  # half side, in units of the answer's frame, of the box written around a target known as a point

_GATE = re.compile(
    r"<\|object_ref_start\|>[^<]*+<\|object_ref_end\|>(?:<\|box_start\|>[^<]*+<\|box_end\|>)++<\|im_end\|>"
)
_ZERO_LED = re.compile(r"[+-]?0[0-9]*[1-9][0-9]*")  # whole numbers such as 012, which Python's eval refuses


# --- released -------------------------------------------------------------------------------------------------------


def released_format(text: str) -> float:
    """1 if the text starts with one labelled segment of one or more boxes and the end token; else 0."""
    return float(_GATE.match(text[: answers.MAX_CHARS]) is not None)


def released_points(text: str) -> list[list[float]]:
    """Centres of all readable boxes anywhere in the text, on the 0..1000 grid. A coordinate may be infinite."""
    points = []
    for content in answers.token_boxes(text.replace(answers.PAD, "")):
        literals = answers.two_pairs(content)
        if literals is None or any(map(_ZERO_LED.fullmatch, literals)):
            continue
        x1, y1, x2, y2 = map(float, literals)
        points.append([(x1 + x2) / 2, (y1 + y2) / 2])
    return points


def released_reward(text: str, clicks: Sequence[Sequence[float]], matching: str = "hungarian") -> float:
    """Released counting reward for target points `clicks` [[x, y], ..] on the 0..1000 grid."""
    answers.choose(matching, answers.MATCHING, "matching")
    if not released_format(text):
        return 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # float32 as published: far-off points are infinitely far
        pred, target = (np.array(p, np.float32).reshape(-1, 2) for p in (released_points(text), clicks))
        distance = np.sqrt(((pred[:, None] - target[None]) ** 2).sum(-1))
    if not distance.size:
        return 0.0
    try:
        paired = distance[_pairs(distance, matching, linear_sum_assignment)]
    except ValueError:  # no assignment without an infinite distance
        return 0.0
    ratio = min(distance.shape) / max(distance.shape)
    return ratio * (1 - float(paired.mean()) / SCALE) if np.isfinite(paired).all() else 0.0


Pairs = tuple[Int[np.ndarray, "M"], Int[np.ndarray, "M"]]


def _pairs(cost: Float[np.ndarray, "P G"], matching: str, assign: Callable[[np.ndarray], Pairs] = hungarian) -> Pairs:
    if matching == "hungarian":
        return assign(cost)
    order = np.arange(min(cost.shape))
    return order, order


# --- task -----------------------------------------------------------------------------------------------------------


def prompt(record: Mapping[str, Any], style: str = "qwen2_5_vl", thinking: bool = False) -> str:
    """The user's text: the published question (no full stop), with a request for JSON for Qwen2.5-VL."""
    text = f"Output all the bounding boxes of the {record['label']}"
    return answers.finish_prompt(text + "." if answers.STYLES[style].json else text, style, thinking)


def answer(record: Mapping[str, Any], style: str = "qwen2_5_vl", thinking: bool = False) -> str:
    """The gold answer: the record's `boxes`, or small boxes around its `points`, whole numbers of the style's frame."""
    frame = answers.STYLES[answers.choose(style, answers.STYLES, "style")].frame
    if "boxes" in record:
        boxes = answers.whole_boxes(Boxes.of(record, record["boxes"]).to(frame))
    else:
        boxes = _point_boxes(Points.of(record, record["points"]).to(frame))
    return answers.wrap(answers.write_boxes([(record["label"], boxes)], style), thinking)


def _point_boxes(points: Points) -> Int[np.ndarray, "N 4"]:
    """Boxes whose centres are the points rounded to whole numbers; smaller near the border, to stay inside."""
    limit = np.array(points.extent()).astype(np.int64)
    center = np.rint(points.clip().array).astype(np.int64)
    half = np.minimum(POINT_BOX_HALF, np.minimum(center, limit - center).min(-1, keepdims=True)).clip(0)
    return np.concatenate([center - half, center + half], axis=-1)


def parse(text: str, style: str = "qwen2_5_vl", thinking: bool = False, rules: str = "corrected") -> Points:
    """Centres of all readable objects in the answer, shape [N, 2], in the style's frame (image sizes unknown).

    Read leniently, as in evaluation: there is no format check. Released rules read box tokens only.
    """
    frame = answers.STYLES[answers.choose(style, answers.STYLES, "style")].frame
    body = answers.content(text, thinking) or ""
    if answers.choose(rules, answers.RULES, "rules") == "released":
        points = released_points(body)
        return Points([p for p in points if all(map(math.isfinite, p))], "norm1000")
    if not answers.STYLES[style].json:
        found = [_center(answers.pair_box(content)) for content in answers.token_boxes(body, across_lines=True)]
    else:
        found = [_json_point(item) for item in answers.json_objects(body)]
    return Points([point for point in found if point is not None], frame)


def read(text: str, style: str = "qwen2_5_vl", thinking: bool = False) -> list[list[float] | None] | None:
    """Every object of a well-formed answer: its point in the style's frame, None where unreadable or inverted.

    The answer is None where the format is broken: not one labelled segment of boxes (`"qwen2_vl"`), not a JSON list
    (`"qwen2_5_vl"`), or no proper thinking and answer blocks when `thinking` is asked for.
    """
    if thinking and not answers.thinking_format(text):
        return None
    body = answers.content(text, thinking) or ""
    if answers.STYLES[answers.choose(style, answers.STYLES, "style")].json:
        items = answers.json_list(body)
        return None if items is None else [_json_point(item) for item in items]
    segments = answers.token_segments(body)
    if segments is None or len(segments) != 1:
        return None
    return [_center(answers.pair_box(content)) for content in segments[0][1]]


def _center(box: list[float] | None) -> list[float] | None:
    if box is None or box[0] > box[2] or box[1] > box[3]:
        return None
    x1, y1, x2, y2 = box
    return [x1 / 2 + x2 / 2, y1 / 2 + y2 / 2]


def _json_point(item: Any) -> list[float] | None:
    """Point of a labelled element: the centre of its `bbox_2d`, else its `point_2d`."""
    if not isinstance(item, dict) or not isinstance(item.get("label"), str):
        return None
    box = answers.four_numbers(item.get("bbox_2d"))
    return _center(box) if box is not None else answers.two_numbers(item.get("point_2d"))


def reward(
    text: str,
    record: Mapping[str, Any],
    rules: str = "corrected",
    style: str = "qwen2_5_vl",
    thinking: bool = False,
    matching: str = "hungarian",
    reach: float = SCALE,
) -> dict[str, float]:
    """Count ratio times closeness: {"reward" 0..1, "format", "count" = the ratio, "closeness" of the matched pairs}.

    `reach`: distance on the 0..1000 grid from which a pair is worth nothing; corrected rules only. `rules="released"`
    reads the raw text (box tokens) whatever `style` is, and reports "reward" and "format" only.
    """
    answers.choose(matching, answers.MATCHING, "matching")
    target = _targets(record)
    if answers.choose(rules, answers.RULES, "rules") == "released":
        return {
            "reward": released_reward(text, target.to("norm1000").tolist(), matching),
            "format": released_format(text),
        }
    objects = read(text, style, thinking)
    if objects is None:
        return {"reward": 0.0, "format": 0.0, "count": 0.0, "closeness": 0.0}
    if not objects and not len(target):
        return {"reward": 1.0, "format": 1.0, "count": 1.0, "closeness": 1.0}
    points = Points.of(record, [p for p in objects if p is not None], answers.STYLES[style].frame)
    distance = np.minimum(points.to("norm1000").pairwise_distance(target.to("norm1000")), reach)
    pairs = _pairs(distance, matching)
    count = min(distance.shape) / max(len(objects), len(target))
    closeness = 1 - float(distance[pairs].mean()) / reach if min(distance.shape) else 0.0
    return {"reward": count * closeness, "format": 1.0, "count": count, "closeness": closeness}


def _targets(record: Mapping[str, Any]) -> Points:
    return Points.of(record, record["points"]) if "points" in record else Boxes.of(record, record["boxes"]).centers


@dataclass(frozen=True)
class Counting(Task):
    """A box or point for each object of a category."""

    style: answers.StyleName = "qwen2_5_vl"
    thinking: bool = False
    rules: answers.Rules = "corrected"
    matching: answers.Matching = "hungarian"

    figures = {"accuracy": "higher", "mae": "lower"}
    primary = ("accuracy", "mae")

    def prompt(self, record: Record) -> str:
        return prompt(record, self.style, self.thinking)

    def gold(self, record: Record) -> str:
        return answer(record, self.style, self.thinking)

    def reward(self, text: str, record: Record) -> Reward:
        return reward(text, record, self.rules, self.style, self.thinking, self.matching)

    def row(self, text: str, record: Record) -> Row:
        """`accuracy`: whether the answer has exactly `count` readable boxes (no format gate); `mae`: count error.

        Released rules: an answer without a readable box counts as no answer, so a true 0 can never be right.
        """
        counted = len(parse(text, self.style, self.thinking, self.rules))
        right = counted == record["count"] and (counted > 0 or self.rules != "released")
        return {"accuracy": float(right), "mae": float(abs(counted - record["count"]))}

    def groups(self, record: Record) -> tuple[str, ...]:
        return (str(record["label"]),)

    def predicted(self, text: str, record: Record) -> Shown:
        points = parse(text, self.style, self.thinking, self.rules)
        return {"points": in_pixels(record, points), "count": len(points)}


PARSERS = {
    "tokens": lambda text: parse(text, "qwen2_vl"),
    "json": parse,
    "released": lambda text: parse(text, rules="released"),
    "released format": released_format,
    "released points": released_points,
    "strict tokens": lambda text: read(text, "qwen2_vl"),
    "strict json": read,
    "strict json, thinking": lambda text: read(text, thinking=True),
}
