"""Temporal perplexity of clips: the scorer's probabilities through the sheet's formula; the filter feeds training."""

import json

import jax
import numpy as np
import pytest

from jaxmllm import api, cli
from jaxmllm.data.examples import Asking
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.eval import tpl
from tests.test_cli import refused

CLIPS = "world:tracks?size=56x56&objects=1-2&frames=3&length=8&kinds=box"  # halves are of one kind


@pytest.fixture(scope="module")
def model():
    return api.load("tiny", dtype="float32")


def chat(record, answer):
    """The same clip as a video of a chat, four frames."""
    frames = [*record["images"], record["images"][-1]]
    content = [{"type": "video", "video": frames, "fps": 2}, {"type": "text", "text": "What moves?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": "video", "messages": messages}


def test_scores_are_the_formula_on_the_scorers_probabilities(model):
    """Single frames are shown in other words here: as lists of one image, or of a frame twice."""
    record = open_source(CLIPS)[0]
    video = chat(record, "A red square.")
    found = tpl.temporal_scores(model, [record, video], tries=None, single_mode="single")
    asking = Asking()
    question = asking.parts(record)[-1]
    answers = [asking.answer(record) + tpl.END, "A red square." + tpl.END]
    images = [[{"type": "image", "image": image} for image in chosen] for chosen in
              (record["images"], *([image] for image in record["images"]))]  # fmt: skip
    frames = video["messages"][0]["content"][0]["video"]
    videos = [{"type": "video", "video": chosen, "fps": 2} for chosen in (frames, *([frame] * 2 for frame in frames))]
    asked = [
        [[*shown, question] for shown in images],
        [[shown, {"type": "text", "text": "What moves?"}] for shown in videos],
    ]
    for row, contents, answer in zip(found, asked, answers, strict=True):
        chats = [[{"role": "user", "content": content}] for content in contents]
        nll = np.array([-logps.mean() for (logps,) in api.score(model, chats, [[answer]] * len(chats))])
        assert row["frames"] == list(range(len(nll) - 1))
        assert row["tpl_nll_mean"] == pytest.approx(nll[1:].mean() - nll[0], abs=1e-4)
        assert row["tpl_nll_min"] == pytest.approx(nll[1:].min() - nll[0], abs=1e-4)
        assert row["tpl_ppl_mean"] == pytest.approx(np.exp(nll[1:]).mean() - np.exp(nll[0]), rel=1e-4)
    assert found[0]["tokens"] == len(model.tokenizer(answers[0])["input_ids"])


def test_one_frame_keeps_its_place():
    """Of images with tags the shown one stays at its own tag; the control fills every place with it."""
    content = [part for k in range(3) for part in ({"type": "text", "text": f"f{k}"}, {"type": "image", "image": k})]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
    (_, single), (_, repeated) = (tpl.one_frame(messages, 1, mode) for mode in ("single", "repeat"))
    assert [part.get("text", part.get("image")) for part in single["content"]] == ["f0", "f1", 1, "f2"]
    assert [part.get("text", part.get("image")) for part in repeated["content"]] == ["f0", 1, "f1", 1, "f2", 1]
    video = [{"role": "user", "content": [{"type": "video", "video": ["a", "b", "c"], "fps": 2}]}]
    shown = [tpl.one_frame(video, 2, mode)[0]["content"][0]["video"] for mode in ("single", "repeat")]
    assert shown == [["c", "c"], ["c", "c", "c"]]


def test_what_is_no_clip_is_refused(model):
    scene = open_source("world:grounding?size=56x56")[0]
    with pytest.raises(InputError, match="1 frames; temporal perplexity needs two"):
        tpl.temporal_scores(model, [scene])
    other = {**scene, "images": [scene["images"][0], np.zeros((28, 28, 3), np.uint8)]}
    with pytest.raises(InputError, match="differ in size"):
        tpl.temporal_scores(model, [other])


def test_the_command_and_training_on_what_it_keeps(tmp_path, capsys, monkeypatch):
    def scripted(model, conversations, completions, **_):
        """One frame in the place of all is less likely than the clip for every other record."""
        likely = []
        for k, messages in enumerate(conversations):
            shown = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
            still = all(np.array_equal(shown[0], other) for other in shown)
            likely.append([np.full(12, -1.0 - (k % 2 if still else 0))])
        return likely

    monkeypatch.setattr(api, "score", scripted)
    out = tmp_path / "scores" / "tpl.jsonl"
    assert cli.main(["tpl", "--data", CLIPS, "--out", str(out)]) == 0
    printed, err = capsys.readouterr()
    assert "tpl_nll_mean   0.500 [" in printed and "8 records, 4 of them kept" in err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["keep"] for row in rows] == [False, True] * 4 and all(row["tokens"] == 12 for row in rows)
    source = open_source(f"{CLIPS}&keep={out}")
    assert [record["id"] for record in source] == [open_source(CLIPS)[k]["id"] for k in (1, 3, 5, 7)]
    assert "exists already" in refused(capsys, "tpl", "--data", CLIPS, "--out", out)
    assert "--tries -1" in refused(capsys, "tpl", "--data", CLIPS, "--tries", -1)
    with pytest.raises(InputError, match="made of another source"):
        open_source(f"{CLIPS}&seed=1&keep={out}")
    out.write_text('{"id": 3}\n')
    with pytest.raises(InputError, match="tpl.jsonl: expected lines with index, id and keep"):
        open_source(f"{CLIPS}&keep={out}")


def test_clips_take_the_options_of_scenes():
    clip = open_source("world:tracks?size=84x84&objects=1-1&frames=3&noise=0")[2]
    assert clip["size"] == [84, 84] and len(clip["images"]) == 3 and len(clip["tracks"]) == 1
    with pytest.raises(InputError, match="world: option"):
        open_source("world:tracks?lines=3")
    assert jax.tree.leaves(clip["images"])[0].shape == (84, 84, 3)
