"""Detection AP of COCO: pycocotools matches boxes, image by image; AP and its interval are computed from the matches.

Boxes are in original pixels, [x, y, w, h] as COCO writes them. Generated text has no confidence, so every box has
score 1.0 as in Perception-R1's evaluation (perception_r1.md section 5). COCOeval ranks equal scores by image id and by
their order in the result list, so AP depends slightly on that order; here it is fixed: images by id, boxes as the
answer lists them.

A record may carry, besides the fields of the detection task: `image_id` and `file_name`, for the files written here;
`crowd_boxes` and `crowd_labels`, regions of many objects in which a detection is neither right nor wrong. A record does
not know areas of masks: small, medium and large are judged by the area of the box.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jaxmllm.errors import InputError
from jaxmllm.intervals import Statistic
from jaxmllm.tasks.coco_ids import COCO_IDS

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # as COCOeval spells them
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
AREAS = ("all", "small", "medium", "large")  # all; under 32 x 32; up to 96 x 96; above
_CHUNK = 1 << 18  # resamples x boxes worked on at a time


# --- files ----------------------------------------------------------------------------------------------------------


def category_ids(records: Sequence[Mapping[str, Any]], known: Mapping[str, int] | None = None) -> dict[str, int]:
    """Id of each category asked for: the `known` one, COCO's if every name is one of its 80, else 1, 2, .. in order."""
    names = dict.fromkeys(name for record in records for name in record.get("categories", COCO_IDS))
    for table in (known or {}, COCO_IDS):
        if names.keys() <= table.keys():
            return {name: int(table[name]) for name in names}
    return {name: number for number, name in enumerate(names, 1)}


def image_ids(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """The records' `image_id` where all have whole numbers, else 1, 2, ... InputError when one occurs twice."""
    given = [record.get("image_id") for record in records]
    ids = [i for i in given if isinstance(i, int)]
    if len(ids) < len(given):
        return list(range(1, len(records) + 1))
    twice = [i for i, times in Counter(ids).items() if times > 1]
    if twice:
        raise InputError(f"image_id {twice[0]} occurs twice; detection is measured with one record an image")
    return ids


def ground_truth(records: Sequence[Mapping[str, Any]], ids: Mapping[str, int]) -> dict[str, Any]:
    """The records as a COCO annotation file: `images`, `annotations`, `categories` (`ids` by name).

    Raises InputError when two records have the same image id, or a label is not among the categories.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record, image_id in zip(records, image_ids(records), strict=True):
        width, height = record["size"]
        name = str(record.get("file_name", record["id"]))
        images.append({"id": image_id, "width": int(width), "height": int(height), "file_name": name})
        for label, box, crowd in _objects(record):
            if label not in ids:
                raise InputError(f"record {record['id']!r}: label {label!r} is not one of its categories")
            x, y, w, h = _xywh(box)
            annotations.append(
                {
                    "id": len(annotations) + 1,  # COCOeval takes id 0 for "no match"
                    "image_id": image_id,
                    "category_id": ids[label],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": crowd,
                }
            )
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _objects(record: Mapping[str, Any]) -> list[tuple[str, list[float], int]]:
    """Label, box and 1 for a crowd of every object; a crowd that is also listed as an object counts as a crowd only."""
    crowds = list(zip(record.get("crowd_labels", ()), map(_floats, record.get("crowd_boxes", ())), strict=True))
    objects = zip(record["labels"], map(_floats, record["boxes"]), strict=True)
    return [(*item, 0) for item in objects if item not in crowds] + [(*item, 1) for item in crowds]


def _floats(box: Sequence[float]) -> list[float]:
    return [float(side) for side in box]


def _xywh(box: Sequence[float]) -> list[float]:
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1, y2 - y1]


def results(
    records: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]], ids: Mapping[str, int]
) -> list[dict[str, Any]]:
    """COCO results for predictions {"boxes": [[x1, y1, x2, y2], ..] in original pixels, "labels": [name, ..]}.

    Labels that are not in `ids` are left out.
    """
    rows = [
        {"image_id": image_id, "category_id": ids[label], "bbox": _xywh(box), "score": 1.0}
        for image_id, found in zip(image_ids(records), predictions, strict=True)
        for label, box in zip(found["labels"], found["boxes"], strict=True)
        if label in ids
    ]
    return sorted(rows, key=lambda row: row["image_id"])


# --- AP -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """The detections of one category in one range of areas, best first, and what they were matched with."""

    image: Int[np.ndarray, "D"]  # position of the detection's image
    hit: Bool[np.ndarray, "T D"]  # matched with a true box, by IoU threshold
    miss: Bool[np.ndarray, "T D"]  # matched with nothing; neither for a crowd or a box outside the range
    targets: Int[np.ndarray, "N"]  # true boxes of each image


def average_precision(ranking: Ranking, counts: Int[np.ndarray, "R N"]) -> Float[np.ndarray, "R T"]:
    """AP by IoU threshold, image i counted counts[r, i] times: mean of the best precision at each of 101 recalls.

    Equal to COCOeval's `accumulate` where all counts are 1. NaN where no true box is left.
    """
    rows = max(_CHUNK // max(ranking.hit.shape[1], 1), 1)
    if len(counts) > rows:
        parts = [average_precision(ranking, counts[at : at + rows]) for at in range(0, len(counts), rows)]
        return np.concatenate(parts)
    total = (counts @ ranking.targets)[:, None]
    weight = counts[:, ranking.image]
    every = np.cumsum(weight, axis=-1)
    out = np.zeros((len(counts), len(ranking.hit)))
    for t, (hit, miss) in enumerate(zip(ranking.hit, ranking.miss, strict=True)):
        judged = hit | miss
        seen = every if judged.all() else np.cumsum(weight * judged, axis=-1)
        # recall rises, and precision peaks, at hits only
        true = np.cumsum(weight[:, hit], axis=-1).astype(np.float64)
        precision = true / (seen[:, hit] + np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=-1)[:, ::-1]
        reached = np.searchsorted(RECALL_THRESHOLDS, true / np.maximum(total, 1), side="right")
        out[:, t] = (best * np.diff(reached, axis=-1, prepend=0)).sum(-1) / len(RECALL_THRESHOLDS)
    return np.where(total > 0, out, np.nan)


def rankings(truth: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Ranking]:
    """By (category, area): pycocotools' matches. Images are ordered by id; at most 100 boxes an image and category."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        target, guess = COCO(), COCO()
        target.dataset = {**truth, "annotations": [dict(row) for row in truth["annotations"]]}
        guess.dataset = {
            "images": truth["images"],
            "categories": truth["categories"],
            "annotations": [
                {**row, "id": number, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
                for number, row in enumerate(found, 1)
            ],
        }
        target.createIndex()
        guess.createIndex()
        run = COCOeval(target, guess, "bbox")
        run.params.iouThrs = IOU_THRESHOLDS
        run.evaluate()
    names = {row["id"]: row["name"] for row in truth["categories"]}
    images = len(run.params.imgIds)
    table = np.array(run.evalImgs, object).reshape(len(run.params.catIds), len(AREAS), images)
    return {
        (names[category], area): _ranking(table[k, a], images)
        for k, category in enumerate(run.params.catIds)
        for a, area in enumerate(AREAS)
    }


def _ranking(row: Sequence[Mapping[str, Any] | None], images: int) -> Ranking:
    """From COCOeval's per-image entries of one category and area (None: nothing there)."""
    targets = np.zeros(images, np.int64)
    image, scores = [np.zeros(0, np.int64)], [np.zeros(0)]
    matched = [np.zeros((len(IOU_THRESHOLDS), 0), bool)]
    ignored = [np.zeros((len(IOU_THRESHOLDS), 0), bool)]
    for i, entry in enumerate(row):
        if entry is not None:
            targets[i] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
            image.append(np.full(len(entry["dtIds"]), i))
            scores.append(np.asarray(entry["dtScores"], np.float64))
            matched.append(entry["dtMatches"] > 0)
            ignored.append(entry["dtIgnore"].astype(bool))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    match, skip = (np.concatenate(parts, axis=1) for parts in (matched, ignored))
    order = order[np.any(~skip[:, order], axis=0)]  # a box that is ignored at every threshold changes nothing
    match, skip = match[:, order], skip[:, order]
    return Ranking(np.concatenate(image)[order], match & ~skip, ~match & ~skip, targets)


def ap_statistic(truth: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> tuple[list[str], Statistic]:
    """Names and statistic of AP (mean of IoU .50 .. .95), AP50, AP75, AP by size of object and AP of each category.

    Records are the images of `truth` in the order of their ids. Categories and sizes without a true box are left out.
    """
    table = {key: ranking for key, ranking in rankings(truth, found).items() if ranking.targets.any()}
    groups = {area: [key for key in table if key[1] == area] for area in AREAS}
    sizes = [area for area in AREAS[1:] if groups[area]]
    names = ["AP", "AP50", "AP75"] if groups["all"] else []
    names += [f"AP_{area}" for area in sizes] + [f"AP/{name}" for name, _ in groups["all"]]

    def statistic(counts: Int[np.ndarray, "R N"]) -> Float[np.ndarray, "R K"]:
        ap = {key: average_precision(ranking, counts) for key, ranking in table.items()}

        def over(area: str) -> Float[np.ndarray, "R T"]:
            return _mean(np.stack([ap[key] for key in groups[area]]))

        if not names:
            return np.zeros((len(counts), 0))
        every = over("all")
        columns = [every.mean(-1), every[:, 0], every[:, 5], *(over(area).mean(-1) for area in sizes)]
        return np.stack([*columns, *(ap[key].mean(-1) for key in groups["all"])], axis=-1)

    return names, statistic


def _mean(values: Float[np.ndarray, "C R T"]) -> Float[np.ndarray, "R T"]:
    """Mean over the categories that have a true box in the resample; NaN where none has."""
    here = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(here, values, 0.0).sum(0) / here.sum(0)
