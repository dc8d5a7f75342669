"""Tasks: what is asked, how the answer is written, read, rewarded and measured. One file a task, host side only.

`Task` (task.py) is the protocol; `TASKS` names the ones of this library, and `module:name` one of another package. Beside its
task a file holds the plain functions that the task is made of, and `PARSERS`: every function that reads model text, as
functions of the text alone. The fuzz test runs them all.

A record is a plain dict. Its coordinates are original pixels; tasks convert them to the frame of the answer.

| field                            | meaning                                                                  |
|----------------------------------|--------------------------------------------------------------------------|
| `id`, `task`, `images`           | identity; a name of `TASKS` or `module:name`; PIL images, paths, arrays  |
| `size`                           | [W, H], pixels of the original image                                     |
| `resized`                        | [w, h], pixels of the image the model sees; equal to `size` when absent  |
| `messages`                       | a conversation; its last turn is the gold answer of the task `chat`      |
| grounding                        | `expression`, `box` [x1, y1, x2, y2]                                     |
| counting                         | `label`, `count`, `points` [[x, y], ..], optional `boxes`                |
| detection                        | `categories` (names asked for), `boxes`, `labels` (names)                |
| ocr                              | `text`, optional `lines` [{"text", "quad"}]                              |
| captioning                       | `caption`, `objects`                                                     |
| tracks, foresight, relations     | see the files                                                            |
"""

import functools
import importlib
import inspect
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from jaxmllm.errors import InputError
from jaxmllm.tasks.task import DIRECTIONS, Task

CHAT = "chat"  # of a record that is a conversation and names no task
TASKS = {
    "grounding": "Grounding",
    "counting": "Counting",
    "detection": "Detection",
    "ocr": "OCR",
    "captioning": "Captioning",
    "tracks": "Tracks",
    "foresight": "Foresight",
    "relations": "Relations",
    CHAT: "Chat",
}


def names() -> tuple[str, ...]:
    """Names of the tasks of this library."""
    return tuple(TASKS)


def module(name: str) -> ModuleType:
    """The file of a task of this library. KeyError for another name."""
    if name not in TASKS:
        raise KeyError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache
def get(name: str) -> Task:
    """A task by its name, with default options: one of `TASKS`, or `module:name`, an object or a class of `Task`.

    InputError for an unknown name, a module that does not import, or a task without the directions of its primary figures.
    """
    if name in TASKS:
        found = getattr(module(name), TASKS[name])()
    else:
        where, _, attribute = name.partition(":")
        if not attribute:
            raise InputError(
                f"task {name!r} is unknown; use one of {', '.join(TASKS)}, or module:name for one of your own"
            )
        try:
            found = getattr(importlib.import_module(where), attribute)
            found = found() if inspect.isclass(found) else found
        except Exception as error:  # a module of somebody else may raise anything
            raise InputError(f"task {name!r} does not import ({type(error).__name__}: {error})") from error
        if not isinstance(found, Task):
            raise InputError(f"task {name!r} is a {type(found).__name__}; give a subclass of jaxmllm.tasks.task.Task")
    for figure in dict.fromkeys((*found.primary, *found.figures)):
        if (way := found.way(figure)) not in DIRECTIONS:
            raise InputError(f"task {name!r}: figures[{figure!r}] is {way!r}; say one of {', '.join(DIRECTIONS)}")
    return found


@functools.lru_cache(maxsize=256)
def _configured(name: str, options: tuple[tuple[str, Any], ...]) -> Task:
    own = {key.removeprefix(f"{name}."): value for key, value in options}
    return get(name).with_options(own)


def name_of(record: Mapping[str, Any]) -> str:
    """The name of a record's task. A conversation's is `chat` unless it names one: a column `task` may be anything there.

    InputError for a record without a task.
    """
    name = record.get("task")
    if "messages" in record and not (isinstance(name, str) and (name in TASKS or ":" in name)):
        return CHAT
    if not isinstance(name, str):
        raise InputError(f"task: {name!r} is unknown; use one of {', '.join(TASKS)}, or give messages")
    return name


def of(record: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> Task:
    """The task of a record, with those of the options that it has; `name.option` is for the task of that name alone.

    InputError for a record without a task, and for a task or a value that is unknown.
    """
    return _configured(name_of(record), tuple(sorted((options or {}).items())))


def check_options(options: Mapping[str, Any], among: Iterable[str] = ()) -> None:
    """Raises InputError for an option that no task has (none of `among`, where these are given), and for a wrong value."""
    chosen = tuple(dict.fromkeys(among)) or names()
    for key, value in options.items():
        name, _, rest = key.rpartition(".") if ":" in key else key.partition(".")
        named = bool(rest) and (name in TASKS or ":" in name)
        takers = [get(name)] if named else [get(task) for task in chosen]
        option = rest if named else key
        if not any(option.partition(".")[0] in task.options() for task in takers):
            known = ", ".join(sorted({own for task in takers for own in task.options()}))
            raise InputError(f"option {key!r} is known to none of {', '.join(chosen)}; known are {known}")
        for task in takers:
            task.with_options({option: value})


def parsed_options(pairs: Iterable[str]) -> dict[str, str]:
    """`name=value` texts as options. InputError for one without a name or a value, or of an option that no task has."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise InputError(f"task option {pair!r}: write name=value")
        options[name] = value
    check_options(options)
    return options
