"""The table of the findings, from the evaluations that `tests.benchmarks.findings` left: means over seeds and differences.

Every figure and every difference is a mean over the seeds that both arms have. Its interval is a bootstrap of both, the seeds and
the held-out records: each resample draws seeds with replacement, pairs the arms by seed, and draws the same records for
all of them. With three seeds it is rough; so the table also tells in how many seeds the difference has its sign.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmllm import tasks
from jaxmllm.eval import measure
from jaxmllm.intervals import RESAMPLES, Interval, Statistic, percentiles, resample
from jaxmllm.runfiles import read_json, read_lines
from jaxmllm.tasks import coco_ap as coco
from tests.benchmarks.findings import FEW, FEW_TASKS, results


@dataclasses.dataclass(frozen=True)
class Finding:
    """Case `a` against case `b` on one figure. `paper`: what Perception-R1 found for a - b, 1, -1 or 0 (none to speak of)."""

    group: str
    text: str
    a: str
    b: str
    source: str  # of the evaluation: where its name begins
    figures: tuple[str, ...]
    paper: int
    said: str  # the paper's own numbers


WORLD = {
    "grounding": ("Acc@0.5", "IoU"),
    "counting": ("accuracy", "mae"),
    "detection": ("AP", "AP50"),
    "ocr": ("f1", "edit_distance"),
}
PAPER_RL = {
    "grounding": (1, "89.1, SFT 88.2"),
    "counting": (1, "78.1, SFT 58.0"),
    "detection": (1, "31.9, SFT 25.9"),
    "ocr": (1, "98.2, SFT 97.2"),
}
PHOTOS = {
    "detection": ("AP", "AP50", "AP75"),
    "counting": ("accuracy", "mae", "accuracy/RBC", "accuracy/WBC", "accuracy/Platelets"),
}


def findings() -> list[Finding]:
    found = [
        Finding(
            "bccd",
            f"{reward} reward, photographs, {task}",
            f"bccd_{reward}_rl",
            f"bccd_{reward}_sft",
            f"coco:{task}",
            names,
            1,
            "",
        )
        for reward in ("detection", "counting")
        for task, names in PHOTOS.items()
    ]
    for task, (sign, said) in PAPER_RL.items():
        text = f"RL, not more SFT: {task}"
        found.append(Finding("sft", text, f"{task}_rl", f"{task}_sft", f"world:{task}", WORLD[task], sign, said))
    for task in FEW_TASKS:
        names = f"{task}_few_rl", f"{task}_few_sft"
        text, (sign, said) = f"RL, not more SFT, {FEW} answers: {task}", PAPER_RL[task]
        found.append(Finding("few", text, *names, f"world:{task}", WORLD[task], sign, said))
    for task, said in (("counting", "78.1, without 77.1"), ("detection", "31.9, without 23.5")):
        text = f"reward matching, not in order: {task}"
        found.append(Finding("matching", text, f"{task}_rl", f"{task}_in_order", f"world:{task}", WORLD[task], 1, said))
    for task, said in (("grounding", "75.1, without 89.1"), ("counting", "74.9, without 78.1")):
        text, names = f"with a thinking format: {task}", (f"{task}_taught_thinking_rl", f"{task}_taught_rl")
        found.append(Finding("thinking", text, *names, f"world:{task}", WORLD[task], -1, said))
    for task in ("grounding", "counting"):
        for large, small in ((4, 2), (8, 4), (16, 8)):
            names = ["_rl" if g == 8 else f"_g{g}" for g in (large, small)]
            text = f"G = {large}, not {small}: {task}"
            arms = (task + names[0], task + names[1])
            found.append(Finding("group", text, *arms, f"world:{task}", WORLD[task], 1, "more is better (a curve)"))
        text = f"KL 0.04, not 0: {task}"
        found.append(
            Finding("kl", text, f"{task}_kl", f"{task}_rl", f"world:{task}", WORLD[task], 0, "0.04 used, not compared")
        )
    return found


# ---------------------------------------------------------------- figures of a run


def statistic(folder: Path, source: str, figure: str) -> tuple[int, Statistic]:
    """How many records an evaluation's source has, and the figure as a statistic of how often each counts."""
    if figure.startswith("AP"):
        part = folder / measure.folder_name(source)
        truth = read_json(part / "ground_truth.json")
        names, all_figures = coco.ap_statistic(truth, read_json(part / "coco_results.json"))
        count = len(truth["images"])
    else:
        lines = [line for line in read_lines(folder / "predictions.jsonl") if line["source"] == source]
        lines.sort(key=lambda line: line["index"])
        names, all_figures = measure.lines_statistic(lines, ())
        count = len(lines)
    column = names.index(figure)
    return count, lambda counts: all_figures(counts)[:, column : column + 1]


def source_of(result: Mapping[str, Any], wanted: str) -> str:
    """The evaluated source that `wanted` (KIND:TASK) means."""
    kind, _, task = wanted.partition(":")
    return next(name for name, m in result["after"].items() if name.startswith(kind) and m["task"] == task)


def over_seeds(parts: Sequence[Sequence[tuple[int, Statistic]]], signs: Sequence[int]) -> tuple[Interval, list[float]]:
    """Mean over seeds of sum(sign x figure) over the arms of a seed, with its interval, and the value of each seed.

    `parts`: [seed][arm].
    """
    n = parts[0][0][0]
    if any(count != n for arms in parts for count, _ in arms):
        raise ValueError("the runs were evaluated on different records")

    def by_seed(counts: np.ndarray) -> Float[np.ndarray, "R S"]:
        columns = [sum(sign * arm[1](counts) for sign, arm in zip(signs, arms, strict=True)) for arms in parts]
        return np.concatenate(columns, axis=1)

    values = by_seed(np.ones((1, n), np.int64))[0]
    samples = np.concatenate([by_seed(counts) for counts in resample(n)])
    drawn = np.random.default_rng(0).integers(0, len(parts), (RESAMPLES, len(parts)))
    mean = np.take_along_axis(samples, drawn, axis=1).mean(axis=1, keepdims=True)
    return percentiles(values.mean(keepdims=True), mean)[0], values.tolist()


# ---------------------------------------------------------------- the table


def verdict(finding: Finding, figure: str, difference: Interval) -> str:
    """Whether the difference has the sign that the paper reports."""
    assert difference.low is not None and difference.high is not None
    sign = max((measure.direction(tasks.get(name), figure) for name in tasks.names()), key=abs)
    better = 0 if difference.low <= 0 <= difference.high else (1 if difference.value * sign > 0 else -1)
    if not finding.paper:
        return {0: "no difference", 1: "better", -1: "worse"}[better]
    if not better:
        return "undecided"
    return "agrees" if better == finding.paper else "disagrees"


def row(folder: Path, finding: Finding, figure: str, a: Mapping[int, Any], b: Mapping[int, Any]) -> str:
    seeds = sorted(a.keys() & b.keys())
    arms = []
    for case, found in ((finding.a, a), (finding.b, b)):
        runs = [folder / "runs" / f"{case}_{seed}" / "eval" / "after" for seed in seeds]
        sources = [source_of(found[seed], finding.source) for seed in seeds]
        arms.append([statistic(run, source, figure) for run, source in zip(runs, sources, strict=True)])
    first, second = (over_seeds([[one] for one in arm], (1,))[0] for arm in arms)
    difference, values = over_seeds(list(zip(*arms, strict=True)), (1, -1))
    same = sum(value * difference.value > 0 for value in values)
    seconds = " / ".join(f"{np.mean([found[seed]['seconds'] for seed in seeds]):.0f}" for found in (a, b))
    cells = (finding.text, figure, first, second, difference, f"{same}/{len(seeds)}", seconds, finding.said)
    return "| " + " | ".join(map(str, cells)) + f" | {verdict(finding, figure, difference)} |"


def table(folder: Path) -> str:
    """Markdown: one row for each finding and figure of which both arms have a seed in common."""
    found = results(folder)
    head = (
        "finding",
        "figure",
        "with it",
        "without it",
        "difference",
        "seeds of its sign",
        "seconds",
        "the paper",
        "here",
    )
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    missing = []
    for finding in findings():
        a, b = found.get(finding.a, {}), found.get(finding.b, {})
        if not a.keys() & b.keys():
            missing.append(f"{finding.text} ({finding.a}, {finding.b})")
            continue
        rows += [row(folder, finding, figure, a, b) for figure in finding.figures]
    return "\n".join([*rows, *(f"not run yet: {name}" for name in missing)])
