"""Random views of photographs: boxes are checked against the pixels of the view."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from jaxmllm.data.sources import all_records, open_source
from jaxmllm.errors import InputError

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}
BOXES = {"red": [[10, 20, 40, 60]], "green": [[100, 10, 130, 30], [60, 80, 90, 110]], "blue": [[5, 90, 25, 115]]}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """One 160 x 120 photograph of filled boxes."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.full((120, 160, 3), 128, np.uint8)
    annotations = []
    for number, (name, boxes) in enumerate(BOXES.items(), 1):
        for x1, y1, x2, y2 in boxes:
            pixels[y1:y2, x1:x2] = COLOURS[name]
            annotations.append({"image_id": 1, "category_id": number, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    Image.fromarray(pixels).save(folder / "a.png")
    categories = [{"id": number, "name": name} for number, name in enumerate(BOXES, 1)]
    images = [{"id": 1, "file_name": "a.png", "width": 160, "height": 120}]
    path = folder / "photos.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def painted(record, name):
    """Pixels of the record's picture in a colour, and those that boxes of that name hold."""
    pixels = np.asarray(record["images"][0])
    inside = np.zeros(pixels.shape[:2], bool)
    labels = record.get("labels", [record.get("label")] * len(record["boxes"]))
    for label, (x1, y1, x2, y2) in zip(labels, record["boxes"], strict=True):
        if label == name:
            inside[int(y1) : int(y2), int(x1) : int(x2)] = True
    return (pixels == COLOURS[name]).all(-1), inside


def test_boxes_follow_the_pixels(file):
    source = open_source(f"coco:{file}?task=detection&augment=40&crop=0.5")
    assert len(source) == 40
    shapes, corners = set(), set()
    for index in range(len(source)):
        record = source[index]
        width, height = record["images"][0].size
        assert record["size"] == [width, height] and width / height == pytest.approx(4 / 3, abs=0.02)
        shapes.add(width)
        corners.add(tuple(record["boxes"][0]))
        assert record["boxes"] == sorted(record["boxes"], key=lambda box: box[:2])
        for name, boxes in BOXES.items():
            colour, inside = painted(record, name)
            assert colour[inside].all()
            # what no box holds is the rest of objects that left the view by more than 70 % of their area
            assert (colour & ~inside).sum() <= 0.3 * sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes)
    assert len(shapes) > 10 and len(corners) > 20 and min(shapes) >= 80 and max(shapes) <= 160


def test_mirrors_alone_keep_every_object(file):
    source = open_source(f"coco:{file}?task=detection&augment=30&crop=1")
    seen = set()
    for index in range(30):
        record = source[index]
        assert record["size"] == [160, 120] and len(record["boxes"]) == 4
        for name in BOXES:
            colour, inside = painted(record, name)
            assert (colour == inside).all()
        seen.add(tuple(record["boxes"][record["labels"].index("red")]))
    assert seen == {(10, 20, 40, 60), (120, 20, 150, 60), (10, 60, 40, 100), (120, 60, 150, 100)}


def test_questions_of_a_picture_share_its_view_and_stay_answerable(file):
    source = open_source(f"coco:{file}?task=detection,counting,grounding&group=1&augment=30&crop=0.3&order=left")
    for index in range(0, 30, 3):
        records = all_records(source, index)
        assert [r["task"] for r in records] == ["detection", *["counting"] * 3, *["grounding"] * 2]
        assert len({r["images"][0].tobytes() for r in records}) == 1
        detection = records[0]
        for record in records[1:]:
            name = record.get("label", record.get("expression"))
            named = zip(detection["boxes"], detection["labels"], strict=True)
            boxes = [box for box, label in named if label == name]
            assert boxes
            if record["task"] == "counting":
                assert record["boxes"] == boxes and record["count"] == len(boxes) == len(record["points"])
            else:
                assert [record["box"]] == boxes


def test_a_view_depends_on_its_index_and_the_seed_alone(file):
    specs = [f"coco:{file}?task=counting&augment=8&seed={seed}" for seed in (0, 0, 1)]
    first, again, other = map(open_source, specs)
    again = pickle.loads(pickle.dumps(again))
    assert [again[k]["boxes"] for k in reversed(range(24))] == [first[k]["boxes"] for k in reversed(range(24))]
    assert [other[k]["boxes"] for k in range(24)] != [first[k]["boxes"] for k in range(24)]
    assert first[0]["label"] == first[3]["label"] and first[0]["boxes"] != first[3]["boxes"]


def test_points_alone_are_cut(tmp_path, file):
    rows = [
        {"id": "a", "task": "counting", "images": ["a.png"], "label": "dot", "count": 2, "points": [[5, 5], [150, 100]]}
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source = open_source(f"records:{tmp_path / 'rows.json'}?images={file.parent}&augment=30&crop=0.6")
    counts = [(record["count"], len(record["points"])) for record in map(source.__getitem__, range(30))]
    assert all(a == b for a, b in counts) and {a for a, _ in counts} == {1, 2}


@pytest.mark.parametrize(
    "query, message",
    [
        ("augment=0", "augment: needs at least 1 view"),
        ("augment=2&crop=0", "augment: needs at least 1 view and a crop in 0..1"),
        ("crop=0.5", "option 'crop' goes with augment"),
        ("order=up", "order: 'up' is unknown; use one of file, left"),
    ],
)
def test_mistakes(file, query, message):
    with pytest.raises(InputError, match=message):
        open_source(f"coco:{file}?{query}")


def test_chats_are_refused(tmp_path, file):
    turns = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]}]
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": turns + [{"role": "assistant", "content": "A box"}]}]))
    source = open_source(f"chat:{tmp_path / 'chat.json'}?images={file.parent}&augment=2")
    with pytest.raises(InputError, match="augment: only for tasks about one image"):
        source[0]
