"""Training methods. One file or folder each; `METHODS` in names.py is the only list of them.

A method from outside the package is named `module:Class`; see CONTRIBUTING.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxmllm.errors import InputError
from jaxmllm.methods.names import METHODS

if TYPE_CHECKING:
    from jaxmllm.methods.method import Method

_CLASSES = {target.partition(":")[2]: target for target in METHODS.values()}


def get(name: str) -> type[Method]:
    """The class of a method by its name here, or of `module:Class`. InputError where there is none."""
    from jaxmllm.methods.method import Method

    target = METHODS.get(name, name)
    module, _, attribute = target.partition(":")
    if not attribute:
        raise InputError(f"method {name!r}: unknown; use one of {', '.join(METHODS)}, or module:Class")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"method {name!r} does not import ({error}); write module:Class") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise InputError(f"method {name!r}: not a subclass of jaxmllm.methods.method.Method")
    return found


def __getattr__(name: str) -> Any:
    """`from jaxmllm.methods import GRPO`: imported on first use, so that reward processes never load jax."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _CLASSES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
