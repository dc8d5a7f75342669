"""A task of another package: trained, evaluated, resumed, reported and previewed by its name, without a change in this one."""

import dataclasses
import json
import sys
import textwrap

import pytest
from PIL import Image, ImageDraw

from jaxmllm import cli, tasks
from jaxmllm.errors import InputError
from jaxmllm.eval import measure
from jaxmllm.methods import GRPO
from jaxmllm.runfiles import read_lines
from jaxmllm.tasks import grounding, ocr
from jaxmllm.training.config import DataConfig
from jaxmllm.training.loop import train
from tests.support import training

pytestmark = pytest.mark.usefixtures("one_device")

COINS = textwrap.dedent('''
    """How many coins, as a number in words."""

    import dataclasses

    from jaxmllm.tasks.chat import last_turn
    from jaxmllm.tasks.task import Task

    WORDS = ("one", "two", "three")


    @dataclasses.dataclass(frozen=True)
    class Coins(Task):
        partial: float = 0.5  # what a wrong number earns

        figures = {"right": "higher", "off": "lower", "length": "neutral"}
        primary = ("right",)

        def reward(self, text, record):
            return {"reward": 1.0 if text.strip() == record["text"] else self.partial, "spoke": float(bool(text))}

        def row(self, text, record):
            said = text.strip()
            off = abs(WORDS.index(said) - WORDS.index(record["text"])) if said in WORDS else 3
            return {"right": float(said == record["text"]), "off": float(off), "length": float(len(text))}

        def unit(self, record):
            return record["scene"]

        def groups(self, record):
            return (record["text"],)


    task = Coins()
''')


@pytest.fixture
def coins(tmp_path, monkeypatch):
    """The spec of a file of 48 rows, two about each picture, that the task `coins:task` judges."""
    (tmp_path / "coins.py").write_text(COINS)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = []
    for k in range(48):
        count = k // 2 % 3 + 1
        image = Image.new("RGB", (84, 84), "white")
        for coin in range(count):
            ImageDraw.Draw(image).ellipse((5 + 25 * coin, 20, 25 + 25 * coin, 40), fill="gold")
        image.save(tmp_path / f"{k // 2}.png")
        answer = ("one", "two", "three")[count - 1]
        messages = [{"role": "user", "content": f"<image>How many? {k}"}, {"role": "assistant", "content": answer}]
        rows.append({"id": k, "images": [f"{k // 2}.png"], "scene": str(k // 2), "text": answer, "messages": messages})
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield f"chat:{tmp_path / 'mine.jsonl'}?task=coins:task"
    sys.modules.pop("coins", None)
    tasks.get.cache_clear()
    tasks._configured.cache_clear()


def test_a_task_of_another_package_is_trained_evaluated_resumed_and_reported(coins, tmp_path, capsys):
    config = training.config(
        tmp_path,
        method=GRPO(num_generations=2, max_completion_length=4),
        data=DataConfig(train=(coins,), eval=(coins,), eval_samples=48, task_options=("coins:task.partial=0.25",)),
        max_steps=1,
        eval_steps=1,
        metric_for_best_model=f"{coins.partition('?')[0]}/off",
    )
    folder = train(config)
    train(dataclasses.replace(config, max_steps=2))
    found = measure.load(folder / "eval" / "after").sources[coins.partition("?")[0]]
    assert found.task == "coins:task" and found.n == 48
    assert found.primary[:2] == ("reward", "right") and found.direction("off") == -1 and found.direction("length") == 0
    lines = read_lines(folder / "eval" / "after" / "predictions.jsonl")
    assert {line["unit"] for line in lines} == {str(k) for k in range(24)}
    assert {line["figures"]["reward"] for line in lines} <= {0.25, 1.0}
    assert found.figures["right"].value == sum(line["figures"]["right"] for line in lines) / 48
    logged = read_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in logged if "reward" in row] == [1, 2]
    page = (folder / "report.html").read_text(encoding="utf-8") if (folder / "report.html").exists() else ""
    cli.main(["report", str(folder)])
    page = page or (folder / "report.html").read_text(encoding="utf-8")
    assert "right" in page and "How many?" in page
    assert "48 of the first 48 records are training records too" in page and "Training worked: " not in page
    cli.main(["data", "preview", coins, "--out", str(tmp_path / "sheet.png"), "--n", "4"])
    assert Image.open(tmp_path / "sheet.png").width > 84


def test_what_a_task_of_another_package_lacks_is_said_at_once(coins, tmp_path):
    (tmp_path / "odd.py").write_text(
        COINS.replace('"right": "higher", ', "")
        + '\nnothing = 3\n\nclass Unsaid(Coins):\n    figures = {"right": "up"}\n'
    )
    for name, message in (
        ("odd:task", r"'odd:task': figures\['right'\] is None; say one of higher, lower, neutral"),
        ("odd:Unsaid", r"figures\['right'\] is 'up'"),
        ("odd:nothing", "'odd:nothing' is a int; give a subclass of jaxmllm.tasks.task.Task"),
        ("odd:missing", "'odd:missing' does not import .AttributeError"),
        ("nowhere.at_all:task", "'nowhere.at_all:task' does not import .ModuleNotFoundError"),
        ("coin", "'coin' is unknown; use one of grounding, .* or module:name"),
    ):
        with pytest.raises(InputError, match=message):
            tasks.get(name)
    for options, message in (
        (("stile=a",), "'stile' is known to none of"),
        (("style=a",), "option style = 'a': use one of qwen2_vl"),
        (("detection.weights.fone=1",), "option weights.fone: Weights has f1"),
        (("detection.weights.f1=much",), "option weights.f1 = 'much': give a float"),
        (("grounding.wording=train",), "'grounding.wording' is known to none of"),
        (("style",), "write name=value"),
    ):
        with pytest.raises(InputError, match=f"data.task_options: .*{message}"):
            training.config(tmp_path, data=DataConfig(task_options=options)).validate()
    sys.modules.pop("odd", None)


def test_options_go_to_the_tasks_that_have_them():
    options = {"style": "qwen2_vl", "thinking": "true", "ocr.wording": "evaluation"}
    assert tasks.of({"task": "ocr"}, options) == ocr.OCR(thinking=True, wording="evaluation")
    assert tasks.of({"task": "grounding"}, options) == grounding.Grounding("qwen2_vl", True)
