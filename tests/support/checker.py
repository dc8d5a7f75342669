"""The run-time type checker of the tests: beartype on functions, nothing on dataclasses.

A checked `__init__` would break `jax.tree.map`, which rebuilds dataclasses with anything as leaves.
"""

from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def check(function):
    return function if function.__name__ == "__init__" else _beartype(function)
