"""The smallest run that is a run: the embedded model on the procedural world, and reward functions that misbehave."""

import dataclasses
import math
import os
import time
import zlib

import jax
import numpy as np

from jaxmllm.losses.grpo_options import GRPOOptions
from jaxmllm.runfiles import read_lines
from jaxmllm.train.config import DataConfig, OptimConfig, RolloutConfig, TrainConfig

SCENES = "size=84x84&objects=2-3"


def config(folder, **changes) -> TrainConfig:
    """Three GRPO updates of two groups of two; `changes` replace fields."""
    base = TrainConfig(
        name="run",
        output_dir=str(folder),
        batch_size=2,
        max_steps=3,
        trainable=r"text/layers/.*",
        data=DataConfig(
            train=(f"world:grounding?{SCENES}&length=64", f"world:counting?{SCENES}&length=64"),
            eval=(f"world:grounding?{SCENES}&split=val&length=4",),
            eval_samples=4,
        ),
        optim=OptimConfig(learning_rate=1e-3, lr_scheduler_type="constant"),
        rollout=rewarded_by("checksum"),
        grpo=GRPOOptions(num_generations=2, max_completion_length=6),
        save_steps=2,
        completions_steps=2,
        save_pictures=1,
        export=False,
    )
    return dataclasses.replace(base, **changes)


def rewarded_by(name: str, **options) -> RolloutConfig:
    """Without processes of their own, which take seconds to start."""
    return RolloutConfig(**{"reward_funcs": (f"tests.training:{name}",), "reward_processes": 0, **options})


def numbers(run_dir, *left_out: str) -> list[dict]:
    """The logged metrics without what depends on the clock."""
    clock = ("time", "step_time", "tokens_per_second", *left_out)
    return [
        {k: v for k, v in row.items() if k not in clock and not k.startswith("seconds/")}
        for row in read_lines(run_dir / "metrics.jsonl")
    ]


def assert_same(a, b) -> None:
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---------------------------------------------------------------- rewards


def checksum(text, record) -> float:
    """Differs between completions, whatever an untrained model writes."""
    return zlib.crc32(text.encode()) % 97 / 97


def raises(text, record):
    raise RuntimeError("no such luck")


def hangs(text, record):
    time.sleep(60)


def hangs_on_a(text, record) -> float:
    return time.sleep(60) or 0.0 if text.startswith("a") else 1.0


def fails_on_a(text, record) -> float:
    if text.startswith("a"):
        raise TimeoutError("of its own")
    return 1.0


def dies_on_a(text, record) -> float:
    if text.startswith("a"):
        os._exit(1)
    return 1.0


def mostly_alike(text, record) -> float:
    """Two of three records give every completion the same reward."""
    return checksum(text, record) if zlib.crc32(record["id"].encode()) % 3 == 0 else 0.5


def alike(text, record) -> float:
    return 0.5


def infinite(text, record):
    return math.inf if text else 0.0


def wrong_type(text, record):
    return "very good"


def no_total(text, record):
    return {"precision": 1.0}


def sometimes(text, record):
    return None if record["task"] == "counting" else {"reward": 1.0, "bonus": 0.5}


NOT_A_FUNCTION = 3
