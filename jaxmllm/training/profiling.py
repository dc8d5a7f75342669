"""A trace of a few updates, for TensorBoard's profile plugin, xprof or Perfetto."""

from pathlib import Path
from types import TracebackType

import jax

SKIPPED, TRACED = 2, 3  # updates of a start before the trace, which compile, and in it


class Trace:
    """Context manager around a loop that calls `before(step)` ahead of every update.

    Writes `folder`/plugins/profile/TIME/*.xplane.pb once the traced updates are done, or at the end of the loop. Every
    process writes its own. Does nothing unless `enabled`.
    """

    def __init__(self, folder: Path, first: int, enabled: bool):
        """`first`: number of the first update of this start."""
        self._folder, self._begin, self._running = folder, first + SKIPPED, False
        self._waiting = enabled

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop()

    def before(self, step: int) -> None:
        if self._running and step >= self._begin + TRACED:
            self._stop()
        if self._waiting and step >= self._begin:
            jax.profiler.start_trace(self._folder)
            self._waiting, self._running = False, True

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
