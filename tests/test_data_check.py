"""`jaxmllm data check`: every fault of a data set, by row and reason, and flags that fit the rest."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from jaxmllm import api, cli
from jaxmllm.data import check
from jaxmllm.data.chat import Buckets, Processor
from jaxmllm.data.examples import Asking, PromptEncoder
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError


def chat(image: str, question: str, answer: str | None = "a cat") -> dict:
    asked = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
    return {"messages": [asked] + ([] if answer is None else [{"role": "assistant", "content": answer}])}


def rows(path, *found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.fixture
def pictures(tmp_path):
    draw = np.random.default_rng(0)
    for name, width, height in (("small", 84, 84), ("wide", 140, 84), ("photo", 640, 480)):
        Image.fromarray(draw.integers(0, 255, (height, width, 3), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "small.png").read_bytes())
    (tmp_path / "cut.png").write_bytes((tmp_path / "photo.png").read_bytes()[:5000])
    return tmp_path


def test_what_a_person_sees(pictures):
    """Bad rows with their reasons, the limit and the flag that fits, empty answers, records that both sides have; status 2."""
    train = rows(
        pictures / "train.jsonl",
        chat("small.png", "What is it?"),
        chat("cut.png", "What is it?"),
        chat("wide.png", "Why? " * 400),
        chat("photo.png", "What is it?", ""),
        chat("gone.png", "What is it?"),
        chat("wide.png", "What is it?", None),
    )
    held = rows(pictures / "val.jsonl", chat("copy.png", "What is it?"), chat("copy.png", "What else is it?"))
    command = [sys.executable, "-m", "jaxmllm.cli", "data", "check", f"chat:{train}", "--eval", f"chat:{held}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=pictures)
    said, lines = done.stdout, done.stdout.splitlines()
    assert done.returncode == 2 and "would stop at 3 of 8 records" in done.stderr, done.stderr
    assert "train.jsonl: 6 records, 2 of them bad" in lines[0]
    assert "record 1: " in lines[1] and "cut.png" in lines[1] and "truncated" in lines[1]
    assert "record 4: " in lines[2] and "gone.png: image file not found" in lines[2]
    assert "--data.max_bad_records 2" in lines[3]
    assert "record 3: its answer is empty" in said
    # by the tokenizer and the sizes: 14 pixels a vision token, and the template around question and picture
    words = len(AutoTokenizer.from_pretrained(api.TINY)("Why? " * 400)["input_ids"])
    (longest,) = map(int, re.findall(r"--data.max_prompt_length (\d+)", said))
    (tokens, vision), *more = re.findall(r"record 2: (\d+) tokens, (\d+) of them vision", said)
    assert not more and int(tokens) == longest and int(vision) == (140 // 14) * (84 // 14)
    assert 0 < longest - words - int(vision) < 40
    assert "1 records have none" in said and "84 x 84 to 640 x 480 pixels" in said
    assert "1 of 4 are made smaller, to 50176 pixels" in said
    assert "1 of 2 records of the evaluation are among the training's" in said
    assert "val.jsonl, record 0: also" in said and "train.jsonl, record 0" in lines[-1]


def looked(source, **options) -> list[check.Seen]:
    look = check.Look(
        Processor.from_pretrained(api.TINY), Asking({"style": "qwen2_5_vl"}), options.pop("earns", lambda *_: 1.0)
    )
    return list(look.source(source, **options))


def test_flags_that_are_named_fit(pictures, capsys):
    """Training takes the very rows that were too long, with either of the two flags."""
    path = rows(pictures / "train.jsonl", chat("photo.png", "What is it?"), chat("small.png", "What?"))
    assert cli.main(["data", "check", f"chat:{path}", "--max-prompt-length", "128"]) == cli.EXIT_INPUT
    said = capsys.readouterr().out
    (length,) = map(int, re.findall(r"--data.max_prompt_length (\d+)", said))
    (pixels,) = map(int, re.findall(r"smaller pictures: --data.max_pixels (\d+)", said))
    source = open_source(f"chat:{path}")

    def taken(max_prompt_length: int, max_pixels: int | None = None) -> None:
        limits = {"max_prompt_length": max_prompt_length, "max_pixels": max_pixels}
        encode = PromptEncoder(Processor.from_pretrained(api.TINY, **limits), Asking(), Buckets())
        for index in range(len(source)):
            encode(source, index, 0)

    taken(length)
    taken(128, pixels)
    for short in (length - 1, 128):
        with pytest.raises(InputError, match="max_prompt_length"):
            taken(short)


@pytest.mark.parametrize("task", ["grounding", "counting", "detection", "ocr", "captioning", "relations"])
def test_right_answers_are_not_called_wrong(task, capsys):
    assert cli.main(["data", "check", f"world:{task}?size=84x84", "--limit", "24"]) == 0
    said = capsys.readouterr().out
    assert "24 records, 0 of them bad" in said and "never right" not in said


def test_answers_that_are_never_right(pictures, capsys):
    """Boxes outside the picture, a box of no area, and what the task's own reward gives nothing."""
    box = {"task": "grounding", "images": ["small.png"], "expression": "the cat"}
    path = rows(
        pictures / "boxes.jsonl",
        {**box, "box": [10, 10, 60, 60]},
        {**box, "box": [10, 10, 300, 60]},
        {"task": "ocr", "images": ["small.png"], "text": " "},
    )
    assert cli.main(["data", "check", f"records:{path}"]) == cli.EXIT_INPUT
    said = capsys.readouterr().out
    assert re.search(r"record 1: box: .* leaves the image of 84 x 84 pixels", said)
    assert re.search(r"record 2: its answer is empty", said) and "record 0" not in said
    (_, _, nothing) = looked(open_source(f"records:{path}"), earns=lambda *_: 1.0)
    assert nothing.never
    (first, *_) = looked(open_source(f"records:{path}"), earns=lambda *_: 0.0)
    assert "earns 0" in first.never


def test_pictures_are_the_same_by_their_content_and_texts_are_never_paths(pictures):
    path = rows(
        pictures / "rows.jsonl",
        chat("small.png", "What?"), chat("copy.png", "What?"), chat("wide.png", "What?"), chat("small.png", "small.png"),
    )  # fmt: skip
    first, twin, other, named = (seen.question for seen in looked(open_source(f"chat:{path}")))
    assert first == twin and len({first, other, named}) == 3


def test_histogram_counts_every_record_once():
    values = np.random.default_rng(0).integers(40, 3000, 500)
    lines = [line.split() for line in check.histogram(values, 1024)]
    assert sum(int(line[3]) for line in lines) == 500 and len(lines) <= check.BARS
    for first, _, last, count, *_ in lines:
        assert int(count) == ((values >= int(first)) & (values <= int(last))).sum()
    assert [line for line in lines if line[-1] == "long"] == [line for line in lines if int(line[0]) > 1024]


def test_limits_of_the_command(capsys):
    assert cli.main(["data", "check", "world:ocr", "--limit", "0"]) == cli.EXIT_INPUT
    assert "--limit 0: must be at least 1" in capsys.readouterr().err
