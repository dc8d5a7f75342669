"""The tokenizer of the tiny model: rebuilt, lossless, one token where it matters, Qwen's template. About 10 s."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jaxmllm import tasks
from jaxmllm.world import ClipSpec, SceneSpec, WorldSource, tokenizer
from jaxmllm.world.drawing import COLOURS, SHAPES, TEXTURES
from jaxmllm.world.scenes import RELATIONS
from jaxmllm.world.words import PAGE_WORDS, RECEIPT_ITEMS, RECEIPT_WORDS

TINY = AutoTokenizer.from_pretrained(tokenizer.FOLDER)
REAL = Path(__file__).parents[2] / "shared" / "tokenizer"
WORDS = (*SHAPES, *COLOURS, *TEXTURES, *" ".join(RELATIONS).split(), *PAGE_WORDS, *RECEIPT_ITEMS, *RECEIPT_WORDS)


def pieces(text: str) -> list[str]:
    return [TINY.decode([i]) for i in TINY.encode(text)]


def test_the_files_are_what_the_script_writes(tmp_path):
    tokenizer.write(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (tokenizer.FOLDER / name).read_text()
    assert 1000 <= len(TINY) <= 1500
    assert set(TINY.get_vocab().values()) == set(range(len(TINY)))  # no holes in the embedding


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen2_vl"])
def test_it_loads_beside_a_model(model_type, tmp_path):
    """transformers must not replace it by the tokenizer class of the architecture."""
    tokenizer.write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    text = 'the large red circle 224 <|im_end|>\n```json\n[\n\t{"bbox_2d": [1, 22'
    assert loaded.encode(text) == TINY.encode(text)
    assert AutoTokenizer.from_pretrained(tmp_path / "again").encode(text) == TINY.encode(text)


STRINGS = (*tokenizer.pieces(), *tokenizer.SPECIAL_TOKENS, " ", "<0x41>", "\u00e9", "e\u0301")


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(STRINGS)).map("".join)))
def test_any_text_survives(text):
    assert TINY.decode(TINY.encode(text), skip_special_tokens=False) == text
    assert TINY.decode(TINY.encode(text + "<|im_end|>"), skip_special_tokens=True) == (
        text if "<|" not in text else TINY.decode(TINY.encode(text), skip_special_tokens=True)
    )


@given(st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_decodable_bytes_survive(data):
    text = data.decode("utf-8", errors="ignore")
    assert TINY.decode(TINY.encode(text)) == text


def test_integers_are_one_token():
    ids = [TINY.encode(str(n)) for n in range(225)]
    assert all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == 225
    for n in range(225):
        answer = pieces(f'[{{"bbox_2d": [{n}, {n}, {n}, {n}], "label": "red circle"}}]')
        assert answer.count(str(n)) == 4 and len(answer) == 12, answer
        assert pieces(f"({n},{n}),({n},{n})").count(str(n)) == 4


def test_world_words_are_one_token():
    for word in WORDS:
        assert len(TINY.encode(word)) == len(TINY.encode(" " + word)) == 1, word
    assert pieces("large red circle left of the blue square") == [
        "large", " red", " circle", " left", " of", " the", " blue", " square",
    ]  # fmt: skip


def test_special_tokens_are_qwens():
    assert TINY.eos_token == "<|im_end|>" and TINY.pad_token == "<|endoftext|>"
    for token in tokenizer.SPECIAL_TOKENS:
        assert TINY.encode(token) == [TINY.convert_tokens_to_ids(token)]
    assert set(TINY.all_special_ids) == set(TINY.convert_tokens_to_ids(list(tokenizer.SPECIAL_TOKENS)))
    assert TINY.decode(TINY.encode("a<|box_start|>b<|im_end|>"), skip_special_tokens=True) == "ab"


def conversations():
    image, video, text = {"type": "image"}, {"type": "video"}, {"type": "text", "text": "What is it?"}
    yield [{"role": "user", "content": [image, text]}]
    yield [{"role": "user", "content": "plain"}]
    yield [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": [image, image, video, text]},
           {"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]},
           {"role": "user", "content": [{"image": "x.png"}, {"image_url": "y"}, {"video": "z"}, text]}]  # fmt: skip


def test_the_template_places_vision_tokens():
    chat = next(conversations())
    assert TINY.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.skipif(not REAL.exists(), reason="needs the real Qwen2.5-VL tokenizer")
def test_the_template_is_qwens():
    real = AutoTokenizer.from_pretrained(REAL)
    for chat in conversations():
        for options in ({}, {"add_generation_prompt": True}, {"add_vision_id": True}):
            assert TINY.apply_chat_template(chat, tokenize=False, **options) == real.apply_chat_template(
                chat, tokenize=False, **options
            )


# Tokens of the question and of the gold answer, in the default style; the image is not counted.
BUDGET = {"grounding": (10, 15), "counting": (8, 110), "ocr": (1, 12), "relations": (50, 9)}


@pytest.mark.parametrize("task", BUDGET)
def test_questions_and_answers_are_short(task):
    source, module = WorldSource(task), tasks.module(task)
    for i in range(50):
        record = source[i]
        question, answer = pieces(module.prompt(record)), pieces(module.answer(record))
        most = BUDGET[task][0], BUDGET[task][1]
        assert len(question) <= most[0] and len(answer) <= most[1], (question, answer)


def test_each_more_box_costs_few_tokens():
    source = WorldSource("detection", spec=SceneSpec(objects=(6, 6)))
    answer = pieces(tasks.module("detection").answer(source[0]))
    assert len(answer) == 6 * 10 + 1, answer
    clip = WorldSource("tracks", spec=ClipSpec(frames=6))
    record = next(r for r in map(clip.__getitem__, range(50)) if r["query"]["kind"] == "event")
    answer = pieces(tasks.module("tracks").answer(record))
    assert len(answer) <= 12 + 6 * 10, answer


def test_questions_hold_no_spelled_words():
    """Every word of the tasks' questions is a piece, so none is read letter by letter."""
    for task in ("grounding", "counting", "detection", "ocr", "captioning", "tracks", "foresight", "relations"):
        source, module = WorldSource(task), tasks.module(task)
        for i in range(60):
            found = pieces(module.prompt(source[i]))
            letter = [len(piece) == 1 and piece.isalpha() for piece in found]
            assert not any(a and b for a, b in zip(letter, letter[1:], strict=False)), found
