"""The recipes of CONTRIBUTING.md, followed literally: its files are written as they stand there, and nothing else is."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxmllm import api, cli, tasks
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.eval import measure
from jaxmllm.eval.harness import evaluate
from jaxmllm.machine.targets import load_mesh
from jaxmllm.methods.exported import load_exported
from jaxmllm.plan import plan as make_plan
from jaxmllm.runfiles import read_lines
from jaxmllm.training.checkpoint import read_params
from jaxmllm.training.config import DataConfig, OptimConfig
from jaxmllm.training.loop import train
from tests.support import training

pytestmark = pytest.mark.usefixtures("one_device")
TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXT, re.DOTALL))


@pytest.fixture(autouse=True)
def written(tmp_path, monkeypatch):
    """The recipes' files in a folder on the path, as a user's would be."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)
    tasks.get.cache_clear()
    tasks._configured.cache_clear()


def test_every_recipe_is_here():
    assert list(FILES) == ["coins.py", "flags.py", "spread.py", "guess.py"]


def test_a_task_and_a_source(tmp_path):
    spec = "flags:open_flags:red?length=6"
    data = DataConfig(train=(spec,), eval=(spec,), eval_samples=6, task_options=("coins:Coins.partial=0.5",))
    config = training.config(tmp_path, method=training.grpo(reward_funcs=("task",)), data=data, max_steps=1)
    folder = train(config)
    found = measure.load(folder / "eval" / "after").sources["flags:open_flags:red"]
    assert found.task == "coins:Coins" and found.primary == ("reward", "right") and found.direction("off") == -1
    source = open_source(spec)
    assert len(source) == 6 and source[4]["count"] == 1
    task = tasks.of(source[4], {"coins:Coins.partial": "0.5"})
    assert [task.reward(text, source[4]) for text in ("one", "two", "four", "?")] == [1.0, 0.5, 0.0, 0.0]
    cli.main(["data", "preview", spec, "--out", str(tmp_path / "sheet.png")])
    assert Image.open(tmp_path / "sheet.png").convert("RGB").getpixel((20, 20)) == (255, 0, 0)
    for wrong, message in (
        ("flags:open_flag:red", "flags:open_flag does not import .AttributeError"),
        ("nowhere:open:red", "nowhere:open does not import .ModuleNotFoundError.*KIND:PATH with one of the kinds"),
        ("flags:open_flags:red?size=3", "option 'size' is unknown; it takes length, sample"),
        ("flags:open_flags:red?length=many", "length: 'many' does not fit"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(wrong)


def test_a_metric(tmp_path):
    source = open_source("flags:open_flags:red?length=40")
    records = [{**source[k], "task": "spread:Spread"} for k in range(40)]
    texts = {r["id"]: ("none", "two", "?")[k % 3] for k, r in enumerate(records)}
    found = evaluate(lambda batch: [texts[r["id"]] for r in batch], records, out_dir=tmp_path, n_resamples=200)
    figures = found.sources["spread:Spread"].figures
    off = [line["figures"]["off"] for line in read_lines(tmp_path / "predictions.jsonl")]
    assert figures["spread"].value == pytest.approx(np.std(off)) and figures["off"].value == pytest.approx(np.mean(off))
    assert figures["spread"].low < figures["spread"].value < figures["spread"].high


def test_a_method_with_a_network_of_its_own(tmp_path):
    guess = importlib.import_module("guess").Guess
    config = training.config(
        tmp_path,
        method=guess(scale=0.1),
        data=DataConfig(train=("world:counting?size=84x84&objects=2-4&length=64",)),
        batch_size=8,
        trainable=r"guess/.*",
        max_steps=30,
        optim=OptimConfig(learning_rate=0.05, lr_scheduler_type="constant"),
        export=True,
        save_steps=10,
    )
    assert config.method.name == "guess:Guess"
    train(dataclasses.replace(config, max_steps=10))
    folder = train(config)  # resumed
    whole = train(dataclasses.replace(config, name="whole"))
    assert training.numbers(folder) == training.numbers(whole)
    losses = [row["loss"] for row in read_lines(folder / "metrics.jsonl")]
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    method, own = load_exported(folder / "export")
    assert method == config.method
    training.assert_same(own, {"guess": read_params(folder / "checkpoints" / "30")["guess"]})
    kept = api.load(folder / "export").params["text"]
    training.assert_same(kept, api.load("tiny").params["text"])  # the backbone was frozen
    planned = make_plan(config, load_mesh("cpu"), mesh_name="cpu")
    assert [phase.name for phase in planned.phases] == ["update"] and planned.fits
