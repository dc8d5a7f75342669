"""Tracks from video by `jaxmllm data tracks`: found, linked, described, judged by the field's tool against the truth."""

import json
import logging
import sys
import types

import av
import numpy as np
import pytest

from jaxmllm import cli
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.eval.identities import identity_figures
from jaxmllm.experts import words
from jaxmllm.experts.detectors import Detection, detect, open_detector
from jaxmllm.experts.linking import link
from jaxmllm.experts.video_tracks import write_tracks

SIZE = (192, 128)
N = 60


def truth(t):
    """Two walkers, from frame 11 on: one to the right above, one to the left below."""
    if t <= 10:
        return {}
    return {1: [3 * (t - 11), 20, 3 * (t - 11) + 22, 60], 2: [168 - 3 * (t - 11), 78, 192 - 3 * (t - 11), 118]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    ground = rng.integers(90, 150, (SIZE[1], SIZE[0], 3), np.uint8)
    with av.open(str(folder / "street.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "12", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv444p"
        for t in range(1, N + 1):
            image = ground.copy()
            for i, (x1, y1, x2, y2) in truth(t).items():
                image[y1:y2, max(x1, 0) : max(x2, 0)] = (220, 20, 20) if i == 1 else (20, 30, 220)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return folder


def test_walkers_are_found_linked_and_described(folder, tmp_path, capsys):
    out = tmp_path / "made" / "clips.jsonl"
    args = ["data", "tracks", str(folder), "--out", str(out), "--preview", str(tmp_path / "seen")]
    assert cli.main(args) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    gt = {i: {t: truth(t)[i] for t in range(12, N + 1)} for i in (1, 2)}
    found = identity_figures([({t["id"]: t["boxes"] for t in row["tracks"]}, gt)])
    assert found["idf1"] > 0.85 and found["precision"] > 0.9 and found["hota"] > 0.7
    said = {tuple(t["appearance"]): [a["text"] for a in t["action"]] for t in row["tracks"]}
    assert said == {("red object",): ["moving right"], ("blue object",): ["moving left"]}
    assert len(list((tmp_path / "seen").glob("*.png"))) == 4
    record = open_source(f"clips:{out}?frames=5&rate=0&kinds=phrase")[2]
    assert record["query"]["cue"] in ("red object", "blue object") and len(record["images"]) == 5
    before = out.read_bytes()
    assert cli.main(args) == 0 and out.read_bytes() == before  # what is there is left alone
    assert "clips:" in capsys.readouterr().err


def test_detectors_of_others(folder, tmp_path, monkeypatch, caplog):
    module = types.ModuleType("their_detector")

    def perfect():
        count = iter(range(1, N + 1))
        return lambda frame: [Detection(b, 0.9, "walker") for b in truth(next(count)).values()]

    def failing():
        return lambda frame: 1 / 0

    def nothing():
        return lambda frame: [Detection([0, 0, float("nan"), 9], 0.9, "x")]

    module.perfect, module.failing, module.nothing = perfect, failing, nothing
    monkeypatch.setitem(sys.modules, "their_detector", module)
    for tracker in ("bytetrack", "sort"):
        out = tmp_path / f"{tracker}.jsonl"
        write_tracks(folder, out, "their_detector:perfect", tracker)
        (row,) = map(json.loads, out.read_text().splitlines())
        gt = {i: {t: truth(t)[i] for t in range(12, N + 1)} for i in (1, 2)}
        found = identity_figures([({t["id"]: t["boxes"] for t in row["tracks"]}, gt)])
        assert found["idf1"] > 0.95 and {n for t in row["tracks"] for n in t["names"]} == {"walker"}
    with pytest.raises(InputError, match=r"street.mp4, frame 1: the detector failed \(ZeroDivisionError"):
        write_tracks(folder, tmp_path / "a.jsonl", "their_detector:failing")
    with pytest.raises(InputError, match="street.mp4, frame 1: the detector gave .*not four finite"):
        write_tracks(folder, tmp_path / "b.jsonl", "their_detector:nothing")
    with caplog.at_level(logging.WARNING):
        write_tracks(folder, tmp_path / "c.jsonl", "their_detector:failing", max_bad_records=1)
    assert "left out" in caplog.text and not (tmp_path / "c.jsonl").read_text()
    for name, message in (("their_detector:none", "does not import"), ("yolo", "module:function")):
        with pytest.raises(InputError, match=message):
            open_detector(name)
    with pytest.raises(InputError, match="no video file"):
        write_tracks(tmp_path, tmp_path / "d.jsonl")


def test_boxes_are_cut_to_the_frame_and_empty_ones_dropped():
    frame = np.zeros((20, 30, 3), np.uint8)
    found = detect(lambda _: [([-5, 2, 40, 9], 0.5, "a"), ([31, 2, 40, 9], 0.5, "b")], frame, "x")
    assert found == [Detection([0.0, 2.0, 30, 9.0], 0.5, "a")]


def test_links_keep_identities_over_a_gap():
    frames = [[] if t in (5, 6) else [Detection([t, 0, t + 20, 20], 0.9, "a")] for t in range(12)]
    (track,) = link(frames, 10)
    assert track["names"] == ["a"] and track["score"] == 0.9 and len(track["boxes"]) >= 9
    with pytest.raises(InputError, match="tracker"):
        link(frames, 10, "none")


def test_words():
    boxes = {t: [10 * t, 5, 10 * t + 20, 25] for t in range(1, 11)} | {t: [100, 5, 120, 25] for t in range(11, 31)}
    assert [a["text"] for a in words.motions(boxes, 5)] == ["moving right", "standing still"]
    assert words.places({1: [0, 0, 10, 10], 2: [0, 0, 10, 10], 3: [80, 80, 99, 99]}, [100, 100]) == [
        {"span": [1, 2], "text": "upper left"},
        {"span": [3, 3], "text": "lower right"},
    ]
    for name, rgb in (
        ("red", (200, 10, 10)),
        ("green", (30, 160, 40)),
        ("black", (9, 9, 9)),
        ("white", (240, 240, 240)),
    ):
        assert words.colour(np.full((8, 8, 3), rgb, np.uint8)) == name
