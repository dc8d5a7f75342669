"""Starting a run of several processes with `jax.distributed`, stopping it together, and what its exit statuses mean.

Every process runs the same command. `start()` finds the others by the first of these that is there:

| source              | what is read                                                                                          |
|---------------------|-------------------------------------------------------------------------------------------------------|
| arguments           | `coordinator`, `num_processes`, `process_id`                                                          |
| environment         | JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES, JAX_PROCESS_ID                   |
| SLURM               | the variables of a task that `srun` started; one task a node with all of its GPUs, or one task a GPU  |
| Cloud TPU           | the slice's metadata on a TPU VM, TPU_WORKER_HOSTNAMES under GKE; several slices by MEGASCALE_*       |

Without any it is one process. JAX_NUM_PROCESSES=1 alone says so where the surroundings look like more.

Exit statuses of `jaxmllm`, for whoever restarts it:

| status | meaning                                                                        | start again?                     |
|--------|--------------------------------------------------------------------------------|----------------------------------|
| 0      | done                                                                           | no                               |
| 1      | a defect of the library                                                        | no; report it with `--debug`     |
| 2      | a mistake in config, data, model or surroundings, named in the last line       | no, the same would happen again  |
| 75     | SIGTERM, SIGINT or a preemption notice: everything is saved                    | yes, it goes on where it stopped |
| 134    | SIGABRT by jax: another process died or was out of reach for `LOST_SECONDS`    | yes, from the last checkpoint    |
| 137    | SIGKILL: out of memory, or evicted without notice                              | yes, from the last checkpoint    |
"""

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from jaxmllm.errors import InputError
from jaxmllm.machine.mesh import BATCH, P

log = logging.getLogger(__name__)

LOST_SECONDS = 30  # a process that was silent for so long is taken for dead, and all the others stop
TOGETHER = (0, 75)  # every process ends so after the same update
EXIT_LOST = 134  # as jax's own abort: another process is gone
EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> str:
    """Joins the other processes; call it before anything touches a device. Returns the source that was used, or "single".

    `timeout`: seconds to wait for the others; then jax ends the process (status 134). A second call does nothing. Raises
    InputError when a source is incomplete or contradicts itself.
    """
    if jax.distributed.is_initialized():
        return "running"
    given = dict(zip(EXPLICIT, (coordinator, num_processes, process_id), strict=True))
    explicit = explicit_processes(given, os.environ)
    if explicit is not None:
        if explicit["num_processes"] == 1:
            return "single"
        return _join("explicit", timeout, **explicit)
    if tasks := slurm_tasks(os.environ):
        return _join("slurm", timeout, cluster_detection_method="slurm", local_device_ids=slurm_gpus(os.environ, tasks))
    if on_cloud_tpu(os.environ):
        kubernetes = "TPU_WORKER_HOSTNAMES" in os.environ or "TPU_PROCESS_ADDRESSES" in os.environ
        return _join("tpu", timeout, cluster_detection_method="gketpu" if kubernetes else "gcetpu")
    return "single"


def _join(source: str, timeout: int, **options) -> str:
    # when the time is up jax aborts (status 134) with a message about itself: say before what is being waited for
    patience = min(20.0, timeout / 2)
    where = options.get("coordinator_address", "process 0, as the cluster names it")
    waiting = threading.Timer(
        patience,
        log.warning,
        [
            f"still waiting for the other processes after {patience:g} s ({source}: {where}); do all run, is the port open?"
        ],
    )
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=LOST_SECONDS,
            shutdown_timeout_seconds=LOST_SECONDS,
        )
    except Exception as error:  # jax raises its own kinds, and those of sockets and of the metadata server
        raise InputError(
            f"could not join the other processes ({source}: {type(error).__name__}: {str(error).splitlines()[0]}). Is "
            f"process 0 running, its port reachable, and its address right? Set {', '.join(EXPLICIT)} to say it yourself, "
            "or JAX_NUM_PROCESSES=1 for a run of one process"
        ) from error
    finally:
        waiting.cancel()
    log.info("process %d of %d (%s)", jax.process_index(), jax.process_count(), source)
    return source


def explicit_processes(given: Mapping[str, object], environ: Mapping[str, str]) -> dict | None:
    """Arguments of `jax.distributed.initialize` from arguments or, where they are None, variables; None when none is set.

    Raises InputError naming what is missing, no number, or out of range.
    """
    found = {name: environ.get(name) if given.get(name) is None else given[name] for name in EXPLICIT}
    if all(value is None for value in found.values()):
        return None
    numbers = {}
    for name in EXPLICIT[1:]:
        try:
            numbers[name] = None if found[name] is None else int(str(found[name]))
        except ValueError:
            raise InputError(f"{name} = {found[name]!r}: not a whole number") from None
    count, number = numbers["JAX_NUM_PROCESSES"], numbers["JAX_PROCESS_ID"]
    if count is not None and count < 1:
        raise InputError(f"JAX_NUM_PROCESSES = {count}: must be at least 1")
    if count == 1 and not number:
        return {"num_processes": 1}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        have = ", ".join(f"{name}={value}" for name, value in found.items() if value is not None)
        raise InputError(f"{', '.join(missing)} missing beside {have}: all three or none")
    assert count is not None and number is not None
    if not 0 <= number < count:
        raise InputError(f"JAX_PROCESS_ID = {number}: must be from 0 to JAX_NUM_PROCESSES - 1 = {count - 1}")
    address = str(found["JAX_COORDINATOR_ADDRESS"])
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
        raise InputError(f"JAX_COORDINATOR_ADDRESS = {address!r}: write HOST:PORT, the address of process 0")
    return {"coordinator_address": address, "num_processes": count, "process_id": number}


def slurm_tasks(environ: Mapping[str, str]) -> int:
    """How many tasks `srun` started, this one being one of them; 0 when there is nobody else."""
    if "SLURM_JOB_ID" not in environ:
        return 0
    count = _whole(environ, "SLURM_NTASKS", 1)
    if "SLURM_STEP_NODELIST" not in environ:
        if count > 1:
            log.warning("SLURM gave this job %d tasks, but this one was not started by srun: it runs alone", count)
        return 0
    return count if count > 1 else 0


def slurm_gpus(environ: Mapping[str, str], tasks: int) -> list[int] | None:
    """This task's GPUs among those it sees; None leaves the choice to jax, which takes one GPU a task.

    A task that has its node to itself gets all of them.
    """
    nodes = _whole(environ, "SLURM_STEP_NUM_NODES", _whole(environ, "SLURM_NNODES", 1))
    if tasks > nodes:
        return None
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    count = len(visible.split(",")) if visible else _whole(environ, "SLURM_GPUS_ON_NODE", 0)
    return list(range(count)) or None


def _whole(environ: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(environ.get(name) or default)
    except ValueError:
        raise InputError(f"{name} = {environ[name]!r}: not a whole number") from None


def on_cloud_tpu(environ: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Whether this host has TPU chips and jax will use them."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if importlib.util.find_spec("libtpu") is None or (platforms and "tpu" not in platforms.split(",")):
        return False
    return any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))


def told_to_stop(step: int) -> bool:
    """True in every process at the same update once any of them got SIGTERM (the preemption notice of clouds and SLURM).

    Every process must ask at every update, and leave SIGTERM to jax: a handler of one's own hides it. Costs no collective:
    jax's coordinator agrees on a later update in the background. Always False in a run of one process.
    """
    return jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(step)


LOSS = (
    "gloo",
    "nccl",
    "connection",
    "socket",
    "unavailable",
    "deadline",
    "aborted",
    "heartbeat",
    "disconnect",
)  # in messages


def is_loss(error: BaseException) -> bool:
    """Whether an error is what a collective or the coordinator raises when another process is gone."""
    if not jax.distributed.is_initialized() or not isinstance(error, jax.errors.JaxRuntimeError):
        return False
    return any(word in str(error).lower() for word in LOSS)


@contextlib.contextmanager
def leaving_together() -> Iterator[None]:
    """In a run of several processes, an error in the block ends this one at once, so that the others stop as well."""
    try:
        yield
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if is_loss(error):
            text = " ".join(str(error).split())[:300]
            print(
                f"error: another process was lost; start all again, they go on from the last checkpoint ({text})",
                file=sys.stderr,
            )
            leave(EXIT_LOST)
        mistake = isinstance(error, InputError)
        print(f"error: {error}" if mistake else f"error: {type(error).__name__}: {error}", file=sys.stderr)
        leave(2 if mistake else 1)


def leave(status: int) -> None:
    """Ends this process at once when it has failed and others depend on it; returns in a run of one process.

    jax would wait for the others at exit, and they for this one's part of a collective. Without goodbye they see within
    `LOST_SECONDS` that it is gone and stop as well (status 134).
    """
    if not jax.distributed.is_initialized() or status in TOGETHER:
        return
    log.error("leaving with status %d; the other processes will stop", status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# ---------------------------------------------------------------- rows and values of several processes


def row_block(mesh: Mesh) -> tuple[int, int]:
    """(number, count) of the block of a batch's rows that this process loads; processes that share rows load the same.

    Raises InputError when the mesh splits a process's rows so that another holds only some of them.
    """
    parts = mesh.shape["replica"] * mesh.shape["fsdp"]
    held: dict[int, set[int]] = {}
    where: Mapping[Any, Any] = NamedSharding(mesh, BATCH).devices_indices_map((parts,))
    for device, index in where.items():
        held.setdefault(device.process_index, set()).add(index[0].start or 0)
    blocks = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, blocks)) != parts:
        raise InputError(
            f"mesh: tensor = {mesh.shape['tensor']} spreads rows over parts of several processes; with {len(held)} processes "
            f"of {len(mesh.local_devices)} devices, let tensor divide {len(mesh.local_devices)} or be a multiple of it"
        )
    return blocks.index(tuple(sorted(held[jax.process_index()]))), len(blocks)


def own_block(rows: Any, mesh: Mesh) -> Any:
    """This process's block of host arrays that every process has whole."""
    number, count = row_block(mesh)
    return jax.tree.map(lambda x: x[number * (len(x) // count) : (number + 1) * (len(x) // count)], rows)


def local_rows(tree: Any) -> Any:
    """The rows of this process as numpy arrays, of arrays whose first axis is split over the mesh; scalars as they are."""

    def fetch(x: jax.Array | np.ndarray) -> np.ndarray:
        # one that never left the host is no jax array
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        rows = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
        return np.concatenate([np.asarray(rows[start].data) for start in sorted(rows)])

    return jax.tree.map(fetch, tree)


def from_all(value: Any) -> list[Any]:
    """The JSON-able `value` of every process, in the order of their numbers; each must call it at the same point."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size)).reshape(-1)
    padded = np.pad(data, (0, int(sizes.max()) - data.size))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def whole(tree: Any) -> Any:
    """numpy copies of global arrays in every process."""

    def fetch(x: jax.Array) -> np.ndarray:
        if not (x.is_fully_addressable or x.is_fully_replicated):
            assert isinstance(x.sharding, NamedSharding)
            x = jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, P()))(x)
        return np.asarray(x)

    return jax.tree.map(fetch, tree)


def own_copy(folder: Path) -> Path:
    """A folder that all processes share, for process 0; for each other one a copy of its own, the same at this point."""
    mine = folder
    multihost_utils.sync_global_devices("before the copy")
    if jax.process_index():
        mine = Path(tempfile.mkdtemp(prefix="jaxmllm_")) / folder.name
        if folder.exists():
            shutil.copytree(folder, mine)
    multihost_utils.sync_global_devices("after the copy")
    return mine


@contextlib.contextmanager
def one_after_another() -> Iterator[bool]:
    """Process 0 runs the block first, the others when it is done; True in process 0. For files that all of them share."""
    first = jax.process_index() == 0
    if not first:
        multihost_utils.sync_global_devices("process 0 is done")
    yield first
    if first and jax.process_count() > 1:
        multihost_utils.sync_global_devices("process 0 is done")
