"""Flags as people write them, said again as tyro reads them; and the numbers among them."""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxmllm.errors import InputError

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def flag_types(of: Any, prefix: str = "") -> dict[str, Any]:
    """Type of every flag: of a function's parameters, or of a dataclass's fields and those of the dataclasses in it."""
    kind = of if isinstance(of, type | types.FunctionType) else type(of)
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        value = getattr(of, name, None)
        if dataclasses.is_dataclass(value):
            found |= flag_types(value, f"{prefix}{name}.")
        elif typing.get_origin(hint) is not typing.ClassVar and name != "return":
            found[prefix + name] = hint
    return found


def spelled(arguments: Sequence[str], kinds: Mapping[str, Any]) -> list[str]:
    """`arguments` as tyro takes them: `--export False` as `--no-export`, `--a 1 --a 2` of a list as `--a 1 2`.

    InputError for a switch with another value. Of a flag that takes one value the last one counts, as everywhere.
    """
    segments: list[list[str]] = [[]]  # a flag and what follows it
    lists: dict[str, list[str]] = {}
    for argument in arguments:
        if not argument.startswith("--"):
            segments[-1].append(argument)
            continue
        flag, equals, value = argument.partition("=")
        name = flag[2:].replace("-", "_")
        segment = [flag, value] if equals else [flag]
        if name in lists:  # go on with its earlier values
            segments.remove(lists[name])
            segment = lists[name] + segment[1:]
        if _is_list(kinds.get(name)):
            lists[name] = segment
        segments.append(segment)
    return [word for segment in segments for word in _switch(segment, kinds)]


def _is_list(kind: Any) -> bool:
    arms = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return any(typing.get_origin(arm) is tuple and typing.get_args(arm)[1:] == (...,) for arm in arms)


def _switch(segment: list[str], kinds: Mapping[str, Any]) -> list[str]:
    if len(segment) < 2 or kinds.get(segment[0][2:].replace("-", "_")) is not bool:
        return segment
    flag, value, *rest = segment
    if value.lower() not in TRUE + FALSE:
        raise InputError(f"{flag} {value}: write true or false")
    group, dot, name = flag[2:].rpartition(".")
    return [flag if value.lower() in TRUE else f"--{group}{dot}no-{name}", *rest]


def numbers(of: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a dataclass, its dataclasses and tuples, by the flag that sets it."""
    if isinstance(of, int | float) and not isinstance(of, bool):
        yield prefix, of
    elif dataclasses.is_dataclass(of):
        for field in dataclasses.fields(of):
            yield from numbers(getattr(of, field.name), f"{prefix}.{field.name}" if prefix else field.name)
    elif isinstance(of, tuple | list):
        for value in of:
            yield from numbers(value, prefix)
