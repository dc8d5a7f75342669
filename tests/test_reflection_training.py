"""Training on reflection dialogues: the loss is the sheet's on the scorer's probabilities; bad answers become unlikely."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from jaxmllm import api
from jaxmllm.data.dialogues import conversation
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.runfiles import read_lines
from jaxmllm.train.config import DataConfig, OptimConfig, UnlikelihoodConfig
from jaxmllm.train.loop import train
from tests import training

pytestmark = pytest.mark.usefixtures("one_device")
END = "<|im_end|>"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two dialogues, of two and of three answers, and their file."""
    folder = tmp_path_factory.mktemp("reflection")
    rewards = [("vlm", [2.0, 10.0]), ("rule", [0.1, 0.4, 0.8])]
    found = []
    for k, (source, values) in enumerate(rewards):
        Image.fromarray(open_source("world:grounding?size=84x84&objects=2-3")[k]["images"][0]).save(folder / f"{k}.png")
        turns = [
            {"response": f"It is at [{10 * n}, {n + k}].", "reward": value, "feedback": "Look again."}
            for n, value in enumerate(values)
        ]
        turns[-1]["feedback"] = None
        found.append({"image": f"{k}.png", "source": source, "question": "Where is it?", "turns": turns})
    path = folder / "dialogues.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path, found


def config(folder, path, **changes):
    return training.config(
        folder,
        **{
            "method": "unlikelihood",
            "trainable": r"(?!vision/).*",
            "data": DataConfig(train=(f"reflection:{path}",)),
            "optim": OptimConfig(learning_rate=1e-3, lr_scheduler_type="constant"),
            "save_steps": 100,
            **changes,
        },
    )


def expected(path, rows, alpha, spared) -> float:
    """Sheet reper.md 4.2 in numpy: each answer is scored on its own after all that came before it."""
    model, sigmas = api.load("tiny", dtype="float32"), {"vlm": lambda r: np.array(r) / 10, "rule": lambda r: np.array(r) / max(r)}
    losses = []
    for row in rows:
        tokens = []
        sigma = sigmas[row["source"]]([turn["reward"] for turn in row["turns"]])
        for k, turn in enumerate(row["turns"]):
            chat = conversation({"image": str(path.parent / row["image"])}, row["question"], row["turns"][:k])
            ((logps,),) = api.score(model, [chat], [[turn["response"] + END]])
            pushed = np.ones(len(logps))
            pushed[-1] = not spared
            floored = np.log(np.maximum(1 - np.exp(logps.astype(np.float64)), 1e-5))
            tokens.append(-(sigma[k] * logps + alpha * (1 - sigma[k]) * pushed * floored))
        losses.append(np.concatenate(tokens).mean())
    return float(np.mean(losses))


def test_the_loss_is_the_sheets_and_bad_answers_become_unlikely(tmp_path, rows):
    path, found = rows
    whole = config(tmp_path, path, max_steps=12, name="whole", unlikelihood=UnlikelihoodConfig(alpha=1.0))
    lines = read_lines(train(whole) / "metrics.jsonl")
    first, last = lines[0], lines[-1]
    assert first["loss"] == pytest.approx(expected(path, found, alpha=1.0, spared=True), rel=1e-4)
    assert last["loss"] < 0.7 * first["loss"]
    # answer 3 has sigma 1; answer 1 has .2 and .125, and its likeliest tokens are above that
    assert last["probability/answer_3"] > 2 * first["probability/answer_3"]
    assert last["probability/answer_3"] > 1.5 * last["probability/answer_1"]


def test_microbatches_and_the_published_variant(tmp_path, rows):
    """Cut in two, and with the end of turn pushed down as any other token."""
    path, found = rows
    (row,) = read_lines(train(config(
        tmp_path, path, max_steps=1, unlikelihood=UnlikelihoodConfig(penalise_end=True),
        optim=OptimConfig(learning_rate=1e-3, gradient_accumulation_steps=2),
    )) / "metrics.jsonl")  # fmt: skip
    assert row["loss"] == pytest.approx(expected(path, found, alpha=10.0, spared=False), rel=1e-4)


def test_other_data_is_refused(tmp_path, rows):
    base = config(tmp_path, rows[0])
    with pytest.raises(InputError, match="method unlikelihood learns from reflection: sources"):
        train(dataclasses.replace(base, data=DataConfig(train=("world:grounding",))))
    with pytest.raises(InputError, match=r"questions_per_image(.|\n)*alpha = -1"):
        data = dataclasses.replace(base.data, questions_per_image=2)
        train(dataclasses.replace(base, data=data, unlikelihood=UnlikelihoodConfig(alpha=-1)))
    assert not (tmp_path / "run").exists()
