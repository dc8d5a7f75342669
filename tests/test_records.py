"""Rows of other programs' files as records, in every form in which they are handed on, and what is said of bad ones."""

import io
import json
import math
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxmllm.data.formats import Rows, image_size
from jaxmllm.data.sources import Grouped, open_source, sample, where
from jaxmllm.errors import InputError
from jaxmllm.tasks.coco_ids import COCO_IDS
from jaxmllm.world.source import WorldSource
from tests.test_sources import SHARED, picture, write

# ---------------------------------------------------------------- rows


def test_rows_of_every_form_are_the_same(tmp_path):
    import pyarrow
    import pyarrow.parquet

    values = [{"a": i, "text": "äß" * i, "list": [1.5] * (i % 3)} for i in range(23)]
    write(tmp_path / "x.json", values)
    lines = [json.dumps(v, ensure_ascii=False) + ("\n\n" if i % 4 == 0 else "\n") for i, v in enumerate(values)]
    (tmp_path / "x.jsonl").write_text("\n" + "".join(lines).rstrip("\n"))
    for name, part in (("p/0.parquet", values[:10]), ("p/1.parquet", values[10:])):
        (tmp_path / "p").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / name, row_group_size=4)
    for name in ("x.json", "x.jsonl", "p"):
        rows = pickle.loads(pickle.dumps(Rows(tmp_path / name)))
        assert len(rows) == 23
        for i in random.Random(0).sample(range(23), 23):
            assert rows[i] == values[i]


def test_bad_line_is_named(tmp_path):
    picture(tmp_path / "a.png")
    good = json.dumps({"file_name": "a.png", "text": "A"})
    (tmp_path / "x.jsonl").write_text(f"{good}\n\n{{broken\n[1]\n{good}\n")
    source = open_source(f"pages:{tmp_path / 'x.jsonl'}")
    assert source[0]["text"] == source[3]["text"] == "A"
    with pytest.raises(InputError, match=r"x\.jsonl, record 1: line 3 is not JSON"):
        source[1]
    with pytest.raises(InputError, match=r"x\.jsonl, record 2: expected an object, got list"):
        source[2]
    with pytest.raises(IndexError):
        source[4]


# ---------------------------------------------------------------- chats


def user(*parts):
    return {"role": "user", "content": list(parts)}


IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What?"}
CHATS = {
    "in place": ({"messages": [user({"type": "image", "image": "a.png"}, TEXT)]}, ["a.png", "What?"]),
    "image_url": ({"messages": [user({"type": "image_url", "image_url": {"url": "a.png"}}, TEXT)]}, ["a.png", "What?"]),
    "placeholders": ({"messages": [user(IMAGE, TEXT, IMAGE)], "images": ["a.png", "b.png"]}, ["a.png", "What?", "b.png"]),
    "tags": (
        {"messages": [{"role": "user", "content": "One <image> two <image>"}], "images": ["a.png", "b.png"]},
        ["One ", "a.png", " two ", "b.png"],
    ),
    "no place": ({"messages": [{"role": "user", "content": "What?"}], "images": ["a.png"]}, ["a.png", "What?"]),
    "trl text": ({"prompt": "What?", "image": "a.png", "solution": "4"}, ["a.png", "What?"]),
    "trl messages": ({"prompt": [user(TEXT)], "images": ["a.png", "b.png"]}, ["a.png", "b.png", "What?"]),
    "arrow fills with None": (
        {"prompt": [user({"type": "image", "text": None}, {"type": "text", "text": "What?"})], "images": ["a.png"]},
        ["a.png", "What?"],
    ),
    "text alone": ({"prompt": "Is <image> a tag?"}, ["Is <image> a tag?"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_chat_forms(tmp_path, name):
    row, want = CHATS[name]
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    record = open_source(f"chat:{write(tmp_path / 'x.jsonl', [row])}")[0]
    parts = record["messages"][0]["content"]
    found = [part["text"] if part["type"] == "text" else Path(part["image"]).name for part in parts]
    assert found == want
    assert [Path(p).name for p in record["images"]] == [w for w in want if w.endswith(".png")]
    assert all(Path(p).is_file() for p in record["images"])
    assert record.get("solution") == row.get("solution")


def test_chat_keeps_turns_and_columns(tmp_path):
    picture(tmp_path / "a.png")
    row = {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}],
        "completion": [{"role": "assistant", "content": "Not an <image> tag."}],
        "image": "a.png", "solution": "4", "difficulty": 3, "id": "q1",
    }  # fmt: skip
    record = open_source(f"chat:{write(tmp_path / 'x.json', [row])}")[0]
    assert [m["role"] for m in record["messages"]] == ["system", "user", "assistant"]
    assert record["messages"][2]["content"] == [{"type": "text", "text": "Not an <image> tag."}]
    assert (record["solution"], record["difficulty"], record["id"]) == ("4", 3, "q1")
    assert set(record) == {"id", "messages", "images", "solution", "difficulty"}


def test_chat_from_hugging_face_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    raw = io.BytesIO()
    Image.new("RGB", (8, 6)).save(raw, "png")
    images = [{"bytes": raw.getvalue(), "path": None}]
    rows = [{"prompt": [user(IMAGE, TEXT)], "images": images, "solution": str(i)} for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    record = open_source(f"chat:{tmp_path / 'x.parquet'}")[2]
    assert record["solution"] == "2" and image_size(record["images"][0]) == [8, 6]
    assert record["messages"][0]["content"][0] == {"type": "image", "image": raw.getvalue()}


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"text": "x"}, r"field 'messages or .* or instruction' is missing; the row has text"),
        ({"messages": []}, "messages: expected a list of turns"),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            r"messages\[0\].role: 'robot' is unknown; use one of system,",
        ),
        ({"messages": [{"content": "x"}]}, r"messages\[0\]: expected an object with role and content"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            r"messages\[0\]: content must be a text or a list of parts, got int",
        ),
        (
            {"messages": [user({"type": "audio"})]},
            r"messages\[0\]: a part needs the type text, image or video, got 'audio'",
        ),
        ({"messages": [user(IMAGE, TEXT)]}, r"messages\[0\]: more places for images than images"),
        ({"messages": [user(IMAGE, IMAGE)], "images": ["a.png"]}, r"messages\[0\]: more places for images"),
        ({"messages": [user(IMAGE)], "images": ["a.png", "a.png"]}, "images: there are 2, but places for 1 of them"),
    ],
)
def test_bad_chats(tmp_path, row, error):
    picture(tmp_path / "a.png")
    source = open_source(f"chat:{write(tmp_path / 'x.jsonl', [row])}")
    with pytest.raises(InputError, match=rf"x\.jsonl, record 0: {error}"):
        source[0]


# ---------------------------------------------------------------- Perception-R1


def test_perception_r1_records(tmp_path):
    picture(tmp_path / "a.jpg", 1000, 600)
    two = {"target_id": [1, 90], "target_box": [[0, 0, 9, 9], [504, 294, 1008, 588]]}
    rows = [
        {"problem": "the cat", "image": "a.jpg", "solution": "[10, 20, 30.5, 40]", "normalized_solution": "[1,2,3,4]"},
        {"problem": "the cat", "image": "a.jpg", "solution": "(100, 200, 300, 400)"},
        {"problem": "dog", "image": "a.jpg", "clicks": [[500, 500], [0, 1000]]},
        {"problem": "x", "image": "a.jpg", "solution": two},
        {"problem": "x", "image": "a.jpg", "solution": "{'target_id': [18], 'target_box': [[0, 0, 10, 10]]}"},
        {"problem": "OCR this image.", "image": "a.jpg", "solution": "[sic] some text"},
    ]  # fmt: skip
    source = open_source(f"pr1:{write(tmp_path / 'x.json', rows)}")
    assert source[0]["box"] == [10, 20, 30.5, 40] and source[0]["expression"] == "the cat"  # pixels
    assert source[1]["box"] == [100, 120, 300, 240] and source[1]["size"] == [1000, 600]  # the 0..1000 grid
    assert source[2]["points"] == [[500, 300], [0, 600]] and (source[2]["label"], source[2]["count"]) == ("dog", 2)
    assert source[3]["labels"] == ["person", "toothbrush"] and source[3]["categories"] == list(COCO_IDS)
    # 1000 x 600 was shown as 1008 x 588: nearest multiples of 28
    assert source[3]["boxes"][1] == pytest.approx([500, 300, 1000, 600])
    assert source[4]["labels"] == ["dog"]
    assert source[5]["text"] == "[sic] some text"
    assert [source[i]["task"] for i in range(6)] == ["grounding"] * 2 + ["counting", "detection", "detection", "ocr"]
    pixels = open_source(f"pr1:{tmp_path / 'x.json'}?frame=pixel&sample=first:2")
    assert pixels[1]["box"] == [100, 200, 300, 400]


def detected(ids, boxes):
    return {"problem": "x", "image": "a.jpg", "solution": {"target_id": ids, "target_box": boxes}}


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"image": "a.jpg", "solution": "[1,2,3,4]"}, "field 'problem' is missing"),
        ({"problem": "x", "image": "a.jpg", "solution": "[1, 2, 1, 4]"}, r"solution: \[1, 2, 1, 4\] is a box without area"),
        ({"problem": "x", "image": "a.jpg", "clicks": [[1, "2"]]}, "clicks: '2' is not a finite number"),
        (detected([12], [0]), "solution: target_id 12 is no COCO"),
        (detected([1], []), "solution: 1 target_id for 0 target_box"),
        ({"problem": "x", "image": "a.jpg"}, "field 'solution' is missing"),
        ({"problem": " ", "image": "a.jpg", "solution": "x"}, "problem: expected a text, got ' '"),
    ],
)  # fmt: skip
def test_bad_perception_r1(tmp_path, row, error):
    picture(tmp_path / "a.jpg")
    source = open_source(f"pr1:{write(tmp_path / 'x.json', [row])}")
    with pytest.raises(InputError, match=rf"x\.json, record 0: {error}"):
        source[0]


def strategy(data, text, rng):
    """The sampling of the published loaders, restated."""
    kind, _, amount = text.partition(":")
    if kind == "all":
        return data
    count = math.ceil(int(amount[:-1]) * len(data) / 100) if amount.endswith("%") else int(amount)
    if kind == "first":
        return data[:count]
    return data[-count:] if kind == "end" else rng.sample(data, count)


@pytest.mark.parametrize(
    "text", ["all", "first:7", "end:5", "first:15%", "end:1%", "random:4", "random:50%", "first:99"]
)
def test_sampling_strategies(text):
    records = [{"id": i} for i in range(33)]
    found = sample(records, text, seed=1)
    found = [found[i]["id"] for i in range(len(found))]
    want = strategy(list(range(33)), text, random.Random(0))
    if text.startswith("random"):
        assert len(found) == len(set(found)) == len(want) and found != sorted(found)
        again, other = sample(records, text, seed=1), sample(records, text, seed=2)
        assert found == [again[i]["id"] for i in range(len(again))] != [other[i]["id"] for i in range(len(other))]
    else:
        assert found == want


def test_yaml_mixture(tmp_path):
    for name in ("one", "two"):
        picture(tmp_path / name / "pics" / "a.png")
        rows = [{"problem": f"{name} {i}", "image": "a.png", "solution": f"text {i}"} for i in range(10)]
        write(tmp_path / name / "rows.json", rows)
    (tmp_path / "mix.yaml").write_text(
        "datasets:\n"
        "  - {json_path: one/rows.json, sampling_strategy: 'first:30%', data_root: one/pics}\n"
        "  - {json_path: two/rows.json, sampling_strategy: 'end:2', image_root: two/pics}\n"
        "  - {json_path: two/rows.json, sampling_strategy: 'random:4', image_root: two/pics}\n"
    )
    source = open_source(f"pr1:{tmp_path / 'mix.yaml'}?seed=5")
    texts = [source[i]["text"] for i in range(len(source))]
    assert texts[:5] == ["text 0", "text 1", "text 2", "text 8", "text 9"] and len(set(texts[5:])) == 4
    assert all(Path(source[i]["images"][0]).is_file() for i in range(9))
    assert where(source, 4) == f"{tmp_path / 'two' / 'rows.json'}, record 9"
    for text, error in [
        ("datasets: []", "datasets must be a list"),
        ("[1, 2", "not readable as YAML"),
        ("- a", "not readable as YAML with a list datasets"),
        ("datasets: [{sampling_strategy: all}]", r"datasets\[0\]: json_path is missing"),
        (
            "datasets: [{json_path: one/rows.json, sampling_strategy: 'last:3', data_root: one/pics}]",
            r"datasets\[0\]: sample: 'last' is unknown",
        ),
        ("datasets: [{json_path: one/none.json}]", r"datasets\[0\]: .*none\.json: dataset not found"),
        ("datasets: [{json_path: one/rows.json, sampling_strategy: 'first:-1', data_root: one/pics}]", "first:-1"),
    ]:  # fmt: skip
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match=rf"bad\.yaml: {error}" if not error.startswith("first") else error):
            open_source(f"pr1:{tmp_path / 'bad.yaml'}")


# ---------------------------------------------------------------- referring expressions, PixMo-Count, pages, records

REFERRED = [("the left cat", [10, 5, 30, 25]), ("cat", [10, 5, 30, 25]), ("a dog", [0, 0, 20, 10])]


def referring_files(root):
    """The same three expressions of one image in every form."""
    image = {"id": 4, "file_name": "a.png", "width": 60, "height": 40}
    sentences = [
        [{"sent_id": 1, "sent": "the left cat"}, {"sent_id": 2, "sent": "cat"}],
        [{"sent_id": 3, "sent": "a dog"}],
    ]
    boxes = [[10, 5, 20, 20], [0, 0, 20, 10]]
    split = ["testA", "testA"]
    refs = [
        {"ref_id": k, "ann_id": k + 70, "image_id": 4, "split": split[k], "sentences": sentences[k]} for k in range(2)
    ] + [{"ref_id": 9, "ann_id": 70, "image_id": 4, "split": "train", "sentences": sentences[0]}]
    objects = [{"id": k + 70, "image_id": 4, "bbox": boxes[k]} for k in range(2)]
    write(root / "unc" / "refs(unc).json", refs)
    write(root / "unc" / "instances.json", {"images": [image], "annotations": objects})
    raw = [[{"sent_id": s["sent_id"], "raw": s["sent"]} for s in group] for group in sentences]
    parts = {"dataset": "refcoco", "dataset_partition": "unc", "split": "testA", "image_id": 4}
    other = {**parts, "dataset": "refcocoplus", "ref_id": 5, "ann": {"bbox": boxes[1]}, "sentences": raw[1]}
    listed = [{**parts, "ref_id": k, "ann": {"bbox": boxes[k]}, "sentences": raw[k]} for k in range(2)]
    write(root / "tfds" / "refcoco.json", {"ref": [*listed, other], "coco_anns": {"4": {"info": image, "anns": []}}})
    captions = [{**image, "id": i, "caption": text} for i, (text, _) in enumerate(REFERRED)]
    things = [
        {"id": i, "image_id": i, "bbox": [x1, y1, x2 - x1, y2 - y1]} for i, (_, (x1, y1, x2, y2)) in enumerate(REFERRED)
    ]
    write(root / "mdetr" / "finetune_refcoco_testA.json", {"images": captions, "annotations": things, "categories": []})
    write(
        root / "rows" / "x.jsonl",
        [{"image": "a.png", "sent": t, "bbox": b, "width": 60, "height": 40} for t, b in REFERRED],
    )
    write(
        root / "rows" / "x.json",
        [{"file_name": "a.png", "expression": t, "box": b, "size": [60, 40]} for t, b in REFERRED],
    )
    for name in ("unc", "tfds", "mdetr", "rows"):
        picture(root / name / "images" / "a.png")


@pytest.mark.parametrize(
    "spec",
    ["unc?split=testA", "tfds/refcoco.json?dataset=refcoco_unc&split=testA", "mdetr/finetune_refcoco_testA.json",
     "rows/x.jsonl?boxes=xyxy", "rows/x.json"],
)  # fmt: skip
def test_referring_expressions_in_json(tmp_path, spec):
    referring_files(tmp_path)
    source = open_source(f"refcoco:{tmp_path}/{spec}")
    records = [source[i] for i in range(len(source))]
    assert [(r["expression"], r["box"]) for r in records] == REFERRED
    assert all(r["task"] == "grounding" and r["size"] == [60, 40] and Path(r["images"][0]).is_file() for r in records)
    assert len({r["id"] for r in records}) == 3


def test_referring_expressions_choices(tmp_path):
    referring_files(tmp_path)
    assert len(open_source(f"refcoco:{tmp_path}/unc?split=train")) == 2
    assert len(open_source(f"refcoco:{tmp_path}/tfds/refcoco.json?dataset=refcocoplus_unc")) == 1
    for spec, error in [
        ("unc", r"it holds several; choose split=testA or train"),
        ("unc?split=testC", r"split 'testC' is unknown; the file has testA, train"),
        ("tfds/refcoco.json", r"choose name=refcoco_unc or refcocoplus_unc"),
        ("rows", r"expected instances.json and one refs\*.json, found 0"),
    ]:
        with pytest.raises(InputError, match=error):
            open_source(f"refcoco:{tmp_path}/{spec}")
    write(tmp_path / "odd.json", {"a": 1})
    with pytest.raises(InputError, match="no known form of referring expressions"):
        open_source(f"refcoco:{tmp_path}/odd.json")
    write(tmp_path / "xywh.json", [{"image": "rows/images/a.png", "sent": "x", "bbox": [10, 5, 20, 20]}])
    assert open_source(f"refcoco:{tmp_path}/xywh.json?boxes=xywh")[0]["box"] == [10, 5, 30, 25]


def prepared_refcoco(root):
    """A folder of TFDS's ref_coco, its records written by hand: TFDS itself would need TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    def feature(values):
        kinds = {
            int: ("int64_list", "Int64List"),
            float: ("float_list", "FloatList"),
            bytes: ("bytes_list", "BytesList"),
        }
        field, name = kinds[type(values[0])]
        return tf_feature_pb2.Feature(**{field: getattr(tf_feature_pb2, name)(value=values)})

    f = tfds.features
    refexp = f.Sequence({"refexp_id": np.int64, "raw": f.Text()})
    objects = f.Sequence(
        {"id": np.int64, "bbox": f.BBoxFeature(), "mask": f.Image(encoding_format="png"), "refexp": refexp}
    )
    features = f.FeaturesDict({"image": f.Image(encoding_format="png"), "image/id": np.int64, "objects": objects})
    rows = []
    for i in range(3):
        png = io.BytesIO()
        Image.new("RGB", (60, 40), (i, 0, 0)).save(png, "png")
        texts = [b"the left cat", b"cat", b"a dog"]
        shares = [
            v / s for box in ([5, 10, 25, 30], [0, 0, 10, 20]) for v, s in zip(box, (40, 60, 40, 60), strict=True)
        ]
        row = {
            "image": [png.getvalue()], "image/id": [i + 100],
            "objects/id": [1, 2], "objects/bbox": shares, "objects/mask": [b"-", b"-"],
            "objects/refexp/raw/ragged_flat_values": texts,
            "objects/refexp/raw/ragged_row_lengths_0": [2, 1],
            "objects/refexp/refexp_id/ragged_flat_values": [7, 8, 9],
            "objects/refexp/refexp_id/ragged_row_lengths_0": [2, 1],
        }  # fmt: skip
        entries = {
            name: feature([float(v) for v in values] if "bbox" in name else values) for name, values in row.items()
        }
        rows.append(tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=entries)).SerializeToString())
    folder = root / "ref_coco" / "refcoco_unc" / "1.1.0"
    folder.mkdir(parents=True)
    writer = ArrayRecordWriter(str(folder / "ref_coco-testA.array_record-00000-of-00001"), "group_size:1")
    for row in rows:
        writer.write(row)
    writer.close()
    features.save_config(str(folder))
    names = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    split = {"name": "testA", "shardLengths": ["3"], "numBytes": "99", "filepathTemplate": names}
    info = {
        "name": "ref_coco",
        "configName": "refcoco_unc",
        "version": "1.1.0",
        "fileFormat": "array_record",
        "splits": [split],
    }
    write(folder / "dataset_info.json", info)
    return folder


def test_refcoco_prepared_by_tfds(tmp_path):
    folder = prepared_refcoco(tmp_path)
    source = pickle.loads(pickle.dumps(open_source(f"refcoco:{tmp_path / 'ref_coco'}")))
    assert len(source) == 9
    for i in range(9):
        text, box = REFERRED[i % 3]
        record = source[i]
        assert (record["expression"], record["box"], record["image_id"]) == (text, box, 100 + i // 3)
        assert record["size"] == [60, 40] and (record["images"][0][0, 0] == [i // 3, 0, 0]).all()
    assert [len(g.records(0)) for g in [Grouped(source)]] == [3]
    with pytest.raises(InputError, match="split 'val' is unknown; it has testA"):
        open_source(f"refcoco:{tmp_path / 'ref_coco'}?split=val")
    info = json.loads((folder / "dataset_info.json").read_text())
    write(folder / "dataset_info.json", {**info, "fileFormat": "tfrecord"})
    with pytest.raises(
        InputError, match="prepared as tfrecord, which needs TensorFlow to read; prepare it with file_format="
    ):
        open_source(f"refcoco:{tmp_path / 'ref_coco'}")


def test_world_slices_prepared_by_tfds(tmp_path):
    from jaxmllm.world.tfds_builder import materialise

    world = WorldSource({"grounding": 1, "counting": 1}, questions=3)
    materialise({"train": world}, tmp_path, 2, 5)
    source = pickle.loads(pickle.dumps(open_source(f"tfds:{tmp_path}?group=true")))
    assert len(source) == 3
    for i in range(3):
        for got, want in zip(source.records(i), world.records(i + 2), strict=True):
            assert {k: v for k, v in got.items() if k != "images"} == {k: v for k, v in want.items() if k != "images"}
            assert np.array_equal(got["images"][0], want["images"][0])


def test_pixmo_count(tmp_path):
    picture(tmp_path / "images" / ("ab" * 32 + ".jpg"), 200, 100)
    picture(tmp_path / "images" / "photo.jpg", 200, 100)
    rows = [
        {"image_url": "https://x.org/p/photo.jpg?w=3", "label": "cat", "count": 2, "points": {"x": [1.5, 20], "y": [2, 30]}},
        {"image_sha256": "ab" * 32, "label": "dog", "points": [{"x": 10, "y": 20}]},
        {"image": "photo.jpg", "label": "dog", "count": 4},
        {"image": "photo.jpg", "label": "dog", "count": 4, "points": [{"x": 10, "y": 20}]},
        {"image_url": "https://x.org/none.jpg", "label": "dog", "count": 4},
        {"image": "photo.jpg", "label": "dog"},
    ]  # fmt: skip
    source = open_source(f"pixmo:{write(tmp_path / 'x.jsonl', rows)}?images={tmp_path / 'images'}")
    assert source[0]["points"] == [[1.5, 2], [20, 30]] and source[0]["count"] == 2 and source[0]["label"] == "cat"
    assert source[1]["count"] == 1 and Path(source[1]["images"][0]).stem == "ab" * 32
    assert source[2]["count"] == 4 and "points" not in source[2]
    percent = open_source(f"pixmo:{tmp_path / 'x.jsonl'}?images={tmp_path / 'images'}&frame=percent")
    assert percent[1]["points"] == [[20, 20]]
    for i, error in [
        (3, "count: 4, but there are 1 points"),
        (4, "no file named none.jpg in"),
        (5, "count: expected a whole"),
    ]:
        with pytest.raises(InputError, match=rf"x\.jsonl, record {i}: .*{error}"):
            source[i]


def test_pages_and_own_records(tmp_path):
    picture(tmp_path / "a.png")
    lines = [{"text": "one", "quad": [0, 0, 9, 0, 9, 9, 0, 9]}, {"text": "two", "quad": list(range(8))}]
    rows = [
        {"file_name": "a.png", "width": 60, "height": 40, "lines": lines},
        {"file_name": "a.png", "text": "whole"},
        {"file_name": "a.png", "lines": [{"text": "one", "quad": [0, 0]}]},
        {"file_name": "a.png"},
    ]
    source = open_source(f"pages:{write(tmp_path / 'x.jsonl', rows)}")
    head = {"id": "0", "task": "ocr", "images": [str(tmp_path / "a.png")], "size": [60, 40]}
    assert source[0] == {**head, "text": "one\ntwo", "lines": lines}
    assert source[1]["text"] == "whole" and "lines" not in source[1]
    for i, error in [(2, r"lines\[0\].quad: expected 8 numbers"), (3, "field 'text' is missing")]:
        with pytest.raises(InputError, match=rf"record {i}: {error}"):
            source[i]
    row = {"task": "counting", "images": ["a.png"], "label": "cat", "count": 0, "points": [], "note": 3}
    record = open_source(f"records:{write(tmp_path / 'own.jsonl', [row, {'task': 'sums'}])}")
    assert record[0] == {**row, "id": "0", "images": [str(tmp_path / "a.png")]}
    with pytest.raises(InputError, match="record 1: task 'sums' is unknown; use one of grounding, counting"):
        record[1]


def test_real_pages():
    if not (SHARED / "sroie" / "pages.jsonl").is_file():
        pytest.skip("needs the shared data")
    source = open_source(f"pages:{SHARED / 'sroie' / 'pages.jsonl'}")
    rows = [json.loads(line) for line in (SHARED / "sroie" / "pages.jsonl").read_text().splitlines()]
    assert len(source) == len(rows) == 60
    for i, row in enumerate(rows):
        assert source[i]["text"].split("\n") == [line["text"] for line in row["lines"]]
        assert image_size(source[i]["images"][0]) == source[i]["size"] == [row["width"], row["height"]]
