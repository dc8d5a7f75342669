"""Steps on given answers: cross-entropy, reflective unlikelihood, DPO; answers about an image share its prefix."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmllm.data.dialogues import MAX_TURNS
from jaxmllm.data.examples import Weigh
from jaxmllm.data.pipeline import Batch
from jaxmllm.machine.mesh import shard_batch
from jaxmllm.methods.optim import reference_params
from jaxmllm.methods.update import dpo_step, score_jit, sft_step, unlikelihood_step
from jaxmllm.model.logprobs import Sampling
from jaxmllm.rollout.reflect import dialogue_sigma
from jaxmllm.training.config import TrainConfig
from jaxmllm.training.run import Run

# of a gold answer in JSON or in Qwen2-VL's tokens: x1 and y1 of each box; the words of each label
FIRST_CORNER = re.compile(r"(?:\[|<\|box_start\|>\()(\d+)\D+?(\d+)")
LABEL = re.compile(r'"label": "([^"]*)|<\|object_ref_start\|>([^<]*)')


def weigh_parts(tokenizer: Any, corner: float, label: float) -> Weigh | None:
    """Weights of an answer's tokens: `corner` where a box begins, which decides what object is meant, `label` where it is
    named, 1 elsewhere. None where both are 1.
    """
    if corner == label == 1:
        return None
    pieces = [tokenizer.decode([i]) for i in range(len(tokenizer))]

    def weigh(record: dict[str, Any], tokens: Sequence[int]) -> list[float]:
        written = [pieces[token] for token in tokens]
        text, ends = "".join(written), np.cumsum([len(piece) for piece in written])
        weights = np.ones(len(tokens))
        for pattern, weight in ((FIRST_CORNER, corner), (LABEL, label)):
            for start, end in (span for match in pattern.finditer(text) for span in match.regs[1:] if span[0] >= 0):
                first, last = np.searchsorted(ends, (start, end - 1), side="right")
                weights[first : last + 1] = weight
        return weights.tolist()

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
