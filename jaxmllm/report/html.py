"""`report.html` of a run: one file without scripts or outside resources, from which a person judges the training.

Reads only files of the run folder; whatever is missing is said to be missing.
"""

import json
import string
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jaxmllm.errors import InputError
from jaxmllm.eval import measure
from jaxmllm.eval.measure import Change, Evaluation
from jaxmllm.report import completions, curves, pictures, verdict
from jaxmllm.report.markup import Html, details, join, tag
from jaxmllm.runfiles import read_json, read_lines, replace_file
from jaxmllm.tasks import answers

SIDES = ("before", "after")


def write_report(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Writes the report of a run folder and returns its path, `run_dir`/report.html unless given.

    Used where present: config.json, run.json, metrics.jsonl, eval/before and eval/after (as `eval.harness` writes them),
    completions/*.parquet. Raises InputError naming the file when the folder is missing or a file cannot be read.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise InputError(f"{run}: no such run folder")
    path = Path(path) if path is not None else run / "report.html"
    page = string.Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    config = read_json(run / "config.json") if (run / "config.json").exists() else {}
    title = str(config.get("name") or run.resolve().name)
    footer = "Intervals: percentile bootstrap over records; differences are paired. Written by jaxmllm."
    text = page.substitute(title=join(title), body=_body(run, title, config), footer=join(footer))
    replace_file(path, text.encode("utf-8", "replace"))
    return path


def _body(run: Path, title: str, config: Mapping[str, Any]) -> Html:
    metrics = curves.columns(read_lines(run / "metrics.jsonl"))
    info = read_json(run / "run.json") if (run / "run.json").exists() else {}
    evaluations = {side: _evaluation(run / "eval" / side) for side in SIDES}
    before, after = evaluations["before"], evaluations["after"]
    changes: dict[str, list[Change]] = {}
    if before and after:
        changes = measure.compare(run / "eval" / "before", run / "eval" / "after")
    lines = [(side, run / "eval" / side, read_lines(run / "eval" / side / "predictions.jsonl")) for side in SIDES]
    lines = [side for side in lines if side[2]]
    last = after or before
    measured = last.sources if last else {}
    return join(
        tag("h1", title),
        _facts(run, config, info),
        verdict.section(metrics, changes, before, after),
        _part(
            "Evaluation",
            "Greedy answers to held-out records, before and after training. The interval in brackets says how far a figure "
            "could move with other records of the same kind.",
            verdict.evaluation_table(changes, before, after),
            "No evaluation in eval/before or eval/after.",
        ),
        _part(
            "Training",
            "Thin: logged values. Thick: running mean.",
            curves.section(metrics) if metrics else None,
            "No metrics in metrics.jsonl.",
        ),
        _part(
            "Pictures",
            "The first held-out records, not chosen by result.",
            join(_key(), pictures.section(lines, measured)) if lines else None,
            "No predictions in eval/before or eval/after.",
        ),
        _part(
            "Worst records",
            "The held-out records that were answered worst, by the first main figure.",
            pictures.worst(lines, measured) if lines else None,
            "None: every record was answered equally well, or there are no predictions.",
        ),
        _part(
            "Sampled completions",
            "What the policy tried while training, best of each group first. The advantage is how far a completion's reward "
            "lies above (green) or below (red) its group's; it decides what is learned.",
            completions.section(run),
            "No tables in completions/.",
        ),
        _part("Run", "", _settings(config, info), "No config.json or run.json."),
    )


def _evaluation(folder: Path) -> Evaluation | None:
    return measure.load(folder) if (folder / "metrics.json").exists() else None


def _part(title: str, lead: str, content: Html | None, missing: str) -> Html:
    if content is None:
        return join(tag("h2", title), tag("p", missing, class_="missing"))
    return join(tag("h2", title), tag("p", lead, class_="lead") if lead else None, content)


def _key() -> Html:
    entries = [
        join(tag("i", class_=kind), text)
        for kind, text in (("true", "truth"), ("before", "before"), ("after", "after"))
    ]
    entries.append(join("in texts: ", tag("ins", "said, but not true"), " ", tag("del", "true, but not said")))
    return tag("p", *(tag("span", entry) for entry in entries), class_="key")


def _method(method: Any) -> Any:
    """A method's name; config files of earlier versions hold it alone."""
    return method.get("name") if isinstance(method, Mapping) else method


def _boxes(style: Any) -> str | None:
    """How boxes are written, in words."""
    return answers.STYLES[style].words if style in answers.STYLES else None


def _facts(run: Path, config: Mapping[str, Any], info: Mapping[str, Any]) -> Html:
    """One line of what was run."""
    start = info["starts"][-1] if info.get("starts") else {}
    rows = read_lines(run / "metrics.jsonl")
    times = [row["time"] for row in rows if isinstance(row.get("time"), int | float)]
    git = start.get("git") or {}
    devices = ", ".join(f"{count} x {name}" for name, count in (start.get("devices") or {}).items())
    versions = start.get("versions") or {}
    facts = {
        "method": _method(config.get("method")),
        "model": config.get("model"),
        "boxes": _boxes((config.get("data") or {}).get("style")),
        "seed": info.get("seed", config.get("seed")),
        "steps": f"{max(row['step'] for row in rows):,}" if rows else None,
        "training": _duration(max(times) - min(times)) if len(times) > 1 else None,
        "devices": devices or None,
        "started": start.get("time"),
        "restarts": len(info["starts"]) - 1 or None if info.get("starts") else None,
        "jax": versions.get("jax"),
        "jaxmllm": versions.get("jaxmllm"),
        "commit": (git["commit"][:10] + (" with changes" if git.get("changed") else "")) if git.get("commit") else None,
    }
    shown = [tag("span", f"{name} ", tag("b", value)) for name, value in facts.items() if value is not None]
    return tag("div", *shown, class_="facts")


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _settings(config: Mapping[str, Any], info: Mapping[str, Any]) -> Html | None:
    """Config, versions and commands, folded."""
    parts = []
    if config:
        parts.append(details("Config", tag("pre", json.dumps(config, indent=2, ensure_ascii=False), class_="box")))
    if info:
        parts.append(details("Versions, devices and commands", tag("pre", json.dumps(info, indent=2), class_="box")))
    return join(*parts) if parts else None
