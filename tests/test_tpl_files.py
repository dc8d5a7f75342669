"""Scores of a whole source: few clips at a time, in a file that goes on where a stopped call left it, halves by kind."""

import json

import numpy as np
import pytest

from jaxmllm import api
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.eval import tpl

CLIPS = "world:tracks?size=56x56&objects=1-2&frames=3&length=11"


@pytest.fixture
def scorer(monkeypatch):
    """Probabilities by the pixels, and the number of clips asked about at a time."""
    seen = []

    def score(model, conversations, completions, **_):
        seen.append(len(conversations))
        means = [
            np.mean([np.asarray(p["image"]).mean() for p in c[0]["content"] if p["type"] == "image"])
            for c in conversations
        ]
        return [[np.full(12, -mean / 400)] for mean in means]

    monkeypatch.setattr(api, "score", score)
    return seen


def test_a_stopped_call_goes_on_and_ends_the_same(tmp_path, scorer):
    source, options = open_source(CLIPS), {"batch_size": 2, "tries": 2, "seed": 3}
    whole = tpl.score_source(None, source, out=tmp_path / "whole.jsonl", identity={"data": CLIPS}, **options)
    assert max(scorer) <= 8 and [row["index"] for row in whole] == list(range(11))  # 4 records, 2 frames of each

    class Stops:
        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            if index == 9:
                raise KeyboardInterrupt
            return source[index]

    out = tmp_path / "new" / "scores.jsonl"
    with pytest.raises(KeyboardInterrupt):
        tpl.score_source(None, Stops(), out=out, identity={"data": CLIPS}, **options)
    assert not out.exists() and len((out.parent / "scores.jsonl.part").read_text().splitlines()) == 9
    with pytest.raises(InputError, match="begun with another seed; remove it"):
        tpl.score_source(None, source, out=out, identity={"data": CLIPS}, **{**options, "seed": 4})
    scorer.clear()
    again = tpl.score_source(None, source, out=out, identity={"data": CLIPS}, **options)
    assert again == whole and sum(scorer) == 3 + 6  # three records were left
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not list(out.parent.glob("*.part"))
    assert [json.loads(line) for line in out.read_text().splitlines()] == whole
    with pytest.raises(InputError, match="exists already"):
        tpl.score_source(None, source, out=out, **options)


def test_halves_are_of_one_kind_of_question():
    """Tracks score high and captions low: a median over both would keep one kind of text."""
    rows = [
        {"task": "tracks", "kind": kind, "tokens": 20, "tpl_nll_mean": base + k / 100}
        for kind, base in (("trajectory", 0.0), ("box", 5.0))
        for k in range(10)
    ]
    kept = tpl.keep(rows)
    assert sum(kept[:10]) == sum(kept[10:]) == 5 and kept[5:10] == [True] * 5


def test_a_scorer_that_does_not_know_the_task_is_named():
    assert tpl.unknown_task([{"ppl_full": np.exp(0.4)}] * 3) is None
    assert "9.0 nats a token" in tpl.unknown_task([{"ppl_full": float(np.exp(9))}] * 3)


def test_still_clips_score_nothing_by_default():
    model = api.load("tiny", dtype="float32")
    record = open_source(CLIPS)[0]
    still = {**record, "images": [record["images"][0]] * 3}
    (row,) = tpl.temporal_scores(model, [still], tries=None)
    assert row["tpl_nll_mean"] == pytest.approx(0, abs=1e-4) and row["kind"] == record["query"]["kind"]
    (alone,) = tpl.temporal_scores(model, [still], tries=None, single_mode="single")
    assert abs(alone["tpl_nll_mean"]) > 1e-3  # the published form measures the shorter prompt too
