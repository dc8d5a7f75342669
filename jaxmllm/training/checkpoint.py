"""Saving and resuming: parameters, optimiser, step and data position together, whole or not at all.

Orbax writes a checkpoint to a temporary folder, in the background, and renames it when it is complete; a run that is killed
while writing resumes from the one before.
"""

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxmllm.errors import InputError
from jaxmllm.methods.method import Own
from jaxmllm.types import TrainState

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run folder: the newest `keep`, plus the best by a metric when one is named.

    `read_only`: of a run that another one resumes from; nothing in its folder is written, moved or removed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 2,
        best_metric: str = "",
        larger_is_better: bool = True,
        read_only: bool = False,
    ):
        self._folder, self._best_metric, self._read_only = Path(folder).absolute(), best_metric, read_only
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
                read_only=read_only,
            ),
            item_names=("state", "own", "data"),
        )

    def save(self, state: TrainState, own: Own, data: dict, metrics: dict[str, float] | None = None) -> None:
        """Starts writing checkpoint `state.step`.

        `own`: what a step carries besides the state, arrays and JSON values. `data`: JSON-able position of the data iterator
        and counters. A checkpoint that is there already is written again only to add `metrics`. Raises InputError when the
        disk is full; checkpoints already there stay valid.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            if metrics is None or not self._best_metric or self._manager.metrics(step):
                return
            self.wait()
            self._manager.delete(step)
        needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(self._folder).free
        if free < needed:  # said before a half-written one takes the rest
            raise InputError(
                f"checkpoint {step} could not be written (it takes up to {needed / 2**30:.2f} GiB, {free / 2**30:.2f} are free "
                f"in {self._folder}); earlier checkpoints are intact"
            )
        arrays = {name: _host(value) for name, value in own.items() if isinstance(value, jax.Array | np.ndarray)}
        plain = {name: value for name, value in own.items() if name not in arrays}
        with _told(f"checkpoint {step}, or the one before it,"):  # the one before is written in the background
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave({**data, "own": plain}),
                    **({"own": ocp.args.StandardSave(arrays)} if arrays else {}),
                ),
                metrics=metrics,
            )

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, Own, dict] | None:
        """(state, own, data) of the newest (or a given) checkpoint in the shapes and shardings of `like`; None without one.

        One that cannot be read is put aside as damaged_<step> (but not where `read_only`), and the one before is taken.
        InputError when none can be.
        """
        self._manager.reload()
        steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        first: Exception | None = None
        for tried in steps:
            try:
                found = self._read(like, tried)
            except Exception as error:  # the storage library raises whatever it meets
                first = first or error
                log.warning("checkpoint %d of %s cannot be read: %s", tried, self._folder, _short(error))
                continue
            if first is not None and not self._read_only:
                self._put_aside([other for other in steps if other > tried])
            if first is not None:
                log.warning("going on from checkpoint %d, the newest that can be read", tried)
            log.info("resumed from checkpoint %d", tried)
            return found
        if first is not None:
            raise InputError(
                f"{self._folder}: no checkpoint of {', '.join(map(str, steps))} can be read, or they hold other parameters "
                f"than this config trains ({_short(first)})"
            ) from first
        return None

    def _read(self, like: TrainState, step: int) -> tuple[TrainState, Own, dict]:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items: dict[str, Any] = {"state": ocp.args.StandardRestore(abstract), "data": ocp.args.JsonRestore()}
        has_own = (self._folder / str(step) / "own").exists()
        if has_own:
            items["own"] = ocp.args.StandardRestore()
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        data = dict(found.data)
        own = {**data.pop("own", {}), **(dict(found.own) if has_own else {})}
        return found.state, own, data

    def _put_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                with contextlib.suppress(OSError):
                    os.replace(self._folder / str(step), self._folder / f"damaged_{step}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are put aside")
        self._manager.reload()

    def best_step(self) -> int | None:
        """The checkpoint with the best measured figure; None when none was measured."""
        self.wait()
        return self._manager.best_step() if self._best_metric else None

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


def read_params(folder: Path) -> dict[str, Any]:
    """The parameters of one checkpoint, on one device. InputError where it cannot be read."""
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        tree: Any = reader.metadata(folder / "state").item_metadata.tree["params"]
        shapes = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)}
        arguments = ocp.args.PyTreeRestore(
            item=shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes), partial_restore=True
        )
        return reader.restore(folder / "state", args=arguments)["params"]
    except Exception as error:  # the storage library raises whatever it meets
        raise InputError(f"{folder}: the checkpoint cannot be read ({_short(error)})") from error
    finally:
        reader.close()


def _host(value: Any) -> Any:
    """An array that every process has whole as numpy, which is how several processes save it."""
    spread = isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated)
    return value if spread else np.asarray(value)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """A failed write as InputError: the background threads raise whatever the storage library does (OSError, ValueError, ..)."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what} could not be written ({_short(error)}); earlier checkpoints are intact") from error
