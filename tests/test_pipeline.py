"""Batches against the processor's own encoding, against one another at every position, and what is said of bad records."""

import collections
import dataclasses
import functools
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

from jaxmllm.data.chat import Buckets, Processor
from jaxmllm.data.examples import Asking, PromptEncoder, Sized
from jaxmllm.data.images import PixelConfig
from jaxmllm.data.pipeline import batch_sizes, join_prompts, pad, rl_batches, sft_batches
from jaxmllm.data.sources import Mixture, open_source
from jaxmllm.errors import InputError
from jaxmllm.world.source import WorldSource
from tests.support.conversations import VIDEO, model_of, small_tokenizer
from tests.test_sources import picture, write

PIXELS = PixelConfig(min_pixels=28 * 28, max_pixels=56 * 56)
ONE_SIZE = Buckets(frames=(6,), windows=(1,), prompt=(1024,), completion=(1024,))


@pytest.fixture(scope="module")
def processor():
    tokenizer = small_tokenizer()
    return Processor(tokenizer, model_of(tokenizer), PIXELS, VIDEO)


def world(task="grounding", **options):
    return WorldSource(task, **{"length": 40, **options})


@functools.cache
def drawn(task="grounding", length=7):
    """Records that are not drawn anew each time."""
    return tuple(world(task)[i] for i in range(length))


def leaves(value, path=""):
    """Every number of a batch by name, images included."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, part in items for k, v in leaves(part, f"{path}/{name}").items()}
    return {} if value is None else {path: value}


def same(a, b):
    a, b = leaves(a), leaves(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def turn(role, *content):
    return {"role": role, "content": content[0] if isinstance(content[0], str) else list(content)}


# ---------------------------------------------------------------- order, resuming, processes


class Patchy:
    """A source with unreadable records."""

    name = "patchy"

    def __init__(self, bad, length=11):
        self.source, self.bad = drawn(length=length), set(bad)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index in self.bad:
            raise InputError(f"record {index}: torn")
        return self.source[index]


def streams(processor):
    """Iterators of every kind, made anew at each call."""
    mixture = Mixture([drawn(), drawn("ocr", 5)], [2, 1])
    return {
        "one source": lambda: rl_batches(drawn(), processor, 3, Buckets(), seed=1),
        "mixture": lambda: rl_batches(mixture, processor, 4, Buckets(), seed=1, threads=3),
        "bad records": lambda: rl_batches(Patchy({2, 3, 7}), processor, 4, Buckets(), seed=1, max_bad_records=3),
        "ordered": lambda: rl_batches(Patchy({4}), processor, 3, Buckets(), shuffle=False, max_bad_records=1),
        "answers": lambda: sft_batches(world(questions=5, length=5), processor, 2, Buckets(), seed=1, questions=2),
    }


@pytest.mark.parametrize("kind", ["one source", "mixture", "bad records", "ordered", "answers"])
def test_resuming_at_every_position_changes_nothing(processor, kind):
    make = streams(processor)[kind]
    with make() as batches:
        count = 6 if batches.steps is None else batches.steps
        states, found = [json.loads(json.dumps(batches.get_state()))], []
        for _ in range(count):
            found.append(next(batches))
            states.append(json.loads(json.dumps(batches.get_state())))
    again = make()
    for k in [*range(count + 1), 0, count - 1]:  # forwards, and back with the same iterator
        for resumed in (again, make()):
            resumed.set_state(states[k])
            assert resumed.get_state() == states[k]
            rest = take(resumed, min(2, count - k))
            assert len(rest) == min(2, count - k) and all(map(same, rest, found[k:]))
            assert resumed.get_state() == states[min(k + 2, count)]
            if resumed is not again:
                resumed.close()
    again.close()
    assert [batch.step for batch in found] == list(range(count))


def test_a_state_of_other_data_is_refused(processor):
    state = rl_batches(world(length=7), processor, 3, Buckets(), seed=1).get_state()
    for options, error in [
        (
            dict(source=world(length=8), batch_size=3, seed=1),
            "saved with records 7, this run has 8; resume with the same",
        ),
        (dict(source=world(length=7), batch_size=4, seed=1), "saved with batch_size 3, this run has 4"),
        (dict(source=world(length=7), batch_size=3, seed=2), "saved with seed 1, this run has 2"),
        (dict(source=world(length=7), batch_size=3, seed=1, shuffle=False), "saved with seed 1, this run has None"),
    ]:
        with pytest.raises(InputError, match=f"data state: it was {error}"):
            rl_batches(processor=processor, buckets=Buckets(), **options).set_state(state)


def test_epochs_and_seeds(processor):
    def indices(seed, **options):
        with rl_batches(drawn(length=10), processor, 5, Buckets(), seed=seed, **options) as batches:
            assert len(batches) == 2
            return np.concatenate([batch.index for batch in take(batches, 6)]).tolist()

    first = indices(0)
    assert all(sorted(first[k : k + 10]) == list(range(10)) for k in (0, 10, 20))
    assert len({tuple(first[k : k + 10]) for k in (0, 10, 20)}) == 3
    assert first == indices(0, threads=4, prefetch=5) != indices(1)


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_batches(processor, process_count):
    mixture = Mixture([drawn(), drawn("ocr", 5)], [2, 1])
    make = functools.partial(rl_batches, mixture, processor, 4, ONE_SIZE, seed=3)
    with make() as batches:
        whole = take(batches, 4)
    parts = []
    for number in range(process_count):
        with make(process=(number, process_count)) as batches:
            parts.append(take(batches, 4))
    for step, batch in enumerate(whole):
        for name in ("tokens", "positions", "lengths", "next_position", "vision_index"):
            joined = np.concatenate([getattr(part[step].prompts, name) for part in parts])
            assert np.array_equal(joined, getattr(batch.prompts, name))
        assert np.array_equal(
            np.concatenate([part[step].prompts.vision.patches for part in parts]), batch.prompts.vision.patches
        )
        assert same(sum((part[step].records for part in parts), []), batch.records)
        assert np.concatenate([part[step].index for part in parts]).tolist() == batch.index.tolist()


def test_processes_agree_on_sizes(processor, tmp_path):
    """One process has text alone, the other an image and a longer text: both pad alike, and as one process would."""
    rows = [
        {"prompt": "Hi", "completion": "Yes"},
        {"prompt": "What is this? " * 9, "image": "a.png", "completion": "It " * 30},
    ]
    picture(tmp_path / "a.png", 112, 56)
    source = open_source(f"chat:{write(tmp_path / 'x.jsonl', rows)}")
    with sft_batches(source, processor, 2, Buckets(), shuffle=False) as batches:
        whole = next(batches)
    sizes, found = [], []
    for number in range(2):
        make = functools.partial(sft_batches, source, processor, 2, Buckets(), shuffle=False, process=(number, 2))
        with make(agree=lambda size: sizes.append(size) or size) as batches:
            alone = next(batches)
            assert (alone.prompts.vision is None) == (number == 0)
    for number in range(2):
        make = functools.partial(sft_batches, source, processor, 2, Buckets(), shuffle=False, process=(number, 2))
        with make(agree=lambda size: np.maximum(*sizes)) as batches:
            found.append(next(batches))
    arrays = leaves([whole.prompts, whole.completions])
    parts = [leaves([part.prompts, part.completions]) for part in found]
    for name, array in arrays.items():
        assert np.array_equal(np.concatenate([part[name] for part in parts]), array), name
    assert (found[0].prompts.vision.positions == -1).all() and (found[0].prompts.vision_index == -1).all()


@pytest.mark.slow
def test_worker_processes_change_nothing(processor):
    make = streams(processor)["bad records"]
    with make() as batches:
        found = take(batches, 6)
    loader = functools.partial(rl_batches, Patchy({2, 3, 7}), processor, 4, Buckets(), seed=1, max_bad_records=3)
    with loader(workers=2) as batches:
        assert all(map(same, take(batches, 6), found))
        state = batches.get_state()
    with loader(workers=2) as batches:
        batches.set_state({**state, "step": 3})
        assert all(map(same, take(batches, 3), found[3:]))


def test_an_ordered_pass_has_every_record_once(processor):
    source = Patchy({4, 10})
    for batch_size in (1, 2, 3, 4, 11, 16):
        for make in (rl_batches, sft_batches):
            with make(source, processor, batch_size, Buckets(), shuffle=False, max_bad_records=2) as batches:
                assert len(batches) == -(-11 // batch_size)
                found = list(batches)
                records = [r[0] if isinstance(r, list) else r for batch in found for r in batch.records]
                assert [int(record["id"].split("-")[4]) for record in records] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
                assert batches.bad == {4: "record 4: torn", 10: "record 10: torn"}
            for batch in found:
                assert batch.prompts.tokens.shape[0] == len(batch.index) == batch_size
                if batch.completions is not None:
                    real = len(batch.records)
                    assert (batch.completions.lengths[:real] > 0).all()
                    assert not batch.completions.lengths[real:].any() and not batch.completions.weights[real:].any()


def test_no_thread_is_left(processor):
    before = threading.active_count()
    for _ in range(5):
        with rl_batches(world(), processor, 2, Buckets(), threads=3) as batches:
            next(batches)
            batches.set_state(batches.get_state())
            next(batches)
    batches = rl_batches(Patchy({0, 1, 2, 3}), processor, 4, Buckets(), shuffle=False)
    with pytest.raises(InputError):
        next(batches)
    batches.close()
    for _ in range(100):  # the last ones finish their record
        if threading.active_count() > before:
            time.sleep(0.05)
    assert threading.active_count() <= before


# ---------------------------------------------------------------- bad records


def test_bad_records_are_replaced_and_counted(processor, caplog):
    with rl_batches(Patchy({2, 3, 7}), processor, 11, Buckets(), seed=1, max_bad_records=3) as batches:
        first = next(batches)
        assert batches.bad == {i: f"record {i}: torn" for i in (2, 3, 7)}
        counts = collections.Counter(first.index.tolist())
        assert counts == {i: 3 if i == 4 else 2 if i == 8 else 1 for i in (0, 1, 4, 5, 6, 8, 9, 10)}
        next(batches)
    assert [r.getMessage() for r in caplog.records] == [f"left out: record {i}: torn" for i in batches.bad]
    with rl_batches(Patchy({2, 3, 7}), processor, 11, Buckets(), seed=1, max_bad_records=2) as batches:
        with pytest.raises(InputError, match="record [237]: torn; 3 records could not be read, max_bad_records is 2"):
            next(batches)
    with rl_batches(Patchy({2, 3, 7}), processor, 11, Buckets(), seed=1) as batches:
        with pytest.raises(InputError, match="^record [237]: torn$"):
            next(batches)


def test_the_count_of_bad_records_outlives_a_restart(processor):
    make = functools.partial(rl_batches, Patchy({1, 9}), processor, 5, Buckets(), shuffle=False, max_bad_records=1)
    with make() as batches:
        next(batches)
        state = json.loads(json.dumps(batches.get_state()))
    with make() as batches:
        batches.set_state(state)
        with pytest.raises(InputError, match="record 1: torn; 2 records could not be read, max_bad_records is 1"):
            take(batches, 2)


GOOD = {"task": "grounding", "images": ["a.png"], "expression": "cat", "box": [1, 2, 30, 20]}
BAD_RECORDS = {
    "no image": ({**GOOD, "images": ["gone.png"]}, r"gone\.png: image file not found"),
    "no picture": ({**GOOD, "images": ["x.jsonl"]}, r"x\.jsonl: cannot be read as an image"),
    "long picture": ({**GOOD, "images": ["long.png"], "box": [0, 0, 1, 1]}, "one side is more than 200 times the other"),
    "size": ({**GOOD, "size": [40, 60]}, "size: the image is 60 x 40, its annotations are for 40 x 60"),
    "box outside": ({**GOOD, "box": [100, 200, 900, 950]}, r"box: \[100, 200, 900, 950\] leaves the image of 60 x 40"),
    "points outside": (
        {"task": "counting", "images": ["a.png"], "label": "x", "count": 1, "points": [[3, -9]]},
        r"points: \[\[3, -9\]\] leaves the image",
    ),
    "ragged": ({**GOOD, "box": [1, 2, 3]}, "a field has the wrong form"),
    "no field": ({k: v for k, v in GOOD.items() if k != "expression"}, "field 'expression' is missing"),
    "placeholder": ({**GOOD, "expression": "<|image_pad|>"}, "placeholder tokens must not be written in a text"),
    "too long": ({**GOOD, "expression": "cat " * 400}, r"the prompt has 17[0-9]+ tokens, [0-9]+ of them vision, and max_"),
    "no messages": ({**GOOD, "messages": [{"role": "assistant", "content": "x"}]}, "messages: there is nothing to answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_named(processor, tmp_path, name):
    record, error = BAD_RECORDS[name]
    picture(tmp_path / "a.png"), picture(tmp_path / "long.png", 1000, 2)
    source = open_source(f"records:{write(tmp_path / 'x.jsonl', [GOOD, record])}?images={tmp_path}")
    limited = Processor(processor.tokenizer, processor.model_config, PIXELS, VIDEO, max_prompt_length=1024)
    with rl_batches(source, limited, 1, Buckets(), shuffle=False) as batches:
        assert next(batches).records[0]["resized"] == [56, 28]
        with pytest.raises(InputError, match=rf"x\.jsonl, record 1: .*{error}"):
            next(batches)
    with rl_batches(source, limited, 1, Buckets(), shuffle=False, max_bad_records=1) as batches:
        assert [len(batch.records) for batch in batches] == [1, 0]


def test_records_that_are_larger_than_the_buckets(processor, tmp_path):
    path = str(picture(tmp_path / "a.png", 112, 112))
    record = {"id": "0", "task": "ocr", "images": [path] * 2, "text": "word " * 40, "size": [112, 112]}
    large = Processor(processor.tokenizer, processor.model_config, PixelConfig(max_pixels=224 * 224), VIDEO)
    for field, sizes in [("frames", (1,)), ("windows", (1,)), ("prompt", (32,)), ("completion", (16, 64))]:
        if field == "windows":
            record = {**record, "images": [str(picture(tmp_path / "b.png", 224, 112))], "size": [224, 112]}
        buckets = dataclasses.replace(Buckets(), **{field: sizes})
        with sft_batches([record], large, 1, buckets) as batches:
            with pytest.raises(
                InputError, match=rf"record 0: buckets: [0-9]+ is above the largest size of {field}, {sizes[-1]};"
            ):
                next(batches)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([turn("user", "Hi")], "there is no answer of the assistant after the last picture; nothing to learn"),
        ([turn("assistant", "Hi")], "there is no answer of the assistant"),
        (
            [turn("user", "Hi"), turn("assistant", "x"), turn("user", {"type": "image", "image": "a.png"})],
            "there is no answer",
        ),
        ([turn("user", "<|image_pad|>"), turn("assistant", "x")], "placeholder tokens must not be written in a text"),
        (
            [turn("user", "Hi"), turn("assistant", "<|video_pad|>")],
            "placeholder tokens must not be written in a text",
        ),
    ],
)
def test_bad_chats_to_learn(processor, tmp_path, messages, error):
    picture(tmp_path / "a.png")
    source = open_source(f"chat:{write(tmp_path / 'x.jsonl', [{'messages': messages}])}")
    with sft_batches(source, processor, 1, Buckets()) as batches:
        with pytest.raises(InputError, match=rf"x\.jsonl, record 0: .*{error}"):
            next(batches)


def test_bad_options(processor):
    make = functools.partial(rl_batches, world(), processor)
    for options, error in [
        (dict(batch_size=0), "batch_size 0 does not divide over 1 processes"),
        (dict(batch_size=5, process=(0, 2)), "batch_size 5 does not divide over 2 processes"),
        (dict(batch_size=4, process=(2, 2)), "process 2 of 2 does not exist"),
        (
            dict(batch_size=4, process=(0, 2)),
            "several processes need buckets of one size each, or agree=agree_with_all",
        ),
        (dict(batch_size=4, max_bad_records=-1), "max_bad_records and workers must be at least 0"),
        (dict(batch_size=4, threads=0), "threads and prefetch at least 1"),
    ]:
        with pytest.raises(InputError, match=error):
            make(buckets=Buckets(), **options)
    with pytest.raises(InputError, match="data: it has no records"):
        rl_batches([], processor, 1, Buckets())
    with pytest.raises(InputError, match="questions: 0 must be at least 1"):
        sft_batches(world(), processor, 1, Buckets(), questions=0)
    with pytest.raises(
        InputError, match="option 'styles' is known to none of grounding, .*; known are .*style, thinking"
    ):
        Asking({"styles": "qwen2_vl"})
    trimmed = small_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content | upper }}{% endfor %}")
    odd = Processor.__new__(Processor)
    odd.tokenizer = trimmed
    with pytest.raises(InputError, match="the chat template does not keep texts as they are"):
        PromptEncoder(odd, Asking(), Buckets())
    with rl_batches([{"task": "sums"}], processor, 1, Buckets()) as batches:
        with pytest.raises(InputError, match="record 0: task 'sums' is unknown; use one of grounding"):
            next(batches)


def test_sized_sources(tmp_path):
    Image.new("RGB", (100, 70)).save(tmp_path / "a.png")
    record = {**GOOD, "images": [str(tmp_path / "a.png")]}
    source = Sized([record, {**record, "size": [1, 2]}], PIXELS)
    # 100 x 70 shrunk below 56 x 56 pixels, sides in steps of 28
    assert len(source) == 2 and source[0]["size"] == [100, 70] and source[0]["resized"] == [56, 28]
    with pytest.raises(InputError, match="record 1: size: the image is 100 x 70"):
        source[1]


def test_pad_needs_no_picture_to_agree(processor):
    row = PromptEncoder(processor, Asking(), Buckets())([{"messages": [turn("user", "Hi")]}], 0, 0)
    batch = pad(3, [row, row], 1, np.array([2, 3, 64, 0]), (PIXELS.window_patches, PIXELS.patch_pixels))
    assert batch.prompts.vision.patches.shape == (2, 2, 3, PIXELS.window_patches, PIXELS.patch_pixels)
    assert len(batch.records) == 1 and batch.step == 3 and batch.prompts.tokens.shape == (2, 64)


def test_rows_of_several_batches_join_as_if_padded_together():
    """Pictures of several windows, several sizes, and a batch of text alone."""
    tokenizer = small_tokenizer()
    large = Processor(tokenizer, model_of(tokenizer), PixelConfig(min_pixels=28 * 28, max_pixels=400 * 400), VIDEO)
    sizes = [(56, 56), (112, 224), (364, 112), (28, 140)]
    rng = np.random.default_rng(0)
    source = [
        {"id": str(k), "task": "ocr", "text": "x", "images": [rng.integers(0, 255, (*size, 3), np.uint8)]}
        for k, size in enumerate(sizes)
    ]
    source += [{"messages": [{"role": "user", "content": "Hi" * k}]} for k in (1, 90)]
    encode = PromptEncoder(large, Asking(), Buckets())
    rows = [encode(source, k, k) for k in range(len(source))]
    pixels = large.pixel_config
    picture = (pixels.window_patches, pixels.patch_pixels)
    groups = [rows[:2], rows[2:4], rows[4:]]
    measured = [batch_sizes(group, Buckets()) for group in groups]
    parts = [pad(0, group, 2, size, picture).prompts for group, size in zip(groups, measured, strict=True)]
    assert len({part.vision.patches.shape[2] for part in parts[:2]}) == 2 and parts[2].vision is None
    picks = [(1, 0), (2, 1), (0, 1), (1, 1), (0, 0)]
    together = [groups[part][row] for part, row in picks]
    expected = pad(0, together, len(together), np.max(measured, axis=0), picture).prompts
    merge = 4  # patches of a vision token
    assert same(join_prompts(parts, picks, merge), expected)
    # sizes are those of all parts, whatever is picked
    assert join_prompts(parts, picks[4:], merge).tokens.shape[1] == expected.tokens.shape[1]
    texts = join_prompts([parts[2]], [(0, 1), (0, 0)], merge)
    assert texts.vision is None and same(texts, pad(0, [rows[5], rows[4]], 2, measured[2], picture).prompts)
