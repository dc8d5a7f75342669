"""Two programs measured in one run: each in a process of its own, called by turns, so that both see the same machine.

A side is a function that calls `serve(function)`; `function(case)` does the work once and returns a dict of figures. The
driver starts the sides with `Side` and calls them by turns with `compare`. Seconds are medians after warm-up, `processor` is
the processor time of all threads, which other work on the machine changes less; memory is the process's peak since it
started, imports, loading and compilation included.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]
Rows = dict[str, dict[str, Any]]


def peak_mib() -> float:
    """The most memory this process has held. On Linux of this program alone: `ru_maxrss` also knows its parent's."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 1024
    unit = 1 << 20 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def versions(*packages: str) -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# ---------------------------------------------------------------- a side


def serve(function: Callable[[dict], dict | None], packages: Sequence[str], imports_mib: float) -> None:
    """Answers one JSON line per request line on standard input; everything else printed goes to standard error.

    `imports_mib`: `peak_mib()` after the side's imports, before it loaded anything.
    """
    out, sys.stdout = sys.stdout, sys.stderr
    ready = {"imports_mib": imports_mib, "ready_mib": peak_mib(), "versions": versions(*packages)}
    print(json.dumps(ready), file=out, flush=True)
    for line in sys.stdin:
        started, used = time.perf_counter(), time.process_time()
        figures = function(json.loads(line)) or {}
        seconds, used = time.perf_counter() - started, time.process_time() - used
        measured = {"seconds": seconds, "processor": used, "peak_mib": peak_mib()}
        print(json.dumps(measured | figures), file=out, flush=True)


class Side:
    """A running side: `module --serve NAME *arguments` under `python`."""

    def __init__(self, name: str, module: str, *arguments: str | Path, python: str = sys.executable):
        self.name = name
        # the repository is importable whatever the environment has installed
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [python, "-m", module, "--serve", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        )
        ready = self._read()
        self.versions = ready.pop("versions")
        self.start: dict[str, float] = ready

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


def compare(sides: Sequence[Side], case: dict, repeats: int = 5, warmup: int = 1) -> Rows:
    """Calls the sides by turns; the median of every figure, fastest and slowest call, first call and peak memory of each."""
    first = {side.name: [side.call(case) for _ in range(warmup)][0]["seconds"] for side in sides}
    runs: dict[str, list[dict]] = {side.name: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            runs[side.name].append(side.call(case))
    rows = {}
    for side in sides:
        called = runs[side.name]
        seconds = [run["seconds"] for run in called]
        row = {name: statistics.median(run[name] for run in called) for name in called[0]}
        row |= {"fastest": min(seconds), "slowest": max(seconds), "first": first[side.name]} | side.start
        rows[side.name] = row | {"peak_mib": called[-1]["peak_mib"]}
    return rows


# ---------------------------------------------------------------- the driver


def options(doc: str | None, repeats: int = 5) -> argparse.ArgumentParser:
    """What every comparison takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="measured calls of each side")
    parser.add_argument("--warmup", type=int, default=1, help="calls of each side before")
    parser.add_argument("--save", action="store_true", help="write the figures to tests/benchmarks/results")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the environment with the peer")
    parser.add_argument("--serve", nargs="+", metavar="SIDE", help=argparse.SUPPRESS)
    return parser


def machine() -> dict[str, Any]:
    """Which machine, when, and how busy with other work."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return {
        "date": datetime.date.today().isoformat(),
        "processor": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def table(rows: Rows, columns: Sequence[str]) -> str:
    """Plain text, one line a row; an absent figure is a dash."""
    first = max(14, *(len(name) + 2 for name in rows))
    widths = [max(10, len(name) + 2) for name in columns]
    lines = [" " * first + "".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True))]
    for name, row in rows.items():
        cells = [f"{row[c]:,.2f}" if row.get(c) is not None else "-" for c in columns]
        lines.append(f"{name:{first}}" + "".join(f"{c:>{width}}" for c, width in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def report(
    name: str, rows: Rows, columns: Sequence[str], used: dict[str, str], settings: dict, summary: dict, save: bool
) -> None:
    """Prints versions, machine, one table and the summary (ratios); with `save` all of it goes to results/NAME.json."""
    where = machine()
    print(", ".join(f"{key} {value}" for key, value in used.items()))
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(table(rows, columns))
    for key, value in summary.items():
        print(f"{key}: {value:.3g}" if isinstance(value, float) else f"{key}: {value}")
    if save:
        RESULTS.mkdir(exist_ok=True)
        content = dict(machine=where, versions=used, settings=settings, rows=rows, summary=summary)
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def all_versions(sides: Sequence[Side]) -> dict[str, str]:
    return {package: version for side in sides for package, version in side.versions.items()}


def ratios(rows: Rows, ours: str, theirs: str) -> dict[str, float]:
    """How many times faster we are, and our peak memory as a share of theirs."""
    a, b = rows[ours], rows[theirs]
    return {
        "times faster": b["seconds"] / a["seconds"],
        "times less processor time": b["processor"] / a["processor"],
        "share of its peak memory": a["peak_mib"] / b["peak_mib"],
    }
