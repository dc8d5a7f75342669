"""Counter-based random numbers, and the rule that keeps the splits apart.

Every item of the world draws from its own Philox stream, addressed by (seed, split, index, purpose, attempt) and not by
what was drawn before, so item i is the same in any order, process and machine. Only the raw 64-bit words of Philox are
used, whose values numpy guarantees; numpy's distributions may change between releases.

Splits are disjoint by content, not only by stream: each item has a signature, a hash of what is on the picture, and
the signature alone says to which split the item belongs (8 of 10 train, 1 val, 1 test). A generator draws until the
signature suits the wanted split. So no training picture, of any seed or length, has the content of a test picture.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np
from jaxtyping import Int, UInt, UInt8

from jaxmllm.errors import InputError

SPLITS = ("train", "val", "test")
_SPLIT_OF_RESIDUE = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 2])  # index into SPLITS by signature residue
_BLOCK = 64  # words fetched at a time
_T = TypeVar("_T")

# Purposes: independent streams of one item.
CONTENT, PIXELS, QUESTIONS, EVENT = 0, 1, 2, 3


def check_split(split: str) -> str:
    """Returns `split`. Raises InputError if it is none of SPLITS."""
    if split not in SPLITS:
        raise InputError(f"split: {split!r} is unknown; use one of {', '.join(SPLITS)}")
    return split


class Stream:
    """Random numbers of one item; `purpose` and `attempt` name independent streams of the same item."""

    def __init__(self, seed: int, split: str, index: int, purpose: int = CONTENT, attempt: int = 0):
        self._key = (seed % 2**64, SPLITS.index(split))
        self._counter = (0, attempt, index, purpose)  # Philox counts up in word 0: streams are 2**64 blocks apart
        self._words: list[int] = []

    @cached_property
    def _bits(self) -> np.random.Philox:
        # made on first use: it costs as much as drawing a shape, and many streams are never asked
        return np.random.Philox(key=np.array(self._key, np.uint64), counter=np.array(self._counter, np.uint64))

    def _word(self) -> int:
        if not self._words:
            self._words = self._bits.random_raw(_BLOCK).tolist()
        return self._words.pop()

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * ((self._word() >> 11) * 2.0**-53)

    def integer(self, low: int, high: int) -> int:
        """An integer in low..high, both included."""
        return low + ((self._word() * (high - low + 1)) >> 64)

    def integers(self, low: int, high: int, n: int) -> Int[np.ndarray, "n"]:
        """n integers in low..high, both included; the range must be below 2**32."""
        words = self._bits.random_raw(n) >> np.uint64(32)
        return low + ((words * np.uint64(high - low + 1)) >> np.uint64(32)).astype(np.int64)

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.uniform() < probability

    def choice(self, options: Sequence[_T]) -> _T:
        """One of the options, each as likely."""
        return options[self.integer(0, len(options) - 1)]

    def shuffled(self, options: Sequence[_T]) -> list[_T]:
        """The options in random order."""
        items = list(options)
        for i in range(len(items) - 1, 0, -1):
            j = self.integer(0, i)
            items[i], items[j] = items[j], items[i]
        return items

    def generator(self) -> np.random.Generator:
        """numpy's generator on these bits, for functions that want one; its distributions may vary with numpy."""
        return np.random.Generator(self._bits)

    def bytes(self, n: int) -> UInt8[np.ndarray, "n"]:
        """n random bytes."""
        return self._bits.random_raw(-(-n // 8)).astype("<u8").view(np.uint8)[:n]


def mix(values: UInt[np.ndarray, "*n"]) -> UInt[np.ndarray, "*n"]:
    """A hash of 64-bit words, element by element (the finaliser of splitmix64)."""
    z = np.asarray(values, np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def split_index(signature: UInt[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
    """The split of each signature, as an index into SPLITS."""
    return _SPLIT_OF_RESIDUE[(np.asarray(signature, np.uint64) >> np.uint64(33)) % np.uint64(10)]
