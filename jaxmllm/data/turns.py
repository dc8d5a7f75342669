"""Chats with pictures in several turns, cut so that every answer of the assistant can be learned.

A completion is text: it cannot hold a picture. A chat is therefore learned in parts, each a chat of its own that ends with
the answers behind one picture, while all that comes before is its prompt:

    user P1 "a?"  assistant "x"  user P2 "b?"  assistant "y"  user "c?"  assistant "z"

    part 0   user P1 "a?"  [assistant "x"]
    part 1   user P1 "a?"  assistant "x"  user P2 "b?"  [assistant "y"  user "c?"  assistant "z"]
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmllm.data.formats import Record, Source
from jaxmllm.data.selection import RecordSource, all_records, image_key, where
from jaxmllm.data.sources import Mixture
from jaxmllm.errors import InputError


def has_pictures(message: Mapping[str, Any]) -> bool:
    """Whether a message has an image or a video."""
    return not isinstance(message["content"], str) and any(part["type"] != "text" for part in message["content"])


def ends(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """How many messages each part has: up to the last answer before the next turn with a picture, and up to the last of all."""
    found: list[int] = []
    last = 0  # messages up to the last answer since a picture was shown
    for k, message in enumerate(messages):
        if has_pictures(message):
            found += [last] * (last > 0)
            last = 0
        elif message["role"] == "assistant" and k:
            last = k + 1
    return found + [last] * (last > 0)


class Turns(Source):
    """The parts of every chat of a source, one after the other. Other records are one part, and so are records of a group."""

    def __init__(self, source: RecordSource, counts: Sequence[int]):
        self.source, self.name = source, getattr(source, "name", "data")
        self.starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Record:
        place, part = self._at(index)
        return _part(self.source[place], part)

    def records(self, index: int) -> list[Record]:
        place, part = self._at(index)
        found = all_records(self.source, place)
        return [_part(found[0], part)] if len(found) == 1 else found

    def image_key(self, index: int) -> Any:
        place, part = self._at(index)
        return image_key(self.source, place), part

    def where(self, index: int) -> str:
        return where(self.source, self._at(index)[0])

    def _at(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"no record {index}, there are {len(self)}")
        place = int(np.searchsorted(self.starts, index, side="right")) - 1
        return place, index - int(self.starts[place])


def _part(record: Record, number: int) -> Record:
    if "messages" not in record or len(found := ends(record["messages"])) < 2:
        return record
    messages = record["messages"][: found[number]]
    parts = [part for message in messages if has_pictures(message) for part in message["content"]]
    cut = {kind + "s": [part[kind] for part in parts if part["type"] == kind] for kind in ("image", "video")}
    return {**record, "messages": messages, **{name: held for name, held in cut.items() if name in record}}


def all_turns(source: RecordSource) -> RecordSource:
    """The source with its chats cut into parts; the source itself where none has pictures in several turns.

    Reads every row of a source of chats once. A row that cannot be read is one part: the pipeline's to judge.
    """
    if isinstance(source, Mixture):
        parts = [all_turns(part) for part in source.sources]
        same = all(a is b for a, b in zip(parts, source.sources, strict=True))
        return source if same else Mixture(parts, source.weights)
    counts = []
    for index in range(len(source)):
        try:
            found = all_records(source, index)
        except InputError:
            counts.append(1)
            continue
        if "messages" not in found[0]:
            return source  # a source has records of one kind
        counts.append(max(len(ends(found[0]["messages"])), 1) if len(found) == 1 else 1)
    return source if sum(counts) == len(source) else Turns(source, counts)
