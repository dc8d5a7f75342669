"""A run as a person sees it: live progress, the change in figures, the report. `jaxmllm.train` and `jaxmllm train`."""

from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console

from jaxmllm.eval import measure, tables
from jaxmllm.report.html import write_report
from jaxmllm.training.config import TrainConfig
from jaxmllm.training.loop import Watcher, train
from jaxmllm.training.progress import Live


def run_and_report(
    config: TrainConfig, watcher: Watcher | Callable[[int, dict[str, float]], None] | None = None
) -> Path:
    """Runs `config` (see `loop.train`), shows how it goes, writes `report.html`; returns the run folder.

    `watcher`, or a function of the update and its metrics, is told besides.
    """
    first = jax.process_index() == 0
    console = Console(stderr=True, highlight=False, quiet=not first)
    also = watcher if isinstance(watcher, Watcher) else Watcher(watcher)
    with Live(config, console, also) as live:
        folder = train(config, live)
    if not first:
        return folder
    before, after = folder / "eval" / "before", folder / "eval" / "after"
    if all((side / "metrics.json").exists() for side in (before, after)):
        changes = measure.compare(before, after)
        console.print(tables.terminal(tables.change_rows(changes), "before and after, same held-out records"))
    write_report(folder, folder / "report.html")
    console.print(f"wrote {folder / 'report.html'}", soft_wrap=True)
    return folder
