"""Seconds from starting the quickstart to the end of its first update, with a cold and with a warm compilation cache.

    python -m tests.benchmarks.first_step [--repeats 1] [--config configs/quickstart.py] [--save]

Every start is a process of its own, `jaxmllm train CONFIG` with a run folder of its own, killed once metrics.jsonl has its
first line. The cache is a folder of its own: empty for `cold`, what the cold start left for `warm`. The quickstart evaluates
512 records before it trains; `trains at once` leaves that evaluation out, and the targets, 60 s cold and 15 s warm, are for
it. `update` is the first update alone, its compilation included; `processor` the processor time of all threads.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.side_by_side import ROOT, options, report, versions

COLUMNS = ("seconds", "processor", "update", "fastest", "slowest")
TARGETS = {"cold": 60.0, "warm": 15.0}
CASES = {"trains at once": ("--data.eval",), "evaluates first": ()}
PATIENCE = 900  # seconds


def start(config: str, cache: Path, flags: tuple[str, ...]) -> dict[str, float]:
    """One start, up to its first update."""
    from jaxmllm.runfiles import read_lines

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "jaxmllm.cli", "train", config, "--output-dir", folder, *flags]
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": paths}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # the cold start compiles Python's modules too, where they are not yet
        began = time.perf_counter()
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            while not (rows := [row for path in Path(folder).glob("*/metrics.jsonl") for row in read_lines(path)]):
                # polling costs the run nothing that shows, and needs no hook in it
                time.sleep(0.05)
                if process.poll() is not None or time.perf_counter() - began > PATIENCE:
                    process.kill()
                    raise SystemExit(f"no update was made: {(Path(folder) / 'log').read_text()[-2000:]}")
            seconds = time.perf_counter() - began
        finally:
            process.kill()
        _, _, used = os.wait4(process.pid, 0)
        process.returncode = 0  # reaped here, for its processor time
    return {"seconds": seconds, "processor": used.ru_utime + used.ru_stime, "update": rows[0]["step_time"]}


def measure(config: str, flags: tuple[str, ...], repeats: int) -> dict[str, dict[str, float]]:
    """Cold and warm starts by turns; medians."""
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for starts in found.values():
                starts.append(start(config, Path(cache), flags))
    rows = {}
    for name, starts in found.items():
        rows[name] = {figure: statistics.median(one[figure] for one in starts) for figure in starts[0]}
        rows[name] |= {
            "fastest": min(one["seconds"] for one in starts),
            "slowest": max(one["seconds"] for one in starts),
        }
    return rows


def main() -> None:
    parser = options(__doc__, repeats=1)
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.py"))
    args = parser.parse_args()
    rows = {}
    for case, flags in CASES.items():
        rows |= {f"{name}, {case}": row for name, row in measure(args.config, flags, args.repeats).items()}
    summary: dict = {}
    for name, target in TARGETS.items():
        seconds = rows[f"{name}, trains at once"]["seconds"]
        summary[name] = f"{seconds:.1f} s, target {target:.0f} s: {'met' if seconds < target else 'missed'}"
    settings = {"config": Path(args.config).name, "repeats": args.repeats}
    report("first_step", rows, COLUMNS, versions("jax", "jaxlib", "flax"), settings, summary, args.save)


if __name__ == "__main__":
    main()
