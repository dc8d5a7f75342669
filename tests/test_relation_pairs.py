"""Pairs of matched and mismatched expressions from drawn scenes, photographs and people's sentences."""

import json
import pickle
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from jaxmllm.data.relation_pairs import build
from jaxmllm.data.relation_pairs.make import make
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.world.preview import preview


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs") / "world"
    return out, make("world:?size=84x84", out, pairs=120, val_pairs=20, test_pairs=12)


def read(out, name):
    source = open_source(f"records:{out}/{name}.jsonl")
    return [source[k] for k in range(len(source))]


def holds(relation, a, b):
    """Of two boxes, by their centres alone: a second writing."""
    dx, dy = (b[0] + b[2] - a[0] - a[2]) / 2, (b[1] + b[3] - a[1] - a[3]) / 2
    return {"left of": dx > abs(dy), "right of": -dx > abs(dy), "above": dy > abs(dx), "below": -dy > abs(dx)}[relation]


def test_twins_of_the_world_differ_in_one_wrong_relation(world):
    out, summary = world
    for name in ("train", "val", "test_id", "test_ood_words", "test_ood_edges", "test_ood_depth"):
        rows = read(out, name)
        assert len(rows) == summary[name]["records"] == 2 * summary[name]["pairs"] > 0
        for a, b in zip(rows[::2], rows[1::2], strict=True):
            good, bad = (a, b) if a["match"] else (b, a)
            assert good["match"] and not bad["match"] and a["twin"] == b["twin"] and a["images"] == b["images"]
            differing = [k for k, (r, s) in enumerate(zip(good["relations"], bad["relations"], strict=True)) if r != s]
            assert differing == [bad["foil_pos"]] and good["entities"] == bad["entities"] and good["rivals"] >= 1
            boxes = good["node_boxes"]
            assert all(
                holds(r, boxes[s], boxes[o])
                for (s, o), r in zip(good["edges"], good["scene"]["relations"], strict=True)
            )
            assert good["box"] == boxes[good["root"]] and good["box"] in good["candidates"]
            for row in (good, bad):
                spoken = [row["expression"][i:j].removeprefix("to the ") for i, j in row["spans"]]
                assert spoken == row["relations"]


def test_cells_are_what_they_are_called(world):
    out, _ = world
    shape = {name: [(len(r["edges"]), r["length"], r["edges"]) for r in read(out, name)] for name in ("train", *TESTS)}
    assert all(e <= 2 and n <= 16 for e, n, _ in shape["train"] + shape["test_id"])
    assert all(e <= 2 and n >= 17 for e, n, _ in shape["test_ood_words"])
    assert all(e >= 3 for e, _, _ in shape["test_ood_edges"])
    assert all(e >= 3 and all(b[0] == a[1] for a, b in pairwise(edges)) for e, _, edges in shape["test_ood_depth"])


TESTS = ("test_id", "test_ood_words", "test_ood_edges", "test_ood_depth")


def test_training_and_test_share_no_picture_and_no_combination(world):
    out, _ = world

    def combinations(names):
        found = set()
        for row in (row for name in names for row in read(out, name)):
            look = {tuple(o["box"]): (o["colour"], o["shape"]) for o in row["scene"]["objects"]}
            ends = [look[tuple(box)] for box in row["node_boxes"]]
            found |= {(ends[s], r, ends[o]) for (s, o), r in zip(row["edges"], row["relations"], strict=True)}
        return found

    train, test = combinations(("train", "val")), combinations(TESTS)
    assert len(train) > 150 and len(test) > 60 and not train & test
    units = [{row["unit"] for row in read(out, name)} for name in ("train", "val", "test_id")]
    assert not units[0] & units[1] and not units[0] & units[2]


def test_words_of_both_classes_are_equally_frequent(world):
    out, _ = world
    for name in ("train", "val"):
        words = build.language(read(out, name))
        singles = {gram for gram, _ in words if " " not in gram}
        assert all(words[gram, True] == words[gram, False] for gram in singles)
    # what sees words alone is told by its figure where they do betray the class
    rows = [{"expression": f"a {'left' if k % 2 else 'right'} b", "match": bool(k % 2)} for k in range(20)]
    assert build.language_only(build.language(rows), rows) == 1


def test_a_preview_marks_the_wrong_relation_in_red(world, tmp_path):
    out, _ = world
    rows = [row for row in read(out, "val") if not row["match"]][:1]
    red = []
    for row in (rows[0], rows[0] | {"foil_pos": -1}):
        pixels = np.asarray(Image.open(preview([row], tmp_path / "sheet.png", 1)).convert("RGB"))
        red.append(int((pixels == [255, 40, 40]).all(-1).sum()))
    assert red[0] > 50 and red[1] == 0


# ---- photographs


def photograph(folder, name, size=(400, 300)):
    folder.mkdir(exist_ok=True)
    Image.new("RGB", size).save(folder / f"{name}.jpg")


def test_photographs_of_coco_and_gqa(tmp_path):
    things = {
        "cup": [20, 100, 60, 60],
        "plate": [180, 100, 80, 60],
        "lamp": [190, 10, 40, 50],
        "fork": [320, 110, 40, 60],
    }
    images, annotations, graphs = [], [], {}
    for k in range(12):
        photograph(tmp_path / "images", str(k))
        images.append({"id": k, "file_name": f"{k}.jpg", "width": 400, "height": 300})
        for n, box in enumerate(things.values()):
            annotations.append({"id": len(annotations), "image_id": k, "category_id": n, "bbox": box, "iscrowd": 0})
        objects = {
            n: dict(zip("xywh", box, strict=True), name=n, attributes=["red"], relations=[])
            for n, box in things.items()
        }
        objects["cup"]["relations"] = [
            {"name": "to the left of", "object": "plate"},
            {"name": "near", "object": "lamp"},
        ]
        objects["fork"]["relations"] = [{"name": "to the right of", "object": "plate"}]
        graphs[str(k)] = {"width": 400, "height": 300, "objects": objects}
    categories = [{"id": n, "name": name} for n, name in enumerate(things)]
    graphs["outside"] = {
        "width": 400,
        "height": 300,
        "objects": {"a": {"name": "x", "x": 390, "y": 0, "w": 90, "h": 9}},
    }
    (tmp_path / "c.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    (tmp_path / "g.json").write_text(json.dumps(graphs))
    for kind in ("coco:c.json", "gqa:g.json"):
        out, (name, _, file) = tmp_path / kind[:3], kind.partition(":")
        summary = make(f"{name}:{tmp_path / file}", out, pairs=20, val_pairs=0, test_pairs=0, rivals=0, apart=False)
        rows = read(out, "train")
        assert summary["train"]["pairs"] * 2 == len(rows) >= 8 and all(row["verified"] for row in rows)
        for row in rows:
            ends = row["node_boxes"]
            truth = [holds(r, ends[s], ends[o]) for (s, o), r in zip(row["edges"], row["relations"], strict=True)]
            assert [k for k, true in enumerate(truth) if not true] == ([] if row["match"] else [row["foil_pos"]])
            assert len(row["candidates"]) == 4 and Image.open(row["images"][0]).size == (400, 300)


def test_sentences_of_people_get_unverified_twins(tmp_path):
    photograph(tmp_path, "7")
    rows = [
        {"image": "7.jpg", "expression": "the cup to the left of the plate", "bbox": [10, 10, 60, 60]},
        {"image": "7.jpg", "expression": "second plate", "bbox": [100, 10, 160, 60]},
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = make(f"refcoco:{tmp_path / 'r.jsonl'}?boxes=xyxy", tmp_path / "out", test_pairs=9)
    name = next(name for name, line in summary.items() if line["pairs"])
    good, bad = read(tmp_path / "out", name)
    assert good["expression"] == rows[0]["expression"] and good["relations"] == ["to the left of"]
    assert bad["foil_pos"] == 0 and not bad["verified"] and bad["parsed"] and len(bad["candidates"]) == 2
    start, end = bad["spans"][0]
    assert bad["expression"][start:end] == bad["foil_phrase"] != "to the left of"


def test_the_published_files_and_their_pickles(tmp_path):
    photograph(tmp_path / "photos", "42")
    (tmp_path / "expression").mkdir()
    (tmp_path / "parse").mkdir()
    true = {"image_id": "42", "expression": "the man wearing the shirt .", "bbox": [1, 2, 30, 40]}
    false = true | {
        "expression": "the man holding the shirt .",
        "foil_pos": 0,
        "foil_phrase": "holding",
        "target_phrase": "wearing",
    }
    bad = true | {"bbox": [5, 5, 0, 3]}
    for split in ("train", "val", "test"):
        for side, rows in (("ori_rel", [true, bad]), ("foil_rel", [false])):
            (tmp_path / "expression" / f"{split}_expressions_{side}.json").write_text(json.dumps(rows))
    (tmp_path / "parse" / "train_graphs.pkl").write_bytes(pickle.dumps({}))
    with pytest.raises(InputError, match="train_graphs.pkl.*pickle runs code.*json.dump"):
        make(f"gitm:{tmp_path}", tmp_path / "out", images=str(tmp_path / "photos"))
    (tmp_path / "parse" / "train_graphs.pkl").unlink()
    summary = make(f"gitm:{tmp_path}", tmp_path / "out", images=str(tmp_path / "photos"))
    assert summary["train"]["pairs"] == 1
    good, foil = read(tmp_path / "out", "train")
    assert good["box"] == [1, 2, 31, 42] and good["relations"] == ["wearing"]
    assert (foil["match"], foil["foil_pos"], foil["entities"]) == (False, 0, ["man", "shirt"]) and "box" not in foil


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("imagenet:x", {}, "--from 'imagenet:x'"),
        ("world:?colour=3", {}, "option 'colour' is unknown"),
        ("world:", {"cell": "S12"}, "--cell 'S12'"),
        ("coco:none.json", {}, "none.json"),
        ("coco:none.json?a=b", {}, "takes no options"),
        ("world:", {"pairs": 0}, "--pairs 0"),
    ],
)
def test_bad_requests(tmp_path, source, options, message):
    with pytest.raises(InputError, match=message.replace("?", ".")):
        make(source, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_the_command_writes_pairs_and_a_preview(tmp_path):
    out = tmp_path / "out"
    flags = ["--pairs", "6", "--val-pairs", "0", "--test-pairs", "0"]
    command = [sys.executable, "-m", "jaxmllm.cli", "data", "relations", "--from"]
    done = subprocess.run([*command, "world:?size=84x84", "--out", str(out), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read(out, "train")) == 12 and Image.open(out / "preview.png").width > 300 and "language" in done.stdout
    done = subprocess.run([*command, "world:", "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "exists already" in done.stderr
