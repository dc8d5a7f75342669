"""Floating-point operations of a function, counted from its loops: products only, on all devices together.

XLA's cost analysis counts the body of a loop once. Here the traced program is walked, a scan's body counts as often as it
runs, and a rematerialised block counts again where the backward pass runs it again.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params


def count(function: Callable[..., Any], *arguments: Any, steps: int = 1, chosen: float = 1.0) -> float:
    """FLOPs of `function(*arguments)`, arguments being arrays or shapes; a multiplication with its addition is two.

    Args:
        steps: times a `while_loop` whose length is not known runs its body.
        chosen: share of a conditional's runs that take its last branch (the true one); all others take the first.
    """
    return _total(jax.make_jaxpr(function)(*arguments).jaxpr, steps, chosen)


def _total(jaxpr: Any, steps: int, chosen: float) -> float:
    return sum(_equation(equation, steps, chosen) for equation in jaxpr.eqns)


def _equation(equation: Any, steps: int, chosen: float) -> float:
    name, options = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = options["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        raise NotImplementedError("convolutions are not counted; the models have none")
    if name == "scan":
        return options["length"] * _total(options["jaxpr"].jaxpr, steps, chosen)
    if name == "while":
        return steps * _total(options["body_jaxpr"].jaxpr, steps, chosen)
    if name == "cond":
        branches = [_total(branch.jaxpr, steps, chosen) for branch in options["branches"]]
        return (1 - chosen) * branches[0] + chosen * branches[-1]
    return sum(_total(inner, steps, chosen) for inner in jaxprs_in_params(options))
