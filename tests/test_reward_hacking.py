"""The reward hacking table: what cheap strategies earn beside an honest answer. `pytest -s` prints it.

Groups come from every module `tests/support/hacks_*.py`. A cheap strategy that reaches the honest answer is a bug of the
reward, or is listed with its counter in the group's `known`; an entry there that is no longer true fails as well.
"""

from importlib import import_module
from pathlib import Path

import pytest

HACKS = [
    hack
    for path in sorted(Path(__file__).parent.glob("support/hacks_*.py"))
    for hack in import_module(f"tests.support.{path.stem}").HACKS
]


@pytest.mark.parametrize("hack", HACKS, ids=lambda hack: hack.name)
def test_cheap_strategies_earn_less_than_an_honest_answer(hack):
    honest = hack.value(hack.honest)
    values = {strategy: hack.value(text) for strategy, text in hack.cheap.items()}
    print(f"\n{hack.name}: honest {honest:.3f}")
    for strategy, value in sorted(values.items(), key=lambda item: -item[1]):
        note = f"   counter: {hack.known[strategy]}" if strategy in hack.known else ""
        print(f"  {value:7.3f}  {strategy}{note}")
    winners = {strategy for strategy, value in values.items() if value >= honest}
    assert winners == set(hack.known), f"{hack.name}: honest {honest:.3f}, cheap {values}"
