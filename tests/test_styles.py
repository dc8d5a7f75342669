"""How boxes are written belongs to the model's family: it is the default everywhere, and another one is told."""

import dataclasses
import json
import logging

import pytest

from jaxmllm import api, cli
from jaxmllm.errors import InputError
from jaxmllm.runfiles import read_json
from jaxmllm.training.config import DataConfig
from jaxmllm.training.loop import train
from jaxmllm.training.setup import chosen_style
from tests.support import training

pytestmark = pytest.mark.usefixtures("one_device")
SCENES = "world:grounding?size=84x84&objects=2-3&length=8"


def test_a_family_writes_boxes_as_its_checkpoints_do(caplog):
    cfg = api.load("tiny").cfg
    older = dataclasses.replace(cfg, model_type="qwen2_vl")
    assert (chosen_style(None, cfg), chosen_style(None, older)) == ("qwen2_5_vl", "qwen2_vl")
    assert not caplog.text
    assert chosen_style("qwen2_5_vl", older) == "qwen2_5_vl"
    assert "style qwen2_5_vl: checkpoints of this family write box tokens in 0-1000 of the image" in caplog.text
    with pytest.raises(InputError, match="style 'pixels': use one of qwen2_vl, qwen2_5_vl"):
        chosen_style("pixels", cfg)


def test_a_run_says_how_boxes_are_written_and_keeps_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = training.config(tmp_path, data=DataConfig(train=(SCENES,), eval=(SCENES,), eval_samples=2), max_steps=1)
    assert config.data.style is None
    folder = train(config)
    assert read_json(folder / "config.json")["data"]["style"] == "qwen2_5_vl"
    assert "boxes are JSON in pixels of the resized image; a right answer: '```json" in caplog.text
    train(config)  # goes on: the same style is no other config
    with pytest.raises(InputError, match="data.style: 'qwen2_5_vl' -> 'qwen2_vl'"):
        train(dataclasses.replace(config, data=dataclasses.replace(config.data, style="qwen2_vl")))
    cli.main(["report", str(folder)])
    assert "JSON in pixels of the resized image" in (folder / "report.html").read_text(encoding="utf-8")


def test_an_evaluation_asks_in_the_style_of_the_model(tmp_path):
    out = tmp_path / "own"
    assert cli.main(["eval", "--data", SCENES, "--limit", "2", "--max-new-tokens", "4", "--out", str(out)]) == 0
    (line, *_) = (out / "predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["question"].endswith("Report the bbox coordinates in JSON format.")
    out = tmp_path / "other"
    arguments = ["--limit", "2", "--max-new-tokens", "4", "--style", "qwen2_vl", "--out", str(out)]
    assert cli.main(["eval", "--data", SCENES, *arguments]) == 0
    assert "JSON" not in json.loads((out / "predictions.jsonl").read_text().splitlines()[0])["question"]
