"""Training runs end to end, small: what they leave, that they repeat and resume bit for bit, and how they stop."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxmllm import api
from jaxmllm.errors import InputError
from jaxmllm.methods import SFT
from jaxmllm.model.lora import LoRAConfig
from jaxmllm.runfiles import read_lines
from jaxmllm.training import setup
from jaxmllm.training.checkpoint import Checkpoints
from jaxmllm.training.config import DataConfig, OptimConfig
from jaxmllm.training.loop import Interrupted, train
from tests.support import training

pytestmark = pytest.mark.usefixtures("one_device")


def final_state(config):
    """(state, data) of the last checkpoint."""
    _, state = setup.build(config)
    found = Checkpoints(config.run_dir / "checkpoints").restore(state)
    assert found is not None
    return found[0], found[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that went through, with its export."""
    config = training.config(tmp_path_factory.mktemp("train"), export=True)
    return config, train(config)


def test_what_a_run_leaves(finished):
    config, folder = finished
    every = read_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in every] == [0, 1, 2, 3, 3]  # an evaluation before and after the updates
    assert all(0 <= every[k]["eval_world:grounding/IoU"] <= 1 for k in (0, -1))
    rows = every[1:-1]
    # TRL's names
    for name in (
        "loss", "grad_norm", "reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "entropy",
        "completions/clipped_ratio", "rewards/tests.support.reward_functions:checksum/mean", "num_tokens", "step_time",
        "processor_time", "learning_rate",
    ):  # fmt: skip
        assert all(np.isfinite(row[name]) for row in rows), name
    assert rows[0]["num_tokens"] < rows[1]["num_tokens"] < rows[2]["num_tokens"]
    assert all(row["nonfinite"] == 0 for row in rows)
    # the sampler drew from what the learner differentiates
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-4
    start = json.loads((folder / "run.json").read_text())
    assert start["seed"] == 0 and {"jax", "jaxmllm"} <= start["starts"][0]["versions"].keys()
    table = pq.read_table(folder / "completions" / "completions_00002.parquet").to_pydict()
    assert len(table["completion"]) == 4 and {"prompt", "advantage", "step"} <= table.keys()
    for name in ("before", "after"):
        figures = json.loads((folder / "eval" / name / "metrics.json").read_text())
        assert figures["sources"]["world:grounding"]["n"] == 4
    kept = {int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {2, 3}


def test_the_export_is_the_final_model(finished):
    config, folder = finished
    state, _ = final_state(config)
    training.assert_same(api.load(folder / "export").params, jax.device_get(state.params))
    start = api.load("tiny").params
    frozen, moved = (jax.tree.map(np.array_equal, start[k], state.params[k]) for k in ("vision", "text"))
    assert all(jax.tree.leaves(frozen))
    assert not any(jax.tree.leaves(moved["layers"]["mlp"]))


def test_the_same_seed_gives_the_same_numbers(finished, tmp_path):
    config, folder = finished
    again = dataclasses.replace(config, output_dir=str(tmp_path), export=False)
    assert training.numbers(train(again)) == training.numbers(folder)
    training.assert_same(final_state(again)[0], final_state(config)[0])


def test_interrupted_and_resumed_equals_uninterrupted(finished, tmp_path):
    config, folder = finished
    cut = dataclasses.replace(config, output_dir=str(tmp_path), export=False)

    def stop(step, _):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM: saved update 1; start the same command again"):
        train(cut, stop)
    assert training.numbers(train(cut)) == training.numbers(folder)
    training.assert_same(final_state(cut)[0], final_state(config)[0])
    assert final_state(cut)[1]["batches"] == final_state(config)[1]["batches"]


def test_a_finished_run_is_not_run_again(finished):
    config, folder = finished
    before = (folder / "metrics.jsonl").read_bytes()
    assert train(config) == folder
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_folder_of_another_config_is_refused(finished):
    config, _ = finished
    with pytest.raises(InputError, match=r"belongs to another config(.|\n)*seed: 0 -> 1"):
        train(dataclasses.replace(config, seed=1))
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=1.0))
    with pytest.raises(InputError, match="optim.learning_rate: 0.001 -> 1.0"):
        train(other)


# ---------------------------------------------------------------- variants


@pytest.mark.parametrize(
    "options, rollout",
    [
        (dict(beta=0.04, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5), {}),
        (dict(loss_type="dr_grpo", scale_rewards="none"), dict(num_iterations=2)),
        (dict(importance_sampling_level="sequence", epsilon=3e-4), dict(steps_per_generation=2)),
        (
            dict(use_adaptive_entropy=True, top_entropy_quantile=0.5, mask_truncated_completions=True),
            dict(
                reward_funcs=("tests.support.reward_functions:checksum", "soft_overlong"),
                soft_punish_cache=2,
                temperature=0.7,
                top_k=40,
            ),
        ),
    ],
    ids=str,
)
def test_objectives_run(tmp_path, options, rollout):
    base = training.config(tmp_path, max_steps=2, save_steps=10)
    config = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, eval=()),
        method=dataclasses.replace(base.method, **options, **rollout),
    )
    updates = config.method.num_iterations * config.method.steps_per_generation
    rows = read_lines(train(config) / "metrics.jsonl")
    assert rows[-1]["step"] == -(-2 // updates) * updates
    assert all(np.isfinite(row["loss"]) and row["nonfinite"] == 0 for row in rows)
    if options.get("beta"):
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)  # the reference is the policy at first
        assert rows[-1]["kl"] > 0


def test_adapters_leave_the_model_as_it_was(tmp_path):
    base = training.config(tmp_path, max_steps=2, export=True)
    config = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, eval=(), max_pixels=8000),
        lora=LoRAConfig(r=2, lora_alpha=4),
        method=dataclasses.replace(base.method, beta=0.04),
    )
    folder = train(config)
    state, _ = final_state(config)
    start = api.load("tiny").params
    training.assert_same(start, {k: v for k, v in state.params.items() if k != "lora"})
    assert (folder / "adapter").is_dir()
    assert api.load(folder / "export").processor.pixel_config.max_pixels == 8000  # as it was trained
    merged = api.load(folder / "export").params  # adapters merged
    a, b = (params["text"]["layers"]["self_attn"]["q_proj"]["kernel"] for params in (merged, start))
    assert not np.array_equal(a, b)


def test_supervised_loss_falls_and_does_not_depend_on_the_cut(tmp_path):
    base = training.config(
        tmp_path,
        method=SFT(questions_per_image=3),
        from_scratch=True,
        trainable=r"text/.*|embed",
        name="whole",
        batch_size=4,
        max_steps=8,
        save_steps=100,
        data=DataConfig(train=(f"world:grounding?{training.SCENES}&questions=3&length=4",)),
        optim=OptimConfig(learning_rate=3e-3, lr_scheduler_type="constant"),
    )
    whole = read_lines(train(base) / "metrics.jsonl")
    assert whole[-1]["loss"] < 0.6 * whole[0]["loss"]
    cut = dataclasses.replace(
        base, name="cut", max_steps=2, optim=dataclasses.replace(base.optim, gradient_accumulation_steps=2)
    )
    for a, b in zip(read_lines(train(cut) / "metrics.jsonl"), whole, strict=False):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    with pytest.raises(
        InputError, match="questions_per_image = 4: of 16 pictures .* none has more than 3; set it to 3"
    ):
        train(dataclasses.replace(base, name="more", method=SFT(questions_per_image=4)))


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "reward, message",
    [
        ("raises", "reward_functions:raises failed on record 'world-.*': RuntimeError: no"),
        ("infinite", "returned inf, expected a finite number"),
        ("wrong_type", "returned str, expected a number, a dict or None"),
        ("absent", "reward_funcs: 'tests.support.reward_functions:absent' does not import"),
    ],
)  # fmt: skip
def test_a_bad_reward_stops_the_run(tmp_path, reward, message):
    config = training.config(
        tmp_path, method=training.grpo(reward), data=DataConfig(train=("world:grounding?size=84x84",))
    )
    with pytest.raises(InputError, match=message):
        train(config)


def test_non_finite_updates_are_skipped_counted_and_end_the_run(tmp_path):
    base = training.config(tmp_path, max_steps=9, method=SFT())
    config = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, eval=()),
        optim=OptimConfig(learning_rate=1e35, lr_scheduler_type="constant", max_nonfinite_steps=2),
        save_steps=1,
        save_total_limit=9,
    )
    _, state = setup.build(config)
    with pytest.raises(InputError, match="2 updates in a row had a NaN or infinite gradient"):
        train(config)
    rows = read_lines(config.run_dir / "metrics.jsonl")
    assert [row["nonfinite"] for row in rows] == [0, 1, 1]  # the first one threw the weights far away
    with np.load(config.run_dir / "nonfinite_3.npz") as saved:
        assert saved["prompts.tokens"].shape[0] == 2 and saved["completions.weights"].any()
        assert saved["prompts.vision.patches"].shape[0] == 2
    first, second = (Checkpoints(config.run_dir / "checkpoints").restore(state, k)[0] for k in (1, 2))
    training.assert_same(first.params, second.params)  # a skipped update changes nothing
    training.assert_same(first.opt_state, second.opt_state)


def test_checkpoints_survive_a_failing_run(tmp_path):
    """A reward that fails after update 2 leaves checkpoint 2."""
    config = training.config(tmp_path, data=DataConfig(train=("world:grounding?size=84x84&length=8",)))
    calls = []

    def fail_later(step, _):
        calls.append(step)
        if step == 2:
            raise InputError("stopped here")

    with pytest.raises(InputError, match="stopped here"):
        train(dataclasses.replace(config, save_steps=1), fail_later)
    state, data = final_state(config)
    assert int(state.step) == 1 and data["batches"]["step"] == 1 and calls == [1, 2]
