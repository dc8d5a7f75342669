"""What a person sees while a run trains: a bar with the figures that matter, plain lines where there is no terminal."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jaxmllm.training.config import TrainConfig
from jaxmllm.training.loop import Watcher

SHOWN = ("loss", "reward", "reward_std", "kl", "entropy", "completions/mean_length", "step_time")


class Live(Watcher):
    """A context manager that watches a run."""

    def __init__(self, config: TrainConfig, console: Console):
        self.console, self.config = console, config
        self._every = max(1, config.max_steps // 40)  # lines of a log that is no terminal
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )
        self._task = self._bar.add_task(config.name, total=config.max_steps, figures="preparing")

    def __enter__(self) -> "Live":
        if self.console.is_terminal:
            self._bar.start()
        else:
            self.console.print(f"{self.config.name}: preparing, run folder {self.config.run_dir}")
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        figures = self.figures(metrics)
        if self.console.is_terminal:
            self._bar.update(self._task, completed=step, figures=figures)
        elif step % self._every == 0 or step == 1:
            self.console.print(f"{step}/{self.config.max_steps}  {figures}", soft_wrap=True)  # one line each in a log

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
        left = metrics.get("seconds/left")
        return "  ".join(parts + ([] if left is None else [f"{left / 60:.1f} min left"]))
