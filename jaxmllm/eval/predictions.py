"""What a completion and its record say, as plain JSON in original pixels: for result files, pictures, other tools."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from jaxmllm import tasks
from jaxmllm.errors import InputError
from jaxmllm.geometry import Boxes, Points
from jaxmllm.tasks import answers, counting, detection, grounding

Record = Mapping[str, Any]
Shown = dict[str, Any]  # any of "boxes", "points", "labels", "count", "text"


def accepted(function: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a task's function takes: OCR, for example, has no box style."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in names}


def check_options(options: Mapping[str, Any], task_names: Sequence[str]) -> None:
    """Raises InputError for an option that none of the tasks' `prompt` and `metric` takes."""
    for name in options:
        functions = (f for task in task_names for f in (tasks.get(task).prompt, tasks.get(task).metric))
        if not any(name in inspect.signature(function).parameters for function in functions):
            raise InputError(f"evaluation option {name!r} is not taken by {' or '.join(task_names)}")


def _pixels(record: Record, found: Boxes | Points) -> list[list[float]]:
    """Rows in original pixels; a row beyond the range of numbers is left out."""
    moved = type(found).of(record, found.array.reshape(-1, found.array.shape[-1]), found.frame).to("pixel").array
    return moved[np.isfinite(moved).all(-1)].tolist()


def _grounding(text: str, record: Record, options: Mapping[str, Any]) -> Shown:
    box = grounding.parse(text, **accepted(grounding.parse, options))
    return {"boxes": [] if box is None else _pixels(record, box)}


def _counting(text: str, record: Record, options: Mapping[str, Any]) -> Shown:
    points = counting.parse(text, **accepted(counting.parse, options))
    return {"points": _pixels(record, points), "count": len(points)}


def _detection(text: str, record: Record, options: Mapping[str, Any]) -> Shown:
    found = detection.parse(text, categories=record.get("categories"), **accepted(detection.parse, options))
    kept = [(box, label) for i, label in enumerate(found.labels) for box in _pixels(record, found.boxes[i : i + 1])]
    return {"boxes": [box for box, _ in kept], "labels": [label for _, label in kept]}


def _text(text: str, record: Record, options: Mapping[str, Any]) -> Shown:
    return {"text": answers.content(text, bool(options.get("thinking"))) or ""}


_PREDICTED = {"grounding": _grounding, "counting": _counting, "detection": _detection}


def predicted(task: str, text: str, record: Record, options: Mapping[str, Any]) -> Shown:
    """What the completion says, read as the task's metric reads it. Boxes [x1, y1, x2, y2], points: original pixels."""
    return _PREDICTED.get(task, _text)(text, record, options)


def target(record: Record) -> Shown:
    """What the record says is true, in the same form."""
    shown: Shown = {}
    if "box" in record:
        shown["boxes"] = np.asarray(record["box"], np.float64).reshape(1, 4).tolist()
    if "boxes" in record and not isinstance(record["boxes"], Mapping):
        shown["boxes"] = np.asarray(record["boxes"], np.float64).reshape(-1, 4).tolist()
    if "points" in record:
        shown["points"] = np.asarray(record["points"], np.float64).reshape(-1, 2).tolist()
    if "labels" in record:
        shown["labels"] = list(record["labels"])
    if "count" in record:
        shown["count"] = int(record["count"])
    for name in ("text", "caption"):
        if isinstance(record.get(name), str):
            shown["text"] = record[name]
    return shown


def figures(module: ModuleType, text: str, record: Record, options: Mapping[str, Any]) -> dict[str, Any]:
    """The task's metric on one record: a number x for a mean, [top, bottom] for a ratio of sums over the records."""
    alone = module.metric([text], [record], **accepted(module.metric, options))
    if module is detection:
        return _detection_ratios(alone, record)
    return {name: float(value) for name, value in alone.items() if np.isfinite(value)}


def _detection_ratios(alone: Mapping[str, float], record: Record) -> dict[str, Any]:
    """Pooled precision, recall and F1 of detection as ratios of counts, which the figures of one image determine."""
    found, true = round(alone["boxes"]), len(record["boxes"])
    right = round(alone["precision"] * found)
    return {
        "precision": [right, found],
        "recall": [right, true],
        "f1": [2 * right, found + true],
        "mean_iou": [alone["mean_iou"] * right, right],
        "boxes": alone["boxes"],
    }
