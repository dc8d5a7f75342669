"""Floating-point operations of a function, counted from its loops: products only, on all devices together.

XLA's cost analysis counts the body of a loop once. Here the traced program is walked, a scan's body counts as often as it
runs, and a rematerialised block counts again where the backward pass runs it again.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

BLOCKS = re.compile(r"splash_(\d+)_blocks_of_(\d+)")  # a name scope of jaxmllm.model.splash
BLOCK_PRODUCTS = {"splash_mqa_fwd": 2, "splash_mqa_dq": 3, "splash_mqa_dkv": 4}  # of one block of scores in each kernel


def kernel_blocks(kernel: str, scopes: str) -> tuple[int, int, int]:
    """Of a fused attention kernel: blocks of scores that it computes, their side, products of each; (0, 0, 0) of another."""
    products = next((n for name, n in BLOCK_PRODUCTS.items() if kernel.startswith(name)), 0)
    found = BLOCKS.search(scopes)
    return (int(found[1]), int(found[2]), products) if products and found else (0, 0, 0)


def cudnn_products(query: Sequence[int], keys: Sequence[int], causal: bool, backward: bool) -> float:
    """FLOPs of cuDNN's fused attention; `query` [B, X, N, H] and `keys` [B, Y, K, H] are shapes.

    Forward: scores and values. Backward: scores again and the gradients of weights, queries, keys and values. Of a causal one
    only the pairs that meet are counted; its kernels skip the blocks of the others.
    """
    rows, length, heads, width = query
    pairs = length * (length + 1) // 2 if causal else length * keys[1]
    return 2.0 * (5 if backward else 2) * rows * heads * pairs * width


def count(function: Callable[..., Any], *arguments: Any, steps: int = 1, chosen: float = 1.0) -> float:
    """FLOPs of `function(*arguments)`, arguments being arrays or shapes; a multiplication with its addition is two.

    Args:
        steps: times a `while_loop` whose length is not known runs its body.
        chosen: share of a conditional's runs that take its last branch (the true one); all others take the first.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    # as the compiler leaves it: a frozen weight's gradient is not computed
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _total(used, steps, chosen)


def _total(jaxpr: Any, steps: int, chosen: float, scopes: str = "") -> float:
    """`scopes`: names around the jaxpr, which its own equations do not repeat."""
    return sum(_equation(equation, steps, chosen, scopes) for equation in jaxpr.eqns)


def _equation(equation: Any, steps: int, chosen: float, scopes: str) -> float:
    name, options = equation.primitive.name, equation.params
    scopes = f"{scopes}/{equation.source_info.name_stack}"

    def inside(jaxpr: Any) -> float:
        return _total(jaxpr, steps, chosen, scopes)

    if name == "dot_general":
        (contracted, _), _ = options["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        raise NotImplementedError("convolutions are not counted; the models have none")
    if name == "scan":
        return options["length"] * inside(options["jaxpr"].jaxpr)
    if name == "while":
        return steps * inside(options["body_jaxpr"].jaxpr)
    if name == "cond":
        branches = [inside(branch.jaxpr) for branch in options["branches"]]
        return (1 - chosen) * branches[0] + chosen * branches[-1]
    if name == "shard_map":  # its body is one device's
        return options["mesh"].size * inside(options["jaxpr"])
    if name == "pallas_call":
        blocks, side, products = kernel_blocks(str(options["name"]), scopes)
        if not blocks:
            raise NotImplementedError(f"the kernel {options['name']} is not counted")
        width = max((v.aval.shape for v in equation.outvars), key=math.prod)[-1]
        return 2.0 * products * blocks * side * side * width
    if name.startswith("dot_product_attention_"):  # cuDNN's
        causal, backward = options["mask_type"].name == "CAUSAL", "_bwd" in name
        query, keys = (v.aval.shape for v in equation.invars[:2])
        return cudnn_products(query, keys, causal, backward)
    return sum(map(inside, jaxprs_in_params(options)))
