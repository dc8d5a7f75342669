"""Dispatcher for the specification vectors: maps the sheets' function and field names to the library.

One module per sheet holds the mapping; no formula lives here or there.
"""

from tests.support import (
    vectors_gitm_mr,
    vectors_grpo,
    vectors_merlin,
    vectors_perception_r1,
    vectors_reper,
    vectors_utr,
)

FUNCTIONS = {}
for _sheet in (vectors_gitm_mr, vectors_grpo, vectors_merlin, vectors_perception_r1, vectors_reper, vectors_utr):
    _clash = FUNCTIONS.keys() & _sheet.FUNCTIONS.keys()
    if _clash:
        raise ValueError(f"{_sheet.__name__} redefines {sorted(_clash)}")
    FUNCTIONS |= _sheet.FUNCTIONS


def evaluate(function: str, inputs):
    """Result of one vector; a list of argument objects gives a list of results where the function is per item."""
    if function not in FUNCTIONS:
        raise KeyError(f"no function {function!r}; known: {sorted(FUNCTIONS)}")
    return FUNCTIONS[function](inputs)
