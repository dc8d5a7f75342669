"""Records by index, and parts of sources: samples, and the records that a file of scores keeps."""

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxmllm.data.formats import Record, Source, choose
from jaxmllm.data.rows import Rows, existing
from jaxmllm.errors import InputError


@runtime_checkable
class RecordSource(Protocol):
    """What the pipeline reads. A source may also have `records(index)`: several records of one image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def all_records(source: RecordSource, index: int) -> list[Record]:
    """The records that share image `index`; one where the source knows no groups."""
    return source.records(index) if hasattr(source, "records") else [source[index]]


def image_key(source: RecordSource, index: int) -> Any:
    """Equal for records of the same image; a source that does not know has one image a record."""
    return source.image_key(index) if hasattr(source, "image_key") else index


def where(source: RecordSource, index: int) -> str:
    """How messages name a record."""
    return source.where(index) if hasattr(source, "where") else f"record {index}"


class Subset(Source):
    """The records of `source` at `indices`, in that order."""

    def __init__(self, source: RecordSource, indices: Sequence[int] | np.ndarray):
        self.source, self.indices = source, np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[self._at(index)]

    def records(self, index: int) -> list[Record]:
        return all_records(self.source, self._at(index))

    def image_key(self, index: int):
        return image_key(self.source, self._at(index))

    def where(self, index: int) -> str:
        return where(self.source, self._at(index))

    def _at(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"no record {index}, there are {len(self)}")
        return int(self.indices[index])


def sample(source: RecordSource, strategy: str, seed: int = 0) -> RecordSource:
    """Perception-R1's sampling strategies: all, first:N, end:N, random:N; N a number, or a percentage rounded up."""
    kind, _, amount = strategy.partition(":")
    if kind == "all" and not amount:
        return source
    choose(kind, ("first", "end", "random"), "sample")
    number, percent = amount.removesuffix("%"), amount.endswith("%")
    try:
        wanted = float(number) if percent else int(number)
    except ValueError:
        wanted = -1
    if not 0 <= wanted < math.inf:
        raise InputError(f"sample: {strategy!r} is unknown; use all, or first, end or random with :N or :N%")
    total = len(source)
    count = min(math.ceil(wanted * total / 100) if percent else int(wanted), total)
    if kind == "random":
        indices = np.random.default_rng(seed).permutation(total)[:count]
    else:
        indices = np.arange(total)[:count] if kind == "first" else np.arange(total)[total - count :]
    return Subset(source, indices)


def kept(source: RecordSource, path: str) -> RecordSource:
    """The records that a file of scores keeps: JSON lines {"index", "id", "keep"}, made of the same source.

    Raises InputError where the file names records that the source does not hold: of the first kept one the id is compared.
    """
    file = Rows(existing(path))
    rows = [file[k] for k in range(len(file))]
    try:
        found = {int(row["index"]): row["id"] for row in rows if row["keep"]}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: expected lines with index, id and keep ({error})") from None
    if found and (max(found) >= len(source) or source[first := min(found)].get("id") != found[first]):
        raise InputError(f"{path}: it was made of another source; score this one with jaxmllm tpl --out")
    return Subset(source, list(found))
