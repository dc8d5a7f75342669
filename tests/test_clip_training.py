"""SFT on clips: attribute tracks (UTR) and foresight (Merlin), with the normalisers of their sheets."""

import numpy as np
import pytest

from jaxmllm import api
from jaxmllm.data.examples import Asking
from jaxmllm.data.sources import open_source
from jaxmllm.methods import SFT
from jaxmllm.runfiles import read_lines
from jaxmllm.training.config import DataConfig, OptimConfig
from jaxmllm.training.loop import train
from tests.support import training

pytestmark = pytest.mark.usefixtures("one_device")
CLIPS = "size=56x56&objects=1-1&frames=2&length=4"


@pytest.mark.parametrize(
    "spec, norm",
    [
        (f"world:foresight?{CLIPS}&horizon=1", "token"),
        pytest.param(f"world:tracks?{CLIPS}", "sample", marks=pytest.mark.slow),
    ],
)
def test_the_loss_is_the_scorers(tmp_path, spec, norm):
    """Of the first update; and it falls."""
    config = training.config(
        tmp_path,
        method=SFT(loss_norm=norm),
        trainable=r"text/.*|embed",
        batch_size=4,
        max_steps=6,
        data=DataConfig(train=(spec,)),
        optim=OptimConfig(learning_rate=2e-3, lr_scheduler_type="constant"),
        save_steps=100,
    )
    lines = read_lines(train(config) / "metrics.jsonl")
    records, asking = [open_source(spec)[k] for k in range(4)], Asking()
    answers = [[asking.answer(record) + "<|im_end|>"] for record in records]
    scores = api.score(api.load("tiny", dtype="float32"), [asking.conversation(record) for record in records], answers)
    each = [-logps for (logps,) in scores]
    mean = np.mean([one.mean() for one in each]) if norm == "sample" else np.concatenate(each).mean()
    assert len({len(one) for one in each}) > 1  # the two normalisers differ
    assert lines[0]["loss"] == pytest.approx(mean, rel=1e-4)
    assert lines[0]["num_tokens"] == sum(map(len, each))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
