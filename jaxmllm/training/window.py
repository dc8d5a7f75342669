"""Metrics of the updates between two log lines: means over them, as TRL logs them."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

SUMMED = ("nonfinite",)  # counted, not averaged


def host_scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as floats, fetched together."""
    return {name: float(np.asarray(value)) for name, value in jax.device_get(dict(metrics)).items()}


class Window:
    """Collects the metrics of steps, and counts tokens over all of them, logged or not."""

    def __init__(self, tokens: float = 0.0):
        self.tokens = tokens  # of the whole run
        self._steps: list[Mapping[str, Any]] = []
        self._started: list[tuple[float, float]] = []  # wall and processor time of each
        self._steady: tuple[int, float] | None = None

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a run that goes on logs the means it would have logged: JSON values."""
        return {"tokens": self.tokens, "steps": self._steps}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.tokens, self._steps = state["tokens"], list(state["steps"])

    def begin(self) -> None:
        """A step begins."""
        self._began = time.perf_counter(), time.process_time()

    def add(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """A step is done; its metrics as floats."""
        wall, processor = self._began
        found = host_scalars(metrics)
        found |= {"step_time": time.perf_counter() - wall, "processor_time": time.process_time() - processor}
        self.tokens += found.get("num_tokens", 0.0)
        self._steps.append(found)
        return found

    def close(self, step: int, max_steps: int) -> dict[str, float]:
        """What to log at `step`: means of the steps since the last time, and running totals."""
        rows, self._steps = self._steps, []
        names = dict.fromkeys(name for row in rows for name in row)
        found: dict[str, float] = {}
        for name in names:
            values = np.array([row[name] for row in rows if name in row], np.float64)
            known = values[~np.isnan(values)]
            mean = float(known.mean()) if len(known) else float("nan")
            found[name] = float(values.sum()) if name in SUMMED else mean
        if "num_tokens" in found:
            spent = sum(row["step_time"] for row in rows)
            found["tokens_per_second"] = sum(row.get("num_tokens", 0.0) for row in rows) / max(spent, 1e-9)
            found["num_tokens"] = self.tokens
        now = time.perf_counter()
        if self._steady is not None:  # from the second logged step on: the first one compiles
            found["seconds/left"] = (now - self._steady[1]) / (step - self._steady[0]) * (max_steps - step)
        self._steady = self._steady or (step, now)
        return found
