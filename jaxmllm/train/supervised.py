"""Steps on given answers: cross-entropy, reflective unlikelihood, DPO; answers about an image share its prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from jaxmllm.data.dialogues import MAX_TURNS
from jaxmllm.data.examples import Weigh
from jaxmllm.data.pipeline import Batch
from jaxmllm.losses.logprobs import Sampling
from jaxmllm.mesh import shard_batch
from jaxmllm.rollout.reflect import dialogue_sigma
from jaxmllm.train.config import TrainConfig
from jaxmllm.train.optim import reference_params
from jaxmllm.train.step import dpo_step, score_jit, sft_step, unlikelihood_step

if TYPE_CHECKING:
    from jaxmllm.train.setup import Run


def first_corner(tokenizer: Any, weight: float) -> Weigh | None:
    """Weighs the first two numbers after each opening bracket, which decide what object is meant. None for weight 1.

    Meant for tokenizers that write a number as one token.
    """
    if weight == 1:
        return None
    pieces = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    opening = {i for i, piece in enumerate(pieces) if piece.endswith("[")}
    number = {i for i, piece in enumerate(pieces) if piece.strip().isdecimal()}

    def weigh(record: dict[str, Any], tokens: Sequence[int]) -> list[float]:
        weights, expected = [], 0
        for token in tokens:
            chosen = expected > 0 and token in number
            weights.append(weight if chosen else 1.0)
            expected = 2 if token in opening else expected - chosen
        return weights

    return weigh


def answer_sigmas(rows: Sequence[Sequence[Mapping[str, Any]]]) -> Float[np.ndarray, "B 1 R"]:
    """Normalised rewards of the answers of each row's dialogue; 1 where it has fewer than R = MAX_TURNS."""
    sigmas = np.ones((len(rows), 1, MAX_TURNS), np.float32)
    for row, (dialogue,) in enumerate(rows):
        sigmas[row, 0, : len(dialogue["turns"])] = dialogue_sigma(dialogue)
    return sigmas


def answer_rewards(rows: Sequence[Sequence[Mapping[str, Any]]], answers: int) -> Float[np.ndarray, "B G"]:
    """Reward of each ranked answer; 0 where a prompt has fewer."""
    rewards = np.zeros((len(rows), answers), np.float32)
    for row, ranked in enumerate(rows):
        rewards[row, : len(ranked)] = [record["reward"] for record in ranked]
    return rewards


class Supervised:
    """Callable `(run, batch) -> metrics` that replaces `run.state`."""

    def __init__(self, config: TrainConfig):
        self.config = config

    def __call__(self, run: Run, batch: Batch) -> dict[str, Any]:
        config = self.config
        prompts, completions = shard_batch((batch.prompts, batch.completions), run.mesh)
        if config.method == "unlikelihood":
            sigmas = shard_batch(answer_sigmas(batch.records), run.mesh)
            spared = () if config.unlikelihood.penalise_end else run.model.stop_ids
            run.state, metrics = unlikelihood_step(
                run.state, prompts, completions, sigmas, update=run.update, options=config.unlikelihood, spared=spared
            )
        elif config.method == "dpo":
            rewards = answer_rewards(batch.records, config.dpo.answers)
            reference = reference_params(run.state, config.trainable)
            ref_logps, _ = score_jit(reference, run.model.cfg, prompts, completions, Sampling())
            run.state, metrics = dpo_step(
                run.state, prompts, completions, shard_batch(rewards, run.mesh), ref_logps,
                update=run.update, options=config.dpo,
            )  # fmt: skip
        else:
            run.state, metrics = sft_step(
                run.state, prompts, completions, update=run.update, loss_norm=config.loss_norm
            )
        return metrics

    def get_state(self) -> dict[str, float]:
        return {}

    def set_state(self, state: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass
