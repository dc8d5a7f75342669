"""`jaxmllm reflect`: the loop with the embedded model, the data set it writes, and one line for each mistake."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxmllm import api, cli
from jaxmllm.data.dialogues import conversation
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.tasks import grounding
from tests.test_cli import refused

SCENES = "world:grounding?size=84x84&objects=2-4&split=val"


def test_the_loop_with_the_embedded_model(capsys):
    """The first answer is what `generate` gives, its score what the task's reward gives."""
    tokens, records = 24, [open_source(SCENES)[k] for k in range(2)]
    options = ["--data", SCENES, "--limit", "2", "--turns", "2", "--critic", "reward", "--max-new-tokens", str(tokens)]
    assert cli.main(["reflect", *options]) == 0
    out, err = capsys.readouterr()
    chats = [conversation(record, grounding.prompt(record)) for record in records]
    answers = api.generate(api.load("tiny"), chats, max_new_tokens=tokens, temperature=0)
    scores = []
    for record, block, (answer,) in zip(records, out.split("=== ")[1:], answers, strict=True):
        parts = [grounding.reward(text, record)["reward"] for text in (answer.text, grounding.answer(record))]
        scores.append(10 * parts[0] / parts[1])
        assert block.startswith(f"{record['id']}: {grounding.prompt(record)}\n--- answer 1 (score ")
        assert f"(score {10 * parts[0] / parts[1]:.3g} of 10)" in block and f"\n{answer.text}\n" in block
        assert block.count("--- answer") == 2 and block.count("--- feedback") == 1
    assert f"mean score of answers 1 to 2: {np.mean(scores):.2f}, " in err


@pytest.fixture
def scripted(monkeypatch):
    """Answers in place of the model's: the gold one at temperature 0, else a wrong box; a judge likes the first."""
    records = [open_source(SCENES)[k] for k in range(60)]
    gold = {record["images"][0].tobytes(): grounding.answer(record) for record in records}
    wrong = grounding.answer({"size": [84, 84], "box": [0, 0, 5, 5], "expression": "thing"})

    def generate(model, conversations, *, temperature, **_):
        said = []
        for messages in conversations:
            image, question = messages[-1]["content"][0]["image"], messages[-1]["content"][-1]["text"]
            right = gold[image.tobytes()]
            if "Criteria" not in question:
                said.append(right if temperature == 0 else wrong)
            else:
                said.append(
                    f"Authenticity: {4 * (right in question)}, Correctness: 2, Detail: 2, Coherence: 1, Completeness: 1. "
                    "Reason: x"
                )
        return [[api.Generation(text, [], np.zeros(0), "stop")] for text in said]

    monkeypatch.setattr(api, "generate", generate)
    return gold, wrong


@pytest.mark.parametrize("critic, best", [(["--critic", "reward"], 1.0), ([], 10.0)])
def test_the_data_set(tmp_path, capsys, scripted, critic, best):
    gold, wrong = scripted
    assert cli.main(["reflect", "--data", SCENES, "--limit", "60", "--out", str(tmp_path / "data"), *critic]) == 0
    assert f"reflection:{tmp_path / 'data' / 'dialogues.jsonl'}" in capsys.readouterr().err
    source = open_source(f"reflection:{tmp_path / 'data' / 'dialogues.jsonl'}")
    assert len(source) == 60
    record, drawn = source[7], open_source(SCENES)[7]
    assert record["id"] == drawn["id"]
    with Image.open(record["images"][0]) as image:
        np.testing.assert_array_equal(image, drawn["images"][0])
    assert record["turns"][-1]["response"] == gold[drawn["images"][0].tobytes()]
    assert record["turns"][-1]["reward"] == pytest.approx(best)
    long = next(record for record in source if len(record["turns"]) == 2)
    assert [turn["response"] for turn in long["turns"]][0] == wrong
    roles = [message["role"] for message in long["messages"]]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert long["messages"][2]["content"][0]["text"] == long["turns"][0]["feedback"]
    assert "exists already" in refused(capsys, "reflect", "--data", SCENES, "--out", tmp_path / "data")


def test_mistakes_get_one_line(tmp_path, capsys):
    missing = tmp_path / "missing.png"
    assert "either --image or --data" in refused(capsys, "reflect")
    assert "bring their own" in refused(capsys, "reflect", "--data", SCENES, "--prompt", "Count.")
    assert "no reference" in refused(capsys, "reflect", "--image", missing, "--critic", "reward")
    assert "--turns 0" in refused(capsys, "reflect", "--image", missing, "--turns", 0)
    assert str(missing) in refused(capsys, "reflect", "--image", missing)
    assert "about one image" in refused(capsys, "reflect", "--data", "world:tracks")
    assert str(tmp_path) in refused(capsys, "reflect", "--data", SCENES, "--model", tmp_path)


GOOD = {
    "image": "a.png",
    "question": "What?",
    "source": "vlm",
    "turns": [{"response": "a", "reward": 1, "feedback": "No."}, {"response": "b", "reward": 9, "feedback": None}],
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"source": "me"}, "source: 'me'"),
        ({"turns": []}, "1 to 3 answers"),
        ({"turns": GOOD["turns"] * 2}, "1 to 3 answers"),
        ({"turns": GOOD["turns"][:1]}, r"turns\[0\].feedback"),
        ({"turns": [{"response": "a", "reward": -1}]}, r"turns\[0\].reward: -1"),
        ({"turns": [{"response": "a", "reward": "x"}]}, r"turns\[0\].reward"),
        ({"turns": [{"response": " ", "reward": 1}]}, "response: expected a text"),
        ({"turns": [{"reward": 1}]}, "'response' is missing"),
        ({"question": 3}, "question: expected a text"),
    ],
)
def test_bad_rows_of_a_reflection_file(tmp_path, change, message):
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, GOOD | change)))
    source = open_source(f"reflection:{path}")
    assert [m["role"] for m in source[0]["messages"]] == ["user", "assistant"] * 2
    with pytest.raises(InputError, match=rf"rows.jsonl, record 1: .*{message}"):
        source[1]
