"""A source as a person writes it, `KIND:PATH?option=value&..`, read once; and its options in the types that they are for."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from jaxmllm.data.sources.registry import KINDS, usage
from jaxmllm.errors import InputError


@dataclasses.dataclass(frozen=True)
class Spec:
    """Where records come from. Options are texts as they were written, or Python values."""

    kind: str  # one of the registry, or module:function
    path: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """Reads `KIND:PATH?options`, or `module:function:PATH?options`. InputError for another form.

        It is read as it stands, not as an address: folders may be named refcoco+.
        """
        head, _, query = text.partition("?")
        kind, colon, path = head.partition(":")
        if not colon:
            raise InputError(f"data {text!r}: {usage()}")
        function, _, rest = path.partition(":")
        if kind not in KINDS and function.isidentifier():  # of another package
            kind, path = f"{kind}:{function}", rest
        pairs = (item.partition("=") for item in query.split("&"))
        return cls(kind, path, tuple((key, value) for key, _, value in pairs if key))

    def with_options(self, **options: Any) -> "Spec":
        """With these options, which win over its own; one that is None is not given."""
        return dataclasses.replace(self, options=tuple({**dict(self.options), **_given(options)}.items()))

    @property
    def name(self) -> str:
        """The spec without its options."""
        return f"{self.kind}:{self.path}"

    def __str__(self) -> str:
        query = "&".join(f"{key}={value}" for key, value in self.options)
        return f"{self.name}?{query}" if query else self.name


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def convert(name: str, value: Any, hint: Any) -> Any:
    """A text of a query as the type that a parameter is annotated with; other values are left alone.

    Tuples are written with commas, or `3-6` and `112x112` for pairs of integers, where one number stands for both.
    """
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not types.NoneType)
    arms = typing.get_args(hint)
    try:
        if hint is bool:
            return {"": True, "1": True, "true": True, "0": False, "false": False}[value.lower()]
        if hint in (int, float):
            number = hint(value)
            if not math.isfinite(number):
                raise ValueError
            return number
        if typing.get_origin(hint) is tuple:
            if arms == (int, int):
                numbers = [int(n) for n in value.replace("-", ",").replace("x", ",").split(",")]
                low, high = numbers * 2 if len(numbers) == 1 else numbers
                return low, high
            if arms != (str, ...):
                raise ValueError
            return tuple(item for item in value.split(",") if item)
        return value
    except (ValueError, KeyError):
        raise InputError(f"{name}: {value!r} does not fit; expected {_describe(hint)}") from None


def _describe(hint: Any) -> str:
    if hint is bool:
        return "true or false"
    if typing.get_origin(hint) is tuple:
        return {(int, int): "two whole numbers like 3-6", (str, ...): "names with commas"}.get(
            typing.get_args(hint), "a value that only Python can give"
        )
    return {int: "a whole number", float: "a number"}.get(hint, "a text")
