"""Two programs measured in one run: each in a process of its own, called by turns, so that both see the same machine.

A side is a script that calls `serve(function)`; `function(case)` does the work once and returns a dict of figures. The
driver calls `compare`. Seconds are medians after warm-up; memory is the process's own peak above what it held when ready.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(function: Callable[[dict], dict], ready: Callable[[], None] = lambda: None) -> None:
    """Answers one JSON line per request line on standard input; everything else printed goes to standard error."""
    out, sys.stdout = sys.stdout, sys.stderr
    ready()
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"ready": True, "base_mib": base / 1024}), file=out, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        figures = function(json.loads(line)) or {}
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "peak_mib": peak} | figures), file=out, flush=True)


class Side:
    """A running side."""

    def __init__(self, name: str, module: str, *arguments: str):
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.base_mib = self._read()["base_mib"]
        self.runs: list[dict[str, Any]] = []

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} stopped with status {self._process.wait()}")
        return json.loads(line)

    def call(self, case: dict) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.communicate()


def compare(sides: list[Side], case: dict, repeats: int = 5, warmup: int = 1) -> dict[str, dict[str, Any]]:
    """Calls the sides by turns; returns median seconds, other figures of the last run and peak memory of each."""
    for side in sides:
        for _ in range(warmup):
            side.call(case)
    for _ in range(repeats):
        for side in sides:
            side.runs.append(side.call(case))
    result = {}
    for side in sides:
        last = side.runs[-1]
        seconds = [run["seconds"] for run in side.runs]
        result[side.name] = last | {
            "seconds": statistics.median(seconds),
            "fastest": min(seconds),
            "slowest": max(seconds),
            "base_mib": side.base_mib,
        }
        side.runs = []
    return result


def table(rows: dict[str, dict[str, Any]], columns: tuple[str, ...]) -> str:
    """Plain text, one line a side."""
    lines = [f"{'':14}" + "".join(f"{name:>14}" for name in columns)]
    for name, row in rows.items():
        lines.append(f"{name:14}" + "".join(f"{row[column]:>14,.2f}" for column in columns))
    return "\n".join(lines)
