"""Evaluations of imperfect data and models: records that fail when asked, answers in another frame, worst records, units."""

import numpy as np
import pytest
from PIL import Image

from jaxmllm.errors import InputError
from jaxmllm.eval import measure
from jaxmllm.eval.harness import evaluate
from jaxmllm.runfiles import read_lines
from jaxmllm.tasks import chat, counting, detection, grounding
from tests.test_eval import counting_records, detection_records, failing, gold, grounding_records


def failing_on(*names):
    """Gold answers; a batch with one of the records fails, as the encoder of prompts does."""

    def generate(batch):
        for record in batch:
            if record["id"] in names:
                raise InputError("the prompt has 99 tokens, and max_prompt_length is 64")
        return gold(batch)

    return generate


def test_a_record_that_fails_when_it_is_asked_is_named_and_left_out(tmp_path, caplog):
    records = grounding_records(9)
    call = dict(batch_size=4, n_resamples=5)
    got = evaluate(failing_on("g2", "g5"), records, out_dir=tmp_path / "two", max_bad_records=2, **call)
    assert got.sources["grounding"].n == 7 and got.sources["grounding"].figures["IoU"].value == pytest.approx(1)
    assert "left out: source '', record 2: the prompt has 99 tokens" in caplog.text
    assert "record 5: the prompt" in caplog.text
    with pytest.raises(InputError, match="record 5: the prompt has 99 .*; 2 records failed, max_bad_records is 1"):
        evaluate(failing_on("g2", "g5"), records, out_dir=tmp_path / "one", max_bad_records=1, **call)
    assert len(read_lines(tmp_path / "one" / "predictions.jsonl")) == 4 - 1, "answers before the failure are kept"
    with pytest.raises(InputError, match="^source '', record 2: the prompt has 99"):
        evaluate(failing_on("g2"), records, out_dir=tmp_path / "none", **call)


def test_a_record_without_a_field_of_its_task_is_named(tmp_path):
    records = grounding_records(3)
    del records[1]["expression"]
    with pytest.raises(InputError, match="record 1: does not suit the task grounding .KeyError: 'expression'"):
        evaluate(gold, records, out_dir=tmp_path / "none")
    got = evaluate(gold, records, out_dir=tmp_path / "one", max_bad_records=1, n_resamples=5)
    assert got.sources["grounding"].n == 2


@pytest.mark.parametrize("style", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("make", [grounding_records, detection_records])
def test_answers_in_another_frame_are_told(tmp_path, caplog, make, style):
    records = [{**r, "size": [900, 500], "resized": [448, 252]} for r in make(6)]
    task = {"grounding": grounding, "detection": detection}[records[0]["task"]]

    def perfect(batch, style=style):
        return [task.answer(record, style=style) for record in batch]

    got = evaluate(perfect, records, out_dir=tmp_path / "wrong", n_resamples=5)
    (note,) = got.sources[records[0]["task"]].notes
    assert "0-1000 of the image" in note and f"style {style}" in note and "JSON in pixels of the resized image" in note
    assert note in caplog.text and measure.load(tmp_path / "wrong") == got
    right = evaluate(perfect, records, out_dir=tmp_path / "right", options={"style": style}, n_resamples=5)
    assert not right.sources[records[0]["task"]].notes
    own = evaluate(lambda batch: perfect(batch, "qwen2_5_vl"), records, out_dir=tmp_path / "own", n_resamples=5)
    assert not own.sources[records[0]["task"]].notes


def test_a_model_that_is_merely_bad_gets_no_hint(tmp_path):
    records = grounding_records(20, seed=3)
    wrong = [grounding.answer(records[-k - 1]) for k in range(20)]
    texts = dict(zip([r["id"] for r in records], wrong, strict=True))
    got = evaluate(lambda b: [texts[r["id"]] for r in b], records, out_dir=tmp_path, n_resamples=5)
    assert got.sources["grounding"].figures["IoU"].value < 0.4 and not got.sources["grounding"].notes


def test_questions_of_one_picture_are_resampled_together(tmp_path):
    """Four copies of each of 30 answers say no more than 30 do."""
    rng = np.random.default_rng(0)
    base = counting_records(30)
    right = rng.random(30) < 0.5
    texts = {r["id"]: counting.answer(r) if ok else "" for r, ok in zip(base, right, strict=True)}
    copies = [{**r, "id": f"{r['id']}/{k}", "unit": r["id"]} for r in base for k in range(4)]

    def answer(batch):
        return [texts[record["id"].partition("/")[0]] for record in batch]

    def width(records, name):
        found = evaluate(answer, records, out_dir=tmp_path / name, n_resamples=2000)
        figure = found.sources["counting"].figures["accuracy"]
        return figure.high - figure.low

    once, four = width(base, "once"), width(copies, "four")
    loose = width([{k: v for k, v in r.items() if k != "unit"} for r in copies], "loose")
    assert four == pytest.approx(once, rel=0.1) and loose < 0.65 * once


def test_the_worst_records_keep_their_pictures(tmp_path):
    records = []
    for k, record in enumerate(grounding_records(12)):
        path = tmp_path / f"{k}.png"
        Image.new("RGB", (500, 500)).save(path)
        records.append({**record, "images": [str(path)], "resized": [500, 500]})
    texts = {r["id"]: "no box" if r["id"] in ("g7", "g9") else grounding.answer(r) for r in records}
    evaluate(lambda b: [texts[r["id"]] for r in b], records, out_dir=tmp_path / "out", save_pictures=2, n_resamples=5)
    kept = sorted(path.stem[-2:] for path in (tmp_path / "out" / "pictures").iterdir())
    assert kept == ["00", "01", "07", "09"]


def test_a_runs_own_rewards_come_first(tmp_path):
    records = counting_records(3)
    got = evaluate(
        gold,
        records,
        judge=lambda texts, records: [{"reward": float(len(r["points"])), "reward_short": 0.0} for r in records],
        out_dir=tmp_path,
        n_resamples=5,
    ).sources["counting"]
    assert got.primary == ("reward", "reward_short", "accuracy", "mae")
    assert got.figures["reward"].value == np.mean([len(r["points"]) for r in records]) and got.direction("reward") == 1


def test_short_answers_are_the_same_but_for_form():
    same = [("A cup.", "a cup"), ("２", "2"), ("2.0", "2"), (' "Yes" ', "yes"), ("red  car", "Red car"), ("-3", "-3.0")]
    other = [("-3", "3"), ("cup", "a cup"), ("", "a"), ("2 3", "2"), ("1e999", "2"), ("no", "yes"), ("?", "!")]
    assert all(chat.same_answer(*pair) for pair in same)
    assert not any(chat.same_answer(*pair) for pair in other)
    task = chat.Chat()
    ask = [{"role": "user", "content": "?"}]
    long = {"messages": [*ask, {"role": "assistant", "content": "one two three four five six seven eight nine"}]}
    assert task.reward("x", long) is None and "exact_match" not in task.row("x", long)
    assert task.reward("B", {"messages": ask, "solution": "b"}) == 1.0
    assert task.reward("B", {"messages": ask}) is None and task.row("two words", {"messages": ask}) == {"words": 2.0}


def test_a_larger_limit_asks_only_the_new_records(tmp_path):
    records = grounding_records(9)
    assert evaluate(gold, records, out_dir=tmp_path, limit=4, n_resamples=5).sources["grounding"].n == 4
    generate, asked = failing(99)
    assert evaluate(generate, records, out_dir=tmp_path, n_resamples=5).sources["grounding"].n == 9
    assert asked == [r["id"] for r in records[4:]]
