"""One row group of the reward hacking table: a reward, an honest answer and the cheap strategies against it.

A task adds its own in a module `tests/support/hacks_<task>.py` that exports `HACKS`, a list of `Hack`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Hack:
    """A reward with the answers to compare.

    Attributes:
        name: task, rules and options, as shown in the table.
        score: the reward of a text, for one fixed record; a dict's "reward" is taken.
        honest: what a good model writes: right, with small errors.
        cheap: strategy -> text written without looking, or with less work than was asked.
        known: strategies of `cheap` that do reach the honest answer, each with its counter.
    """

    name: str
    score: Callable[[str], float | Mapping[str, Any]]
    honest: str
    cheap: Mapping[str, str]
    known: Mapping[str, str] = field(default_factory=dict)

    def value(self, text: str) -> float:
        value = self.score(text)
        return float(value["reward"] if isinstance(value, Mapping) else value)
