"""The training loop: evaluate, update until done, evaluate, export. Reads top to bottom like the experiment."""

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.errors import InputError
from jaxmllm.machine import processes
from jaxmllm.methods.method import Context, Report, Work
from jaxmllm.methods.optim import schedule
from jaxmllm.runfiles import claim
from jaxmllm.training.checkpoint import Checkpoints
from jaxmllm.training.config import TrainConfig, free_fields
from jaxmllm.training.evaluating import Evaluator
from jaxmllm.training.exporting import Exported, export
from jaxmllm.training.lock import only_here
from jaxmllm.training.metrics import MetricsWriter, record_start
from jaxmllm.training.profiling import Trace
from jaxmllm.training.setup import Opened, best_direction, build, open_data, with_style
from jaxmllm.training.stopping import Interrupted, Stop
from jaxmllm.training.window import Window
from jaxmllm.types import TrainState

log = logging.getLogger(__name__)
UPDATING = "updating"  # the phase that a run is in most of the time


class Watcher:
    """Told what a run does, for a person to see. The base class looks away, or calls a function with the figures."""

    def __init__(self, on_update: Callable[[int, dict[str, float]], None] | None = None):
        self._on_update = on_update

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        """`what` is being done; `total` 0: it is not known how much there is."""

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """So many updates are done; metrics as logged."""
        if self._on_update is not None:
            self._on_update(step, metrics)


def train(config: TrainConfig, watcher: Watcher | Callable[[int, dict[str, float]], None] | None = None) -> Path:
    """Runs, or goes on with, the run of `config`; returns the run folder.

    `watcher`: a Watcher, or only its `update`. Raises InputError before anything is compiled when the config, data, model
    or run folder does not fit, and while running for a failed reward, a bad record or too many updates that teach nothing.
    Raises Interrupted after SIGINT or SIGTERM, saved.
    """
    watching = watcher if isinstance(watcher, Watcher) else Watcher(watcher)
    opened = open_data(config.validate())
    with contextlib.ExitStack() as stack:
        with processes.one_after_another() as first:
            if first:
                stack.enter_context(only_here(config.run_dir))
        watching.phase("loading the model")
        config = with_style(config)
        context, state = build(config, opened)
        with config.method.open(context) as work:
            run = Run(config, context, opened, work, state, watching)
            with run.stop.listening(), run:
                run.go_on()
                run.evaluate_start()
                run.updates()
                run.finish()
    return config.run_dir


class Run:
    """One start of a run: its state, and what is written about it."""

    def __init__(
        self, config: TrainConfig, context: Context, opened: Opened, work: Work, state: TrainState, watching: Watcher
    ):
        self.config, self.context, self.work, self.watching = config, context, work, watching
        self.state, self.own, self.trained_seconds = state, work.first_own(), 0.0
        with processes.one_after_another() as first:
            changed = claim(
                config.run_dir,
                config,
                free_fields(config),
                defaults=TrainConfig(config.name, method=type(config.method)()),
            )
            if first:
                record_start(config.run_dir, config.seed, jax.devices(), changed)
        self.checkpoints = Checkpoints(
            config.run_dir / "checkpoints",
            keep=config.save_total_limit,
            best_metric=config.metric_for_best_model,
            larger_is_better=best_direction(config, opened.evaluation) > 0,
        )
        self.stop = Stop()
        self.evaluator = Evaluator(
            config, context, work, opened.sized(context), self.stop, watching.phase, opened.shared
        )
        self.window, self.unused, self.began = Window(), 0, time.monotonic()
        self.resumed = False
        self.first_step = 0  # that of the checkpoint which the run began with
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        self.stack.enter_context(contextlib.closing(self.checkpoints))
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    @property
    def step(self) -> int:
        return int(self.state.step)

    def go_on(self) -> None:
        """From the newest checkpoint of this folder, or of the one that the config resumes from; opens the files."""
        config = self.config
        found = self.checkpoints.restore(self.state)
        if found is None and config.resume_from:
            other = Path(config.resume_from) / "checkpoints"
            if not other.is_dir():
                raise InputError(f"resume_from = {config.resume_from}: there is no run with checkpoints")
            with contextlib.closing(Checkpoints(other, read_only=True)) as checkpoints:
                found = checkpoints.restore(self.state)
            if found is None:
                raise InputError(f"resume_from = {config.resume_from}: there is no checkpoint of a run in it")
            state, _, data = found  # its time, and updates that it has not logged, are not this run's
            data |= {"seconds": 0.0, "window": {**data["window"], "steps": []}, "first_step": int(state.step)}
        if found is not None:
            self.state, own, data = found
            self.own = {name: _like(own.get(name, value), value) for name, value in self.own.items()}
            self.work.batches.set_state(data["batches"])
            self.window.set_state(data["window"])
            self.trained_seconds, self.first_step = data["seconds"], data["first_step"]
            self.resumed = True
        self.began = time.monotonic() - self.trained_seconds
        self.stop.allow(config.max_seconds, self.trained_seconds)
        self.writer = self.stack.enter_context(
            MetricsWriter(
                config.run_dir,
                resume_step=self.step if self.resumed else None,
                report_to=config.report_to,
                enabled=jax.process_index() == 0,
                config=config,
            )
        )

    # ------------------------------------------------------------ evaluations

    def evaluate_start(self) -> None:
        """Before the first update; or the evaluation in which the run was interrupted."""
        config, step = self.config, self.step
        if step >= config.max_steps or not self.evaluator:
            return
        if step == self.first_step and config.eval_on_start:
            self.evaluate("before")
        elif step and config.eval_steps and self.resumed and self.interrupted_in == step:
            self.evaluate_here()

    @property
    def interrupted_in(self) -> int:
        """The step whose evaluation was begun and not finished; 0: none."""
        name = f"step_{self.step:06d}"
        begun = (self.evaluator.folder / name).exists()
        return self.step if begun and not self.evaluator.done(name, self.step) else 0

    def evaluate(self, name: str) -> dict[str, float]:
        """An evaluation, logged once; interrupted, everything is saved."""
        try:
            found = self.evaluator(self.state, name)
        except Interrupted as stopped:
            self.leave(str(stopped))
        if not self.writer.has_evaluation(self.step):
            self.writer.log(self.step, {f"eval_{figure}": value for figure, value in found.items()})
        return found

    def evaluate_here(self) -> None:
        self.save(self.evaluate(f"step_{self.step:06d}"))

    # ------------------------------------------------------------ updates

    def updates(self) -> None:
        config, step = self.config, self.step
        trace = Trace(config.run_dir / "profile", step, config.profile)
        compiled = False
        with trace:
            while step < config.max_steps and not self.stop.time_is_up():
                trace.before(step)
                self.watching.phase(UPDATING if compiled else "compiling the update")
                self.window.begin()
                self.state, self.own, report = self.work.step(self.state, self.own, self.stop)
                if report is not None:
                    compiled = True
                    before, step = step, self.step
                    self.after(before, step, report)
                    report = None  # what the step saw is let go before the next one draws
                if self.stop():
                    self.leave(self.stop.signal)

    def after(self, before: int, step: int, report: Report) -> None:
        """What is due after a step from update `before` to `step`."""
        config = self.config

        def due(every: int) -> bool:
            """A rollout makes several updates: what was due at one of them is due now."""
            return every > 0 and step // every > before // every

        found = self.window.add(report.metrics)
        self.count_unused(step, found, report)
        if due(config.logging_steps) or step >= config.max_steps:
            rate = float(schedule(config.optim, config.max_steps)(step - 1))
            metrics = self.window.close(step, config.max_steps) | {"learning_rate": rate}
            self.writer.log(step, metrics)
            self.watching.update(step, metrics)
        if due(config.completions_steps):
            self.writer.log_completions(step, report.rows() if report.rows is not None else None)
        if self.evaluator and due(config.eval_steps) and step < config.max_steps:
            self.evaluate_here()
        elif due(config.save_steps):
            self.save()

    def count_unused(self, step: int, found: dict[str, float], report: Report) -> None:
        """Steps in a row that changed nothing: a gradient that is not finite, or nothing to learn from."""
        limit = self.config.optim.max_nonfinite_steps
        self.unused = self.unused + 1 if found.get("nonfinite") or report.nothing else 0
        if report.nothing:
            log.warning("update %d learned nothing: %s", step, report.nothing)
        if self.unused < limit:
            return
        self.writer.log(step, self.window.close(step, self.config.max_steps))
        if report.nothing:
            raise InputError(f"{self.unused} updates in a row learned nothing: {report.nothing}")
        path = save_arrays(report, self.config.run_dir / f"nonfinite_{step}.npz")
        raise InputError(
            f"{self.unused} updates in a row had a NaN or infinite gradient and were skipped; the last batch is in {path}. "
            "Lower optim.learning_rate or look at the data"
        )

    # ------------------------------------------------------------ saving, ending

    def save(self, metrics: dict[str, float] | None = None) -> None:
        data = {
            "batches": self.work.batches.get_state(),
            "seconds": time.monotonic() - self.began,
            "window": self.window.get_state(),
            "first_step": self.first_step,
        }
        self.checkpoints.save(self.state, self.own, data, metrics)

    def leave(self, signal_name: str) -> NoReturn:
        """Saves and raises Interrupted."""
        self.watching.phase("saving")
        self.save()
        self.checkpoints.wait()
        raise Interrupted(f"{signal_name}: saved update {self.step}; start the same command again to go on")

    def finish(self) -> None:
        """The last checkpoint, the last evaluation, the export. Interrupted, they are done by the next start."""
        config, step = self.config, self.step
        best = config.load_best_model_at_end
        if self.evaluator:
            name = f"step_{step:06d}" if best else "after"
            self.save(self.evaluate(name))
            if best and (chosen := self.checkpoints.best_step()) is not None and chosen != step:
                found = self.checkpoints.restore(self.state, chosen)
                assert found is not None
                self.state, name = found[0], f"step_{chosen:06d}"
            self.evaluator.keep(name, "after")
        else:
            self.save()
        self.checkpoints.wait()
        if not config.export:
            return
        self.watching.phase("exporting")
        try:
            with self.stop.at_once():
                params, model = self.state.params, self.context.model
                assert model.folder is not None  # it was loaded
                export(Exported.of(config), model.cfg, params, config.run_dir / "export", model.folder)
        except Interrupted as stopped:
            self.leave(str(stopped))


def _like(value: Any, like: Any) -> Any:
    """A restored value in the type and place that the method gave its first one."""
    return jnp.asarray(value, like.dtype) if isinstance(like, jax.Array) else value


def save_arrays(report: Report, path: Path) -> Path:
    """What the last update saw, as .npz: the prompts or warm-up arrays, and of a rollout its completions and advantages."""
    seen = report.arrays() if report.arrays is not None else {}
    leaves = jax.tree_util.tree_leaves_with_path(seen)
    arrays = {jax.tree_util.keystr(where, simple=True, separator="."): processes.local_rows(x) for where, x in leaves}
    np.savez(path, **arrays)
    return path
