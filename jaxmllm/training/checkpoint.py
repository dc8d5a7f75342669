"""Saving and resuming: parameters, optimiser, step and data position together, whole or not at all.

Orbax writes a checkpoint to a temporary folder, in the background, and renames it when it is complete; a run that is killed
while writing resumes from the one before.
"""

import contextlib
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxmllm.errors import InputError
from jaxmllm.types import TrainState

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run folder: the newest `keep`, plus the best by a metric when one is named."""

    def __init__(self, folder: str | Path, *, keep: int = 2, best_metric: str = "", larger_is_better: bool = True):
        self._folder, self._best_metric = Path(folder).absolute(), best_metric
        preserve: Any = ocp.checkpoint_managers.LatestN(keep)

        def value(metrics: dict[str, float]) -> float:
            """A figure that was not measured this time is the worst."""
            found = metrics.get(best_metric, -math.inf if larger_is_better else math.inf)
            return found if larger_is_better else -found

        if best_metric:
            best = ocp.checkpoint_managers.BestN(get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False)
            preserve = ocp.checkpoint_managers.AnyPreservationPolicy([preserve, best])
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preserve,
                best_fn=value if best_metric else None,  # what `best_step` asks
                enable_async_checkpointing=True,
            ),
            item_names=("state", "data"),
        )

    def save(self, state: TrainState, data: dict, metrics: dict[str, float] | None = None) -> None:
        """Starts writing checkpoint `state.step`. `data`: JSON-able position of the data iterator and counters.

        Raises InputError when the disk is full; checkpoints already there stay valid.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(self._folder).free
        if free < needed:  # said before a half-written one takes the rest
            raise InputError(
                f"checkpoint {step} could not be written (it takes up to {needed / 2**30:.2f} GiB, {free / 2**30:.2f} are free "
                f"in {self._folder}); earlier checkpoints are intact"
            )
        with _told(f"checkpoint {step}, or the one before it,"):  # the one before is written in the background
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)),
                metrics=metrics,
            )

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict] | None:
        """The newest (or a given) checkpoint in the shapes and shardings of `like`; None when there is none."""
        self._manager.reload()
        step = self._manager.latest_step() if step is None else step
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        found = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        )
        log.info("resumed from checkpoint %d", step)
        return found.state, found.data

    def best(self, like: TrainState) -> TrainState:
        """The state of the best checkpoint; `like` itself when none was measured."""
        self.wait()
        step = self._manager.best_step() if self._best_metric else None
        found = None if step is None else self.restore(like, step)
        return like if found is None else found[0]

    def wait(self) -> None:
        """Returns when everything saved so far is on disk. Raises InputError when a background write failed."""
        with _told("a checkpoint"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            # a failed write is reported once; closing ends the threads all the same
            with contextlib.suppress(Exception):
                self._manager.close()


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """A failed write as InputError: the background threads raise whatever the storage library does (OSError, ValueError, ..)."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{what} could not be written ({reason}); earlier checkpoints are intact") from error
