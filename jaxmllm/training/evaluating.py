"""Evaluations of a run: greedy answers and the method's own held-out figures, into run_dir/eval/<name>."""

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from jaxmllm.data.sources import RecordSource
from jaxmllm.errors import InputError
from jaxmllm.eval import harness
from jaxmllm.machine import processes
from jaxmllm.methods.method import Context, Work
from jaxmllm.runfiles import read_json
from jaxmllm.training.config import TrainConfig
from jaxmllm.training.setup import eval_options
from jaxmllm.training.stopping import Stop
from jaxmllm.types import TrainState

log = logging.getLogger(__name__)
Told = Callable[[str, int, int], None]  # (what is being done, done, of how many), for a person


class Evaluator:
    """Evaluates a state on every evaluation source; goes on where an interrupted evaluation was."""

    def __init__(
        self,
        config: TrainConfig,
        context: Context,
        work: Work,
        sources: dict[str, RecordSource],
        stop: Stop,
        told: Told = lambda what, done, total: None,
        notes: Mapping[str, str] | None = None,
    ):
        self.config, self.context, self.work, self.sources = config, context, work, sources
        self.stop, self.told, self.notes = stop, told, notes or {}
        self.folder = config.run_dir / "eval"

    def __bool__(self) -> bool:
        return bool(self.sources)

    def __call__(self, state: TrainState, name: str) -> dict[str, float]:
        """Figures by "<source>/<figure>". Raises Interrupted between two batches when the run is told to stop.

        InputError where `metric_for_best_model` was not measured.
        """
        config, step = self.config, int(state.step)
        out_dir = self.folder / name
        with processes.one_after_another() as first:
            if first:
                _make_room(out_dir, step)
        if jax.process_count() > 1:  # all generate together, so all go on with the same records
            out_dir = processes.own_copy(out_dir)

        self.told("evaluating", 0, 0)

        def on_batch(done: int, total: int) -> None:
            self.told("evaluating", done, total)
            self.stop.check()

        found = harness.evaluate(
            lambda records: config.method.answers(state.params, records, self.context),
            self.sources,
            out_dir=out_dir,
            batch_size=max(32, config.batch_size),
            limit=config.data.eval_samples,
            options=eval_options(config),
            judge=self.work.judge,
            max_bad_records=config.data.max_bad_records,
            config={"step": step},
            save_pictures=config.save_pictures,
            notes=self.notes,
            on_batch=on_batch,
        ).flat()
        found |= self.work.validate(state, self.sources, config.data.eval_samples)
        log.info("evaluation %s: %s", name, found)
        best = config.metric_for_best_model
        if best and best not in found:
            raise InputError(f"metric_for_best_model = {best!r}: not measured; use one of {', '.join(found)}")
        return found

    def keep(self, name: str, other: str) -> None:
        """Evaluation `name` is also the one called `other`: the same weights, the same figures."""
        with processes.one_after_another() as first:
            if first and name != other:
                shutil.rmtree(self.folder / other, ignore_errors=True)
                shutil.copytree(self.folder / name, self.folder / other)

    def done(self, name: str, step: int) -> bool:
        """Whether this evaluation of this step is finished."""
        return (self.folder / name / "metrics.json").exists() and _step_of(self.folder / name) == step


def _step_of(folder: Path) -> int | None:
    try:
        return int(read_json(folder / "config.json")["config"]["step"])
    except (OSError, InputError, KeyError, TypeError, ValueError):
        return None


def _make_room(folder: Path, step: int) -> None:
    """An evaluation of another step under this name, of a run that goes on, is kept under its step's name."""
    if not folder.exists() or (old := _step_of(folder)) in (None, step):
        return
    kept = folder.with_name(f"step_{old:06d}")
    if kept.exists():
        shutil.rmtree(folder)
    else:
        folder.rename(kept)
