"""Rewards: plain functions `(text, record) -> float | dict | None`, run on the host, in processes with a time limit.

"task" is the reward of the record's own task; anything else is `module:function`. A function that raises, hangs or returns
something else is an error that names the function and the record: a silent zero would be trained on.
"""

import concurrent.futures
import importlib
import inspect
import math
import multiprocessing
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmllm import tasks
from jaxmllm.errors import InputError

Reward = Callable[[str, Mapping[str, Any]], Any]


def task_reward(text: str, record: Mapping[str, Any], **style: Any) -> Any:
    """The reward of the record's own task, with those options that it knows."""
    reward = tasks.get(record["task"]).reward
    known = inspect.signature(reward).parameters
    return reward(text, record, **{name: value for name, value in style.items() if name in known})


def resolve(name: str) -> Reward:
    """The function a name means. InputError when it does not import or is not callable."""
    if name == "task":
        return task_reward
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"rollout.reward_funcs: {name!r} does not import ({error}); write module:function") from error
    if not callable(function):
        raise InputError(f"rollout.reward_funcs: {name!r} is a {type(function).__name__}, not a function")
    return function


def _parts(value: Any, name: str, record: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    """(total, named parts) of what a reward returned; NaN when it does not apply."""
    if value is None:
        return math.nan, {}
    where = f"reward {name}, record {record.get('id')!r}"
    if isinstance(value, Mapping):
        parts = {key: math.nan if part is None else float(part) for key, part in value.items()}
        if "reward" not in parts:
            raise InputError(f"{where}: its dict lacks the key 'reward'")
        total = parts["reward"]
    elif isinstance(value, numbers.Real):
        total, parts = float(value), {}
    else:
        raise InputError(f"{where}: returned {type(value).__name__}, expected a number, a dict or None")
    if math.isinf(total):
        raise InputError(f"{where}: returned {total}, expected a finite number")
    return total, parts


def _one(name: str, style: dict[str, Any], text: str, record: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    function = resolve(name)
    return _parts(function(text, record, **style) if name == "task" else function(text, record), name, record)


class Rewards:
    """Computes the table of rewards of a rollout.

    `processes` 0 runs them here, without a time limit: right for the library's own rewards, which take microseconds and are
    linear in the text. With processes a worker that outlives `timeout` seconds is killed and the run stops.
    """

    def __init__(self, names: Sequence[str], style: dict[str, Any], *, processes: int = 0, timeout: float = 10.0):
        self.names, self._style, self._processes, self._timeout = tuple(names), style, processes, timeout
        for name in names:
            resolve(name)
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __call__(
        self, texts: Sequence[str], records: Sequence[Mapping[str, Any]]
    ) -> tuple[Float[np.ndarray, "rows K"], list[dict[str, float]]]:
        """Rewards [rows, K], NaN where one does not apply, and each row's named parts.

        Raises InputError naming function and record when a reward raises, hangs or returns something else.
        """
        jobs = [(name, row) for row in range(len(texts)) for name in self.names]
        # pictures stay here: rewards read coordinates and sizes
        lean = [{key: value for key, value in record.items() if key not in ("images", "videos")} for record in records]
        table = np.full((len(texts), len(self.names)), np.nan)
        parts: list[dict[str, float]] = [{} for _ in texts]
        run = self._in_processes if self._processes else self._here
        for (name, row), (total, named) in zip(jobs, run(jobs, texts, lean), strict=True):
            table[row, self.names.index(name)] = total
            parts[row] |= named
        return table, parts

    def _here(self, jobs, texts, records):
        for name, row in jobs:
            try:
                yield _one(name, self._style, texts[row], records[row])
            except InputError:
                raise
            except Exception as error:
                raise self._failed(name, records[row], f"{type(error).__name__}: {error}") from error

    def _in_processes(self, jobs, texts, records):
        if self._pool is None:
            # spawn: a forked copy of a process that runs JAX's threads can deadlock
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(self._processes, mp_context=context)
            list(self._pool.map(_warm, range(self._processes)))
        futures = [self._pool.submit(_one, name, self._style, texts[row], records[row]) for name, row in jobs]
        for (name, row), future in zip(jobs, futures, strict=True):
            try:
                yield future.result(timeout=self._timeout)
            except concurrent.futures.TimeoutError:
                self.close(kill=True)
                raise self._failed(name, records[row], f"no result after {self._timeout:g} s") from None
            except InputError:
                raise
            except Exception as error:
                raise self._failed(name, records[row], f"{type(error).__name__}: {error}") from error

    @staticmethod
    def _failed(name: str, record: Mapping[str, Any], why: str) -> InputError:
        return InputError(f"reward {name} failed on record {record.get('id')!r}: {why}")

    def close(self, kill: bool = False) -> None:
        if self._pool is not None:
            workers = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=not kill, cancel_futures=True)
            for worker in workers if kill else ():
                worker.kill()
            self._pool = None


def _warm(_: int) -> None:
    """Runs once in each worker, so that importing is not counted against the first reward's time."""
