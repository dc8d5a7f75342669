"""A task: what is asked about a picture, how an answer is read, rewarded and measured. Host side only.

A subclass of `Task` is a frozen dataclass of its own options, with the methods below. Training, evaluation, report and the
commands know this protocol and no task. A task of another package is named `module:name`, a subclass or an object of one.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from jaxmllm.errors import InputError
from jaxmllm.geometry import Boxes, Points
from jaxmllm.intervals import Statistic, ratio

Record = Mapping[str, Any]
Direction = Literal["higher", "lower", "neutral"]
Row = Mapping[
    str, float | tuple[float, float]
]  # a number of which the mean is taken, or (top, bottom) of a ratio of sums
Reward = float | Mapping[str, float | None] | None  # a dict: the total is "reward", the others are named parts
Shown = dict[str, Any]  # any of "boxes" [x1, y1, x2, y2] and "points" in original pixels, "labels", "count", "text"
Line = Mapping[str, Any]  # of predictions.jsonl, see `eval.harness`
Named = tuple[list[str], Statistic]  # names of figures, and the statistic that gives them
DIRECTIONS = {"higher": 1, "lower": -1, "neutral": 0}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked and how an answer is judged. Subclasses add their options as fields and fill the methods they need.

    Options that mean the same everywhere: `style`, how boxes are written (`answers.STYLES`); `thinking`, whether the answer is
    `<think>..</think><answer>..</answer>`; `wording`, of questions whose published evaluation asks in other words; `rules`,
    "released" to repeat published code with its bugs or "corrected"; `matching`, "hungarian" or, as an ablation, "order".
    """

    figures: ClassVar[
        Mapping[str, Direction]
    ] = {}  # what is better; a name may hold *; one that is not here is neutral
    primary: ClassVar[tuple[str, ...]] = ()  # figures that say most, first first; they are also given by group

    # ---- asking

    def prompt(self, record: Record) -> str:
        """The user's text; the record's pictures come before it."""
        raise NotImplementedError

    def content(self, record: Record) -> list[dict[str, Any]]:
        """The user's message in parts, as chat templates take them: the record's pictures, then `prompt`."""
        return [*pictures(record), {"type": "text", "text": self.prompt(record)}]

    def gold(self, record: Record) -> str:
        """The right completion, for supervised training, without the end of the turn."""
        raise NotImplementedError

    def title(self, record: Record) -> str:
        """What the record asks, in few words."""
        return str(record.get("expression") or record.get("label") or self.prompt(record))

    # ---- judging

    def reward(self, text: str, record: Record) -> Reward:
        """What a completion earns; None where the task has no reward for this record. Never raises on a text."""
        return None

    def row(self, text: str, record: Record) -> Row:
        """Figures of one completion; one that does not apply to it is absent. Shares are in 0..1."""
        raise NotImplementedError

    def files(self, records: Sequence[Record], lines: Sequence[Line], ids: Mapping[str, int] | None) -> dict[str, Any]:
        """Files for other tools, name -> JSON, of an evaluation's records and lines. `ids`: of categories in the source."""
        return {}

    def whole(self, lines: Sequence[Line], files: Mapping[str, Any]) -> Named | None:
        """Figures of the set that are no means or ratios over lines; the statistic counts lines."""
        return None

    def unit(self, record: Record) -> str | None:
        """What is resampled together for intervals, since its records are not independent: `unit`, or the picture's file."""
        if "unit" in record:
            return str(record["unit"])
        images = record.get("images")
        return str(images[0]) if images is not None and len(images) and isinstance(images[0], str | Path) else None

    def groups(self, record: Record) -> tuple[str, ...]:
        """Groups that the record belongs to, for the primary figures by group."""
        return ()

    # ---- showing

    def predicted(self, text: str, record: Record) -> Shown:
        """What the completion says, read as `row` reads it: for result files, pictures, other tools."""
        return {"text": text}

    def target(self, record: Record) -> Shown:
        """What the record says is true, in the same form. A resumed evaluation must find it unchanged, and the question."""
        return annotations(record)

    # ---- for everybody

    def direction(self, figure: str) -> int:
        """1 where a larger figure is better, -1 where a smaller one is, 0 where neither. `figure` may end in /<group>."""
        return DIRECTIONS.get(self.way(figure.partition("/")[0]) or "neutral", 0)

    def way(self, figure: str) -> Direction | None:
        """What `figures` says of a figure; None where it says nothing."""
        return next((way for known, way in self.figures.items() if fnmatchcase(figure, known)), None)

    def metric(self, texts: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
        """The figures of `row` over a set of completions: means, and ratios of sums. Those without any record are absent."""
        names, statistic = rows_statistic([self.row(t, r) for t, r in zip(texts, records, strict=True)])
        values = statistic(np.ones((1, len(texts)), np.int64))[0]
        return {name: float(value) for name, value in zip(names, values, strict=True) if np.isfinite(value)}

    def with_options(self, options: Mapping[str, Any]) -> "Task":
        """The task with those options that it has. A dotted key reaches into an option: `weights.f1`.

        Text is converted to the option's type. InputError for a value that the option does not take.
        """
        task = self
        for key, value in options.items():
            if key.partition(".")[0] in task.options():
                task = _replaced(task, key, value, key)
        return task

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Names of the options."""
        return tuple(field.name for field in dataclasses.fields(cls))


def _replaced(owner: Any, path: str, value: Any, key: str) -> Any:
    name, _, rest = path.partition(".")
    hints = typing.get_type_hints(type(owner))
    if name not in {field.name for field in dataclasses.fields(owner)}:
        raise InputError(
            f"option {key}: {type(owner).__name__} has {', '.join(f.name for f in dataclasses.fields(owner))}"
        )
    if rest:
        return dataclasses.replace(owner, **{name: _replaced(getattr(owner, name), rest, value, key)})
    return dataclasses.replace(owner, **{name: _converted(value, hints[name], key)})


def _converted(value: Any, kind: Any, key: str) -> Any:
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise InputError(f"option {key} = {value!r}: use one of {', '.join(map(str, choices))}")
    elif isinstance(value, str) and kind in (int, float, bool):
        words = {"true": True, "false": False, "1": True, "0": False}
        try:
            value = words[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise InputError(f"option {key} = {value!r}: give a {kind.__name__}") from None
    elif isinstance(value, str) and typing.get_origin(kind) is tuple:
        try:
            value = tuple(float(part) for part in value.split(","))
        except ValueError:
            raise InputError(f"option {key} = {value!r}: give numbers with commas between") from None
    return value


# ---------------------------------------------------------------- pieces that tasks are made of


def pictures(record: Record) -> list[dict[str, Any]]:
    """The record's images, then its videos, as parts of a message."""
    images = [{"type": "image", "image": image} for image in record.get("images", ())]
    return images + [{"type": "video", "video": video} for video in record.get("videos", ())]


def in_pixels(record: Record, places: Boxes | Points) -> list[list[float]]:
    """Rows in original pixels; a row beyond the range of numbers is left out."""
    moved = type(places).of(record, places.array.reshape(-1, places.array.shape[-1]), places.frame).to("pixel").array
    return moved[np.isfinite(moved).all(-1)].tolist()


def annotations(record: Record) -> Shown:
    """A record's boxes, points, labels, count and text, in original pixels."""
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


def rows_statistic(rows: Sequence[Row]) -> Named:
    """Names and statistic of rows of figures; a row counts for the figures that it has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    pairs = [[_pair(row[name]) if name in row else (0.0, 0.0) for name in names] for row in rows]
    table = np.array(pairs, np.float64).reshape(len(rows), len(names), 2)
    return names, ratio(table[..., 0], table[..., 1])


def _pair(value: Any) -> tuple[float, float]:
    return (float(value[0]), float(value[1])) if isinstance(value, Sequence) else (float(value), 1.0)


def total(reward: Reward) -> float | None:
    """A reward without its parts."""
    return reward["reward"] if isinstance(reward, Mapping) else reward
