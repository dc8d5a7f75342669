"""Rows as other programs write them: each file below is written as that program's documentation shows it, and read as one."""

import base64
import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from jaxmllm import api
from jaxmllm.data.decoding import image_size
from jaxmllm.data.examples import Sized
from jaxmllm.data.images import PixelConfig, load_image
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.tasks import detection

QUESTION, ANSWER = "What is it?", "A cup."


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (60, 40), (200, 30, 30)).save(tmp_path / "a.png")
    return tmp_path


def png() -> str:
    file = io.BytesIO()
    Image.new("RGB", (60, 40), (200, 30, 30)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def said(record) -> list[tuple[str, str]]:
    """(role, text) of each turn, "<image>" for a picture."""

    def text(content):
        if isinstance(content, str):
            return content
        return "".join(part["text"] if part["type"] == "text" else "<image>" for part in content)

    return [(message["role"], text(message["content"])) for message in record["messages"]]


ASKED = [("user", "<image>What is it?"), ("assistant", "A cup.")]
ROWS = {
    "LLaVA": {
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": ANSWER},
        ],
    },
    "ms-swift, messages": {
        "messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": ANSWER}],
        "images": ["a.png"],
    },
    "ms-swift, older": {"query": "<image>What is it?", "response": ANSWER, "images": ["a.png"]},
    "EasyR1": {"images": ["a.png"], "problem": "<image>What is it?", "answer": ANSWER},
    "VLM-R1": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": ANSWER}],
    },
    "Alpaca": {"instruction": "What is", "input": "it?", "output": ANSWER, "image": "a.png"},
    "TRL": {"prompt": QUESTION, "completion": ANSWER, "image": "a.png"},
    "OpenAI": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png()}", "detail": "low"}},
                    {"type": "text", "text": QUESTION},
                ],
            },
            {"role": "assistant", "content": ANSWER},
        ]
    },
    "qwen-vl-utils": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "a.png", "max_pixels": 784}, {"type": "text", "text": QUESTION}],
            },
            {"role": "assistant", "content": ANSWER},
        ]
    },
    "base64 column": {"prompt": QUESTION, "completion": ANSWER, "image": f"data:image/png;base64,{png()}"},
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "lines.json"])
def test_every_program_s_rows_are_the_same_conversation(folder, name, suffix):
    row = ROWS[name]
    text = json.dumps([row] * 2) if suffix == "json" else f"{json.dumps(row)}\n" * 2
    (folder / f"x.{suffix}").write_text(text)
    source = open_source(f"chat:{folder / f'x.{suffix}'}")
    assert len(source) == 2
    turns = [(role, text.replace("\n", " " if name == "Alpaca" else "")) for role, text in said(source[0])]
    assert turns == ASKED
    assert len(source[0]["images"]) == 1
    model = api.load("tiny")
    example = model.processor.encode(source[0]["messages"][:1])
    (picture,) = example.vision
    rows, columns = picture.grid[1:]
    assert (rows, columns) == ((2, 4) if name == "qwen-vl-utils" else (6, 8))  # patches of 7 pixels; at most 784 pixels


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_of_pictures_and_answers(folder, separator):
    name = "table.tsv" if separator == "\t" else "table.csv"
    with (folder / name).open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(["image", "question", "answer"])
        writer.writerow(["a.png", QUESTION, ANSWER])
        writer.writerow(["a.png", 'Two\nlines, "quoted"', "12"])
    source = open_source(f"chat:{folder / name}")
    assert said(source[0]) == ASKED
    assert said(source[1]) == [("user", '<image>Two\nlines, "quoted"'), ("assistant", "12")]
    (folder / "bad.csv").write_text("image,question\na.png,x\na.png\n")
    with pytest.raises(InputError, match="bad.csv: line 3 has 1 columns, line 1 has 2"):
        open_source(f"chat:{folder / 'bad.csv'}")


def test_a_folder_of_pictures(folder):
    (folder / "kinds" / "cat").mkdir(parents=True)
    for name in ("one.jpg", "two.JPG"):
        Image.new("RGB", (50, 50)).save(folder / "kinds" / "cat" / name)
    source = open_source(f"images:{folder / 'kinds'}?prompt=Which animal%3F")
    assert len(source) == 2 and source[0]["messages"][1]["content"][-1]["text"] == "cat"
    (folder / "kinds" / "cat" / "one.txt").write_text("A tabby.\n")
    assert said(open_source(f"images:{folder / 'kinds'}")[0])[1] == ("assistant", "A tabby.")
    (folder / "kinds" / "metadata.csv").write_text("file_name,text\ncat/one.jpg,first\n")
    listed = open_source(f"images:{folder / 'kinds'}")
    assert len(listed) == 1 and said(listed[0])[1] == ("assistant", "first")
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no pictures; expected files ending in"):
        open_source(f"images:{folder / 'empty'}")
    with pytest.raises(InputError, match=r"this is a folder.*|images:"):
        open_source(f"chat:{folder / 'empty'}")


def test_calls_of_tools_need_no_words(folder):
    call = {"id": "1", "type": "function", "function": {"name": "zoom", "arguments": '{"box": [1, 2, 3, 4]}'}}
    rows = [
        {"role": "user", "content": "Zoom"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "Grey"},
    ]
    (folder / "x.jsonl").write_text(json.dumps({"messages": rows}) + "\n")
    turns = said(open_source(f"chat:{folder / 'x.jsonl'}")[0])
    assert [role for role, _ in turns] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(turns[1][1].removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")) == {
        "name": "zoom",
        "arguments": {"box": [1, 2, 3, 4]},
    }


def test_refcoco_rows_of_lmms_lab_and_of_corners(folder):
    """lmms-lab writes [x, y, width, height]; a list of expressions is as many records."""
    row = {"question_id": "7", "image": "a.png", "answer": ["left cup", "the cup"], "bbox": [30, 5, 20, 30]}
    (folder / "ref.jsonl").write_text(json.dumps(row) + "\n")
    source = open_source(f"refcoco:{folder / 'ref.jsonl'}")
    assert [source[k]["expression"] for k in range(len(source))] == ["left cup", "the cup"]
    assert {tuple(source[k]["box"]) for k in range(len(source))} == {(30, 5, 50, 35)}
    corners = {"image": "a.png", "expression": "cup", "box": [10, 5, 30, 35]}
    (folder / "corners.jsonl").write_text(json.dumps(corners) + "\n")
    assert open_source(f"refcoco:{folder / 'corners.jsonl'}")[0]["box"] == [10, 5, 30, 35]
    either = {"image": "a.png", "sentence": "cup", "bbox": [10, 5, 30, 35]}
    (folder / "either.jsonl").write_text(json.dumps(either) + "\n")
    with pytest.raises(InputError, match="their numbers fit both xyxy and xywh; write boxes=xyxy or boxes=xywh"):
        open_source(f"refcoco:{folder / 'either.jsonl'}")
    assert open_source(f"refcoco:{folder / 'either.jsonl'}?boxes=xywh")[0]["box"] == [10, 5, 40, 40]


def coco(folder, boxes, categories=None, **image):
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 60, "height": 40, **image}],
        "annotations": [
            {"id": k + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for k, box in enumerate(boxes)
        ],
        "categories": categories or [{"id": 1, "name": "cup", "supercategory": "things"}],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    return f"coco:{folder / 'coco.json'}"


def test_roboflows_root_category_is_not_asked_for(folder, caplog):
    root = [
        {"id": 0, "name": "things", "supercategory": "none"},
        {"id": 1, "name": "cup", "supercategory": "things"},
        {"id": 2, "name": "fork", "supercategory": "things"},
    ]
    record = open_source(coco(folder, [[5, 5, 10, 10]], root))[0]
    assert record["categories"] == ["cup", "fork"] and "things" in caplog.text


def test_boxes_that_leave_the_picture_are_cut_on_request(folder):
    spec = coco(folder, [[40, 20, 50, 50]])
    with pytest.raises(InputError, match="leaves the image of 60 x 40 pixels; option clip=true"):
        Sized(open_source(spec), PixelConfig())[0]
    assert Sized(open_source(spec + "?clip=true"), PixelConfig())[0]["boxes"] == [[40, 20, 60, 40]]


def test_annotations_of_absent_images_are_left_out_and_counted(folder, caplog):
    spec = coco(folder, [[5, 5, 10, 10]])
    content = json.loads((folder / "coco.json").read_text())
    content["annotations"].append({**content["annotations"][0], "id": 9, "image_id": 77})
    (folder / "coco.json").write_text(json.dumps(content))
    assert len(open_source(spec)[0]["boxes"]) == 1
    assert "1 annotations of images that the file does not list are left out" in caplog.text


def test_labels_match_whatever_their_case():
    record = {"boxes": [[1, 1, 20, 20]], "labels": ["person"], "categories": ["person"], "size": [40, 40]}
    for name in ("Person", "PERSON", " person"):
        text = f'[{{"bbox_2d": [1, 1, 20, 20], "label": "{name}"}}]'
        assert detection.reward(text, record)["reward"] == detection.reward(detection.answer(record), record)["reward"]
        assert detection.Detection().metric([text], [record])["f1"] == 1
    both = {**record, "boxes": [[1, 1, 20, 20]] * 2, "labels": ["polish", "Polish"], "categories": ["polish", "Polish"]}
    assert detection.Detection().metric([detection.answer(both)], [both])["f1"] == 1, (
        "names that differ by case alone stay apart"
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_on_stored_pixels_unless_the_file_says_otherwise(folder, orientation):
    """A red patch in a stored picture, its box in the file: the record's box holds the patch of the turned picture."""
    stored = np.full((40, 60, 3), 90, np.uint8)
    stored[4:14, 30:50] = (230, 20, 20)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(folder / "a.png", exif=exif)
    for size in ({}, {"width": None, "height": None}):
        record = Sized(open_source(coco(folder, [[30, 4, 20, 10]], **size)), PixelConfig())[0]
        seen = np.asarray(load_image(record["images"][0], "a"))
        x1, y1, x2, y2 = map(round, record["boxes"][0])
        assert list(seen.shape[1::-1]) == record["size"]
        assert (seen[y1:y2, x1:x2, 0] > 200).all() and (x2 - x1) * (y2 - y1) == 200
        assert (seen[..., 0] > 200).sum() == 200


def test_groups_are_of_records_with_the_same_pictures(folder):
    """Two rows share their first picture and not their second: they are two groups."""
    for name, colour in (("b.png", "blue"), ("c.png", "green")):
        Image.new("RGB", (60, 40), colour).save(folder / name)
    rows = [
        {"images": ["a.png", second], "messages": [{"role": "user", "content": f"<image><image>{k}"}, *TURN]}
        for k, second in enumerate(("b.png", "c.png", "b.png"))
    ]
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(f"chat:{folder / 'x.jsonl'}?group=1")
    assert len(source) == 2
    assert [len(source.records(k)) for k in range(2)] == [2, 1]
    for k in range(2):
        assert len({tuple(map(str, record["images"])) for record in source.records(k)}) == 1


TURN = ({"role": "assistant", "content": "x"},)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("chat", {"chosen": "a", "rejected": "b", "image": "a.png"}, "as preference:FILE reads"),
        ("chat", {"image": "a.png", "expression": "cup", "box": [1, 2, 3, 4]}, "as refcoco:FILE reads"),
        ("pages", {"messages": [], "images": []}, "as chat:FILE reads"),
        ("refcoco?boxes=xyxy", {"problem": "q", "solution": "s", "image": "a.png"}, "as pr1:FILE reads"),
    ],
)
def test_the_nearest_format_is_named(folder, kind, row, message):
    (folder / "x.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=message):
        kind, mark, options = kind.partition("?")
        open_source(f"{kind}:{folder / 'x.jsonl'}{mark}{options}")[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "prompt": "b"}', "line 1 .*the key 'prompt' occurs twice"),
        ('{"prompt": "a", "weight": 1e999}', "line 1 .*beyond the largest number"),
        ('{"prompt": "a", "weight": NaN}', "line 1 .*NaN is not a finite number"),
    ],
)
def test_json_that_others_would_refuse(folder, text, message):
    (folder / "x.jsonl").write_text(text + "\n")
    with pytest.raises(InputError, match=message):
        open_source(f"chat:{folder / 'x.jsonl'}")[0]


def test_image_size_is_that_of_the_upright_image(tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.jpg"
        Image.new("RGB", (30, 20)).save(path, exif=exif)
        assert image_size(str(path)) == list(load_image(path).size)
        assert image_size(path.read_bytes()) == image_size(Image.open(path)) == image_size(str(path))
