"""One start at a time in a run folder: a file says which process has it, and goes stale when that one is gone."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jaxmllm.errors import InputError

FILE = "running.json"
BEAT = 15.0  # seconds between signs of life
STALE = 120.0  # seconds without one after which a process of another host counts as gone


@contextlib.contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """Holds the folder inside the block. InputError naming host, process and start of another run that holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_dir: {folder} cannot be written ({error})") from error
    path = folder / FILE
    own = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()), "since": time.time()}
    for _ in range(2):
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            break
        except FileExistsError:
            _refuse_if_alive(folder, path)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"output_dir: {folder} cannot be written ({error})") from error
    else:
        raise InputError(f"{folder}: another run has just begun here; use another --name, or start again later")
    with os.fdopen(handle, "w") as file:
        json.dump(own, file)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(path)

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a start that failed before it wrote anything leaves nothing
            folder.rmdir()


def _refuse_if_alive(folder: Path, path: Path) -> None:
    try:
        other = json.loads(path.read_text())
        silent = time.time() - path.stat().st_mtime
        host, pid = other["host"], int(other["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # gone meanwhile, or cut off while it was written
    if host == socket.gethostname():
        alive = pid != os.getpid() and _born(pid) is not None and _born(pid) == other.get("born")
    else:
        alive = silent < STALE
    if alive:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(other.get("since", 0)))
        raise InputError(
            f"{folder}: process {pid} on {host} has been training here since {since}; wait for it, stop it, or use another "
            "--name"
        )


def _born(pid: int) -> str | None:
    """When a process of this host began, so that a reused number is not taken for it; None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return "running"  # no /proc: a number in use counts
