"""Runs that are told to stop, go on, are made longer, find their folder taken or their checkpoint damaged."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from jaxmllm import api
from jaxmllm.errors import InputError
from jaxmllm.machine import processes
from jaxmllm.runfiles import read_json, read_lines
from jaxmllm.training import loop
from jaxmllm.training.config import DataConfig, OptimConfig
from jaxmllm.training.loop import Watcher, train
from jaxmllm.training.stopping import Interrupted, Stop
from tests.support import reward_functions, training

pytestmark = pytest.mark.usefixtures("one_device")
EVALUATED = DataConfig(
    train=(f"world:grounding?{training.SCENES}&length=64",),
    eval=(f"world:grounding?{training.SCENES}&split=val&length=80",),
    eval_samples=80,  # three batches
)


class SignalIn(Watcher):
    """Sends a signal once, in a phase at so much done, or after an update."""

    def __init__(self, phase: str = "", done: int = 0, step: int = 0):
        super().__init__()
        self.wanted, self.step, self.sent, self.phases = (phase, done), step, False, []

    def send(self):
        self.sent = True
        os.kill(os.getpid(), signal.SIGTERM)

    def phase(self, what, done=0, total=0):
        self.phases.append((what, done, total))
        if not self.sent and self.wanted == (what, done):
            self.send()

    def update(self, step, metrics):
        if not self.sent and self.step == step:
            self.send()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run with an evaluation in the middle."""
    config = training.config(
        tmp_path_factory.mktemp("whole"), data=EVALUATED, max_steps=4, eval_steps=2, save_steps=100, export=True
    )
    return config, train(config)


def figures(folder):
    return {name: read_json(folder / "eval" / name / "metrics.json") for name in ("before", "step_000002", "after")}


@pytest.mark.parametrize(
    "told",
    [
        SignalIn("evaluating", 32),  # before the first update
        SignalIn("evaluating", 64),
        SignalIn(step=2),  # just before the evaluation in the middle
        SignalIn(step=3),
        SignalIn(step=4),  # before the last evaluation
        SignalIn("exporting"),
    ],
    ids=["first evaluation", "first evaluation later", "before an evaluation", "update", "last update", "export"],
)
def test_a_signal_in_any_phase_loses_nothing(whole, tmp_path, told):
    """It stops at once, is saved, and the next start ends as the undisturbed run did."""
    config, folder = whole
    cut = dataclasses.replace(config, output_dir=str(tmp_path))
    with pytest.raises(Interrupted, match="SIGTERM: saved update"):
        train(cut, told)
    assert told.sent
    answered = [len(read_lines(path)) for path in (tmp_path / "run" / "eval").glob("*/predictions.jsonl")]
    if told.wanted[0] == "evaluating":
        assert answered == [told.wanted[1]]  # it stopped after that batch, and those answers are kept
    again = SignalIn()
    train(cut, again)
    if told.wanted[0] == "evaluating":  # answered records are not asked again
        first = [done for what, done, total in again.phases if what == "evaluating" and total]  # batches
        assert first[0] == 32 and sum(1 for _ in read_lines(tmp_path / "run/eval/before/predictions.jsonl")) == 80
    assert training.numbers(tmp_path / "run") == training.numbers(folder)
    assert figures(tmp_path / "run") == figures(folder)
    training.assert_same(api.load(tmp_path / "run" / "export").params, api.load(folder / "export").params)


def test_processes_agree_on_a_call_whatever_the_updates_of_a_step(monkeypatch):
    """jax answers at one number only: steps of three updates would jump over it."""
    monkeypatch.setattr(processes, "told_to_stop", lambda call: call == 5)
    stop = Stop()
    assert [stop() for _ in range(6)] == [False] * 4 + [True] * 2
    assert stop.signal == "SIGTERM"


def test_intervals_are_hit_whatever_the_updates_of_a_rollout(tmp_path):
    """Three updates a rollout; every interval is crossed, none is a multiple of three."""
    config = training.config(
        tmp_path,
        method=training.grpo(num_iterations=3),
        data=dataclasses.replace(EVALUATED, eval_samples=4),
        max_steps=12,
        logging_steps=2,
        eval_steps=5,
        save_steps=4,
        completions_steps=4,
        save_total_limit=9,
    )
    folder = train(config)
    rows = read_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [3, 6, 9, 12]
    assert [row["step"] for row in rows if "eval_world:grounding/IoU" in row] == [0, 6, 12]
    saved = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    assert saved == [6, 9, 12]  # 5, 8 and 10, 12 were crossed
    tables = sorted(path.stem for path in (folder / "completions").iterdir())
    assert tables == ["completions_00006", "completions_00009", "completions_00012"]


def test_a_window_of_updates_is_logged_as_a_mean_and_every_token_counts(tmp_path):
    """Against the same run logged at every update."""
    each = training.config(tmp_path, name="each", max_steps=6, data=dataclasses.replace(EVALUATED, eval=()))
    window = dataclasses.replace(each, name="window", logging_steps=3)
    rows = read_lines(train(each) / "metrics.jsonl")
    found = read_lines(train(window) / "metrics.jsonl")
    assert [row["step"] for row in found] == [3, 6]
    for k, row in enumerate(found):
        part = rows[3 * k : 3 * k + 3]
        for name in ("loss", "reward", "grad_norm", "completions/mean_length"):
            assert row[name] == pytest.approx(np.mean([other[name] for other in part]), rel=1e-6), name
        assert row["num_tokens"] == part[-1]["num_tokens"]


def test_a_run_is_made_longer(whole, tmp_path):
    """More time or more updates under a constant rate in its own folder; another rate or schedule in a new one, from it."""
    config, _ = whole
    short = dataclasses.replace(config, output_dir=str(tmp_path), max_steps=2, eval_steps=0, export=False)
    folder = train(short)
    longer = dataclasses.replace(short, max_steps=4)
    train(longer)
    assert [row["step"] for row in read_lines(folder / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]
    assert read_json(folder / "eval" / "after" / "config.json")["config"] == {"step": 4}
    assert read_json(folder / "eval" / "step_000002" / "config.json")["config"] == {"step": 2}  # what "after" was
    assert read_json(folder / "run.json")["starts"][1]["changed"] == ["max_steps: 2 -> 4"]
    whole_run = dataclasses.replace(longer, name="at_once")
    training.assert_same(*(_params(c) for c in (longer, whole_run) if train(c)))
    faster = dataclasses.replace(longer, optim=dataclasses.replace(longer.optim, learning_rate=1e-2))
    with pytest.raises(InputError, match=r"--name NEW --resume_from OLD(.|\n)*optim.learning_rate: 0.001 -> 0.01"):
        train(faster)
    linear = dataclasses.replace(
        faster, name="faster", max_steps=6, optim=OptimConfig(learning_rate=1e-2), resume_from=str(folder)
    )
    rows = read_lines(train(linear) / "metrics.jsonl")
    updates = [row for row in rows if "loss" in row]
    assert [row["step"] for row in updates] == [5, 6]
    assert updates[0]["learning_rate"] == pytest.approx(1e-2 * (1 - 4 / 6))
    assert read_json(tmp_path / "faster" / "config.json")["resume_from"] == str(folder)
    with pytest.raises(InputError, match="resume_from = .*nowhere: there is no run with checkpoints"):
        train(dataclasses.replace(linear, name="x", resume_from=str(tmp_path / "nowhere")))


def _params(config):
    _, state = loop.build(config)
    with loop.contextlib.closing(loop.Checkpoints(config.run_dir / "checkpoints")) as checkpoints:
        return checkpoints.restore(state)[0].params


def test_out_of_time_and_then_more(whole, tmp_path):
    config, folder = whole
    out = dataclasses.replace(config, output_dir=str(tmp_path), max_seconds=1e-6, export=False)
    train(out)
    assert not (tmp_path / "run" / "eval" / "step_000002").exists()
    train(dataclasses.replace(out, max_seconds=0))
    assert figures(tmp_path / "run") == figures(folder)
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "run", moved / "run")
    train(dataclasses.replace(out, max_seconds=0, output_dir=str(moved)))  # a finished run opens from another folder


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(tmp_path, caplog):
    config = training.config(tmp_path, max_steps=3, save_steps=1, data=dataclasses.replace(EVALUATED, eval=()))
    folder = train(config)
    expected = training.numbers(folder)
    newest = folder / "checkpoints" / "3"
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    train(config)
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "checkpoint 3 of " in said and "going on from checkpoint 2" in said
    assert (folder / "checkpoints" / "damaged_3").is_dir() and newest.is_dir()
    assert training.numbers(folder) == expected


def test_a_folder_holds_one_run_at_a_time(tmp_path):
    config = training.config(tmp_path, max_steps=1, data=dataclasses.replace(EVALUATED, eval=()))
    alive = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    lock = config.run_dir / "running.json"
    lock.parent.mkdir(parents=True)
    born = open(f"/proc/{alive.pid}/stat").read().rpartition(")")[2].split()[19]
    own = {"host": socket.gethostname(), "pid": alive.pid, "born": born, "since": 0}
    try:
        lock.write_text(json.dumps(own))
        with pytest.raises(InputError, match=f"process {alive.pid} on {socket.gethostname()} has been training here"):
            train(config)
        lock.write_text(json.dumps({**own, "host": "another-host"}))
        with pytest.raises(InputError, match="on another-host has been training here"):
            train(config)
        # stale: another process has that number now; and a host that has been silent for long
        lock.write_text(json.dumps({**own, "born": "1"}))
        train(config)
        assert not lock.exists()
        lock.write_text(json.dumps({**own, "host": "another-host"}))
        os.utime(lock, (0, 0))
        train(config)
    finally:
        alive.kill()
        alive.wait()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DataConfig(train=("coco:nowhere.json?task=detection",))}, "nowhere.json"),
        ({"data": DataConfig(train=EVALUATED.train, eval=("world:groundin",))}, "groundin"),
        ({"method": training.grpo("absent")}, "does not import"),
        ({"report_to": ("tensorbord",)}, "report_to: 'tensorbord' is unknown"),
        (
            {"data": EVALUATED, "metric_for_best_model": "x/y", "eval_steps": 1},
            "metric_for_best_model = 'x/y': write <source>/<figure>",
        ),
        ({"output_dir": "/proc/nowhere"}, "output_dir: .* cannot be written"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded_or_a_folder_taken(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(loop, "build", lambda *_: pytest.fail("the model was loaded"))
    config = training.config(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        train(config)
    assert not config.run_dir.exists()


def test_rollouts_without_a_reward_end_the_run(tmp_path, caplog):
    config = training.config(
        tmp_path,
        method=training.grpo("never"),
        optim=OptimConfig(learning_rate=1e-3, max_nonfinite_steps=2),
        data=dataclasses.replace(EVALUATED, eval=()),
        max_steps=9,
    )
    with pytest.raises(InputError, match="2 updates in a row learned nothing: no completion got a reward"):
        train(config)
    assert "update 1 learned nothing" in caplog.text
    assert reward_functions.never("", {}) is None
    assert read_lines(config.run_dir / "metrics.jsonl")[0]["rewards/none"] == 4
