"""Visual grounding: one box for a referring expression (Perception-R1, perception_r1.md sections 2.1 and 5).

The reward is format (0 or 1) plus the squared IoU, 0..2. The released code and the corrected form differ so:

- Format. Released: the bars of the pattern are not escaped, so any text that starts with `<`, `>` or a bare token name
  passes. Corrected: the whole answer must be exactly one labelled box in the style's format.
- Text without box tokens. Released: numbers are fractions, times 1000, cut to whole. Corrected: only if all four lie
  in 0..1, otherwise they are the style's own units.
- Qwen2.5-VL's pixels. Released: taken as fractions, hence IoU 0. Corrected: style `"qwen2_5_vl"` reads resized pixels.
- Blanks and `12.`. Released: refused in places (see `released_box`). Corrected: allowed, as in the evaluation parser.
- Zero union, huge numbers. Released: ZeroDivisionError or OverflowError stops the training; here IoU 0 in both forms.
- Target. Released: read with eval. Here the numbers of the record in both forms.

Kept as designed: only the first box counts, an inverted box scores 0, the text of the label is not judged.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxmllm.geometry import Boxes, box_area, box_intersection, box_iou
from jaxmllm.tasks import answers
from jaxmllm.tasks.task import Record, Reward, Row, Shown, Task, in_pixels

ACCURACY_THRESHOLDS = (0.1, 0.3, 0.5, 0.75, 0.95)

_HEADS = ("<", "object_ref_start", "object_ref_end", "box_start", "box_end", "im_end", "><", ">")


def _box_patterns(number: str, middle: str, close: str) -> tuple[re.Pattern, ...]:
    """The three box notations in order of preference; `middle`, `close`: blanks around the middle comma, before `)`."""
    n, comma = f"({number})", r",\s*+"
    four = rf"\s*+{n}{comma}{n}{comma}{n}{comma}{n}\s*+"
    pairs = rf"\(\s*+{n}{comma}{n}\){middle},\s*+\(\s*+{n}{comma}{n}{close}\)"
    return tuple(re.compile(p) for p in (rf"\[{four}\]", rf"\({four}\)", pairs))


# The reward's patterns and the laxer ones of the evaluation script; possessive repeats keep them linear.
_STRICT = _box_patterns(r"-?\d++(?:\.\d++)?+", "", "")
_LAX = _box_patterns(r"-?\d++(?:\.\d*+)?+", r"\s*+", r"\s*+")


def _first_box(text: str, patterns: Sequence[re.Pattern]) -> list[float] | None:
    for pattern in patterns:
        match = pattern.search(text)
        if match:
            box = [float(number) for number in match.groups()]
            return box if all(map(math.isfinite, box)) else None
    return None


# --- released -------------------------------------------------------------------------------------------------------


def released_box(text: str, lax: bool = False) -> list[float]:
    """First box in the text on the 0..1000 grid as the published parser reads it; [0, 0, 0, 0] without one.

    `[a, b, c, d]`, then `(a, b, c, d)`, then `(a, b), (c, d)` is looked for over the whole text. Numbers: optional
    minus, digits, optional decimals. Blanks may follow an opening bracket or a comma and, in the first two forms,
    precede the closing one. `lax` also allows `12.` and blanks around the pair form's middle comma (evaluation script).
    Without `<|box_start|>` in the text the numbers are multiplied by 1000 and cut to whole numbers.
    """
    text = text[: answers.MAX_CHARS]
    box = _first_box(text, _LAX if lax else _STRICT)
    if box is None:
        return [0.0] * 4
    if answers.BOX_START in text:
        return box
    scaled = [value * 1000 for value in box]
    return [float(math.trunc(v)) for v in scaled] if all(map(math.isfinite, scaled)) else [0.0] * 4


def released_format(text: str) -> float:
    """1 if the text starts with one of the alternatives of the published, unescaped pattern; else 0."""
    return float(text[: answers.MAX_CHARS].replace(answers.PAD, "").startswith(_HEADS))


def released_reward(text: str, target: Sequence[float] | str, power: float = 2.0) -> float:
    """IoU ** power of the first box with `target` [x1, y1, x2, y2] on the 0..1000 grid (a list, or text of one), 0..1.

    Raises:
        ValueError: the target is not four numbers.
    """
    box = released_box(text.replace(answers.PAD, ""))
    return float(box_iou(box, _target(target)) ** power)


def _target(target: Sequence[float] | str) -> list[float]:
    value = answers.number_list(target) if isinstance(target, str) else target
    box = answers.four_numbers(list(value)) if isinstance(value, Sequence) else None
    if box is None:
        raise ValueError(f"a grounding target must be four numbers [x1, y1, x2, y2], got {target!r}")
    return box


# --- task -----------------------------------------------------------------------------------------------------------


def prompt(record: Mapping[str, Any], style: str = "qwen2_5_vl", thinking: bool = False) -> str:
    """The user's text: the published question, a request for JSON for Qwen2.5-VL, the thinking suffix if asked."""
    text = f"Output the bounding box of the {record['expression']} in the image."
    return answers.finish_prompt(text, style, thinking)


def answer(record: Mapping[str, Any], style: str = "qwen2_5_vl", thinking: bool = False) -> str:
    """The gold answer: the record's box in whole numbers of the style's frame, labelled with the expression."""
    frame = answers.STYLES[answers.choose(style, answers.STYLES, "style")].frame
    boxes = answers.whole_boxes(Boxes.of(record, [record["box"]]).to(frame))
    return answers.wrap(answers.write_boxes([(record["expression"], boxes)], style), thinking)


def parse(text: str, style: str = "qwen2_5_vl", thinking: bool = False, rules: str = "corrected") -> Boxes | None:
    """First box of the answer, shape [4], in the style's frame (image sizes unknown); None if there is none.

    Corrected rules: with style `"qwen2_vl"` the first readable box token or, without box tokens, the first box of the
    lax patterns; with `"qwen2_5_vl"` the first `bbox_2d` or, without one, the first box of the lax patterns in pixels.
    Released rules read every style as the published evaluation script does: with a box token the 0..1000 grid, without
    one the numbers times 1000, which it then takes for original pixels.
    """
    frame = answers.STYLES[answers.choose(style, answers.STYLES, "style")].frame
    body = answers.content(text, thinking)
    if body is None:
        return None
    if answers.choose(rules, answers.RULES, "rules") == "released":
        first = released_box(body, lax=True)
        return Boxes(first, "norm1000" if answers.BOX_START in body else "pixel") if any(first) else None
    box = _json_box(body) if answers.STYLES[style].json else _token_box(body)
    return None if box is None else Boxes(box, frame)


def _token_box(body: str) -> list[float] | None:
    for text in answers.token_boxes(body):
        box = answers.pair_box(text)
        if box is not None:
            return box
    box = _first_box(body, _LAX)
    if box is None or answers.BOX_START in body or not all(0 <= value <= 1 for value in box):
        return box
    return [value * 1000 for value in box]


def _json_box(body: str) -> list[float] | None:
    for item in answers.json_objects(body):
        box = answers.four_numbers(item.get("bbox_2d"))
        if box is not None:
            return box
    return _first_box(body, _LAX)


def well_formed(text: str, style: str = "qwen2_5_vl", thinking: bool = False) -> bool:
    """Whether the whole completion is exactly one labelled box, not inverted, in the style's format."""
    if thinking and not answers.thinking_format(text):
        return False
    body = answers.content(text, thinking)
    if body is None:
        return False
    boxes = answers.labelled_boxes(body, style)
    if boxes is None or len(boxes) != 1 or boxes[0] is None:
        return False
    x1, y1, x2, y2 = boxes[0][0]
    return x1 < x2 and y1 < y2


def reward(
    text: str,
    record: Mapping[str, Any],
    rules: str = "corrected",
    style: str = "qwen2_5_vl",
    thinking: bool = False,
    power: float = 2.0,
) -> dict[str, float]:
    """Format (0 or 1) plus IoU ** power of the first box with the record's box: {"reward" 0..2, "format", "iou"}.

    `rules="released"` reads the raw text on the 0..1000 grid, whatever `style` is. "iou" is the plain IoU.
    """
    target = Boxes.of(record, record["box"])
    if answers.choose(rules, answers.RULES, "rules") == "released":
        form = float(answers.thinking_format(text, "released")) if thinking else released_format(text)
        iou = released_reward(text, target.to("norm1000").tolist(), power=1.0)
    else:
        form = float(well_formed(text, style, thinking))
        iou = _iou(parse(text, style, thinking), record)
    return {"reward": form + iou**power, "format": form, "iou": iou}


def _iou(pred: Boxes | None, record: Mapping[str, Any]) -> float:
    """IoU with the record's box, 0 without a prediction; axis scaling does not change it, so any frame will do."""
    if pred is None:
        return 0.0
    return float(Boxes.of(record, pred.array, pred.frame).iou(Boxes.of(record, record["box"]).to(pred.frame)))


@dataclass(frozen=True)
class Grounding(Task):
    """The box of a described object."""

    style: answers.StyleName = "qwen2_5_vl"
    thinking: bool = False
    rules: answers.Rules = "corrected"

    figures = {"IoU": "higher", "Acc@*": "higher", "center_acc": "higher"}
    primary = ("Acc@0.5", "IoU")

    def prompt(self, record: Record) -> str:
        return prompt(record, self.style, self.thinking)

    def gold(self, record: Record) -> str:
        return answer(record, self.style, self.thinking)

    def reward(self, text: str, record: Record) -> Reward:
        return reward(text, record, rules=self.rules, style=self.style, thinking=self.thinking)

    def row(self, text: str, record: Record) -> Row:
        """IoU, Acc@0.1/0.3/0.5/0.75/0.95, their published average and centre accuracy.

        As published, IoU is intersection / (union + 1e-10) on the 0..1000 grid, compared with >=: an exact 0.5 is a miss.
        `Acc@avg` is the mean of Acc@0.5, @0.75 and @0.95. `center_acc`: the predicted centre lies in the target box.
        """
        pred = parse(text, self.style, self.thinking, self.rules)
        target = Boxes.of(record, record["box"]).to("norm1000")
        box = Boxes([0.0] * 4, "norm1000") if pred is None else Boxes.of(record, pred.array, pred.frame).to("norm1000")
        inter = box_intersection(box.array, target.array)
        iou = float(inter / (box_area(box.array) + box_area(target.array) - inter + 1e-10))
        hits = {t: float(iou >= t) for t in ACCURACY_THRESHOLDS}
        return {
            "IoU": iou,
            **{f"Acc@{t}": hit for t, hit in hits.items()},
            "Acc@avg": (hits[0.5] + hits[0.75] + hits[0.95]) / 3,
            "center_acc": float(pred is not None and bool(box.centers.inside(target))),
        }

    def predicted(self, text: str, record: Record) -> Shown:
        box = parse(text, self.style, self.thinking, self.rules)
        return {"boxes": [] if box is None else in_pixels(record, box)}


PARSERS = {
    "tokens": lambda text: parse(text, "qwen2_vl"),
    "json": parse,
    "tokens, thinking": lambda text: parse(text, "qwen2_vl", thinking=True),
    "released": lambda text: parse(text, rules="released"),
    "released reward box": released_box,
    "released format": released_format,
    "format, tokens": lambda text: well_formed(text, "qwen2_vl"),
    "format, json, thinking": lambda text: well_formed(text, thinking=True),
}
