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
from jaxmllm.methods import DPO, Unlikelihood
from jaxmllm.runfiles import read_lines
from jaxmllm.training.config import DataConfig, OptimConfig
from jaxmllm.training.loop import train
from tests.support import training

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
            "method": Unlikelihood(),
            "trainable": r"(?!vision/).*",
            "data": DataConfig(train=(f"reflection:{path}",)),
            "optim": OptimConfig(learning_rate=1e-3, lr_scheduler_type="constant"),
            "save_steps": 100,
            **changes,
        },
    )


def expected(path, rows, alpha, spared) -> float:
    """Sheet reper.md 4.2 in numpy: each answer is scored on its own after all that came before it."""
    chats, texts = [], []
    for row in rows:
        for k, turn in enumerate(row["turns"]):
            chats.append(conversation({"image": str(path.parent / row["image"])}, row["question"], row["turns"][:k]))
            texts.append([turn["response"] + END])
    scores = iter(api.score(api.load("tiny", dtype="float32"), chats, texts))
    sigmas, losses = {"vlm": lambda r: np.array(r) / 10, "rule": lambda r: np.array(r) / max(r)}, []
    for row in rows:
        tokens = []
        for sigma in sigmas[row["source"]]([turn["reward"] for turn in row["turns"]]):
            (logps,) = next(scores)
            pushed = np.ones(len(logps))
            pushed[-1] = not spared
            floored = np.log(np.maximum(1 - np.exp(logps.astype(np.float64)), 1e-5))
            tokens.append(-(sigma * logps + alpha * (1 - sigma) * pushed * floored))
        losses.append(np.concatenate(tokens).mean())
    return float(np.mean(losses))


def test_the_loss_is_the_sheets_and_bad_answers_become_unlikely(tmp_path, rows):
    path, found = rows
    whole = config(tmp_path, path, max_steps=12, name="whole", method=Unlikelihood(alpha=1.0))
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
        tmp_path, path, max_steps=1, method=Unlikelihood(penalise_end=True),
        optim=OptimConfig(learning_rate=1e-3, gradient_accumulation_steps=2),
    )) / "metrics.jsonl")  # fmt: skip
    assert row["loss"] == pytest.approx(expected(path, found, alpha=10.0, spared=False), rel=1e-4)


def test_preference(tmp_path, rows):
    """Before the first update policy and reference agree: log 2. Then the margin of chosen and rejected grows."""
    path, found = rows
    slow = OptimConfig(learning_rate=1e-4, lr_scheduler_type="constant")  # ten times faster the third margin overshoots
    data = DataConfig(train=(f"preference:{path}",))
    base = config(tmp_path, path, method=DPO(), max_steps=3, data=data, optim=slow)
    lines = read_lines(train(base) / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-5) and lines[0]["rewards/margins"] == 0
    # the second update's margin is that of the scorer, on the weights after the first
    once = dataclasses.replace(base, max_steps=1, name="once", export=True)
    before, after = (api.load(folder, dtype="float32") for folder in ("tiny", train(once) / "export"))
    chats = [conversation({"image": str(path.parent / row["image"])}, row["question"]) for row in found]
    said = [[row["turns"][k]["response"] + END for k in (-1, 0)] for row in found]
    pairs = zip(api.score(after, chats, said), api.score(before, chats, said), strict=True)
    margins = [0.1 * ((new[0] - old[0]).sum() - (new[1] - old[1]).sum()) for new, old in pairs]
    assert lines[1]["rewards/margins"] == pytest.approx(np.mean(margins), rel=1e-2)
    assert lines[1]["loss"] == pytest.approx(np.mean(np.log1p(np.exp(-np.array(margins)))), rel=1e-3)
    assert lines[2]["rewards/margins"] > lines[1]["rewards/margins"] > 0 and lines[2]["rewards/accuracies"] == 1


def lambda_loss(scores, psi) -> float:
    """Sheet reper.md 4.4 for one prompt, in loops."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    discount = {i: np.log(1 + rank) for rank, i in enumerate(order, 1)}
    total = 0.0
    for i, better in enumerate(psi):
        for j, worse in enumerate(psi):
            if better > worse:
                gain = abs(2**better - 2**worse)
                total += gain * abs(1 / discount[i] - 1 / discount[j]) * np.log1p(np.exp(scores[j] - scores[i]))
    return total


@pytest.mark.parametrize("cuts", [1, 2])
def test_ranking(tmp_path, rows, cuts):
    """LiPO on all answers, of prompts that have two and three: the sheet's loss of the scorer's log-probabilities."""
    path, found = rows
    optim = OptimConfig(learning_rate=1e-3, lr_scheduler_type="constant", gradient_accumulation_steps=cuts)
    base = config(
        tmp_path, path, method=DPO(loss_type="lipo"), max_steps=2, optim=optim,
        data=DataConfig(train=(f"preference:{path}?answers=all",)),
    )  # fmt: skip
    lines = read_lines(train(base) / "metrics.jsonl")
    psi = [[1.0, 0.2], [0.8, 0.4, 0.1]]
    if cuts == 1:  # policy and reference agree; computed in other batches, rounding would order the answers
        flat = [lambda_loss(np.zeros(len(p)), p) for p in psi]
        assert lines[0]["loss"] == pytest.approx(np.mean(flat), rel=1e-4)
    once = dataclasses.replace(base, max_steps=1, name="once", export=True)
    before, after = (api.load(folder, dtype="float32") for folder in ("tiny", train(once) / "export"))
    chats = [conversation({"image": str(path.parent / row["image"])}, row["question"]) for row in found]
    said = [[turn["response"] + END for turn in reversed(row["turns"])] for row in found]
    both = zip(api.score(after, chats, said), api.score(before, chats, said), strict=True)
    scores = [[0.1 * (new - old).sum() for new, old in zip(*pair, strict=True)] for pair in both]
    assert lines[1]["loss"] == pytest.approx(np.mean(list(map(lambda_loss, scores, psi))), rel=2e-3)
    assert lines[1]["loss"] < lines[0]["loss"]


def test_answers_that_are_not_preferred(tmp_path, rows):
    path, found = rows
    (tmp_path / "0.png").write_bytes((path.parent / "0.png").read_bytes())
    single = {**found[0], "image": "0.png", "turns": found[0]["turns"][-1:]}
    pair = {**found[0], "image": "0.png"}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (single, pair, single, pair)))
    source = open_source(f"preference:{file}")
    assert len(source) == 2 and source.where(1).endswith("record 3")
    assert [(r["messages"][-1]["content"][0]["text"], r["reward"]) for r in source.records(0)] == [
        ("It is at [10, 1].", 1.0), ("It is at [0, 0].", 0.2),
    ]  # fmt: skip
    said = {"chosen": "It is at [10, 1].", "rejected": [{"role": "assistant", "content": "It is at [0, 0]."}]}
    trl = {"prompt": "Where is it?", "images": ["0.png"], **said}
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps(trl) + "\n" + json.dumps(trl | {"rejected": ""}) + "\n")
    one, other = (open_source(f"preference:{pairs}").records(0), source.records(0))
    assert [record["messages"] for record in one] == [record["messages"] for record in other]
    assert [record["reward"] for record in one] == [1.0, 0.0]
    with pytest.raises(InputError, match="record 1: rejected: expected a text"):
        open_source(f"preference:{pairs}")[1]


def test_other_data_is_refused(tmp_path, rows):
    base = config(tmp_path, rows[0])
    with pytest.raises(InputError, match="method unlikelihood learns from reflection: sources"):
        train(dataclasses.replace(base, data=DataConfig(train=("world:grounding",))))
    with pytest.raises(
        InputError, match="method dpo learns from preference: sources(.|\n)*method.beta = 0: must be above 0"
    ):
        train(dataclasses.replace(base, method=DPO(beta=0)))
    with pytest.raises(InputError, match="answers=all goes with method.loss_type lipo"):
        train(dataclasses.replace(base, method=DPO(), data=DataConfig(train=("preference:x.jsonl?answers=all",))))
    with pytest.raises(InputError, match="label_smoothing: goes with loss_type sigmoid"):
        train(dataclasses.replace(base, method=DPO(loss_type="lipo", label_smoothing=0.1)))
    with pytest.raises(InputError, match=r"method.alpha = -1"):
        train(dataclasses.replace(base, method=Unlikelihood(alpha=-1)))
    assert not (tmp_path / "run").exists()
