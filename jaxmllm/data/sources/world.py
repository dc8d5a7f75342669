"""`world:TASK`: the procedural world, one task or several with weights."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from jaxmllm.data.formats import choose
from jaxmllm.data.selection import RecordSource
from jaxmllm.data.sources.registry import register
from jaxmllm.data.sources.spec import convert
from jaxmllm.errors import InputError
from jaxmllm.world.source import DEFAULT_SPECS, WorldSource


@register("world")
def open_world(
    path: str,
    task: str | None = None,
    split: str = "train",
    seed: int = 0,
    length: int = 100_000,
    questions: int = 1,
    twins: bool = False,
    **spec: Any,
) -> RecordSource:
    """`path` is one task, or several with weights: `grounding:3,counting`. `spec`: fields of the world's spec."""
    if task and path:
        raise InputError(f"world: tasks are given twice, {path!r} and task={task!r}")
    weights: dict[str, float] = {}
    for item in (path or task or "").split(","):
        name, _, weight = item.partition(":")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise InputError(f"world: weight {weight!r} of {name!r} is no number") from None
    first = choose(next(iter(weights)), DEFAULT_SPECS, "world: task")
    base = DEFAULT_SPECS[first]
    scene = getattr(base, "scene", None)  # of a clip's first frame
    parts = [part for part in (base, scene) if part is not None]
    for key in spec:
        choose(key, [field.name for part in parts for field in dataclasses.fields(part)], "world: option")
    if scene is not None:
        base = dataclasses.replace(base, scene=_with_options(scene, spec))
    base = _with_options(base, spec)
    return WorldSource(weights, split=split, seed=seed, length=length, spec=base, questions=questions, twins=twins)


def _with_options(base: Any, options: Mapping[str, Any]) -> Any:
    """A spec of the world with those options that are its fields."""
    hints = typing.get_type_hints(type(base))
    return dataclasses.replace(
        base, **{k: convert(f"world: {k}", v, hints[k]) for k, v in options.items() if k in hints}
    )
