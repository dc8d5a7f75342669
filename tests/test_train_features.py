"""What a run can be told besides its objective: dynamic sampling, adaptive coefficients, best checkpoint, trackers; and
what it does when the disk is full."""

import dataclasses
import os
import resource
import shutil
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxmllm import api
from jaxmllm.errors import InputError
from jaxmllm.methods import SFT
from jaxmllm.methods.grpo import arrange, step
from jaxmllm.methods.grpo.options import GRPOOptions
from jaxmllm.rollout import sampler
from jaxmllm.runfiles import read_json, read_lines, write_json
from jaxmllm.training import evaluating, setup
from jaxmllm.training.checkpoint import Checkpoints
from jaxmllm.training.config import DataConfig, OptimConfig
from jaxmllm.training.loop import Interrupted, train
from jaxmllm.types import TrainState
from tests.support import reward_functions, training

pytestmark = pytest.mark.usefixtures("one_device")
TRAIN = DataConfig(
    train=(f"world:grounding?{training.SCENES}&length=64", f"world:counting?{training.SCENES}&length=64")
)


def run_config(folder, method=None, **changes):
    """Two updates without evaluations."""
    changes = {"method": method or training.grpo(), "max_steps": 2, "save_steps": 10, "data": TRAIN, **changes}
    return training.config(folder, **changes)


# ---------------------------------------------------------------- groups that teach nothing


def test_an_update_leaves_out_groups_that_teach_nothing(tmp_path, monkeypatch):
    """The same losses and gradients as with them, and where no group teaches nothing is computed."""
    cut = OptimConfig(learning_rate=1e-3, lr_scheduler_type="constant", gradient_accumulation_steps=2)

    def run(name, reward="mostly_alike"):
        config = run_config(tmp_path, training.grpo(reward), name=name, batch_size=4, max_steps=4, optim=cut)
        return read_lines(train(config) / "metrics.jsonl")

    left_out, nothing = run("left_out"), run("nothing", "alike")
    monkeypatch.setattr(GRPOOptions, "only_advantages", False)
    jax.clear_caches()
    computed = run("computed")
    assert {row["frac_reward_zero_std"] for row in computed} - {0.0, 1.0}  # some groups of a batch, not all
    for row, other in zip(left_out, computed, strict=True):
        for name in ("loss", "grad_norm", "reward"):
            # the loss itself is a sum of advantages that cancel, each of about 1
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=3e-6), name
    assert any(row["entropy"] != pytest.approx(other["entropy"]) for row, other in zip(left_out, computed, strict=True))
    assert all(row["entropy"] == row["loss"] == row["grad_norm"] == 0 for row in nothing)


# ---------------------------------------------------------------- short completions


def test_short_completions_are_cut_apart_from_long_ones(tmp_path, monkeypatch):
    """The same losses and gradients as with all padded to the longest."""
    sample, score, cut = sampler.sample, step.score_halves, []

    def uneven(*arguments, **options):
        found = sample(*arguments, **options)
        lengths = jnp.minimum(found.lengths, jnp.asarray([3, 99, 99, 2])[:, None])
        written = jnp.arange(found.tokens.shape[2]) < lengths[..., None]
        return found.replace(lengths=lengths, logps=jnp.where(written, found.logps, 0))

    def watched(*arguments, **options):
        cut.append(arguments[-1])
        return score(*arguments, **options)

    monkeypatch.setattr(sampler, "sample", uneven)
    monkeypatch.setattr(step, "score_halves", watched)

    def run(name):
        jax.clear_caches()
        cut.clear()
        config = run_config(tmp_path, training.grpo(max_completion_length=16), name=name, batch_size=4)
        return read_lines(train(config) / "metrics.jsonl")

    padded = run("padded")
    assert not any(cut)
    monkeypatch.setattr(arrange, "LONG", 16)
    for row, other in zip(run("cut"), padded, strict=True):
        assert row["completions/max_length"] > 12 > 4 > row["completions/min_length"]
        for name in ("loss", "grad_norm", "reward", "entropy"):
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=3e-6), name
    assert 4 in cut


# ---------------------------------------------------------------- dynamic sampling


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    method = training.grpo("mostly_alike", filter_groups=True, max_num_gen_batches=8)
    config = run_config(tmp_path_factory.mktemp("filtered"), method, batch_size=2, completions_steps=1)
    return config, train(config)


def test_groups_that_teach_nothing_are_replaced(filtered):
    config, folder = filtered
    rows = read_lines(folder / "metrics.jsonl")
    assert all(row["frac_reward_zero_std"] == 0 for row in rows)
    assert all(row["filter_groups/kept"] >= config.batch_size for row in rows)
    # as many batches as it took, never more than one too many
    assert all(row["filter_groups/drawn"] % config.batch_size == 0 for row in rows)
    assert any(row["filter_groups/drawn"] > config.batch_size for row in rows)
    # rows of several batches were put together: each is still scored on its own prompt and picture
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-4
    for number in (1, 2):
        table = pq.read_table(folder / "completions" / f"completions_{number:05d}.parquet").to_pydict()
        assert len(table["completion"]) == 4 and all(table["advantage"])
        expected = [reward_functions.checksum(text, None) for text in table["completion"]]
        assert table["tests.support.reward_functions:mostly_alike"] == expected


def test_resumed_dynamic_sampling_goes_on_with_the_next_records(filtered, tmp_path):
    config, folder = filtered
    cut = dataclasses.replace(config, output_dir=str(tmp_path))

    def stop(step, _):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(cut, stop)
    assert training.numbers(train(cut)) == training.numbers(folder)


def test_too_few_groups_that_differ(tmp_path):
    """After max_num_gen_batches the rest is filled up, with advantage 0."""
    method = training.grpo("alike", filter_groups=True, max_num_gen_batches=2)
    (row,) = read_lines(train(run_config(tmp_path, method, max_steps=1)) / "metrics.jsonl")
    assert (row["filter_groups/drawn"], row["filter_groups/kept"]) == (4, 0)
    assert row["frac_reward_zero_std"] == 1 and row["grad_norm"] == 0


# ---------------------------------------------------------------- coefficients


def test_adaptive_kl_coefficient(tmp_path):
    """verl's controller by hand: 4 completions an update, horizon 4, so a fifth down below the target, a fifth up above."""
    config = run_config(tmp_path, training.grpo(beta=0.04, kl_ctrl="adaptive", target_kl=1e-5, horizon=4), max_steps=3)
    rows = read_lines(train(config) / "metrics.jsonl")
    assert rows[0]["kl"] < 0.8e-5 and rows[1]["kl"] > 1.2e-5
    np.testing.assert_allclose([row["kl_coef"] for row in rows], [0.04, 0.04 * 0.8, 0.04 * 0.8 * 1.2], rtol=1e-5)


# ---------------------------------------------------------------- checkpoints


def test_best_checkpoint_is_kept_and_can_be_the_result(tmp_path, monkeypatch):
    """Figures are made up, of a figure where less is better: once update 1 is best, once the last one."""
    source = f"world:counting?{training.SCENES}&split=val&length=4"
    config = run_config(
        tmp_path,
        max_steps=4,
        eval_steps=1,
        save_total_limit=1,
        metric_for_best_model="world:counting/mae",
        load_best_model_at_end=True,
        data=dataclasses.replace(TRAIN, eval=(source,)),
        export=True,
    )
    figures, states = {"before": 9.0, "step_000001": 1.0, "step_000002": 2.0, "step_000003": 3.0}, {}

    def evaluate(self, state, name):
        states[name] = jax.tree.map(np.array, state.params)  # a copy: the next update writes into these
        (self.folder / name).mkdir(parents=True)
        (self.folder / name / "who").write_text(name)
        return {"world:counting/mae": figures[name]}

    monkeypatch.setattr(evaluating.Evaluator, "__call__", evaluate)
    for name, last, best in (("first_is_best", 4.0, 1), ("last_is_best", 0.5, 4)):
        figures["step_000004"] = last
        folder = train(dataclasses.replace(config, name=name))
        kept = {int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()}
        assert kept == {best, 4}
        assert (folder / "eval" / "after" / "who").read_text() == f"step_{best:06d}"
        training.assert_same(api.load(folder / "export").params, states[f"step_{best:06d}"])
        rows = {row["step"]: row for row in read_lines(folder / "metrics.jsonl") if "eval_world:counting/mae" in row}
        assert {step: row["eval_world:counting/mae"] for step, row in rows.items()} == {
            0: 9.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: last,
        }  # fmt: skip
    monkeypatch.undo()
    for metric, message in (
        ("world:counting/ap", "not measured; use one of world:counting/"),
        ("world:ocr/f1", "write <source>/<figure>, the sources are world:counting"),
    ):
        with pytest.raises(InputError, match=message):
            train(dataclasses.replace(config, name=metric.replace("/", "_"), metric_for_best_model=metric))


def test_no_room_for_a_checkpoint_is_told_before_it_is_begun(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    state = TrainState(jnp.int32(3), {"w": jnp.zeros((1000, 1000))}, {})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=3_999_999))
    with pytest.raises(InputError, match=r"checkpoint 3 could not be written \(it takes up to 0.00 GiB.*are intact"):
        checkpoints.save(state, {}, {})
    assert not any(tmp_path.iterdir())
    monkeypatch.undo()
    checkpoints.save(state, {"coefficient": jnp.float32(0.5), "note": "x"}, {"a": 1})
    checkpoints.wait()
    found, own, data = checkpoints.restore(state)
    assert data == {"a": 1} and int(found.step) == 3
    assert own == {"coefficient": 0.5, "note": "x"}  # arrays and JSON values alike
    checkpoints.close()


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoints_that_are_there(tmp_path):
    """No file may grow beyond a limit from update 2 on: a clear message, and checkpoint 1 is still good."""
    config = run_config(tmp_path, max_steps=3, save_steps=1, save_total_limit=3, completions_steps=100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails instead of killing

    def fill(step, _):
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    try:
        with pytest.raises(InputError, match="checkpoint.* could not be written .*earlier checkpoints are intact"):
            train(config, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    state, _, data = Checkpoints(config.run_dir / "checkpoints").restore(setup.build(config)[1])
    assert int(state.step) == 1 and data["batches"]["step"] == 1
    assert [row["step"] for row in read_lines(train(config) / "metrics.jsonl")] == [1, 2, 3]  # goes on from there


# ---------------------------------------------------------------- trackers, failures, folders


def test_wandb_gets_the_metrics(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="report_to: wandb is not installed"):
        train(run_config(tmp_path, report_to=("wandb",)))
    seen = []
    run = types.SimpleNamespace(log=lambda values, step: seen.append((step, values["reward"])), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    folder = train(run_config(tmp_path, report_to=("wandb",)))
    assert [step for step, _ in seen] == [1, 2]
    assert not (folder / "tensorboard").exists()


def test_failed_rewards_can_be_left_out(tmp_path):
    config = run_config(tmp_path, training.grpo("raises", reward_errors="skip"), max_steps=1)
    (row,) = read_lines(train(config) / "metrics.jsonl")
    assert row["rewards/failed"] == 4 and row["reward"] is None and row["grad_norm"] == 0


def test_unlogged_non_finite_updates_count(tmp_path):
    """With logging_steps 4 all four are seen, and stop the run."""
    config = run_config(
        tmp_path,
        max_steps=8,
        method=SFT(),
        logging_steps=4,
        optim=OptimConfig(learning_rate=1e35, lr_scheduler_type="constant", max_nonfinite_steps=3),
    )
    with pytest.raises(InputError, match="3 updates in a row had a NaN or infinite gradient"):
        train(config)
    assert [row["nonfinite"] for row in read_lines(config.run_dir / "metrics.jsonl")] == [3]


def test_a_folder_of_an_earlier_version_goes_on(tmp_path):
    """Fields that did not exist when the folder was made count as their defaults."""
    config = run_config(tmp_path, max_steps=1)
    folder = train(config)
    old = read_json(folder / "config.json")
    del old["evaluation"], old["method"]["filter_groups"]
    write_json(folder / "config.json", old)
    assert train(config) == folder
    changed = dataclasses.replace(config, method=dataclasses.replace(config.method, filter_groups=True))
    with pytest.raises(InputError, match="method.filter_groups: False -> True"):
        train(changed)
