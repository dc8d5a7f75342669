"""What a process of the rewards runs: finds a reward function and calls it. Without jax, so that it starts at once."""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import math
import multiprocessing
import numbers
import os
import sys
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from jaxmllm import tasks
from jaxmllm.errors import InputError

Reward = Callable[[str, Mapping[str, Any]], Any]
LARGEST = 3.4e38  # a reward is a float32 once it is in the table


class RewardFailed(Exception):
    """What a reward function raised, in words: its own exception may not survive the way between processes."""


def task_reward(text: str, record: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> Any:
    """The reward of the record's own task, with those options that it has."""
    return tasks.of(record, options).reward(text, record)


def total_reward(style: str, thinking: bool = False) -> Callable[[str, Mapping[str, Any]], float | None]:
    """The reward of a record's task, without its parts; None where it does not apply."""

    def total(text: str, record: Mapping[str, Any]) -> float | None:
        value = task_reward(text, record, {"style": style, "thinking": thinking})
        return value["reward"] if isinstance(value, Mapping) else value

    return total


def named(function: str | Reward) -> str:
    """The name that `resolve` finds a function by: `module:function`, or `file.py:function` where no module has it.

    InputError for a function without a name of its own.
    """
    if isinstance(function, str):
        return function
    name, module = getattr(function, "__qualname__", ""), sys.modules.get(getattr(function, "__module__", ""))
    if not name.isidentifier() or not hasattr(function, "__code__"):
        raise InputError(f"reward_funcs: {function!r}: give a function that is defined by `def` at the top of a file")
    if module is not None and module.__name__ != "__main__" and getattr(module, name, None) is function:
        return f"{module.__name__}:{name}"
    file = Path(function.__code__.co_filename)
    if not file.is_file():  # of a notebook: known in this process alone
        return f"__main__:{name}"
    return f"{os.path.relpath(file) if file.is_relative_to(Path.cwd()) else file}:{name}"


@functools.cache
def resolve(name: str) -> Reward:
    """The function a name means: "task", `module:function` or `file.py:function`.

    InputError when it is not found, is not callable or takes other arguments than (text, record). Modules and files are looked
    for on Python's path, which has the config's folder and the current one.
    """
    if name == "task":
        return task_reward
    module, _, attribute = name.rpartition(":")
    try:
        owner = _of_file(module) if module.endswith(".py") else importlib.import_module(module)
        function = getattr(owner, attribute)
    except Exception as error:  # a module of somebody else may raise anything
        looked = ", ".join(dict.fromkeys(path or os.getcwd() for path in sys.path if not path.endswith(".zip")))
        raise InputError(
            f"reward_funcs: {name!r} does not import ({type(error).__name__}: {error}); write module:function or "
            f"file.py:function. Looked in {looked}"
        ) from error
    if not callable(function):
        raise InputError(f"reward_funcs: {name!r} is a {type(function).__name__}, not a function")
    if inspect.iscoroutinefunction(function):
        raise InputError(f"reward_funcs: {name!r} is async; a reward is a plain function (text, record) -> number")
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin without one
        return function
    try:
        signature.bind("text", {})
    except TypeError:
        raise InputError(
            f"reward_funcs: {name!r} takes {signature}; a reward takes (text, record), one completion at a time"
        ) from None
    return function


def _of_file(name: str) -> types.ModuleType:
    file = next((at for folder in ("", *sys.path) if (at := Path(folder) / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no file {name}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _number(value: Any) -> float:
    """A Python, numpy or jax number, a bool or a Decimal as a float. TypeError for anything else."""
    if isinstance(value, numbers.Real | Decimal):
        return float(value)
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:  # numpy's and jax's
        return _number(value.item())
    raise TypeError(type(value).__name__)


def _parts(value: Any, name: str, record: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    """(total, named parts) of what a reward returned; NaN when it does not apply."""
    if value is None:
        return math.nan, {}
    where = f"reward {name}, record {record.get('id')!r}"
    parts: dict[str, float] = {}
    if isinstance(value, Mapping):
        for key, part in value.items():
            try:
                parts[str(key)] = math.nan if part is None else _number(part)
            except TypeError as error:
                raise InputError(f"{where}: its part {key!r} is a {error}, expected a number or None") from None
        if "reward" not in parts:
            raise InputError(f"{where}: its dict lacks the key 'reward', it has {', '.join(map(repr, parts))}")
        total = parts["reward"]
    else:
        try:
            total = _number(value)
        except TypeError as error:
            raise InputError(f"{where}: returned {error}, expected a number, a dict or None") from None
    if abs(total) > LARGEST:
        raise InputError(f"{where}: returned {total}, expected a finite number")
    return total, parts


def call(name: str, options: dict[str, Any], text: str, record: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    """(total, named parts) of one completion. InputError for a result that is no reward, RewardFailed for one that raised."""
    function = resolve(name)
    try:
        value = task_reward(text, record, options) if name == "task" else function(text, record)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardFailed(f"{type(error).__name__}: {error}") from None
    return _parts(value, name, record)


def warm(_: int) -> None:
    """Runs once a worker is ready, so that importing is not counted against the first reward's time."""


def prepare(names: Sequence[str]) -> None:
    """Runs in a worker before anything else: imports the functions, and ends when the run is gone.

    A killed run cannot tell its workers, and the pool's own pipes stay open.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    for name in names:
        with contextlib.suppress(InputError):  # said where it is called
            resolve(name)
