"""Saving and resuming: parameters, optimiser, step and data position together, whole or not at all.

Orbax writes a checkpoint to a temporary folder, in the background, and renames it when it is complete; a run that is killed
while writing resumes from the one before.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxmllm.errors import InputError
from jaxmllm.types import TrainState

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run folder: the newest `keep`, plus the best by a metric when one is named."""

    def __init__(self, folder: str | Path, *, keep: int = 2, best_metric: str = ""):
        self._best_metric = best_metric
        preserve: Any = ocp.checkpoint_managers.LatestN(keep)
        if best_metric:
            best = ocp.checkpoint_managers.BestN(
                get_metric_fn=lambda m: m[best_metric], n=1, keep_checkpoints_without_metrics=False
            )
            preserve = ocp.checkpoint_managers.AnyPreservationPolicy([preserve, best])
        self._manager = ocp.CheckpointManager(
            Path(folder).absolute(),
            options=ocp.CheckpointManagerOptions(preservation_policy=preserve, enable_async_checkpointing=True),
            item_names=("state", "data"),
        )

    def save(self, state: TrainState, data: dict, metrics: dict[str, float] | None = None) -> None:
        """Starts writing checkpoint `state.step`. `data`: JSON-able position of the data iterator and counters.

        Raises InputError when the disk is full; checkpoints already there stay valid.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)),
                metrics=metrics,
            )
        except OSError as error:
            raise InputError(
                f"checkpoint {step} could not be written ({error}); earlier checkpoints are intact"
            ) from error

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

    @property
    def best_step(self) -> int | None:
        return self._manager.best_step() if self._best_metric else None

    def wait(self) -> None:
        """Returns when everything saved so far is on disk. Raises InputError when a background write failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise InputError(f"a checkpoint could not be written ({error}); earlier checkpoints are intact") from error

    def close(self) -> None:
        self.wait()
        self._manager.close()
