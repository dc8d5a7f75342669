"""Annotated videos as sources: miniature MOT, GOT-10k and LaSOT folders and JSON lines of clips, made here."""

import json
import pickle

import av
import numpy as np
import pytest
from PIL import Image

from jaxmllm import tasks
from jaxmllm.data.clips import Windows
from jaxmllm.data.images import load_image
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.eval.harness import evaluate

SIZE = (96, 64)
N = 24


def place(t, row=0):
    """A box that goes right, two pixels a frame; rows below each other."""
    return [2 * t, 4 + 20 * row, 2 * t + 16, 20 + 20 * row]


def draw(t, rows=2):
    image = np.full((SIZE[1], SIZE[0], 3), 128, np.uint8)
    for row in range(rows):
        x1, y1, x2, y2 = place(t, row)
        image[y1:y2, x1:x2] = (250, 40 + 60 * row, 10)
    image[:4, :] = t  # the frame's number, which a wrong frame would not have
    return image


def pictures(folder):
    folder.mkdir(parents=True)
    for t in range(1, N + 1):
        Image.fromarray(draw(t)).save(folder / f"{t:08d}.png")


def xywh(box, shift=0):
    return f"{box[0] + shift},{box[1] + shift},{box[2] - box[0]},{box[3] - box[1]}"


def make_mot(root, rows=()):
    pictures(root / "train" / "MOT17-02" / "img1")
    folder = root / "train" / "MOT17-02"
    (folder / "gt").mkdir()
    (folder / "seqinfo.ini").write_text("[Sequence]\nname=MOT17-02\nimDir=img1\nframeRate=8\nimWidth=96\nimHeight=64\n")
    lines = [
        f"{t},{row + 3},{xywh(place(t, row), 1)},1,1,{0.1 if t == 9 and row else 1}"
        for t in range(1, N + 1)
        for row in (0, 1)
    ]
    lines += [f"{t},77,1,1,9,9,0,8,1" for t in range(1, N + 1)]  # a distractor, which does not count
    (folder / "gt" / "gt.txt").write_text("\n".join([*lines, *rows]))
    return root


def make_got10k(root):
    folder = root / "val" / "GOT-10k_Val_000001"
    pictures(folder)
    (folder / "groundtruth.txt").write_text("\n".join(xywh(place(t)) for t in range(1, N + 1)))
    (folder / "cover.label").write_text("\n".join("0" if t == 5 else "8" for t in range(1, N + 1)))
    (folder / "meta_info.ini").write_text("[METAINFO]\nobject_class: goat\nmotion_class: walking\nanno_fps: 8Hz\n")
    return root


def make_lasot(root):
    folder = root / "bear" / "bear-12"
    pictures(folder / "img")
    (folder / "groundtruth.txt").write_text("\n".join(xywh(place(t)) if t != 4 else "0,0,0,0" for t in range(1, N + 1)))
    for name in ("full_occlusion.txt", "out_of_view.txt"):
        (folder / name).write_text(",".join("1" if t == 4 else "0" for t in range(1, N + 1)))
    (folder / "nlp.txt").write_text("a brown bear on the grass")
    return root


def make_clips(root, **changes):
    root.mkdir(exist_ok=True)
    with av.open(str(root / "walk.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "0", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv444p"
        for t in range(1, N + 1):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(t), format="rgb24")))
        container.mux(stream.encode())
    row = {
        "id": "walk", "video": "walk.mp4", "size": list(SIZE), "caption": "Two walk.",
        "tracks": [{"id": k, "names": [f"person {k}", "person"], "boxes": {str(t): place(t, k) for t in range(1, N + 1)}}
                   for k in (0, 1)],
    } | changes  # fmt: skip
    (root / "clips.jsonl").write_text(json.dumps(row) + "\n")
    return root / "clips.jsonl"


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return {
        "mot": f"mot:{make_mot(root / 'mot')}",
        "got10k": f"got10k:{make_got10k(root / 'got')}",
        "lasot": f"lasot:{make_lasot(root / 'lasot')}",
        "clips": f"clips:{make_clips(root / 'own')}",
    }


@pytest.mark.parametrize("kind", ["mot", "got10k", "lasot", "clips"])
def test_the_annotated_frame_is_the_shown_frame(specs, kind):
    rate = 8 if kind == "lasot" else 2  # of its 30 and of the others' 8 frames a second: every fourth
    source = open_source(f"{specs[kind]}?frames=4&rate={rate}")
    assert len(source) == 1
    for index in range(len(source)):
        record = source[index]
        assert len(record["images"]) == len(record["frames"]) == 4 and record["size"] == list(SIZE)
        for k, image in enumerate(record["images"], 1):
            pixels = np.asarray(load_image(image))
            t = int(pixels[1, 1, 0].round())
            assert record["frames"][k - 1]["time"] == pytest.approx((t - 1) / (30 if kind == "lasot" else 8))
            for track in record["tracks"]:
                if str(k) in track["boxes"]:
                    row = 0 if kind in ("got10k", "lasot") else track["id"] - (3 if kind == "mot" else 0)
                    assert track["boxes"][str(k)] == place(t, row)


def test_sets_say_who_is_there_and_how_much_is_seen(specs):
    windows = "frames=8&rate=0"
    mot = open_source(f"{specs['mot']}?{windows}")
    assert len(mot) == 3 and [t["id"] for t in mot[0]["tracks"]] == [3, 4]  # no distractor
    second = mot[1]["tracks"][1]
    assert "1" not in second["boxes"] and second["visibility"]["1"] == pytest.approx(0.1)  # frame 9
    goat = open_source(f"{specs['got10k']}?{windows}&task=foresight&horizon=2")
    track = goat[0]["tracks"][0]
    assert track["names"] == ["goat"] and track["action"][0]["text"] == "walking" and "5" not in track["boxes"]
    assert "10" in track["boxes"] and len(goat[0]["images"]) == 8  # the horizon is annotated, not shown
    bear = open_source(f"{specs['lasot']}?{windows}")[0]["tracks"][0]
    assert (
        bear["names"] == ["bear"] and bear["appearance"] == ["a brown bear on the grass"] and "4" not in bear["boxes"]
    )
    own = open_source(f"{specs['clips']}?{windows}&kinds=category")
    assert own[0]["caption"] == "Two walk." and own[0]["query"]["ids"] == [0, 1]
    assert len(open_source(f"{specs['clips']}?{windows}&stride=4")) == 5
    assert pickle.loads(pickle.dumps(own))[1] == own[1]  # as worker processes get it
    assert own[1] == open_source(f"{specs['clips']}?{windows}&kinds=category")[1]


def test_true_answers_of_real_clips_are_measured_as_right(specs, tmp_path):
    for kind in specs:
        source = open_source(f"{specs[kind]}?frames=4&rate=8&kinds=box,phrase")
        found = evaluate(
            lambda records: [tasks.get("tracks").gold(r) for r in records], source, out_dir=tmp_path / kind
        )
        assert [v for name, v in found.flat().items() if name.endswith("reward")] == pytest.approx([1]), kind


def test_plain_videos_are_asked_one_question(specs):
    folder = specs["clips"].removeprefix("clips:").rsplit("/", 1)[0]
    record = open_source(f"video:{folder}?question=What moves?")[0]
    assert record["messages"][0]["content"][0]["video"].endswith("walk.mp4")
    assert record["messages"][0]["content"][1]["text"] == "What moves?"


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"tracks": [{"id": 1, "names": ["a"], "boxes": {"30": [0, 0, 9, 9]}}]},
            "boxes in frames 30 to 30; the video has 24",
        ),
        ({"frames": [{"idx": 2}, {"idx": 1}]}, "line 1: frames are out of order"),
        (
            {"tracks": [{"id": 1, "names": ["a"], "boxes": {"1": [0, 0, 9, 9], "01": [0, 0, 9, 9]}}]},
            "two boxes in a frame",
        ),
        ({"tracks": [{"id": 1, "names": [], "boxes": {"1": [0, 0, 9, 9]}}]}, "identity 1 has no name"),
        ({"tracks": [{"id": 1, "names": ["a"], "boxes": {"1": [5, 5, 5, 9]}}]}, "line 1: tracks, identity 1, frame 1"),
        ({"tracks": [{"id": 1, "boxes": {"1": [0, 0, 9, 9]}}] * 2}, "identity 1 has two tracks"),
        ({"video": "other.mp4"}, "other.mp4 not found"),
        ({"tracks": []}, "no window of 8 frames"),
        ({"size": [9]}, "line 1: size"),
    ],
)
def test_bad_clips_are_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        open_source(f"clips:{make_clips(tmp_path, **changes)}?rate=0")


def test_bad_sets_are_named(tmp_path):
    with pytest.raises(InputError, match=r"line 73: identity 3 has two boxes in frame 2"):
        open_source(f"mot:{make_mot(tmp_path / 'twice', ['2,3,1,1,9,9,1,1,1'])}")
    (tmp_path / "empty").mkdir()
    for kind in ("mot", "got10k", "lasot"):
        with pytest.raises(InputError, match="no sequence"):
            open_source(f"{kind}:{tmp_path / 'empty'}")
    short = make_got10k(tmp_path / "short")
    (short / "val" / "GOT-10k_Val_000001" / f"{N:08d}.png").unlink()
    with pytest.raises(InputError, match="24 rows for 23 frames"):
        open_source(f"got10k:{short}")
    clips = make_clips(tmp_path / "zero")
    (tmp_path / "zero" / "walk.mp4").write_bytes(b"")
    with pytest.raises(InputError, match="walk.mp4"):
        open_source(f"clips:{clips}")
    with pytest.raises(InputError, match="kinds: 'walk' is unknown"):
        Windows(kinds=("walk",))
    with pytest.raises(InputError, match="horizon"):
        Windows(horizon=1)
