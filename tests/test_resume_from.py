"""Runs that begin with another run's checkpoint, are logged in windows, or follow a mistake: what a start takes over."""

import dataclasses
import json
import shutil
import sys
import types

import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxmllm.errors import InputError
from jaxmllm.runfiles import read_json, read_lines
from jaxmllm.training import loop
from jaxmllm.training.config import DataConfig
from jaxmllm.training.loop import train
from tests.support import training

pytestmark = pytest.mark.usefixtures("one_device")
TRAINED = DataConfig(train=(f"world:grounding?{training.SCENES}&length=64",))
EVALUATED = dataclasses.replace(
    TRAINED, eval=(f"world:grounding?{training.SCENES}&split=val&length=4",), eval_samples=4
)


class Killed(Exception):
    pass


def at(step, monkeypatch, what):
    """Does `what(run)` after update `step` and everything that was due then, once."""
    usual = loop.Run.after

    def after(self, before, now, report):
        usual(self, before, now, report)
        if now == step:
            monkeypatch.setattr(loop.Run, "after", usual)
            what(self)

    monkeypatch.setattr(loop.Run, "after", after)


def kill(run):
    run.checkpoints.wait()
    raise Killed


def out_of_time(run):
    run.stop.out_of_time = True


def test_a_window_of_updates_survives_a_stop_in_it(tmp_path, monkeypatch):
    """Logged every third update, stopped after the fourth: row 6 is the mean of three updates all the same."""
    whole = training.config(tmp_path, name="whole", max_steps=6, logging_steps=3, data=TRAINED)
    expected = training.numbers(train(whole))
    assert [row["step"] for row in expected] == [3, 6]
    for name, stop in (("killed", kill), ("out_of_time", out_of_time)):
        cut = dataclasses.replace(whole, name=name)
        at(4, monkeypatch, stop)
        try:
            train(cut)
        except Killed:
            assert stop is kill
        assert [row["step"] for row in training.numbers(cut.run_dir)] == [3], name
        assert training.numbers(train(cut)) == expected, name


def test_a_run_from_another_one_is_a_run_of_its_own(tmp_path, monkeypatch, caplog):
    """It has its own first evaluation and time, leaves the other folder as it is, and opens when that one is gone."""
    old = training.config(tmp_path, name="old", max_steps=3, save_steps=1, data=EVALUATED)
    other = train(old)
    newest = other / "checkpoints" / "3"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.unlink()
    files = sorted(path for path in other.rglob("*"))
    new = dataclasses.replace(old, name="new", max_steps=5, resume_from=str(other), max_seconds=3600.0)
    for steps in (2, 3):
        with pytest.raises(InputError, match=f"max_steps = {steps}: .*old has made 3 updates"):
            train(dataclasses.replace(new, max_steps=steps))
    assert not new.run_dir.exists()
    seconds = []
    monkeypatch.setattr(loop.Stop, "allow", lambda self, limit, used: seconds.append(used))
    folder = train(new)
    assert seconds == [0.0]
    assert "going on from checkpoint 2" in caplog.text
    assert sorted(path for path in other.rglob("*")) == files
    assert read_json(folder / "eval" / "before" / "config.json")["config"] == {"step": 2}
    logged = read_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in logged if "eval_world:grounding/IoU" in row] == [2, 5]
    assert [row["step"] for row in logged if "loss" in row] == [3, 4, 5]
    shutil.rmtree(other)
    train(new)
    assert read_lines(folder / "metrics.jsonl") == logged


def test_another_metric_of_the_best_model_is_taken_in_the_same_folder(tmp_path):
    wrong = training.config(
        tmp_path, max_steps=2, eval_steps=1, data=EVALUATED, metric_for_best_model="world:grounding/Acc@0.5"
    )
    train(wrong)
    train(dataclasses.replace(wrong, metric_for_best_model="world:grounding/IoU", load_best_model_at_end=True))
    changed = read_json(wrong.run_dir / "run.json")["starts"][1]["changed"]
    assert "metric_for_best_model: 'world:grounding/Acc@0.5' -> 'world:grounding/IoU'" in changed
    with pytest.raises(InputError, match="seed: 0 -> 1"):  # what enters an update is still refused by name
        train(dataclasses.replace(wrong, metric_for_best_model="world:grounding/IoU", seed=1))


def test_a_mistyped_metric_is_told_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "build", lambda *_: pytest.fail("the model was loaded"))
    config = training.config(tmp_path, eval_steps=1, data=EVALUATED, metric_for_best_model="world:grounding/IuO")
    with pytest.raises(InputError, match="world:grounding/IuO.*not measured; use one of world:grounding/IoU"):
        train(config)


def test_wandb_knows_a_run_by_its_folder_and_again_at_its_next_start(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda values, step: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: calls.append(k) or run))
    one = training.config(tmp_path / "one", max_steps=1, data=TRAINED, report_to=("wandb",))
    for config in (one, one, dataclasses.replace(one, output_dir=str(tmp_path / "two"))):
        train(config)
    first, again, other = (call["id"] for call in calls)
    assert first == again != other and one.name not in (first, other)


def test_the_table_of_completions_shows_what_a_conversation_asked(tmp_path):
    Image.new("RGB", (84, 84), "red").save(tmp_path / "a.png")
    asked = [f"Which colour, number {k}?" for k in range(4)]
    rows = [
        {
            "id": f"row{k}",
            "images": ["a.png"],
            "messages": [{"role": "user", "content": f"<image>{text}"}, {"role": "assistant", "content": "red"}],
        }
        for k, text in enumerate(asked)
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=(f"chat:{tmp_path / 'x.jsonl'}",))
    folder = train(training.config(tmp_path, max_steps=1, completions_steps=1, data=data))
    shown = pq.read_table(folder / "completions" / "completions_00001.parquet").to_pydict()["prompt"]
    assert len(shown) == 4 and set(shown) <= set(asked)
