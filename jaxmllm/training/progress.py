"""What a person sees while a run trains: a bar with the figures that matter, plain lines where there is no terminal.

⠹ evaluating 64/256 ━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━━ 40/100 0:01:22 2.1 min left
loss 0.0123  reward 0.71  reward_std 0.2  entropy 0.31  mean_length 14  step_time 1.3
"""

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from jaxmllm.training.config import TrainConfig
from jaxmllm.training.loop import UPDATING, Watcher

SHOWN = ("loss", "reward", "reward_std", "kl", "entropy", "completions/mean_length", "step_time")


class _Bar(Progress):
    """The bar in its first line, the figures in the lines below: however many they are, they push nothing out of sight."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.figures, style="dim")


class Live(Watcher):
    """A context manager that watches a run; `also` is told the same."""

    def __init__(self, config: TrainConfig, console: Console, also: Watcher | None = None):
        self.console, self.config, self.also = console, config, also or Watcher()
        self._every = max(1, config.max_steps // 40)  # lines of a log that is no terminal
        self._printed, self._phase = 0, ""
        # all but the bar keep their width, and the bar takes what is left
        self._bar = _Bar(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("preparing", total=config.max_steps, left="")

    def __enter__(self) -> "Live":
        self.console.print(f"{self.config.name}: preparing, run folder {self.config.run_dir}", soft_wrap=True)
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        self.also.phase(what, done, total)
        if self.console.is_terminal:
            self._bar.update(self._task, description=f"{what} {done}/{total}" if total else what)
        elif what not in (self._phase, UPDATING):  # the lines of updates say so themselves
            self.console.print(what, soft_wrap=True)
        self._phase = what

    def update(self, step: int, metrics: dict[str, float]) -> None:
        self.also.update(step, metrics)
        figures, left = self.figures(metrics), metrics.get("seconds/left")
        remaining = "" if left is None else f"{left / 60:.1f} min left"
        if self.console.is_terminal:
            self._bar.figures = figures
            self._bar.update(self._task, completed=step, left=remaining)
        elif not self._printed or step // self._every > self._printed // self._every:
            self._printed = step
            line = "  ".join(filter(None, (f"{step}/{self.config.max_steps}", remaining, figures)))
            self.console.print(line, soft_wrap=True)  # one line each in a log

    @staticmethod
    def figures(metrics: dict[str, float]) -> str:
        parts = [f"{name.removeprefix('completions/')} {metrics[name]:.3g}" for name in SHOWN if name in metrics]
        parts += [
            f"{name.removeprefix('rewards/').removesuffix('/mean')} {value:.3g}"
            for name, value in metrics.items()
            if name.startswith("rewards/") and name.endswith("/mean") and not name.startswith("rewards/task")
        ]
        parts += [
            f"{name.removeprefix('accuracy/')} {v:.2f}" for name, v in metrics.items() if name.startswith("accuracy/")
        ]
        if "tokens_per_second" in metrics:
            parts.append(f"{metrics['tokens_per_second']:.0f} tokens/s")
        return "  ".join(parts)
