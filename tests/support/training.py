"""The smallest run that is a run: the embedded model on the procedural world."""

import dataclasses

import jax
import numpy as np

from jaxmllm.methods import GRPO
from jaxmllm.runfiles import read_lines
from jaxmllm.training.config import DataConfig, OptimConfig, TrainConfig

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
        method=grpo(),
        save_steps=2,
        completions_steps=2,
        save_pictures=1,
        export=False,
    )
    return dataclasses.replace(base, **changes)


def grpo(reward: str = "checksum", **options) -> GRPO:
    """Groups of two, six tokens; rewards without processes of their own, which take seconds to start; hot, so that even six
    tokens of two completions differ. `reward`: a function of `reward_functions`.
    """
    return GRPO(
        **{
            "num_generations": 2,
            "max_completion_length": 6,
            "reward_funcs": (f"tests.support.reward_functions:{reward}",),
            "reward_processes": 0,
            "temperature": 1.5,
            **options,
        }
    )


def numbers(run_dir, *left_out: str) -> list[dict]:
    """The logged metrics without what depends on the clock."""
    clock = ("time", "step_time", "processor_time", "tokens_per_second", *left_out)
    return [
        {k: v for k, v in row.items() if k not in clock and not k.startswith("seconds/")}
        for row in read_lines(run_dir / "metrics.jsonl")
    ]


def assert_same(a, b) -> None:
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)
