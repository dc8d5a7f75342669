"""Controls of temporal figures: one frame, frames without order, no pictures; everything else stays."""

import numpy as np
import pytest

from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.eval.controls import SHOWN, Controlled, control_rows, controlled, with_controls
from jaxmllm.eval.harness import evaluate
from jaxmllm.world.quadruples import OrderQuadruples

CLIPS = "world:tracks?size=56x56&objects=1-2&frames=4&length=6"


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("shown", SHOWN)
def test_frames_change_and_nothing_else(shown):
    source = open_source(CLIPS)
    seen = Controlled(source, shown)
    for index in range(len(source)):
        record, other = source[index], seen[index]
        assert {k: v for k, v in record.items() if k != "images"} == {k: v for k, v in other.items() if k != "images"}
        old, new = record["images"], other["images"]
        order = [[same(a, b) for a in old].index(True) if any(same(a, b) for a in old) else None for b in new]
        if shown == "all":
            assert order == [0, 1, 2, 3]
        elif shown == "one":
            assert len(set(order)) == 1 and order[0] is not None
        elif shown == "shuffled":
            assert sorted(order) == [0, 1, 2, 3] and order != [0, 1, 2, 3]
        else:
            assert order == [None] * 4 and all((np.asarray(image) == 128).all() for image in new)
    assert all(same(a, b) for a, b in zip(seen[3]["images"], Controlled(source, shown)[3]["images"], strict=True))


def test_frames_in_messages_and_lists_of_videos():
    record = OrderQuadruples(length=4)[1]
    pictures = [p["image"] for p in record["messages"][0]["content"] if p["type"] == "image"]
    other = controlled(record, "one", np.random.default_rng(0))["messages"][0]["content"]
    assert other[-1] == record["messages"][0]["content"][-1]
    assert any(all(same(p["image"], picture) for p in other[:-1]) for picture in pictures)
    clip = {"id": "v", "videos": [pictures]}
    assert len(controlled(clip, "shuffled", np.random.default_rng(0))["videos"][0]) == len(pictures)
    for bad, message in (({"videos": ["a.mp4"]}, "one by one"), ({"images": pictures[:1]}, "this has 1")):
        with pytest.raises(InputError, match=message):
            controlled(bad, "one", np.random.default_rng(0))


def test_a_policy_that_looks_at_one_frame_gains_nothing_from_the_others(tmp_path):
    """Order questions answered by true pixels: a solver that compares frames wins with all of them and only then."""
    source = OrderQuadruples("val", length=80)

    def watch(records):
        said = []
        for record in records:
            frames = [np.asarray(p["image"], float) for p in record["messages"][0]["content"] if p["type"] == "image"]
            change = [np.abs(b - a).mean((2,)) for a, b in zip(frames, frames[1:], strict=False)]
            first = change[1] > 30  # what changed at the first step
            hits = []
            for letter in "AB":
                (x1, y1, x2, y2), (u1, v1, u2, v2) = record["places"][letter][0], record["places"][letter][-1]
                hits.append(first[y1:y2, x1:x2].sum() + first[v1:v2, u1:u2].sum())
            said.append("A" if hits[0] > hits[1] else "B")
        return said

    sources = with_controls({"order": source}, ["all", "one", "none"])
    table = control_rows(evaluate(watch, sources, out_dir=tmp_path / "table"), ["all", "one", "none"])
    assert table[0] == ["source", "n", "figure", "frames all", "frames one", "frames none"]
    row = next(row for row in table if row[2] == "exact_match")
    assert row[:2] == ["order", "80"] and row[4].startswith("0.500 [") and row[3].startswith(("0.9", "1.0"))
    assert with_controls({"a": source}, ["all"]) == {"a": source}
    accuracy = {
        shown: evaluate(watch, Controlled(source, shown), out_dir=tmp_path / shown).flat()
        for shown in ("all", "one", "none")
    }
    found = {shown: next(v for k, v in row.items() if k.endswith("exact_match")) for shown, row in accuracy.items()}
    assert found["all"] > 0.95 and found["none"] == found["one"] == 0.5
