"""Confidence intervals by the percentile bootstrap, for any figure that is a function of how often each record counts.

A *statistic* maps counts [R, N] (R resamples of N records) to figures [R, K]; counts of 1 give the figure itself. So a
value and its interval come from one function, and two runs over the same records are compared by the same resamples.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

Statistic = Callable[[Int[np.ndarray, "R N"]], Float[np.ndarray, "R K"]]

CONFIDENCE, RESAMPLES = 0.95, 1000
_CHUNK = 1 << 22  # counts held at a time


@dataclass(frozen=True)
class Interval:
    """A figure and its confidence interval; None where there is no interval."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        text = _short(self.value)
        return text if self.low is None or self.high is None else f"{text} [{_short(self.low)}, {_short(self.high)}]"


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def resample(n: int, n_resamples: int = RESAMPLES, seed: int = 0) -> Iterator[Int[np.ndarray, "R N"]]:
    """Counts of `n_resamples` draws of n records out of n with replacement, in chunks; equal for equal arguments."""
    rng = np.random.default_rng(seed)
    done = 0
    while done < n_resamples:
        rows = min(max(_CHUNK // n, 1), n_resamples - done)
        drawn = rng.integers(0, n, (rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        done += rows


def value_and_samples(
    statistic: Statistic, n: int, n_resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Float[np.ndarray, "K"], Float[np.ndarray, "R K"]]:
    """The figures of n records, and of each resample of them."""
    value = statistic(np.ones((1, n), np.int64))[0]
    return value, np.concatenate([statistic(counts) for counts in resample(n, n_resamples, seed)])


def percentiles(
    value: Float[np.ndarray, "K"], samples: Float[np.ndarray, "R K"], confidence: float = CONFIDENCE
) -> list[Interval]:
    """Interval of each figure: the middle `confidence` of its samples. NaN samples (nothing to count) are left out."""
    out = []
    for point, column in zip(value, samples.T, strict=True):
        column = column[np.isfinite(column)]
        if not len(column):
            out.append(Interval(float(point)))
            continue
        low, high = np.quantile(column, [(1 - confidence) / 2, (1 + confidence) / 2])
        out.append(Interval(float(point), float(low), float(high)))
    return out


def ratio(top: Float[np.ndarray, "N K"], bottom: Float[np.ndarray, "N K"]) -> Statistic:
    """Statistic sum(count x top) / sum(count x bottom); a mean has bottom 1. NaN where the bottom sums to 0."""

    def statistic(counts: Int[np.ndarray, "R N"]) -> Float[np.ndarray, "R K"]:
        weights = counts.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights @ top) / (weights @ bottom)

    return statistic


def by_unit(statistic: Statistic, units: Sequence[Hashable]) -> tuple[Statistic, int]:
    """(a statistic of counts of units, how many units there are): the records of a unit are drawn together."""
    places: dict[Hashable, int] = {}
    owner = np.array([places.setdefault(unit, len(places)) for unit in units], np.int64)
    if len(places) == len(units):
        return statistic, len(units)
    return lambda counts: statistic(counts[:, owner]), len(places)
