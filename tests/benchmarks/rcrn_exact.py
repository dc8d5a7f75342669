"""RCRN on exact attributes: five seeds, longer expressions, and what faults of detector and parser cost.

    python -m tests.benchmarks.rcrn_exact [--seeds 5] [--steps 1500] [--samples 60000]

Writes tests/benchmarks/results/rcrn_exact.json after each part; a part that stands there is not measured again.
Trained on 1 and 2 edges without faults; every fault but "trained with" is met in the test only.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from jaxmllm.runfiles import write_json
from tests.support import relation_learning as learning

RESULT = Path(__file__).parent / "results" / "rcrn_exact.json"
CELLS = [("mixed", n) for n in (1, 2, 3, 4, 5)] + [("chain", n) for n in (3, 4, 5)]
LEVELS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)


def main(seeds: int, steps: int, samples: int) -> None:
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"steps": steps, "samples": samples, "seeds": {}}
    items = learning.samples(2000, 2)
    test = learning.batch(items)
    longer = {f"{shape} {n}": learning.batch(learning.samples(1000, 50, (n, n), shape)) for shape, n in CELLS}
    made, params = None, None
    for seed in range(seeds):
        if str(seed) in found["seeds"] and (seed or "faults" in found):
            continue
        if made is None:
            made = learning.batch(learning.samples(samples, 1))
        start = time.time()
        params = learning.train(made, seed, steps)
        row = {"test": learning.figures(params, test), "seconds": round(time.time() - start)}
        row |= {name: learning.figures(params, cell) for name, cell in longer.items()}
        found["seeds"][str(seed)] = row
        print(seed, row, flush=True)
        write_json(RESULT, found)
        if "faults" not in found:
            found["faults"] = faults(params, items, test)
            write_json(RESULT, found)
    if "trained with" not in found:
        made = learning.batch(learning.samples(samples, 1)) if made is None else made
        found["trained with"] = trained_with(made, test, steps)
        write_json(RESULT, found)


def faults(params, items, test) -> dict:
    """A curve for each fault, of parameters that never met one."""
    rng, out = np.random.default_rng(7), {}
    for name in ("noisy", "jittered", "missed"):
        fault = getattr(learning, name)
        out[name] = {level: learning.figures(params, fault(test, rng, level)) for level in LEVELS}
    out["doubled"] = {}
    for level in (0.0, 0.25, 0.5, 1.0):
        changed, whose = learning.doubled(test, rng, level)
        out["doubled"][level] = learning.figures(params, changed, slack=whose)
    out["misparsed"] = {
        level: learning.figures(params, learning.batch(learning.misparsed(items, rng, level))) for level in LEVELS
    }
    out["candidates"] = {
        count: learning.figures(params, learning.batch(learning.samples(1000, 60, objects=(count, count)), count))
        for count in (5, 8, 10, 12, 14, 18)
    }
    return out


def trained_with(made, test, steps) -> dict:
    """The same faults, met in training as well, at one level each."""
    out = {}
    for name, level in (("noisy", 0.1), ("jittered", 0.2), ("missed", 0.1)):
        rng, fault = np.random.default_rng(8), getattr(learning, name)
        params = learning.train(fault(made, rng, level), 0, steps)
        out[f"{name} {level}"] = learning.figures(params, fault(test, rng, level))
        print(name, out, flush=True)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, value in (("seeds", 5), ("steps", 1500), ("samples", 60_000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    main(**vars(parser.parse_args()))
