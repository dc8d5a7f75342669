"""Every parser of every task against generated texts: never raises, never takes long, never evaluates.

Parsers are found through the task registry: each module's `PARSERS`. A module that is not there yet is skipped.
"""

import builtins
import os
import random
import time
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.tasks import answers, counting, detection, grounding, module, ocr
from jaxmllm.tasks import names as task_names
from tests.support.answer_texts import END, PAD, box, element, fenced, ref

LIMIT_S = 0.05
PARSERS = {
    f"{task}: {name}": parser
    for task in task_names()
    if find_spec(f"jaxmllm.tasks.{task}")
    for name, parser in module(task).PARSERS.items()
}
PARSERS |= {
    "thinking format": answers.thinking_format,
    "thinking format, released": lambda text: answers.thinking_format(text, "released"),
    "json objects": answers.json_objects,
}

# Valid answers in every format of the library, to be damaged.
SEEDS = (
    ref("the dog") + box(100, 200, 300, 400) + END,
    ref("bird") + box(1, 2, 30, 40) + box(50, 60, 700, 800) + END + PAD,
    fenced(element([10, 20, 302, 397], "red dog"), element([1, 2, 3, 4], "cat")),
    '[{"point_2d": [12.5, 20], "label": "bird"}]',
    "<think>there are two</think><answer>[0.1, 0.2, 0.5, 0.65]</answer>",
    "(100, 200, 300, 400) and (1,2),(3,4)",
    "person<Id1>Frame1:[071,402,235,829];Frame2:[073,400,236,830]</Id1>,Track2<Id2>Frame:1:[1,2,3,4]</ Id2>",
    "Cat1:[001,002,003,004],[005,006,007,008];Cat2:[1,2,3,4].",
    "<answer>\nTrack1: Nick<Id1>Frame1:[100,100,200,300];Frame2:[138,100,238,300]</Id1>\n"
    "<attr>action=grinning; location=side</attr>\n</answer>",
    '{"match": true, "bbox_2d": [10, 20, 30, 40]}',
    'I looked closely. {"match": false, "relation": "R2"}',
    '{"scores": {"objects": 3, "attributes": 4.5}, "total": 7.5, "rationale": "good"}\nScore: 7/10. Final score: 70',
    "A red cup is on the left of two small dogs; the dogs are grinning at it. There is no cat.",
    "The quick  brown\nfox jumps over the lazy dog. " * 3,
)
PIECES = (
    "[", "]", "(", ")", "{", "}", "<", ">", '"', "'", ",", ";", ":", "\\", "/", "\n", "\t", " ", "\x00", "-", "+",
    ".", "=", "```json", "```", "<think>", "</think>", "<answer>", "</answer>", "<|box_start|>", "<|box_end|>",
    "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|endoftext|>", "<Id1>", "</Id1>", "Frame1:",
    "Frame", "Track1:", "<attr>", "</attr>", "bbox_2d", "label", "null", "true", "NaN", "Infinity", "-Infinity",
    "1e999", "-1e999", "1e-999", "9" * 30, "9" * 400, "9" * 5000, "0x10", "1_000", "٣", "²", "Ⅷ", "½", "１２", "一",
    "é", "\u202e", "\ufeff", "\ud800", "🦊", "[" * 200, "]" * 200, "{" * 200, '{"a":' * 100, "(" * 200,
    "((1,2),(3,4))", "lambda: 0", "__import__('os').abort()", "exit()", "().__class__.__mro__", "{0.__class__}",
    "%s%n", "${HOME}", "../../etc/passwd",
)  # fmt: skip


def mutate(text: str, rng: random.Random) -> str:
    """The text after a few random cuts, doublings, swaps and insertions."""
    for _ in range(rng.randint(1, 6)):
        kind, i, j = rng.randrange(6), *sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        if kind == 0:
            text = text[:i]
        elif kind == 1:
            text = text[:i] + text[min(j, i + 9) :]
        elif kind == 2:
            text = text[:j] + text[i:j][:200] + text[j:]
        elif kind == 3:
            text = text[:i] + rng.choice(SEEDS) + text[i:]
        else:
            text = text[:i] + rng.choice(PIECES) + text[i:]
    return text[:20_000]


def run(name: str, text: str) -> None:
    """Call the parser; a slow call is timed again, since another process may have held the processor's caches."""
    for _ in range(3):
        start = time.process_time()
        try:
            PARSERS[name](text)
        except Exception as error:
            raise AssertionError(f"{name} raised {type(error).__name__}: {error} on {text[:300]!r}") from error
        spent = time.process_time() - start
        if spent <= LIMIT_S:
            return
    raise AssertionError(f"{name} took {spent * 1e3:.0f} ms on {len(text)} characters: {text[:300]!r}")


@pytest.fixture
def no_evaluation(monkeypatch):
    """Any call that would run text as code or as a command fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"evaluated {args!r}"[:300])

    for text in SEEDS:  # let every parser do its lazy imports and compile its patterns first
        for parser in PARSERS.values():
            parser(text)
    for where, what in ((builtins, "eval"), (builtins, "exec"), (builtins, "compile"), (os, "system"), (os, "abort")):
        monkeypatch.setattr(where, what, refuse)


def fuzz(count: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        text = mutate(rng.choice(SEEDS), rng)
        for name in PARSERS:
            run(name, text)


def test_generated_texts(no_evaluation):
    fuzz(1_500, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_100_000_generated_texts(no_evaluation):
    fuzz(100_000, seed=2)


MEGABYTE = 1_000_000
LONG = {
    "[": "[", "]": "]", "(": "(", "{": "{", '{"a":': '{"a":', "[[1,": "[[1,", "digits": "9", "blanks": " ",
    "newlines": "\n", "( blank": "( ", "[1,2,3": "[1,2,3", "(1,2),": "(1,2),", "(1,2),(": "(1,2),(",
    "box start": "<|box_start|>", "box": "<|box_start|>(1,2),(3,4)<|box_end|>", "box end": "<|box_end|>",
    "ref": "<|object_ref_start|>a", "segments": ref("a") + box(1, 2, 3, 4), "think": "<think>",
    "join": "</think><answer>", "answers": "<answer>1</answer>", "fence": "```json", "bare fence": "```",
    "items": '{"bbox_2d": [1, 2, 3, 4], "label": "a"}, ', "quote": '"', "escape": '\\"', "unicode digit": "٣",
    "unit": '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]', "tracks": "<Id1>Frame1:[1,2,3,4];</Id1>",
    "frames": "Frame1:[1,2,3,4];", "ids": "<Id1>", "close": "</Id1>", "attr": "<attr>a=b;</attr>",
    "score": "Score: 7 ", "word": "dog ", "letters": "a", "phrase": "a red dog and ", "minus": "-", "dots": ".",
    "less": "<", "pad": PAD, "comma": ",", "sentence": "There is a red dog on the left of a cat. ",
    "colon": "a:[1,2,3,4],", "relations": '{"match": false} ',
}  # fmt: skip


@pytest.mark.parametrize("name", PARSERS)
def test_a_megabyte_of_anything(name):
    for unit in LONG.values():
        run(name, unit * (MEGABYTE // len(unit)))
    run(name, ref("a") + "<|box_start|>(" + "1" * MEGABYTE)
    run(name, "<think>" + " " * MEGABYTE + "</think><answer>[" + "9" * MEGABYTE)


# --- write, then read -----------------------------------------------------------------------------------------------

coordinate = st.integers(0, 999)
whole_boxes = st.tuples(coordinate, coordinate, coordinate, coordinate).map(
    lambda c: [min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]) + 1, max(c[1], c[3]) + 1]
)
labels = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="<`"), min_size=1, max_size=12)
styles = st.sampled_from(tuple(answers.STYLES))
FRAMED = {"size": [1000, 1000]}  # all frames coincide, so that whole numbers stay whole


@given(whole_boxes, labels, styles, st.booleans())
@settings(deadline=None)
def test_grounding_round_trip(box_, label, style, thinking):
    text = grounding.answer({"expression": label, "box": box_, **FRAMED}, style, thinking)
    assert grounding.parse(text, style, thinking).tolist() == box_
    assert grounding.well_formed(text, style, thinking)


@given(st.lists(whole_boxes, max_size=6), labels, styles, st.booleans())
@settings(deadline=None)
def test_counting_round_trip(boxes, label, style, thinking):
    centers = [[(b[0] + b[2]) / 2, (b[1] + b[3]) / 2] for b in boxes]
    from_boxes = counting.answer({"label": label, "boxes": boxes, **FRAMED}, style, thinking)
    assert counting.parse(from_boxes, style, thinking).tolist() == centers
    points = [[b[0], b[3]] for b in boxes]
    from_points = counting.answer({"label": label, "points": points, **FRAMED}, style, thinking)
    assert counting.parse(from_points, style, thinking).tolist() == points
    assert counting.read(from_points, style, thinking) == points


@given(st.lists(st.tuples(whole_boxes, labels), max_size=6), styles, st.booleans())
@settings(deadline=None)
def test_detection_round_trip(items, style, thinking):
    record = {"boxes": [b for b, _ in items], "labels": [label for _, label in items], **FRAMED}
    text = detection.answer(record, style, thinking)
    for found in (detection.parse(text, style, thinking), detection.read(text, style, thinking)):
        if found is None:  # the box tokens have no way to write an empty image
            assert style == "qwen2_vl" and not items
            continue
        assert (found.boxes.tolist(), found.labels, found.bad) == (record["boxes"], record["labels"], 0)


@given(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="<"), max_size=60), st.booleans())
def test_ocr_round_trip(page, thinking):
    assert ocr.parse(ocr.answer({"text": page}, thinking), thinking) == page.strip()


def test_labels_that_cannot_be_written_are_refused():
    with pytest.raises(ValueError, match="'<'"):
        answers.write_tokens([("a<b", np.array([[1, 2, 3, 4]]))])
