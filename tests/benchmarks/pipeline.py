"""The host pipeline against the trainer at quickstart size: records/s each, and the share of a step spent waiting for data.

    python -m tests.benchmarks.pipeline [--updates 30] [--batches 60] [--threads 2] [--core 1] [--save]

The pipeline runs alone, as fast as it can (`alone`), and the trainer with it in the background, as always (`training`): the
quickstart without its evaluations, so all processor time of the pipeline is also taken from the trainer. The first updates
compile and are left out. `waiting` is the median share of a step in which the trainer waits for its batch.
"""

import argparse
import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

from tests.benchmarks.side_by_side import report, versions

ROOT = Path(__file__).parents[2]
SETTLED = 10  # updates until every program is compiled
COLUMNS = ("records/s", "seconds", "waiting", "longest wait")


def quickstart(threads: int):
    from jaxmllm.training.config import load_config

    config = load_config(ROOT / "configs" / "quickstart.py")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, eval=(), workers=threads))


def alone(config, batches: int) -> dict[str, float]:
    """Batches made ahead by nobody's leave; the first ones, which fill the queue, are not counted."""
    from tests.benchmarks.running import Running

    made = Running(config).work.batches
    with contextlib.closing(made):
        for _ in range(8):
            next(made)
        began = time.perf_counter()
        for _ in range(batches):
            next(made)
        seconds = time.perf_counter() - began
    return {"records/s": batches * config.batch_size / seconds, "seconds": seconds / batches}


def training(config, updates: int) -> dict[str, float]:
    from jaxmllm.training.loop import train

    seen: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(
            config, output_dir=folder, max_steps=SETTLED + updates, export=False, save_steps=10_000, report_to=()
        )
        train(config, lambda step, metrics: seen.append(metrics))
    steady = seen[SETTLED:]
    seconds = statistics.median(row["step_time"] for row in steady)
    shares = [row["seconds/data"] / row["step_time"] for row in steady]
    return {
        "records/s": config.batch_size / seconds,
        "seconds": seconds,
        "waiting": statistics.median(shares),
        "longest wait": max(shares),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=30, help="measured updates")
    parser.add_argument("--batches", type=int, default=60, help="measured batches of the pipeline alone")
    parser.add_argument("--threads", type=int, default=2, help="of the pipeline")
    parser.add_argument("--core", type=int, default=None, help="run on this core only")
    parser.add_argument("--save", action="store_true", help="write the figures to tests/benchmarks/results")
    args = parser.parse_args()
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    config = quickstart(args.threads)
    rows = {"alone": alone(config, args.batches), "training": training(config, args.updates)}
    summary = {"records made / records used": rows["alone"]["records/s"] / rows["training"]["records/s"]}
    settings = vars(args) | {"batch_size": config.batch_size, "generations": config.grpo.num_generations}
    settings["cores used"] = len(os.sched_getaffinity(0))
    report("pipeline", rows, COLUMNS, versions("jax", "grain"), settings, summary, args.save)


if __name__ == "__main__":
    main()
