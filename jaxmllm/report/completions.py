"""Sampled completions with their rewards and advantages, group by group, from the run's Parquet tables."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxmllm.errors import InputError
from jaxmllm.report.markup import Html, clip, details, short, tag
from jaxmllm.report.pictures import thumbnail

STEPS, GROUPS, ROWS = 3, 4, 16  # shown at most: steps, groups a step, completions a group
MAX_PROMPT, MAX_COMPLETION = 300, 400  # characters
_FIXED = ("mode", "step", "prompt", "completion", "advantage", "image")


def section(run_dir: Path) -> Html | None:
    """The first, a middle and the last table; None if there is none. InputError naming a file that cannot be read."""
    files = sorted((run_dir / "completions").glob("completions_*.parquet"))
    if not files:
        return None
    places = sorted({round(k * (len(files) - 1) / (STEPS - 1)) for k in range(STEPS)})
    parts = []
    for place in places:
        try:
            table = pq.read_table(files[place])
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{files[place]}: not a readable Parquet file ({error})") from None
        parts.append(_step(table.to_pylist(), table.column_names, opened=place == places[-1]))
    return tag("div", *parts)


def _step(rows: Sequence[Mapping[str, Any]], names: Sequence[str], opened: bool) -> Html | None:
    if not rows or not {"prompt", "completion"} <= set(names):
        return None
    rewards = [name for name in names if name not in _FIXED]
    groups = [list(group) for group in _groups(rows)]
    peak = max((abs(row.get("advantage") or 0.0) for row in rows), default=0.0) or 1.0
    shown = [_group(group, rewards, peak) for group in groups[:GROUPS]]
    summary = f"Step {rows[0].get('step', '?')}: {len(rows)} completions of {len(groups)} prompts"
    left = f"The first {len(shown)} of {len(groups)} prompts." if len(groups) > len(shown) else None
    return details(summary, *shown, tag("p", left, class_="note") if left else None, opened=opened)


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Runs of rows with one prompt and picture; a picture is stored in the first row of its group only."""
    number, key = 0, None
    keyed = []
    for row in rows:
        if row["prompt"] != key or row.get("image"):
            number, key = number + 1, row["prompt"]
        keyed.append((number, row))
    return [[row for _, row in group] for _, group in itertools.groupby(keyed, key=lambda pair: pair[0])]


def _group(rows: Sequence[Mapping[str, Any]], rewards: Sequence[str], peak: float) -> Html:
    ranked = sorted(rows, key=lambda row: -(row.get("advantage") or 0.0))[:ROWS]
    head = [tag("th", name, class_="number") for name in rewards]
    head.append(tag("th", "advantage", class_="middle"))
    cells = [
        tag(
            "tr",
            tag("td", tag("p", _one_line(str(row["completion"])) or "(nothing)", class_="said"), class_="completion"),
            *(tag("td", short(row[name]), class_="number") for name in rewards),
            tag("td", *_advantage(row.get("advantage"), peak), class_="number advantage"),
        )
        for row in ranked
    ]
    image = (rows[0].get("image") or {}).get("bytes")
    prompt = tag("p", clip(str(rows[0]["prompt"]), MAX_PROMPT), class_="question")
    table = tag("table", tag("thead", tag("tr", tag("th", "completion"), *head)), tag("tbody", *cells))
    body = tag("div", thumbnail(image) if image else None, tag("div", table, class_="scroll"), class_="group")
    return tag("article", prompt, body, class_="completions")


def _one_line(text: str) -> str:
    """The text with marks for its line breaks, so that a group's completions stand close together."""
    return clip(" ↵ ".join(" ".join(line.split()) for line in text.split("\n")), MAX_COMPLETION)


def _advantage(value: float | None, peak: float) -> list[Any]:
    """The number over a bar that grows from the middle: right and green for positive, left and red for negative."""
    if value is None:
        return ["–"]
    width = 50 * min(abs(value) / peak, 1.0)
    side = "left" if value >= 0 else "right"
    kind = "good" if value >= 0 else "bad"
    return [tag("span", f"{value:+.2f}"), tag("i", class_=f"bar {kind}", style=f"{side}:50%;width:{width:.1f}%")]
