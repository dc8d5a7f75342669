"""How the rows of a rollout are ordered and cut so that an update costs less. Nothing here changes a number of the loss."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int

from jaxmllm.machine import layout

SHORTEST = 16  # tokens a completion is cut to at least: below, a program more costs more than the tokens saved
# Tokens from which the shorter half of the prompts is cut to a quarter. Lists of 1 to 25 blood cells, 170-250 tokens: an
# update of 6.2 s took 3.0 s; on completions of 48 tokens the second program cost more than it saved.
LONG = 128


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """What `arrange` decides."""

    width: int  # tokens of a completion that are kept
    order: Int[np.ndarray, "B"] | None = None  # of this process's prompts; None: as they are
    short: int = 0  # tokens of the first half of each device's prompts, see `scorer.score_halves`


def cut_length(longest: int, limit: int) -> int:
    """`limit` halved as often as the longest completion allows: few lengths, so few programs."""
    while limit % 2 == 0 and limit // 2 >= max(longest, SHORTEST):
        limit //= 2
    return limit


def arrange(
    lengths: Int[np.ndarray, "B G"],
    teaches: Bool[np.ndarray, "B"],
    *,
    longest: int,
    limit: int,
    devices: int,
    cuts: int,
    microbatches: int,
    skip_idle: bool,
    all_teach: bool,
    agree: Callable[[int], int] = lambda value: value,
) -> Arrangement:
    """The order and the cut of this process's prompts.

    Args:
        lengths, teaches: tokens of each completion, and which prompts have an advantage that is not 0.
        longest, all_teach: the same of the whole batch, over all processes.
        limit: tokens of a row as it was sampled.
        devices: that hold rows of this process.
        cuts, microbatches: of an update on the rollout.
        skip_idle: microbatches without anything to teach can be left out.
        agree: the largest value of all processes.
    """
    width = cut_length(longest, limit)
    if cuts * microbatches == 1 and len(lengths) > devices and width >= LONG:
        order, half = layout.shortest_first(lengths.max(1), devices)
        if agree(half) <= width // 4:
            return Arrangement(width, order, width // 4)
    elif skip_idle and not all_teach:
        return Arrangement(width, layout.idle_last(teaches, devices, cuts, microbatches))
    return Arrangement(width)
