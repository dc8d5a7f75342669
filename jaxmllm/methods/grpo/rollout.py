"""A rollout: G completions of every prompt, drawn by the policy, rewarded and turned into advantages, on the host."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.machine import processes
from jaxmllm.methods.grpo.advantages import (
    completion_metrics,
    dynamic_sampling_keep,
    estimate_advantages,
    reward_metrics,
    weighted_rewards,
)
from jaxmllm.methods.grpo.options import GRPOOptions
from jaxmllm.rollout import sampler
from jaxmllm.types import Samples


@dataclasses.dataclass
class Group:
    """G completions of one prompt, on the host."""

    record: dict[str, Any]
    tokens: np.ndarray  # [G, T]
    logps: np.ndarray  # [G, T]
    lengths: np.ndarray  # [G]
    stopped: np.ndarray  # [G]
    texts: list[str]
    rewards: np.ndarray  # [G, K]
    parts: list[dict[str, float]]


@dataclasses.dataclass
class Drawn:
    """What sampling and rewards gave: groups, and where each came from."""

    groups: list[Group]
    picks: list[tuple[int, int]]  # (batch of this rollout, row) of every group
    tokens: int  # of prompts and completions
    missed: int  # rewards that failed

    def __add__(self, other: "Drawn") -> "Drawn":
        return Drawn(
            self.groups + other.groups,
            self.picks + other.picks,
            self.tokens + other.tokens,
            self.missed + other.missed,
        )

    def chosen(self, order: list[int]) -> "Drawn":
        """The groups at these places; what was spent stays counted."""
        return dataclasses.replace(self, groups=[self.groups[k] for k in order], picks=[self.picks[k] for k in order])


keys_of_rows = jax.jit(sampler.row_keys, static_argnums=2)


def texts_of(samples: Samples, tokenizer: Any, with_end: bool) -> tuple[list[list[int]], list[str], list[str]]:
    """(token ids, texts without the end token, texts to reward) of every completion, [B * G]; `with_end`: keep it there."""
    lengths, stopped = samples.lengths.reshape(-1), samples.stopped.reshape(-1)
    tokens: list[list[int]] = [
        row[:n].tolist() for row, n in zip(samples.tokens.reshape(len(lengths), -1), lengths, strict=True)
    ]
    without_end = [row[: len(row) - int(end)] for row, end in zip(tokens, stopped, strict=True)]
    texts = tokenizer.batch_decode(without_end, skip_special_tokens=False)
    return tokens, texts, tokenizer.batch_decode(tokens, skip_special_tokens=False) if with_end else texts


def differing(groups: list[Group], options: GRPOOptions) -> list[bool]:
    """Which groups have rewards that differ: the others teach nothing (DAPO's dynamic sampling)."""
    table = jnp.asarray(np.concatenate([group.rewards for group in groups]), jnp.float32)
    return dynamic_sampling_keep(weighted_rewards(table, options.reward_weights), options.num_generations).tolist()


def column(groups: list[Group], name: str) -> np.ndarray:
    """A field of all completions, [B * G, ...]."""
    return np.concatenate([getattr(group, name) for group in groups])


@functools.partial(jax.jit, static_argnames=("names", "options"))
def _estimate(rewards, lengths, stopped, names: tuple[str, ...], options: GRPOOptions):
    """(advantages, metrics), in one program: op by op it would be hundreds."""
    advantages, metrics = estimate_advantages(rewards, options)
    return advantages, metrics | reward_metrics(rewards, list(names)) | completion_metrics(lengths, stopped)


def advantages_of_all(
    groups: list[Group], counts: dict[str, float], block: int, names: tuple[str, ...], options: GRPOOptions
) -> tuple[np.ndarray, dict[str, Any]]:
    """Advantages [B * G] of the whole batch and its metrics, over all processes.

    `block`: number of this process's block of rows. `counts`: metrics to add up over the processes.
    """
    own = {
        "rewards": np.asarray(column(groups, "rewards"), np.float64).tolist(),
        "lengths": column(groups, "lengths").tolist(),
        "stopped": column(groups, "stopped").tolist(),
        "parts": [part for group in groups for part in group.parts],
        "counts": counts,
    }
    blocks = dict(processes.from_all([block, own]))
    every = [blocks[number] for number in sorted(blocks)]

    def joined(name: str) -> list[Any]:
        return [row for process in every for row in process[name]]

    rewards, lengths, parts = jnp.asarray(joined("rewards"), jnp.float32), joined("lengths"), joined("parts")
    estimated, metrics = _estimate(rewards, jnp.asarray(lengths), jnp.asarray(joined("stopped")), names, options)
    if none := int(np.isnan(np.asarray(rewards)).all(1).sum()):
        metrics["rewards/none"] = none  # completions without any reward: None, NaN or failed
    for name in counts:
        metrics[name] = sum(process["counts"][name] for process in every)
    for part in sorted({name for row in parts for name in row if name != "reward"}):
        metrics[f"rewards/{part}/mean"] = np.nanmean([row.get(part, np.nan) for row in parts])
    return np.asarray(estimated), metrics
