"""The kinds of sources. Each file of this folder registers its own; one of another package is `module:function`."""

import importlib
from collections.abc import Callable
from typing import TypeVar

from jaxmllm.data.selection import RecordSource
from jaxmllm.errors import InputError

Opener = Callable[..., RecordSource]  # (path, **options); options come in the types of its annotations
KINDS: dict[str, Opener] = {}
F = TypeVar("F", bound=Opener)


def register(kind: str) -> Callable[[F], F]:
    """A decorator: the function opens sources of this kind."""

    def remember(opener: F) -> F:
        KINDS[kind] = opener
        return opener

    return remember


def usage() -> str:
    """How a source is written, for messages."""
    return f"write KIND:PATH with one of the kinds {', '.join(KINDS)}, or module:function:PATH"


def opener(kind: str, spec: str) -> Opener:
    """The function that opens a kind, or `module:function`. InputError, naming the spec, where there is none."""
    if kind in KINDS:
        return KINDS[kind]
    module, colon, function = kind.partition(":")
    if not colon:
        raise InputError(f"data {spec!r}: {usage()}")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module of somebody else may raise anything
        raise InputError(
            f"data {spec!r}: {kind} does not import ({type(error).__name__}: {error}); {usage()}"
        ) from error
    if not callable(found):
        raise InputError(
            f"data {spec!r}: {kind} is a {type(found).__name__}, not a function (path, **options) -> records"
        )
    return found
