"""Being told to stop: SIGINT, SIGTERM, a preemption notice or the end of the allowed time."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import jax

from jaxmllm.machine import processes

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved, start the same command again


class Interrupted(Exception):
    """The run was told to stop and has saved itself."""


class Stop:
    """`stop()` is True once the run has to end; in several processes at the same call in all of them.

    Every process must ask equally often: calls are counted, and jax agrees on a later one in the background
    (`processes.told_to_stop`). Steps would not do, since a rollout may make several updates.
    """

    def __init__(self) -> None:
        self.signal = ""  # its name, once one has arrived
        self.out_of_time = False
        self._calls = 0
        self._ends: float | None = None
        self._at_once = False

    def allow(self, max_seconds: float, used: float) -> None:
        """Sets the time that steps may take; 0: no limit."""
        self._ends = time.monotonic() + max_seconds - used if max_seconds else None

    def __call__(self) -> bool:
        """Whether a signal says to stop."""
        self._calls += 1
        if processes.told_to_stop(self._calls):
            self.signal = self.signal or "SIGTERM"
        return bool(self.signal)

    def time_is_up(self) -> bool:
        """Whether the allowed training time is over; asked between steps."""
        if self._ends is not None and not self.out_of_time:
            self.out_of_time = processes.from_all(time.monotonic() > self._ends)[0]
        return self.out_of_time

    def check(self) -> None:
        """Raises Interrupted where a signal says to stop."""
        if self():
            raise Interrupted(self.signal)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside the block a signal raises Interrupted where it arrives: for work that is lost without harm."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Notes SIGINT and SIGTERM inside the block; a second one acts as usual.

        With several processes SIGTERM is jax's, which makes all of them stop at the same call, and SIGINT is passed on as
        SIGTERM.
        """
        alone = jax.process_count() == 1

        def note(number: int, _: object) -> None:
            if not alone:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            self.signal = signal.Signals(number).name
            for kind, old in previous.items():
                signal.signal(kind, old)
            if self._at_once:
                raise Interrupted(self.signal)

        previous = {}
        with contextlib.suppress(ValueError):  # not in the main thread: signals are somebody else's
            previous = {kind: signal.signal(kind, note) for kind in (signal.SIGINT, signal.SIGTERM)[: 1 + alone]}
        try:
            yield self
        finally:
            for kind, old in previous.items():
                signal.signal(kind, old)
