"""Detection: boxes and names of all objects of the asked categories (Perception-R1, perception_r1.md sections 2.3, 5).

The reward of an answer with n predicted, m target boxes and k matched pairs (IoU > 0.5) is

    0.25 f  +  0.75 F1(k/n, k/m)  +  share of pairs with equal class  +  mean IoU of the pairs   [- penalty]

clamped to 0..3, where f is the share of well-formed elements; without any pair it stops at 0.25 f. An optional coverage
bonus is added after the clamp. Text that is not wholly a JSON list (prose around it, cut off, a bare object) gets 0.
The forms differ so:

- Matching cost 5 L1 - class probability - 2 GIoU. Released: L1 in raw pixels, which swamps the rest, and a pair under
  the IoU threshold is dropped only after it has taken the place of a better one. Corrected: L1 in shares of the image's
  sides, and pairs at or under the threshold never displace eligible ones.
- Class columns. Released: predictions at their id, targets at id - 1, so that ties pair neighbouring ids; 90 columns,
  so any `toothbrush` (id 90) zeroes the answer. Corrected: classes are compared by name, any names are allowed.
- One inverted box, or one with a wrong number of coordinates. Released: zeroes the answer. Corrected: a bad element.
- No valid element. Released: 0 by an exception. Corrected: 0 by rule (f = 0); an empty list also has f = 0.
- No targets. Released: 0.25 f, and 0 for an empty list. Corrected: 3 for an empty list, 0.25 f otherwise.
- Penalty. Released: minus 0.5 ((n-k)/n + (m-k)/m), on by default, off in the released training script. Corrected: the
  paper's missing penalty, minus 0.5 (m-k)/m, off by default.
- Size weights (3 below 32 x 32, 2 below 96 x 96, else 1). Released: divided by (sum of IoUs x pairs), so two perfect
  large boxes score 0.5. Corrected: divided by the sum of weights.
- A label that differs from a category in spelling alone. Released: another class. Corrected: that category.
- Logging side effects of the released code (rewards appended twice without LOG_DIR) are not repeated.

A known weakness of both: class and location are means over the matched pairs, so naming only the surest object (2.6 of
3 for one of three) beats naming all of them with loose boxes. Counter: `Weights(penalty=True)`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from jaxmllm.geometry import Boxes, box_area, box_valid, hungarian, match_iou, pairwise_giou, pairwise_iou
from jaxmllm.tasks import answers
from jaxmllm.tasks.coco_ids import COCO_IDS
from jaxmllm.tasks.task import Line, Named, Record, Reward, Row, Shown, Task, in_pixels

IOU_THRESHOLD = 0.5
FORMAT_WEIGHT, PENALTY_WEIGHT = 0.25, 0.5
COST_L1, COST_CLASS, COST_GIOU = 5.0, 1.0, 2.0
_RELEASED_COLUMNS = 90
_TINY = np.float32(1e-8)
WORDINGS = ("train", "evaluation")


@dataclass(frozen=True)
class Weights:
    """Weights and switches of the reward; the defaults are those of the released training script.

    Attributes:
        f1: weight of the count term (F1_SCALE).
        label: weight of the class term (CLS_COE).
        iou: weight of the location term (IOU_COE).
        coverage: weight of the coverage bonus (COVERAGE_SCALE): mean over target classes of min(predicted/true, 1).
        penalty: subtract the penalty (DO_PENAIlty).
        size: weight IoUs by the target's size (IS_SIZE_WEIGHT).
    """

    f1: float = 0.75
    label: float = 1.0
    iou: float = 1.0
    coverage: float = 0.0
    penalty: bool = False
    size: bool = False


@dataclass(frozen=True)
class Detections:
    """What an answer holds: `boxes` [N, 4] in the style's frame, their `labels`, the number of `bad` elements."""

    boxes: Boxes
    labels: list[str]
    bad: int

    @property
    def share(self) -> float:
        """Share of well-formed elements, 0 if there is no element."""
        return len(self.labels) / total if (total := len(self.labels) + self.bad) else 0.0


def _match_order(iou: Float[np.ndarray, "P G"]) -> tuple[Int[np.ndarray, "K"], Int[np.ndarray, "K"]]:
    """Prediction i with target i, where their IoU exceeds the threshold: the ablation without reward matching."""
    order = np.arange(min(iou.shape))
    order = order[iou[order, order] > IOU_THRESHOLD]
    return order, order


def _size_weights(boxes: Float[np.ndarray, "K 4"]) -> Float[np.ndarray, "K"]:
    area = box_area(boxes)
    return np.where(area < 32 * 32, 3.0, np.where(area < 96 * 96, 2.0, 1.0))


def _coverage(pred: Sequence[Any], target: Sequence[Any]) -> float:
    """Mean over the target's classes of min(predicted count / true count, 1)."""
    pred, target = list(pred), list(target)
    return float(np.mean([min(pred.count(c) / target.count(c), 1.0) for c in set(target)]))


def _total(
    share: float, n: int, m: int, same: Sequence[bool], location: float, penalty: float, weights: Weights
) -> dict[str, float]:
    """Weighted sum of the terms for at least one matched pair, before the coverage bonus, clamped to 0..3."""
    k = len(same)
    precision, recall = k / n, k / m
    f1 = 2 * precision * recall / (precision + recall + 1e-8)
    label = float(np.mean(same))
    value = FORMAT_WEIGHT * share + weights.f1 * f1 + weights.label * label + weights.iou * location
    value -= PENALTY_WEIGHT * penalty if weights.penalty else 0.0
    return {"reward": min(max(value, 0.0), 3.0), "format": share, "f1": f1, "label": label, "iou": location}


# --- released -------------------------------------------------------------------------------------------------------


def released_parse(text: str) -> tuple[list[int], list[Any], float] | None:
    """Ids, raw `bbox_2d` values and format share of an answer; None where the published parser fails as a whole.

    The strings "```json" and "```" are deleted and the rest must be strict JSON. An element without `bbox_2d` or whose
    `label` is not one of the 80 names is bad and dropped; without any good element the parser fails.
    """
    items = answers.json_list(text[: answers.MAX_CHARS])
    if not items:
        return None
    labelled = [item for item in items if isinstance(item, dict) and isinstance(item.get("label"), str)]
    known = [item for item in labelled if "bbox_2d" in item and item["label"] in COCO_IDS]
    good = [(COCO_IDS[item["label"]], item["bbox_2d"]) for item in known]
    if not good:
        return None
    ids, boxes = zip(*good, strict=True)
    return list(ids), list(boxes), 1 - (len(items) - len(good)) / len(items)


def released_reward(
    text: str,
    target_ids: Sequence[int],
    target_boxes: Sequence[Sequence[float]],
    weights: Weights | None = None,
    matching: str = "hungarian",
) -> float:
    """Released detection reward, 0..3 (more with the coverage bonus). Boxes are pixels of the resized image.

    `target_ids` are COCO ids 1..90. Computed in float32, as published, so that near ties fall alike.
    """
    weights = weights or Weights()
    answers.choose(matching, answers.MATCHING, "matching")
    parsed = released_parse(text)
    if parsed is None:
        return 0.0
    ids, raw_boxes, share = parsed
    if not len(target_ids):
        return FORMAT_WEIGHT * share if _rectangular(raw_boxes) else 0.0
    checked = [answers.four_numbers(box) for box in raw_boxes]
    if any(box is None for box in checked):
        return 0.0
    with np.errstate(all="ignore"):
        boxes, targets = np.array(checked, np.float32), np.array(target_boxes, np.float32).reshape(-1, 4)
    inverted = any((b[:, 2:] < b[:, :2]).any() or not np.isfinite(b).all() for b in (boxes, targets))
    if max(ids) >= _RELEASED_COLUMNS or inverted:
        return 0.0
    iou, cost = _released_cost(ids, boxes, target_ids, targets)
    if not np.isfinite(cost).all():
        return 0.0
    if matching == "order":
        rows, columns = _match_order(iou)
    else:
        rows, columns = hungarian(cost)
        keep = iou[rows, columns] > IOU_THRESHOLD
        rows, columns = rows[keep], columns[keep]
    n, m, k = len(ids), len(target_ids), len(rows)
    if not k:
        return FORMAT_WEIGHT * share
    paired = iou[rows, columns]
    location = float(paired.mean())
    if weights.size:
        location = float((_size_weights(targets[columns]) * paired).sum() / (paired.sum() * k + 1e-8))
    same = [ids[r] == target_ids[c] for r, c in zip(rows, columns, strict=True)]
    value = _total(share, n, m, same, location, (n - k) / n + (m - k) / m, weights)["reward"]
    return value + weights.coverage * _coverage(ids, target_ids)


def _rectangular(raw_boxes: Sequence[Any]) -> bool:
    """Whether the values form one array of numbers: without targets the published code asks no more of the boxes."""
    try:
        return np.asarray(raw_boxes).dtype.kind in "iufb"
    except ValueError:
        return False


def _released_cost(
    ids: Sequence[int], boxes: Float[np.ndarray, "P 4"], target_ids: Sequence[int], targets: Float[np.ndarray, "G 4"]
) -> tuple[Float[np.ndarray, "P G"], Float[np.ndarray, "P G"]]:
    """IoU and DETR cost in float32: raw-pixel L1, targets one class column to the left, 1e-8 in the denominators."""
    with np.errstate(all="ignore"):
        a, b = boxes[:, None], targets[None]
        inter = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(-1)
        union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
        iou = inter / (union + _TINY)
        hull = (np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])).prod(-1) + _TINY
        giou = iou - (hull - union) / hull
        l1 = np.abs(_center_size(boxes)[:, None] - _center_size(targets)[None]).sum(-1)
    hit = np.array(ids)[:, None] == np.array(target_ids)[None] - 1
    rest = _RELEASED_COLUMNS - 1
    probability = np.where(hit, math.e / (math.e + rest), 1 / (math.e + rest)).astype(np.float32)
    return iou, np.float32(COST_L1) * l1 - np.float32(COST_CLASS) * probability - np.float32(COST_GIOU) * giou


def _center_size(boxes: Float[np.ndarray, "N 4"]) -> Float[np.ndarray, "N 4"]:
    return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=-1)


# --- task -----------------------------------------------------------------------------------------------------------


def prompt(record: Mapping[str, Any], style: str = "qwen2_5_vl", thinking: bool = False, wording: str = "train") -> str:
    """The user's text with the record's `categories` (default: the 80 of COCO).

    `wording` chooses the published training or evaluation text; which one the released weights saw is unknown.
    """
    answers.choose(style, answers.STYLES, "style")
    names = ", ".join(record.get("categories", COCO_IDS))
    if answers.choose(wording, WORDINGS, "wording") == "train":
        text = f"Please output bbox coordinates and names of {names}."
    else:
        text = (
            "Locate every item from the category list in the image and output the coordinates in JSON format. "
            f"The category set includes {names}."
        )
    return text + answers.THINKING_SUFFIX if thinking else text


def answer(record: Mapping[str, Any], style: str = "qwen2_5_vl", thinking: bool = False) -> str:
    """The gold answer: every box of the record in whole numbers of the style's frame, in the record's order.

    Style `"qwen2_vl"` puts neighbours of one label behind one label segment.
    """
    frame = answers.STYLES[answers.choose(style, answers.STYLES, "style")].frame
    boxes = answers.whole_boxes(Boxes.of(record, record["boxes"]).to(frame))
    segments: list[tuple[str, list]] = []
    for label, box in zip(record["labels"], boxes, strict=True):
        if not segments or segments[-1][0] != label:
            segments.append((label, []))
        segments[-1][1].append(box)
    return answers.wrap(answers.write_boxes([(label, np.array(group)) for label, group in segments], style), thinking)


def parse(
    text: str,
    style: str = "qwen2_5_vl",
    thinking: bool = False,
    rules: str = "corrected",
    categories: Sequence[str] | None = None,
) -> Detections:
    """Labelled boxes of an answer, read for evaluation: image sizes unknown, no strict format.

    Corrected: complete elements are kept where the answer is cut off or surrounded by prose; inverted boxes are bad.
    Released: the whole text, or the contents of its answer block, must be JSON, else there are no detections; boxes
    may be inverted. With `categories`, an element with another label is bad.
    """
    answers.choose(style, answers.STYLES, "style")
    body = answers.content(text, thinking)
    if answers.choose(rules, answers.RULES, "rules") == "released":
        body = answers.content(text, thinking="<answer>" in text)
        found = [answers.json_box(item) for item in answers.json_list(body or "") or []]
    elif answers.STYLES[style].json:
        found = [answers.json_box(item) for item in answers.json_objects(body or "")]
    else:
        found = answers.labelled_boxes(body or "", style) or []
    return _detections(found, answers.STYLES[style].frame, categories, released=rules == "released")


def read(
    text: str, style: str = "qwen2_5_vl", thinking: bool = False, categories: Sequence[str] | None = None
) -> Detections | None:
    """Labelled boxes of a well-formed answer, for the corrected reward; None if the answer's form is broken."""
    if thinking and not answers.thinking_format(text):
        return None
    found = answers.labelled_boxes(answers.content(text, thinking) or "", style)
    return None if found is None else _detections(found, answers.STYLES[style].frame, categories)


def _detections(
    found: Sequence[answers.Labelled | None], frame: str, categories: Sequence[str] | None, released: bool = False
) -> Detections:
    """Good elements as arrays; inverted boxes and labels outside `categories` count as bad.

    A label that differs from a category in spelling alone (`Person`, `person.`) is that category. `released`: neither.
    """
    good = [item for item in found if item is not None]
    if not released:
        names = list(COCO_IDS if categories is None else categories)
        meant = answers.by_spelling(names) | {name: name for name in names}
        good = [(box, meant.get(label) or meant.get(answers.plain_label(label), label)) for box, label in good]
        good = [item for item in good if box_valid(item[0])]
    if categories is not None:
        allowed = set(categories)
        good = [item for item in good if item[1] in allowed]
    return Detections(Boxes([box for box, _ in good], frame), [label for _, label in good], len(found) - len(good))


def match(
    pred: Boxes, pred_labels: Sequence[str], target: Boxes, labels: Sequence[str]
) -> tuple[Int[np.ndarray, "K"], Int[np.ndarray, "K"]]:
    """Corrected matching: as many pairs with IoU > 0.5 as possible, among these the least DETR cost.

    The cost is 5 L1(cx, cy, w, h in shares of the image's sides) - [same label] - 2 GIoU. Raises FrameError on mixed
    frames or unknown image size.
    """
    iou = pred.pairwise_iou(target)
    eligible = iou > IOU_THRESHOLD
    sides = np.tile(pred.extent(), 2)
    with np.errstate(over="ignore", invalid="ignore"):  # a huge box overflows, but is not eligible
        l1 = np.abs(_center_size(pred.array / sides)[:, None] - _center_size(target.array / sides)[None]).sum(-1)
    same = np.array(pred_labels, object)[:, None] == np.array(labels, object)[None]
    cost = COST_L1 * l1 - COST_CLASS * same - COST_GIOU * pairwise_giou(pred.array, target.array)
    # An eligible pair overlaps, so its cost is bounded; the others all cost the same, above any sum of eligible ones.
    worst = float(np.abs(cost[eligible]).max(initial=1.0)) * (2 * min(iou.shape) + 2)
    rows, columns = hungarian(np.where(eligible, cost, worst))
    keep = eligible[rows, columns]
    return rows[keep], columns[keep]


def reward(
    text: str,
    record: Mapping[str, Any],
    rules: str = "corrected",
    style: str = "qwen2_5_vl",
    thinking: bool = False,
    matching: str = "hungarian",
    weights: Weights | None = None,
) -> dict[str, float]:
    """Detection reward 0..3: {"reward", "format" = f, "f1", "label", "iou"}; terms that were not reached are 0.

    `rules="released"` needs COCO labels in the record, reads JSON whatever `style` is and reports "reward" only.
    """
    weights = weights or Weights()
    answers.choose(matching, answers.MATCHING, "matching")
    target, labels = Boxes.of(record, record["boxes"]), list(record["labels"])
    if answers.choose(rules, answers.RULES, "rules") == "released":
        ids = [COCO_IDS[label] for label in labels]
        body = answers.content(text, thinking) or ""
        return {"reward": released_reward(body, ids, target.to("resized").tolist(), weights, matching)}
    found = read(text, style, thinking, record.get("categories"))
    parts = {"reward": 0.0, "format": 0.0, "f1": 0.0, "label": 0.0, "iou": 0.0}
    if found is None:
        return parts
    n, m = len(found.labels), len(labels)
    if not m and not n and not found.bad:
        return {"reward": 3.0, "format": 1.0, "f1": 1.0, "label": 1.0, "iou": 1.0}
    parts |= {"reward": FORMAT_WEIGHT * found.share, "format": found.share}
    if not n or not m:
        return parts
    pred = Boxes.of(record, found.boxes.array, found.boxes.frame)
    target = target.to(pred.frame)
    iou = pred.pairwise_iou(target)
    rows, columns = _match_order(iou) if matching == "order" else match(pred, found.labels, target, labels)
    k = len(rows)
    if not k:
        return parts
    paired = iou[rows, columns]
    sizes = _size_weights(target.to("resized").array[columns]) if weights.size else np.ones(k)
    same = [found.labels[r] == labels[c] for r, c in zip(rows, columns, strict=True)]
    parts = _total(found.share, n, m, same, float((sizes * paired).sum() / sizes.sum()), (m - k) / m, weights)
    parts["reward"] += weights.coverage * _coverage(found.labels, labels)
    return parts


@dataclass(frozen=True)
class Detection(Task):
    """Boxes and names of all objects of the asked categories."""

    style: answers.StyleName = "qwen2_5_vl"
    thinking: bool = False
    wording: Literal["train", "evaluation"] = "train"
    rules: answers.Rules = "corrected"
    matching: answers.Matching = "hungarian"
    weights: Weights = Weights()

    figures = {
        "AP*": "higher",
        **dict.fromkeys(("precision", "recall", "f1", "mean_iou"), "higher"),
        "boxes": "neutral",
    }
    primary = ("AP", "AP50")

    def prompt(self, record: Record) -> str:
        return prompt(record, self.style, self.thinking, self.wording)

    def gold(self, record: Record) -> str:
        return answer(record, self.style, self.thinking)

    def reward(self, text: str, record: Record) -> Reward:
        return reward(text, record, self.rules, self.style, self.thinking, self.matching, self.weights)

    def _read(self, text: str, record: Record) -> Detections:
        return parse(text, self.style, self.thinking, self.rules, record.get("categories"))

    def row(self, text: str, record: Record) -> Row:
        """`precision`, `recall`, `f1` of pairs with equal label and IoU > 0.5, pooled over images, their `mean_iou`.

        `boxes` is the number of predictions an image.
        """
        read = self._read(text, record)
        target = Boxes.of(record, record["boxes"]).to(read.boxes.frame)
        same = np.array(read.labels, object)[:, None] == np.array(record["labels"], object)[None]
        iou = np.where(same, pairwise_iou(read.boxes.array, target.array), 0.0)
        paired = iou[match_iou(iou, IOU_THRESHOLD)]
        right, predicted, true = len(paired), len(read.labels), len(target)
        return {
            "precision": (right, predicted),
            "recall": (right, true),
            "f1": (2 * right, predicted + true),
            "mean_iou": (float(paired.sum()), right),
            "boxes": float(predicted),
        }

    def files(self, records: Sequence[Record], lines: Sequence[Line], ids: Mapping[str, int] | None) -> dict[str, Any]:
        """COCO annotations of the records and COCO results of the lines, in original pixels."""
        from jaxmllm.tasks import coco_ap

        known = coco_ap.category_ids(records, ids)
        results = coco_ap.results(records, [line["prediction"] for line in lines], known)
        return {"ground_truth.json": coco_ap.ground_truth(records, known), "coco_results.json": results}

    def whole(self, lines: Sequence[Line], files: Mapping[str, Any]) -> Named | None:
        """COCO AP."""
        from jaxmllm.tasks import coco_ap

        truth = files["ground_truth.json"]
        names, statistic = coco_ap.ap_statistic(truth, files["coco_results.json"])
        order = np.argsort([image["id"] for image in truth["images"]], kind="stable")  # COCO's order of images
        return names, lambda counts: statistic(counts[:, order])

    def predicted(self, text: str, record: Record) -> Shown:
        read = self._read(text, record)
        kept = [(box, label) for i, label in enumerate(read.labels) for box in in_pixels(record, read.boxes[i : i + 1])]
        return {"boxes": [box for box, _ in kept], "labels": [label for _, label in kept]}

    def title(self, record: Record) -> str:
        return ", ".join(record["categories"]) if "categories" in record else self.prompt(record)


PARSERS = {
    "json": parse,
    "tokens": lambda text: parse(text, "qwen2_vl"),
    "json, thinking": lambda text: parse(text, thinking=True),
    "released": lambda text: parse(text, rules="released"),
    "released reward": released_parse,
    "strict json": lambda text: read(text, categories=tuple(COCO_IDS)),
    "strict tokens": lambda text: read(text, "qwen2_vl"),
}
