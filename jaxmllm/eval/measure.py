"""Figures with intervals from the lines of an evaluation; the change between two evaluations of the same records."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmllm import tasks
from jaxmllm.errors import InputError
from jaxmllm.intervals import CONFIDENCE, RESAMPLES, Interval, Statistic, by_unit, percentiles, value_and_samples
from jaxmllm.runfiles import read_json, read_lines, write_json
from jaxmllm.tasks.task import Line, Named, Record, Task, rows_statistic

MAX_GROUPS, MIN_GROUP = 100, 20  # figures by group need so few groups, and so many records a group on average
REWARDS = "reward"  # figures of a run's own rewards are called so, or begin so


@dataclass(frozen=True)
class Measured:
    """Figures of one source."""

    task: str
    n: int  # records
    figures: dict[str, Interval]
    primary: tuple[str, ...] = ()  # names of the figures that say most
    directions: Mapping[str, int] = field(default_factory=dict)  # 1: larger is better, -1: smaller; absent: neither
    notes: tuple[str, ...] = ()  # what a person should know before believing the figures

    def direction(self, figure: str) -> int:
        """1 where a larger figure is better, -1 where a smaller one is, 0 where neither. `figure` may end in /<group>."""
        return self.directions.get(figure.partition("/")[0], 0)


@dataclass(frozen=True)
class Evaluation:
    """Figures by source, and the share of resamples that an interval holds."""

    sources: dict[str, Measured]
    confidence: float = CONFIDENCE

    def flat(self) -> dict[str, float]:
        """{"<source>/<figure>": value}, for logs and for choosing the best checkpoint."""
        return {f"{s}/{name}": figure.value for s, m in self.sources.items() for name, figure in m.figures.items()}


@dataclass(frozen=True)
class Resampling:
    """How intervals are drawn."""

    n_resamples: int = RESAMPLES
    seed: int = 0
    confidence: float = CONFIDENCE


def direction(task: Task, figure: str) -> int:
    """1 where a larger figure is better, -1 where a smaller one is, 0 where neither: the task's, or a reward's."""
    own = figure.partition("/")[0] == REWARDS or figure.startswith(f"{REWARDS}_")
    return 1 if own else task.direction(figure)


def lines_statistic(lines: Sequence[Line], primary: Sequence[str]) -> Named:
    """Names and statistic of the figures in the lines, and of the primary ones by group."""
    rows: list[dict[str, Any]] = [dict(line["figures"]) for line in lines]
    groups = list(dict.fromkeys(group for line in lines for group in line["groups"]))
    if 1 < len(groups) <= min(MAX_GROUPS, len(lines) // MIN_GROUP):
        for row, line in zip(rows, lines, strict=True):
            names = [name for name in primary if name in row]
            row |= {f"{name}/{group}": row[name] for name in names for group in line["groups"]}
    names, statistic = rows_statistic(rows)
    order = sorted(range(len(names)), key=lambda k: ("/" in names[k], names[k] if "/" in names[k] else ""))
    return [names[k] for k in order], lambda counts: statistic(counts)[:, order]


def statistics(task: Task, lines: Sequence[Line], files: Mapping[str, Any], primary: Sequence[str]) -> Named:
    """Names and statistic of all figures of one source, those of the whole set first."""
    parts = [lines_statistic(lines, primary)]
    whole = task.whole(lines, files)
    if whole is not None:
        parts.insert(0, whole)
    names = [name for some, _ in parts for name in some]
    return names, lambda counts: np.concatenate([statistic(counts) for _, statistic in parts], axis=1)


def units(lines: Sequence[Line]) -> list[Any]:
    """What is resampled together: a line's unit, or itself."""
    return [line["unit"] if line["unit"] is not None else (line["id"],) for line in lines]


def measure(
    records: Sequence[Record],
    lines: Sequence[Line],
    options: Mapping[str, Any],
    folder: Path,
    how: Resampling,
    category_ids: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
) -> Measured:
    """Figures of one source's records; the task's files for other tools are written into `folder`.

    `category_ids`: the ids by which COCO files name categories, see `coco_ap.category_ids`.
    """
    name = lines[0]["task"]
    task = tasks.of({"task": name}, options)
    files = task.files(records, lines, category_ids)
    for file, content in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / file, content)
    rewards = [figure for figure in lines[0]["figures"] if direction(task, figure) and not task.direction(figure)]
    primary = tuple(dict.fromkeys((*rewards, *task.primary)))
    names, statistic = statistics(task, lines, files, primary)
    found = dict(zip(names, _intervals(statistic, units(lines), how), strict=True))
    figures = {figure: found[figure] for figure in names if np.isfinite(found[figure].value)}
    signs = {figure: direction(task, figure) for figure in figures}
    return Measured(
        name,
        len(lines),
        figures,
        tuple(figure for figure in primary if figure in figures) or tuple(figures)[:1],
        {figure: sign for figure, sign in signs.items() if sign},
        tuple(notes),
    )


def _intervals(statistic: Statistic, units: Sequence[Any], how: Resampling) -> list[Interval]:
    drawn, n = by_unit(statistic, units)
    return percentiles(*value_and_samples(drawn, n, how.n_resamples, how.seed), how.confidence)


# --- metrics.json ---------------------------------------------------------------------------------------------------


def save(folder: Path, evaluation: Evaluation, how: Resampling) -> None:
    """Writes metrics.json."""
    sources = {name: asdict(measured) for name, measured in evaluation.sources.items()}
    write_json(folder / "metrics.json", {"bootstrap": asdict(how), "sources": sources})


def load(folder: str | Path) -> Evaluation:
    """Reads the metrics.json of an evaluation folder. InputError when it does not fit."""
    path = Path(folder) / "metrics.json"
    content = read_json(path)
    try:
        sources = {
            name: Measured(
                m["task"],
                m["n"],
                {k: Interval(**v) for k, v in m["figures"].items()},
                tuple(m["primary"]),
                m["directions"],
                tuple(m["notes"]),
            )
            for name, m in content["sources"].items()
        }
        return Evaluation(sources, content["bootstrap"]["confidence"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not written by an evaluation ({error!r})") from None


# --- before and after -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One figure before and after; `difference` is after - before with its interval, None without common records."""

    name: str
    before: Interval
    after: Interval
    difference: Interval | None
    direction: int  # 1: larger is better, -1: smaller, 0: neither

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval of the difference leaves out 0, else `unclear`; "" if neutral."""
        sign, d = self.direction, self.difference
        if not sign:
            return ""
        if d is None or d.low is None or d.high is None or d.low <= 0 <= d.high:
            return "unclear"
        return "better" if (d.value > 0) == (sign > 0) else "worse"


def compare(before: str | Path, after: str | Path, how: Resampling | None = None) -> dict[str, list[Change]]:
    """Changes by source between two evaluation folders, for the figures both have.

    The interval of a difference resamples the records that both evaluations asked, the same ones in both (paired), so
    it is narrower than two separate intervals suggest.
    """
    how = how or Resampling()
    old, new = load(before), load(after)
    sides = [(folder, _by_source(folder)) for folder in (Path(before), Path(after))]
    changes = {}
    for source, measured in new.sources.items():
        if source not in old.sources:
            continue
        was = old.sources[source]
        paired = _paired(source, measured, sides, how)
        changes[source] = [
            Change(
                name,
                was.figures[name],
                figure,
                paired.get(name) if figure.low is not None else None,
                measured.direction(name),
            )
            for name, figure in measured.figures.items()
            if name in was.figures
        ]
    return changes


def _by_source(folder: Path) -> dict[str, dict[str, Line]]:
    out: dict[str, dict[str, Line]] = {}
    for line in read_lines(folder / "predictions.jsonl"):
        out.setdefault(line["source"], {})[line["id"]] = line
    return out


Sides = Sequence[tuple[Path, Mapping[str, Mapping[str, Line]]]]  # folder and lines by source and id, before and after


def _paired(source: str, measured: Measured, sides: Sides, how: Resampling) -> dict[str, Interval]:
    """The differences of the figures on the records that both asked, by figure."""
    old, new = (lines.get(source, {}) for _, lines in sides)
    common = [name for name in old if name in new and old[name]["target"] == new[name]["target"]]
    if not common:
        return {}
    rows = [[lines[name] for name in common] for lines in (old, new)]
    named = [lines_statistic(side, measured.primary) for side in rows]
    if len(common) == len(old) == len(new):
        task, folders = tasks.of({"task": measured.task}), [folder / folder_name(source) for folder, _ in sides]
        files = [
            {path.name: read_json(path) for path in sorted(folder.glob("*.json"))} if folder.is_dir() else {}
            for folder in folders
        ]
        if files[0].keys() == files[1].keys():
            named = [statistics(task, side, own, measured.primary) for side, own in zip(rows, files, strict=True)]
    before, after = named
    return _differences(before, after, units(rows[0]), how)


def _differences(old: Named, new: Named, units: Sequence[Any], how: Resampling) -> dict[str, Interval]:
    names = [name for name in old[0] if name in new[0]]

    def columns(side: Named, values: Float[np.ndarray, "R K"]) -> Float[np.ndarray, "R M"]:
        return values[:, [side[0].index(name) for name in names]]

    def difference(counts: np.ndarray) -> np.ndarray:
        return columns(new, new[1](counts)) - columns(old, old[1](counts))

    found = dict(zip(names, _intervals(difference, units, how), strict=True))
    return {name: interval for name, interval in found.items() if np.isfinite(interval.value)}


def line_value(line: Line, figure: str) -> float | None:
    """A figure of one record; None where the record has none."""
    value = line["figures"].get(figure)
    if isinstance(value, Sequence):
        return value[0] / value[1] if value[1] else None
    return None if value is None else float(value)


def badness(line: Line, measured: Measured) -> float | None:
    """How wrong an answer is, by the first figure that says most and that single records have; None where none has."""
    names = (*measured.primary, *(name for name in measured.directions if name not in measured.primary))
    figure = next((name for name in names if name in line["figures"] and measured.direction(name)), None)
    value = None if figure is None else line_value(line, figure)
    return None if figure is None or value is None else -measured.direction(figure) * value


def folder_name(source: str) -> str:
    """A source's name as the name of a folder."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in source).lstrip(".") or "source"
