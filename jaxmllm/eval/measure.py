"""Figures with intervals from the lines of an evaluation; the change between two evaluations of the same records."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmllm import tasks
from jaxmllm.errors import InputError
from jaxmllm.eval import coco
from jaxmllm.eval.intervals import CONFIDENCE, RESAMPLES, Interval, Statistic, percentiles, ratio, value_and_samples
from jaxmllm.eval.predictions import Record, accepted
from jaxmllm.runfiles import read_json, read_lines, write_json

Line = Mapping[str, Any]
Named = tuple[list[str], Statistic]  # figures' names and the statistic that gives them

# Figures that say most about a task, first first; they are also given by group.
PRIMARY = {
    "grounding": ("Acc@0.5", "IoU"),
    "counting": ("accuracy", "mae"),
    "detection": ("AP", "AP50"),
    "ocr": ("edit_distance", "f1"),
    "captioning": ("capture",),
    "tracks": ("reward", "traj"),
    "foresight": ("ao", "ade"),
    "relations": ("joint_acc", "match_acc"),
}
LOWER_IS_BETTER = re.compile(r"mae|edit_distance|repeat_4|(.*_)?[af]de")
NEUTRAL = re.compile(r"boxes|words|said_match|mrr_chance|(static|velocity)_.*")  # no aims, or not the model's
MAX_GROUPS, MIN_GROUP = 100, 20  # figures by group need so few groups, and so many records a group on average


def direction(name: str) -> int:
    """1 where a larger figure is better, -1 where a smaller one is, 0 where neither. `name` may end in /<group>."""
    name = name.partition("/")[0]
    return 0 if NEUTRAL.fullmatch(name) else -1 if LOWER_IS_BETTER.fullmatch(name) else 1


@dataclass(frozen=True)
class Measured:
    """Figures of one source."""

    task: str
    n: int  # records
    figures: dict[str, Interval]

    def primary(self) -> list[str]:
        """Names of the figures that say most, at most two."""
        known = [name for name in PRIMARY.get(self.task, ()) if name in self.figures]
        return known or list(self.figures)[:1]


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


def lines_statistic(lines: Sequence[Line]) -> tuple[list[str], Statistic]:
    """Names and statistic of the figures in the lines, those of each group included."""
    rows = [{name: _pair(value) for name, value in line["figures"].items()} for line in lines]
    groups = list(dict.fromkeys(line["group"] for line in lines if line["group"] is not None))
    if 1 < len(groups) <= min(MAX_GROUPS, len(lines) // MIN_GROUP):
        for row, line in zip(rows, lines, strict=True):
            if line["group"] is not None:
                names = PRIMARY.get(line["task"]) or list(row)[:1]
                row |= {f"{name}/{line['group']}": row[name] for name in names if name in row}
    names = list(dict.fromkeys(name for row in rows for name in row))
    plain = [name for name in names if "/" not in name]
    names = plain + sorted(name for name in names if "/" in name)
    table = np.array([[row.get(name, (0.0, 0.0)) for name in names] for row in rows]).reshape(len(rows), len(names), 2)
    return names, ratio(table[..., 0], table[..., 1])


def _pair(value: Any) -> tuple[float, float]:
    return (float(value[0]), float(value[1])) if isinstance(value, Sequence) else (float(value), 1.0)


def measure(
    records: Sequence[Record],
    lines: Sequence[Line],
    options: Mapping[str, Any],
    folder: Path,
    how: Resampling,
    category_ids: Mapping[str, int] | None = None,
) -> Measured:
    """Figures of one source's records; for detection writes the COCO files into `folder` and adds AP.

    `category_ids`: the ids by which the COCO files name categories, see `coco.category_ids`.
    A figure that is no mean or ratio over the records (it differs from what its lines give) has no interval.
    """
    task = lines[0]["task"]
    module = tasks.get(task)
    exact = module.metric([line["text"] for line in lines], records, **accepted(module.metric, options))
    names, statistic = lines_statistic(lines)
    found = dict(zip(names, _intervals(statistic, len(lines), how), strict=True))
    figures = {name: _checked(found.get(name), value) for name, value in exact.items() if np.isfinite(value)}
    if task == "detection":
        ids = coco.category_ids(records, category_ids)
        truth = coco.ground_truth(records, ids)
        results = coco.results(records, [line["prediction"] for line in lines], ids)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "ground_truth.json", truth)
        write_json(folder / "coco_results.json", results)
        names, statistic = coco.ap_statistic(truth, results)
        figures = dict(zip(names, _intervals(statistic, len(lines), how), strict=True)) | figures
    return Measured(task, len(lines), figures | {name: found[name] for name in found if name not in figures})


def _checked(found: Interval | None, exact: float) -> Interval:
    same = found is not None and np.isclose(found.value, exact, rtol=1e-9, atol=1e-12)
    return found if found is not None and same else Interval(float(exact))


def _intervals(statistic: Statistic, n: int, how: Resampling) -> list[Interval]:
    return percentiles(*value_and_samples(statistic, n, how.n_resamples, how.seed), how.confidence)


# --- metrics.json ---------------------------------------------------------------------------------------------------


def save(folder: Path, evaluation: Evaluation, how: Resampling) -> None:
    """Writes metrics.json."""
    sources = {
        name: {"task": m.task, "n": m.n, "figures": {k: asdict(v) for k, v in m.figures.items()}}
        for name, m in evaluation.sources.items()
    }
    write_json(folder / "metrics.json", {"bootstrap": asdict(how), "sources": sources})


def load(folder: str | Path) -> Evaluation:
    """Reads the metrics.json of an evaluation folder. InputError when it does not fit."""
    path = Path(folder) / "metrics.json"
    content = read_json(path)
    try:
        sources = {
            name: Measured(m["task"], m["n"], {k: Interval(**v) for k, v in m["figures"].items()})
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

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval of the difference leaves out 0, else `unclear`; "" if neutral."""
        sign, d = direction(self.name), self.difference
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
    old_lines, new_lines = _by_source(before), _by_source(after)
    changes = {}
    for source, measured in new.sources.items():
        if source not in old.sources:
            continue
        was = old.sources[source]
        paired = _paired_lines(old_lines.get(source, {}), new_lines.get(source, {}), how)
        paired |= _paired_ap(Path(before), Path(after), source, how)
        changes[source] = [
            Change(name, was.figures[name], figure, paired.get(name) if figure.low is not None else None)
            for name, figure in measured.figures.items()
            if name in was.figures
        ]
    return changes


def _by_source(folder: str | Path) -> dict[str, dict[str, Line]]:
    out: dict[str, dict[str, Line]] = {}
    for line in read_lines(Path(folder) / "predictions.jsonl"):
        out.setdefault(line["source"], {})[line["id"]] = line
    return out


def _paired_lines(old: Mapping[str, Line], new: Mapping[str, Line], how: Resampling) -> dict[str, Interval]:
    common = [name for name in old if name in new]
    if not common:
        return {}
    was, now = (lines_statistic([side[name] for name in common]) for side in (old, new))
    return _paired(was, now, len(common), how)


def _paired_ap(before: Path, after: Path, source: str, how: Resampling) -> dict[str, Interval]:
    folders = [folder / folder_name(source) for folder in (before, after)]
    if not all((folder / "coco_results.json").exists() for folder in folders):
        return {}
    truths = [read_json(folder / "ground_truth.json") for folder in folders]
    if truths[0] != truths[1]:
        return {}
    was, now = (coco.ap_statistic(truths[0], read_json(folder / "coco_results.json")) for folder in folders)
    return _paired(was, now, len(truths[0]["images"]), how)


def _paired(old: Named, new: Named, n: int, how: Resampling) -> dict[str, Interval]:
    names = [name for name in old[0] if name in new[0]]

    def columns(side: Named, values: Float[np.ndarray, "R K"]) -> Float[np.ndarray, "R M"]:
        return values[:, [side[0].index(name) for name in names]]

    def difference(counts: np.ndarray) -> np.ndarray:
        return columns(new, new[1](counts)) - columns(old, old[1](counts))

    return dict(zip(names, _intervals(difference, n, how), strict=True))


def folder_name(source: str) -> str:
    """A source's name as the name of a folder."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in source).lstrip(".") or "source"
