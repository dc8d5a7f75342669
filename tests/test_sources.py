"""Sources against the files they read (by pycocotools, json, brute force), and what they say about bad ones."""

import collections
import json
import math
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from jaxmllm.data.formats import Rows, image_size
from jaxmllm.data.selection import Subset, all_records
from jaxmllm.data.sources import Mixture, open_source, order
from jaxmllm.errors import InputError
from tests.test_images import SHARED as SHARED_FOLDER

SHARED = SHARED_FOLDER / "data"


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in value))
    else:
        path.write_text(json.dumps(value))
    return path


def picture(path, width=60, height=40, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (10, 20, 30)).save(path, **options)
    return path


COCO = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 60, "height": 40},
        {"id": 3, "file_name": "b.png", "width": 60, "height": 40},
        {"id": 9, "file_name": "c.png", "width": 60, "height": 40},
    ],
    "categories": [{"id": 5, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 8, "name": "cow"}],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 5, "bbox": [1, 2, 10, 20], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 5, 5], "iscrowd": 0},
        {"id": 3, "image_id": 3, "category_id": 2, "bbox": [20, 2, 10.5, 20], "iscrowd": 0},
        {"id": 4, "image_id": 3, "category_id": 5, "bbox": [30, 2, 10, 20], "iscrowd": 0},
        {"id": 5, "image_id": 7, "category_id": 5, "bbox": [10, 10, 20, 20], "iscrowd": 1},
        {"id": 6, "image_id": 7, "category_id": 5, "bbox": [11, 10, 4, 20], "iscrowd": 0},
        {"id": 7, "image_id": 7, "category_id": 8, "bbox": [11, 10, 0, 20], "iscrowd": 0},
    ],
}


@pytest.fixture
def coco(tmp_path):
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.png")
    return write(tmp_path / "train.json", COCO)


# ---------------------------------------------------------------- COCO


def test_coco_questions(coco):
    source = open_source(f"coco:{coco}?task=detection,counting,grounding")
    found = [(r["image_id"], r["task"], r.get("label", r.get("expression"))) for r in map(source.__getitem__, range(7))]
    assert len(source) == 7
    # the dogs of image 7 are partly a crowd: neither counted nor singled out; the flat cow is no object
    assert found == [
        (7, "detection", None), (7, "counting", "cat"), (7, "grounding", "cat"),
        (3, "detection", None), (3, "counting", "cat"), (3, "counting", "dog"), (3, "grounding", "cat"),
    ]  # fmt: skip
    detection, counting, grounding = source[0], source[5], source[6]
    assert detection["boxes"] == [[0, 0, 5, 5], [11, 10, 15, 30]] and detection["labels"] == ["cat", "dog"]
    assert detection["categories"] == ["cat", "dog", "cow"]  # in the order of the ids
    assert detection["crowd_boxes"] == [[10, 10, 30, 30]] and detection["crowd_labels"] == ["dog"]
    assert detection["size"] == [60, 40] and detection["images"] == [str(coco.parent / "images" / "a.png")]
    assert counting["count"] == 2 and counting["points"] == [[6, 12], [35, 12]]
    assert counting["boxes"] == [[1, 2, 11, 22], [30, 2, 40, 22]]
    assert grounding["box"] == [20, 2, 30.5, 22] and grounding["size"] == [60, 40]
    assert len({source[i]["id"] for i in range(7)}) == 7
    assert source.category_ids == {"cat": 2, "dog": 5, "cow": 8}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, [(7, 2), (3, 3)]),
        ({"crowd": "keep"}, [(7, 3), (3, 3)]),
        ({"empty": True}, [(7, 2), (3, 3), (9, 0)]),
        ({"categories": ("dog",)}, [(7, 1), (3, 2)]),
        ({"categories": ("cow",), "empty": True}, [(7, 0), (3, 0), (9, 0)]),
        ({"max_objects": 2}, [(7, 2)]),
    ],
)
def test_coco_options(coco, options, found):
    source = open_source(f"coco:{coco}", **options)
    assert [(r["image_id"], len(r["boxes"])) for r in map(source.__getitem__, range(len(source)))] == found


def test_options_are_read_as_they_stand(coco):
    folder = coco.parent / "refcoco+ 100%"
    (coco.parent / "images").rename(folder)
    source = open_source(f"coco:{coco}?images={folder}&categories=dog,cat&empty=")
    assert source[0]["images"] == [str(folder / "a.png")] and len(source) == 3


@pytest.mark.parametrize("file", ["bccd/train.json", "bccd/val.json", "coco128/instances.json"])
def test_coco_against_pycocotools(file, capsys):
    if not (SHARED / file).is_file():
        pytest.skip("needs the shared data")
    from pycocotools.coco import COCO as Reference

    reference = Reference(str(SHARED / file))
    source = pickle.loads(pickle.dumps(open_source(f"coco:{SHARED / file}", task=("detection", "counting"))))
    seen = collections.Counter()
    for index in range(len(source)):
        record = source[index]
        filters = {"imgIds": [record["image_id"]], "iscrowd": False}
        if record["task"] == "counting":
            filters["catIds"] = reference.getCatIds(catNms=[record["label"]])
        things = reference.loadAnns(reference.getAnnIds(**filters))
        want = [[x, y, x + w, y + h] for x, y, w, h in (t["bbox"] for t in things)]
        assert np.allclose(sorted(record["boxes"]), sorted(want), atol=1e-9)
        if record["task"] == "counting":
            assert record["count"] == len(want) == len(record["points"])
        else:
            names = reference.loadCats([t["category_id"] for t in things])
            assert collections.Counter(record["labels"]) == collections.Counter(c["name"] for c in names)
        assert image_size(record["images"][0]) == record["size"]
        seen[record["task"]] += 1
    assert seen["detection"] == len({t["image_id"] for t in reference.anns.values() if not t["iscrowd"]})


@pytest.mark.parametrize(
    ("layout", "file"),
    [("x/images/a.png", "x/train.json"), ("x/a.png", "x/train.json"), ("x/train/a.png", "x/train.json"),
     ("x/val2017/a.png", "x/annotations/instances_val2017.json"), ("x/images/a.png", "x/annotations/some.json"),
     ("x/images/val/a.png", "x/labels/instances_val.json")],
)  # fmt: skip
def test_images_are_found_near_the_file(tmp_path, layout, file):
    picture(tmp_path / layout)
    raw = {**COCO, "images": COCO["images"][:1], "annotations": [COCO["annotations"][1]]}
    source = open_source(f"coco:{write(tmp_path / file, raw)}")
    assert source[0]["images"] == [str(tmp_path / layout)]


# ---------------------------------------------------------------- order, mixtures, groups


class Numbers:
    name = "numbers"

    def __init__(self, n, start=0):
        self.n, self.start = n, start

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"id": self.start + i}


def take(indices, count, start=0):
    return [int(indices[i]) for i in range(start, start + count)]


def test_order_is_a_new_permutation_each_epoch():
    indices = order(Numbers(17), 3)
    epochs = [take(indices, 17, 17 * k) for k in range(4)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert take(order(Numbers(17), 3), 68) == sum(epochs, [])
    assert take(order(Numbers(17), 4), 17) not in epochs  # neighbouring seeds are not neighbouring epochs
    assert take(order(Numbers(5), None), 12) == [0, 1, 2, 3, 4] * 2 + [0, 1]


def test_mixture_draws_by_weight():
    parts = [Numbers(10), Numbers(40, 100), Numbers(7, 200)]
    mixture = Mixture(parts, [3, 1, 1])
    drawn = [mixture[i]["id"] // 100 for i in take(order(mixture, 0), 1000)]
    assert collections.Counter(drawn) == {0: 600, 1: 200, 2: 200}
    first = [i for i in take(order(mixture, 0), 200) if i < 10]
    assert all(sorted(first[k : k + 10]) == list(range(10)) for k in range(0, 100, 10))  # each part has whole epochs
    every = Mixture(parts)
    assert sorted(take(order(every, 0), 57)) == list(range(57))
    assert [every[i]["id"] for i in (0, 9, 10, 49, 50, 56)] == [0, 9, 100, 139, 200, 206]
    with pytest.raises(IndexError):
        every[57]
    nested = Mixture([Mixture(parts[:2], [1, 1]), parts[2]], [1, 1])
    counts = collections.Counter(nested[i]["id"] // 100 for i in take(order(nested, 0), 400))
    assert counts == {0: 100, 1: 100, 2: 200}
    for weights in ([1], [1, 0, 1], [1, -1, 1], [1, math.nan, 1]):
        with pytest.raises(InputError, match="mixture: "):
            Mixture(parts, weights)


def test_groups_and_subsets(coco):
    assert len(open_source("world:grounding?questions=3&group=1&length=4").records(2)) == 3
    source = open_source(f"coco:{coco}?task=detection,counting,grounding&group=1")
    flat = open_source(f"coco:{coco}?task=detection,counting,grounding")
    assert len(source) == 2
    assert source.records(0) == [flat[0], flat[1], flat[2]] and source.records(1) == [flat[i] for i in range(3, 7)]
    assert source[1] == flat[3] and "record 3" in source.where(1)
    part = Subset(source, [1])
    assert part.records(0) == source.records(1) and part[0] == source[1] and len(part) == 1
    mixture = open_source([f"coco:{coco}?group=1&task=counting", "world:grounding?questions=2&length=5&weight=2"])
    assert [len(all_records(mixture, i)) for i in (0, 1, 2)] == [1, 2, 2] and mixture.weights == [1, 2]


def test_world_specs():
    source = open_source(
        "world:grounding:3,counting?questions=4&objects=2-5&size=84&noise=0&seed=9&split=val&length=50"
    )
    spec = source.spec
    assert (len(source), source.seed, source.split, source.questions) == (50, 9, "val", 4)
    assert (spec.objects, spec.size, spec.noise) == ((2, 5), (84, 84), 0.0)
    assert source.task == {"grounding": 3.0, "counting": 1.0}
    assert open_source("world:", task="ocr", lines="2-4").spec.lines == (2, 4)
    assert open_source("world:counting?shapes=star,cross&size=120x80").spec.shapes == ("star", "cross")
    assert open_source("world:counting", split="val", seed=None)[0]["id"] == "world-counting-val-0-0-0"


# ---------------------------------------------------------------- what is wrong with a spec or a file

BAD_SPECS = {
    "coco.json": "write KIND:PATH with one of the kinds chat, .*world, or module:function:PATH",
    "voc:x": "write KIND:PATH with one of the kinds",
    "coco:{here}/none.json": r"none\.json: dataset not found",
    "coco:{here}": "this is a folder; give the file in it",
    "coco:{here}/empty.json": r"empty\.json: the dataset file is empty",
    "chat:{here}/blank.jsonl": r"blank\.jsonl: the file holds no records",
    "chat:{here}/list.json": r"list\.json: the file holds no records",
    "chat:{here}/object.json": "expected a JSON list of records, got dict",
    "chat:{here}/broken.json": r"broken\.json: not readable as JSON \(Expecting",
    "chat:{here}/broken.parquet": r"broken\.parquet: not readable as Parquet",
    "chat:{here}/folder": r"the folder holds no \*\.parquet files",
    "coco:{here}/object.json": "not COCO JSON, which is an object with lists images, annotations, categories",
    "coco:{here}/train.json?tasks=counting": "coco: option 'tasks' is unknown; it takes task, images, categories",
    "coco:{here}/train.json?task=segmentation": "task: 'segmentation' is unknown; use one of detection, counting, grounding",
    "coco:{here}/train.json?categories=bird": "categories: 'bird' is unknown; the file has cat, dog, cow",
    "coco:{here}/train.json?crowd=maybe": "crowd: 'maybe' is unknown; use one of drop, keep",
    "coco:{here}/train.json?empty=perhaps": "coco: empty: 'perhaps' does not fit; expected true or false",
    "coco:{here}/train.json?max_objects=few": "coco: max_objects: 'few' does not fit; expected a whole number",
    "coco:{here}/train.json?categories=cow&task=counting": "no image has a question for counting with these options",
    "coco:{here}/train.json?images={here}/nowhere": "nowhere: the images folder does not exist",
    "coco:{here}/train.json?sample=most": "sample: 'most' is unknown; use one of first, end, random",
    "coco:{here}/train.json?sample=first:x": "sample: 'first:x' is unknown; use all, or first, end or random",
    "coco:{here}/train.json?sample=first:0": "no records are left",
    "coco:{here}/moved.json": r"its image 'gone\.png' is in none of .*; name the folder with images=FOLDER",
    "chat:{here}/chat.jsonl?split=val": "'split' is unknown; it takes images, task, sample, keep, clip, annotated, group, weight",
    "pixmo:{here}/nojson.jsonl": r"nojson\.jsonl, record 0: line 1 is not JSON",
    "tfds:{here}": "expected one dataset prepared by TFDS, found none",
    "world:juggling": "world: task: 'juggling' is unknown; use one of grounding",
    "world:grounding:x": "world: weight 'x' of 'grounding' is no number",
    "world:grounding?objekts=3": "world: option: 'objekts' is unknown; use one of size, objects",
    "world:grounding?objects=many": "world: objects: 'many' does not fit; expected two whole numbers like 3-6",
    "world:grounding?sizes=small": "world: sizes: 'small' does not fit; expected a value that only Python can give",
    "world:grounding?split=dev": "split: 'dev' is unknown; use one of train, val, test",
    "world:grounding?objects=1-99": r"SceneSpec\.objects",
}  # fmt: skip


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_bad_specs(coco, spec):
    here = coco.parent
    for name in ("empty.json",):
        (here / name).write_text("")
    (here / "blank.jsonl").write_text("\n \n")
    (here / "list.json").write_text("[]")
    (here / "object.json").write_text('{"a": 1}')
    (here / "broken.json").write_text('[{"a": }]')
    (here / "nojson.jsonl").write_text("label,count\n")
    (here / "broken.parquet").write_bytes(b"PAR1 no")
    (here / "folder").mkdir()
    write(here / "chat.jsonl", [{"prompt": "Hello"}])
    write(here / "moved.json", {**COCO, "images": [{"id": 7, "file_name": "gone.png"}], "annotations": []})
    with pytest.raises(InputError, match=BAD_SPECS[spec]) as caught:
        open_source(spec.format(here=here))
    assert "\n" not in str(caught.value)


def thing(**fields):
    return {"annotations": [{"image_id": 7, "category_id": 5, "bbox": [0, 0, 1, 1], **fields}]}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"images": []}, "the list images is empty"),
        ({"images": [{"id": 1}]}, r"images\[0\]: file_name or id is missing or malformed \('file_name'\)"),
        ({"images": [COCO["images"][0]] * 2}, "two images have the same id"),
        ({"categories": [{"id": 1}]}, "categories need id and name"),
        ({"categories": []}, "the list categories is empty"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, "two categories have the same name"),
        ({"annotations": None}, "annotations are missing"),
        (thing(image_id=1), "no annotation has the image_id of an image, such as 7"),
        (thing(category_id=1), r"annotations\[0\]: category_id 1 is not in categories"),
        (thing(bbox=[0, 0, 1]), r"annotations\[0\]: bbox: expected 4 numbers"),
        ({"annotations": [{"image_id": 7, "category_id": 5}]}, r"annotations\[0\]: field 'bbox' is missing"),
        (thing(bbox=[0, 0, "1", 1]), r"annotations\[0\]: bbox: '1' is not a finite number"),
        ({"annotations": [3]}, r"annotations\[0\]: field .* is missing or malformed"),
    ],
)  # fmt: skip
def test_bad_coco(coco, change, error):
    write(coco, {**COCO, **change})
    with pytest.raises(InputError, match=rf"train\.json: {error}"):
        open_source(f"coco:{coco}")


def test_nan_in_a_file_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('[{"a": NaN}]')
    with pytest.raises(InputError, match="NaN is not a finite number"):
        Rows(tmp_path / "x.json")


def test_message_of_a_source_names_the_record(coco):
    source = open_source(f"coco:{coco}")
    assert re.fullmatch(r".*train\.json, record 1 \(b\.png\)", source.where(1))
    with pytest.raises(IndexError):
        source[2]
