"""A command as a function that tells what it would be called with."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


def gathered(function: Callable[..., Any], **defaults: Any) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """A function with the parameters of `function`, and these defaults, that returns what it is called with."""

    @functools.wraps(function)
    def gather(*positional: Any, **values: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return positional, values

    signature = inspect.signature(function)
    parameters = [p.replace(default=defaults.get(name, p.default)) for name, p in signature.parameters.items()]
    gather.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return gather
