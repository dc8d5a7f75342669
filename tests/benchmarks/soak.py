"""A long run watched from outside: does memory grow, does anything compile again, are threads or files left open?

    python -m tests.benchmarks.soak [--hours 2] [--core N] [--config configs/quickstart.py] [--save] [FLAGS of jaxmllm train]

The run is `jaxmllm train CONFIG` that evaluates, saves and writes completions all the time; it is told to stop (SIGTERM) when
the hours are over, and must then have saved itself. Every few seconds its processes are read in /proc: resident memory,
threads and open files, of all of them together. JAX itself says what it compiles. One row for each quarter of the time:
medians of memory, threads and files, the most memory and files (a save opens some), programs compiled, updates. The first
quarter warms up. Needs Linux.
"""

import argparse
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.side_by_side import ROOT, report, versions

ALWAYS = ("--max_steps", "10000000", "--eval_steps", "100", "--save_steps", "25", "--completions_steps", "10")
ALWAYS += ("--data.eval_samples", "64")
EVERY = 5.0  # seconds between two looks
SAVED = 75  # exit status of a run that was told to stop and has saved itself
COMPILED = re.compile(r"Finished XLA compilation of (\S+)")
COLUMNS = ("memory_mib", "largest_mib", "threads", "files", "most_files", "compiled", "updates", "seconds_an_update")


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:  # a thread that has just ended
                continue
    return found


def look(pid: int) -> dict[str, float]:
    """Memory, threads and open files of a run at this moment."""
    memory = threads = files = 0.0
    for one in family(pid):
        try:
            status = Path(f"/proc/{one}/status").read_text()
            files += len(os.listdir(f"/proc/{one}/fd"))
        except OSError:
            continue
        held, running = re.search(r"VmRSS:\s+(\d+)", status), re.search(r"Threads:\s+(\d+)", status)
        memory += int(held[1]) / 1024 if held else 0
        threads += int(running[1]) if running else 0
    return {"memory_mib": memory, "threads": threads, "files": files}


def watch(command: list[str], seconds: float, folder: Path) -> tuple[list[dict], list[tuple[float, str]], int]:
    """Looks (with their second), compilations (second, program), and the exit status."""
    looks, compiled, log = [], [], folder / "log.txt"
    env = os.environ | {
        "JAX_LOG_COMPILES": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    began, read = time.monotonic(), 0
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
        while (now := time.monotonic() - began) < seconds and process.poll() is None:
            time.sleep(EVERY)
            looks.append({"second": now} | look(process.pid))
            with log.open("rb") as written:
                written.seek(read)
                text = written.read()
            whole = text.rfind(b"\n") + 1
            read += whole
            compiled += [(now, name) for name in COMPILED.findall(text[:whole].decode(errors="replace"))]
        process.send_signal(signal.SIGTERM)
        status = process.wait()
    if status != SAVED:
        raise SystemExit(f"the run ended with status {status}:\n{log.read_text()[-2000:]}")
    return looks, compiled, status


def quarter(
    looks: list[dict], compiled: list[tuple[float, str]], updates: list[float], start: float, end: float
) -> dict:
    """One row of the table, of `start` to `end` seconds."""
    here = [one for one in looks if start <= one["second"] < end]
    done = sum(start <= second < end for second in updates)
    return {
        "memory_mib": statistics.median(one["memory_mib"] for one in here),
        "largest_mib": max(one["memory_mib"] for one in here),
        "threads": statistics.median(one["threads"] for one in here),
        "files": statistics.median(one["files"] for one in here),
        "most_files": max(one["files"] for one in here),
        "compiled": sum(start <= second < end for second, _ in compiled),
        "updates": done,
        "seconds_an_update": (end - start) / done if done else math.nan,
    }


def main() -> None:
    from jaxmllm.runfiles import read_lines

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--core", type=int, default=None, help="run on this core only")
    parser.add_argument("--save", action="store_true", help="write the figures to tests/benchmarks/results")
    args, flags = parser.parse_known_args()
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    with tempfile.TemporaryDirectory() as folder:
        run = ["--name", "soak", "--output_dir", folder, *ALWAYS, *flags]
        command = [sys.executable, "-m", "jaxmllm.cli", "train", args.config, *run]
        began = time.time()
        looks, compiled, status = watch(command, args.hours * 3600, Path(folder))
        lines = read_lines(Path(folder) / "soak" / "metrics.jsonl")
        updates = [line["time"] - began for line in lines if "step_time" in line]
    edges = [args.hours * 900 * k for k in range(5)]
    parts = list(zip(edges, edges[1:], strict=False))
    rows = {f"quarter {k + 1}": quarter(looks, compiled, updates, *part) for k, part in enumerate(parts)}
    settled = [one for one in looks if one["second"] >= edges[1]]
    growth = statistics.linear_regression(
        [one["second"] / 3600 for one in settled], [one["memory_mib"] for one in settled]
    )
    summary = {
        "memory grows after the first quarter, MiB an hour": growth.slope,
        "compiled after the first quarter": ", ".join(name for second, name in compiled if second >= edges[1])
        or "nothing",
        "threads, last quarter less second": rows["quarter 4"]["threads"] - rows["quarter 2"]["threads"],
        "files, last quarter less second": rows["quarter 4"]["files"] - rows["quarter 2"]["files"],
        "exit status when told to stop": status,
    }
    settings = {"hours": args.hours, "config": args.config, "flags": [*ALWAYS, *flags], "core": args.core}
    report("soak", rows, COLUMNS, versions("jax", "jaxlib", "flax", "orbax-checkpoint"), settings, summary, args.save)


if __name__ == "__main__":
    main()
