"""Groups of records that share pictures, weighted mixtures of sources, and the order in which they are drawn."""

import math
import operator
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import grain
import numpy as np

from jaxmllm.data.formats import Record, Source
from jaxmllm.data.selection import RecordSource, all_records, image_key, where
from jaxmllm.errors import InputError

ENDLESS = 2**62  # length of an endless order


class Grouped(Source):
    """The records of the same pictures together: item i is the first record about pictures i, `records(i)` are all of them.

    Reads every row once; a source that knows its images without reading rows (COCO) is grouped at once.
    """

    def __init__(self, source: RecordSource):
        groups: dict[Any, list[int]] = {}
        for index in range(len(source)):
            groups.setdefault(image_key(source, index), []).append(index)
        self.source, self.groups = source, list(groups.values())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Record:
        return self.source[self.groups[index][0]]

    def records(self, index: int) -> list[Record]:
        return [record for i in self.groups[index] for record in all_records(self.source, i)]

    def image_key(self, index: int):
        return image_key(self.source, self.groups[index][0])

    def where(self, index: int) -> str:
        return where(self.source, self.groups[index][0])


class Mixture(Source):
    """Several sources, addressed one after the other; `order` draws from each by its weight.

    Without weights every record is drawn equally often.
    """

    def __init__(self, sources: Sequence[RecordSource], weights: Sequence[float] | None = None):
        if not sources or (weights is not None and len(weights) != len(sources)):
            raise InputError(f"mixture: {len(sources)} sources and {len(weights or ())} weights")
        if weights is not None and not all(math.isfinite(w) and w > 0 for w in weights):
            raise InputError(f"mixture: weights must be positive numbers, got {list(weights)}")
        self.sources = list(sources)
        self.weights = None if weights is None else [float(w) for w in weights]
        self.starts = np.cumsum([0, *map(len, sources)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _at(self, index: int) -> tuple[RecordSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"no record {index}, there are {len(self)}")
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.sources[which], index - int(self.starts[which])

    def __getitem__(self, index: int) -> Record:
        source, index = self._at(index)
        return source[index]

    def records(self, index: int) -> list[Record]:
        return all_records(*self._at(index))

    def image_key(self, index: int):
        source, inner = self._at(index)
        return id(source), image_key(source, inner)

    def where(self, index: int) -> str:
        return where(*self._at(index))


def order(source: RecordSource, seed: int | None) -> grain.MapDataset:
    """Endless indices of `source`, epoch after epoch: shuffled anew in each (`seed`), or in their order (None).

    A mixture is drawn by its weights; each of its sources has epochs of its own.
    """
    if isinstance(source, Mixture) and source.weights is not None:
        parts = [
            order(part, None if seed is None else _seed(seed, k)).map(partial(operator.add, int(source.starts[k])))
            for k, part in enumerate(source.sources)
        ]
        return grain.MapDataset.mix(parts, source.weights)
    if not len(source):
        raise InputError(f"{getattr(source, 'name', 'source')}: it has no records")
    places = grain.MapDataset.range(ENDLESS)
    return places.map(partial(_index, len(source), None if seed is None else _seed(seed, 0)))


def _index(length: int, seed: int | None, place: int) -> int:
    epoch, inside = divmod(place, length)
    return inside if seed is None else int(_permutation(length, seed, epoch)[inside])


@lru_cache(maxsize=32)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """Grain's own shuffle takes milliseconds an index for sources of less than a hundred records.

    From raw words, whose values numpy guarantees; its `permutation` may change between releases.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(length)
    return np.argsort(words, kind="stable").astype(np.int32 if length < 2**31 else np.int64)


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed % 2**64, number]).generate_state(1)[0])
