"""What a process of the rewards runs: finds a reward function and calls it. Without jax, so that it starts at once."""

import importlib
import inspect
import math
import multiprocessing
import numbers
import os
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

from jaxmllm import tasks
from jaxmllm.errors import InputError

Reward = Callable[[str, Mapping[str, Any]], Any]


def task_reward(
    text: str,
    record: Mapping[str, Any],
    by_task: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({}),
    **style: Any,
) -> Any:
    """The reward of the record's own task, with those options that it knows, and those of `by_task` that are its own."""
    reward = tasks.get(record["task"]).reward
    known = inspect.signature(reward).parameters
    options = {name: value for name, value in style.items() if name in known}
    return reward(text, record, **options, **by_task.get(record["task"], {}))


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


def call(name: str, style: dict[str, Any], text: str, record: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    """(total, named parts) of one completion. InputError for a result that is no reward."""
    function = resolve(name)
    return _parts(function(text, record, **style) if name == "task" else function(text, record), name, record)


def warm(_: int) -> None:
    """Runs once in each worker, so that importing is not counted against the first reward's time."""


def end_with_parent() -> None:
    """Ends this worker when the run is gone: a killed one cannot tell it to, and the pool's own pipes stay open."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
