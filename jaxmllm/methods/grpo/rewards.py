"""Rewards: plain functions `(text, record) -> float | dict | None`, run on the host, in processes with a time limit.

"task" is the reward of the record's own task, "soft_overlong" and "repetition" judge the tokens alone; anything else is
`module:function` or `file.py:function`. A function that raises, hangs or returns something else is an error that names the
function and the record, unless the run is told to go on without that one reward: a silent zero would be trained on.
"""

import concurrent.futures
import contextlib
import logging
import math
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from jaxmllm.errors import InputError
from jaxmllm.methods.grpo import reward_calls
from jaxmllm.methods.grpo.advantages import repetition_penalty, soft_overlong_punishment

if TYPE_CHECKING:
    from jaxmllm.methods.grpo.method import GRPO

log = logging.getLogger(__name__)
OfTokens = Callable[[Sequence[Sequence[int]]], Sequence[float]]  # token ids of all rows -> a reward for each
FOREIGN_PROCESSES = 2  # for functions of others, unless the config says


def of_tokens(method: "GRPO") -> dict[str, OfTokens]:
    """The rewards that read token ids, end token included, by name (grpo.md section 8)."""
    limit = method.max_completion_length or 0

    def soft_overlong(rows: Sequence[Sequence[int]]) -> list[float]:
        return soft_overlong_punishment([len(row) for row in rows], limit, method.soft_punish_cache)

    def repetition(rows: Sequence[Sequence[int]]) -> list[float]:
        return repetition_penalty(rows, method.repetition_n_grams, method.repetition_max_penalty)

    return {"soft_overlong": soft_overlong, "repetition": repetition}


def of_method(method: "GRPO", task_options: Mapping[str, Any]) -> "Rewards":
    """The rewards of a run. InputError when a function does not import.

    `task_options`: of the run's tasks, besides those that the method decides.
    """
    options = {"rules": method.reward_rules, "matching": method.reward_matching, **task_options}
    return Rewards(
        method.reward_funcs,
        options,
        of_tokens=of_tokens(method),
        processes=method.reward_processes,
        timeout=method.reward_timeout,
        skip_errors=method.reward_errors == "skip",
    )


@contextlib.contextmanager
def _apart_from_this_process() -> Iterator[None]:
    """Processes that begin in the block do not run the main script again, and get no SIGINT or SIGTERM.

    A signal to the whole group (Ctrl-C, a scheduler's) would end them before the run could save. A mask is inherited, where a
    handler would be installed too late; a signal that comes meanwhile is delivered afterwards.
    """
    main = sys.modules["__main__"]
    hidden = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        for name in hidden:
            setattr(main, name, None)
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class Rewards:
    """Computes the table of rewards of a rollout.

    `processes` 0 runs them here, without a time limit: right for the library's own rewards, which take microseconds and are
    linear in the text. With processes (None: `FOREIGN_PROCESSES` where a function is not the library's) a worker that
    outlives `timeout` seconds is killed. A reward that fails stops the run; with `skip_errors` it does not apply to that
    completion, and is counted in `failed`.
    """

    def __init__(
        self,
        names: Sequence[str],
        options: dict[str, Any],
        *,
        of_tokens: Mapping[str, OfTokens] | None = None,
        processes: int | None = 0,
        timeout: float = 10.0,
        skip_errors: bool = False,
    ):
        self.names, self._options, self._timeout, self._skip = tuple(names), options, timeout, skip_errors
        self._of_tokens = {name: f for name, f in (of_tokens or {}).items() if name in self.names}
        self._of_text = [name for name in self.names if name not in self._of_tokens]
        for name in self._of_text:
            reward_calls.resolve(name)
        foreign = any(name != "task" for name in self._of_text)
        self._processes = (FOREIGN_PROCESSES if foreign else 0) if processes is None else processes
        self.failed = 0  # rewards of the last call that did not come
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __call__(
        self,
        texts: Sequence[str],
        records: Sequence[Mapping[str, Any]],
        tokens: Sequence[Sequence[int]] = (),
    ) -> tuple[Float[np.ndarray, "rows K"], list[dict[str, float]]]:
        """Rewards [rows, K], NaN where one does not apply, and each row's named parts. `tokens`: ids with the end token.

        Raises InputError naming function and record when a reward raises or hangs (see the class) or returns something else.
        """
        jobs = [(name, row) for row in range(len(texts)) for name in self._of_text]
        # pictures stay here: rewards read coordinates and sizes
        lean = [{key: value for key, value in record.items() if key not in ("images", "videos")} for record in records]
        table = np.full((len(texts), len(self.names)), np.nan)
        parts: list[dict[str, float]] = [{} for _ in texts]
        self.failed = 0
        run = self._in_processes if self._processes else self._here
        for (name, row), (total, named) in zip(jobs, run(jobs, texts, lean), strict=True):
            table[row, self.names.index(name)] = total
            parts[row] |= named
        for name, function in self._of_tokens.items():
            table[:, self.names.index(name)] = function(tokens)
        return table, parts

    def of_answers(
        self, texts: Sequence[str], records: Sequence[Mapping[str, Any]], weights: Sequence[float] | None
    ) -> list[dict[str, float]]:
        """Figures of each answer in an evaluation: `reward`, the weighted sum of the rewards that apply, and each of several
        as `reward_<function>`. Rewards that read tokens have none.
        """
        if not self._of_text:
            return [{} for _ in texts]
        table, _ = self(texts, records, tokens=[[0]] * len(texts))
        columns = {name: self.names.index(name) for name in self._of_text}
        scale = np.ones(len(self.names)) if weights is None else np.asarray(weights, np.float64)
        figures: list[dict[str, float]] = []
        for row in table:
            known = {name: float(row[k]) for name, k in columns.items() if np.isfinite(row[k])}
            total = {"reward": sum(scale[columns[name]] * value for name, value in known.items())} if known else {}
            several = {f"reward_{name.rpartition(':')[2]}": value for name, value in known.items()}
            figures.append(total | (several if len(columns) > 1 else {}))
        return figures

    def _here(self, jobs, texts, records):
        for name, row in jobs:
            try:
                yield reward_calls.call(name, self._options, texts[row], records[row])
            except InputError:
                raise
            except reward_calls.RewardFailed as error:
                yield self._missed(name, records[row], str(error), error)

    def _in_processes(self, jobs, texts, records):
        futures = self._submit(jobs, texts, records)
        for number, (name, row) in enumerate(jobs):
            try:
                # everything before this one is done, so it is being worked on: what is waited is its own time
                yield futures[number].result(timeout=self._timeout)
            except InputError:
                raise
            except (TimeoutError, concurrent.futures.BrokenExecutor) as error:
                why = (
                    "a process of the rewards died"
                    if futures[number].done()
                    else f"no result after {self._timeout:g} s"
                )
                self.close(kill=True)
                yield self._missed(name, records[row], why, error)
                futures[number + 1 :] = self._submit(jobs[number + 1 :], texts, records)
            except reward_calls.RewardFailed as error:
                yield self._missed(name, records[row], str(error), error)

    def _submit(self, jobs, texts, records):
        if self._pool is None:
            # spawn: a forked copy of a process that runs JAX's threads can deadlock
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._processes, mp_context=context, initializer=reward_calls.prepare, initargs=(self._of_text,)
            )
            with _apart_from_this_process():
                ready = self._pool.map(reward_calls.warm, range(self._processes))
            list(ready)
        return [
            self._pool.submit(reward_calls.call, name, self._options, texts[row], records[row]) for name, row in jobs
        ]

    def _missed(
        self, name: str, record: Mapping[str, Any], why: str, error: Exception
    ) -> tuple[float, dict[str, float]]:
        """What stands for a reward that did not come: NaN, or InputError."""
        message = f"reward {name} failed on record {record.get('id')!r}: {why}"
        if not self._skip:
            raise InputError(message) from error
        log.warning("left out: %s", message)
        self.failed += 1
        return math.nan, {}

    def close(self, kill: bool = False) -> None:
        if self._pool is not None:
            workers = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=not kill, cancel_futures=True)
            for worker in workers if kill else ():
                worker.kill()
            self._pool = None
