"""Prompts and answers against the processor's own encoding of the whole conversation."""

import collections
import functools

import numpy as np
import pytest

from jaxmllm.data.chat import Buckets, Processor, collate
from jaxmllm.data.examples import AnswerEncoder, Asking, PromptEncoder, encode_texts, sized
from jaxmllm.data.pipeline import rl_batches, sft_batches
from jaxmllm.data.sources import all_records, open_source
from jaxmllm.errors import InputError
from tests.support.conversations import VIDEO, model_of
from tests.test_images import SHARED
from tests.test_pipeline import PIXELS, processor, same, take, turn, world
from tests.test_sources import picture, write

__all__ = ["processor"]  # the fixture


@functools.cache
def real_processor():
    from transformers import AutoTokenizer

    folder = SHARED / "tokenizer"
    if not folder.is_dir():
        pytest.skip("needs the real tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Processor(tokenizer, model_of(tokenizer), PIXELS, VIDEO)


def words(text):
    return {"type": "text", "text": text}


# ---------------------------------------------------------------- what is in a batch

TASKS = ["grounding", "counting", "detection", "captioning", "relations", "ocr", "tracks", "foresight"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("system", [None, "Answer briefly."])
def test_prompts_are_the_processors_own(processor, task, system):
    source, asking = world(task), Asking({"style": "qwen2_vl", "coord_space": "abs"}, system)
    buckets = Buckets(prompt=(64, 256, 1024, 4096))
    with rl_batches(source, processor, 3, buckets, asking=asking, shuffle=False) as batches:
        for batch in take(batches, 2):
            records = [source[int(i)] for i in batch.index]
            sizes = [sized(record, PIXELS) for record in records]
            examples = [processor.encode(asking.conversation(record)) for record in sizes]
            assert same(batch.prompts, collate(examples, buckets))
            assert same(batch.records, sizes)
            for record, example in zip(batch.records, examples, strict=True):
                _, rows, columns = example.vision[0].grid
                assert record["resized"] == [columns * 14, rows * 14] and record["size"] == [112, 112]
    assert batch.completions is None and batch.step == 1 and batch.index.tolist() == [3, 4, 5]


def check_answers(processor, source, asking, batch, questions):
    """Prompt and completion are the whole conversation as the template writes it, cut in two."""
    for row, records in enumerate(batch.records):
        n = batch.prompts.lengths[row]
        for g, record in enumerate(records):
            turns = [*asking.conversation(record), {"role": "assistant", "content": asking.answer(record)}]
            whole = processor.encode(turns, add_generation_prompt=False)
            length = int(batch.completions.lengths[row, g])
            tokens = np.concatenate([batch.prompts.tokens[row, :n], batch.completions.tokens[row, g, :length]])
            assert tokens.tolist() == whole.tokens[: len(tokens)].tolist()
            assert processor.tokenizer.decode(whole.tokens[len(tokens) :]) == "\n"
            after = batch.prompts.next_position[row] + np.arange(length)
            positions = np.concatenate([batch.prompts.positions[row, :, :n], np.tile(after, (3, 1))], axis=1)
            assert (positions == whole.positions[:, : len(tokens)]).all()
            counted = batch.completions.weights[row, g, :length] > 0
            answer = processor.tokenizer.decode(batch.completions.tokens[row, g, :length][counted])
            assert answer == asking.answer(record) + "<|im_end|>" and not counted[: -counted.sum()].any()
        assert not batch.completions.lengths[row, len(records) :].any()
    assert batch.completions.tokens.shape[:2] == (len(batch.records), questions)
    padding = np.arange(batch.completions.tokens.shape[2]) >= batch.completions.lengths[..., None]
    assert not batch.completions.weights[padding].any()


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_the_template_cut_in_two(processor, task):
    source, asking = world(task, questions=2), Asking({"thinking": True}, "Answer briefly.")
    with sft_batches(source, processor, 2, Buckets(), questions=3, asking=asking) as batches:
        for batch in take(batches, 2):
            check_answers(processor, source, asking, batch, 3)
            for index, records in zip(batch.index, batch.records, strict=True):
                known = [record["id"] for record in source.records(int(index))]
                assert [record["id"] for record in records] == known[: len(records)] and records


@pytest.mark.parametrize("style", ["qwen2_vl", "qwen2_5_vl"])
def test_answers_in_the_real_tokenizer(style):
    processor, asking = real_processor(), Asking({"style": style})
    tasks = {"grounding": 1, "counting": 1, "detection": 1, "captioning": 1, "relations": 1}
    source = world(tasks, length=10, questions=4)
    with sft_batches(source, processor, 10, Buckets(), questions=4, asking=asking) as batches:
        check_answers(processor, source, asking, next(batches), 4)


def test_questions_are_drawn_anew_each_time(processor):
    source = world("grounding", length=2, questions=7)
    seen = collections.defaultdict(list)
    with sft_batches(source, processor, 2, Buckets(), questions=3) as batches:
        for batch in take(batches, 12):
            for index, records in zip(batch.index, batch.records, strict=True):
                ids = [record["id"] for record in records]
                assert len(set(ids)) == 3 and ids == sorted(ids)
                seen[int(index)].append(tuple(ids))
    for index in range(2):
        assert set(sum(seen[index], ())) == {record["id"] for record in source.records(index)}
        assert len(set(seen[index])) > 5


def test_weights_of_tokens(processor):
    def weigh(record, tokens):
        return [3.0 if token == tokens[0] else 0.5 for token in tokens]

    with sft_batches(world(), processor, 2, Buckets(), weigh=weigh) as batches:
        batch = next(batches)
    for row in range(2):
        counted = batch.completions.weights[row, 0] > 0
        tokens, weights = batch.completions.tokens[row, 0][counted], batch.completions.weights[row, 0][counted]
        assert weights.tolist() == [3.0 if token == tokens[0] else 0.5 for token in tokens]
    with sft_batches(world(), processor, 2, Buckets(), weigh=lambda record, tokens: [1.0]) as batches:
        with pytest.raises(InputError, match="weigh: 1 weights for an answer of [0-9]+ tokens"):
            next(batches)


@pytest.mark.parametrize("real", [False, True])
def test_chats(processor, tmp_path, real):
    processor = real_processor() if real else processor
    image = {"type": "image", "image": str(picture(tmp_path / "a.png"))}
    rows = [
        {"messages": [turn("user", image, words("What?")), turn("assistant", "A dog.")]},
        {"messages": [turn("system", "Be kind."), turn("user", image, words("What?")), turn("assistant", "A dog."),
                      turn("user", "Sure?"), turn("assistant", words("Yes,"), words(" I am."))]},
        {"messages": [turn("user", image), turn("assistant", "One."), turn("user", words("And"), image, words("?")),
                      turn("assistant", "Two."), turn("user", "So?"), turn("assistant", "Three."), turn("user", "Left over")]},
        {"messages": [turn("user", "Hello"), turn("assistant", "Hi"), turn("user", "Bye"), turn("assistant", "Bye")]},
    ]  # fmt: skip
    # the third has pictures in two turns: a row for the answers behind each of them
    parts = [(rows[0], 2), (rows[1], 5), (rows[2], 2), (rows[2], 6), (rows[3], 4)]
    learned = [["A dog."], ["A dog.", "Yes, I am."], ["One."], ["Two.", "Three."], ["Hi", "Bye"]]
    source = open_source(f"chat:{write(tmp_path / 'x.jsonl', rows)}")
    with sft_batches(source, processor, 1, Buckets(), shuffle=False) as batches:
        for (row, stop), answers, batch in zip(parts, learned, batches, strict=True):
            whole = processor.encode(row["messages"][:stop], add_generation_prompt=False)
            n, length = int(batch.prompts.lengths[0]), int(batch.completions.lengths[0, 0])
            tokens = np.concatenate([batch.prompts.tokens[0, :n], batch.completions.tokens[0, 0, :length]])
            assert tokens.tolist() == whole.tokens[: len(tokens)].tolist()
            assert processor.tokenizer.decode(whole.tokens[len(tokens) :]) == "\n"
            counted = batch.completions.weights[0, 0, :length] > 0
            assert "".join(processor.tokenizer.decode(tokens[n:][counted])) == "".join(
                a + "<|im_end|>" for a in answers
            )
            assert batch.prompts.tokens[0, n - 1] == processor.tokenizer("assistant\n")["input_ids"][-1]
    asking = Asking(system="From outside.")
    with rl_batches(source, processor, 4, Buckets(), shuffle=False, asking=asking) as batches:
        batch = next(batches)
        ends = [row["messages"][: 5 if k == 2 else -1] for k, row in enumerate(rows)]
        ends[2] = rows[2]["messages"]
        for k, messages in enumerate(ends):
            if messages[0]["role"] != "system":
                messages = [turn("system", "From outside."), *messages]
            tokens = processor.encode(messages).tokens
            assert batch.prompts.tokens[k, : batch.prompts.lengths[k]].tolist() == tokens.tolist()
        assert [record.get("size") for record in batch.records] == [[60, 40]] * 3 + [None]


def test_chats_about_one_picture_share_it(processor, tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    image = {"type": "image", "image": str(tmp_path / "a.png")}
    pairs = [[turn("user", image, words(f"What {k}?")), turn("assistant", f"A dog {k}.")] for k in range(3)]
    other = [turn("system", "Be kind."), turn("user", image, words("Else?")), turn("assistant", "Yes.")]
    longer = [turn("user", {"type": "image", "image": str(tmp_path / "b.png")}, words("And?")), turn("assistant", "One."),
              turn("user", "More?"), turn("assistant", "Two.")]  # fmt: skip
    rows = [{"messages": messages, "id": k} for k, messages in enumerate([*pairs, other, longer, longer])]
    source = open_source(f"chat:{write(tmp_path / 'x.jsonl', rows)}?group=1")
    assert len(source) == 2
    with sft_batches(source, processor, 1, Buckets(), questions=4, shuffle=False) as batches:
        shared, alone = next(batches), next(batches)
    check_answers(processor, source, Asking(), shared, 4)
    assert [record["id"] for record in shared.records[0]] == ["0", "1", "2"]  # the fourth has a system turn
    assert len(alone.records[0]) == 1 and alone.records[0][0]["id"] in ("4", "5")
    assert (alone.completions.lengths[0] > 0).tolist() == [True, False, False, False]


def test_videos(processor, tmp_path):
    for k in range(4):
        picture(tmp_path / "clip" / f"{k}.png", 56, 56)
    row = {"prompt": "What moves?", "videos": ["clip"], "completion": "Nothing."}
    source = open_source(f"chat:{write(tmp_path / 'x.jsonl', [row])}")
    with sft_batches(source, processor, 1, Buckets()) as batches:
        batch = next(batches)
    assert batch.prompts.vision.patches.shape[1] == 2 and batch.records[0][0]["resized"] == [56, 56]
    own = {"task": "captioning", "videos": [str(tmp_path / "clip")], "caption": "Nothing.", "id": "0", "objects": []}
    for encoder in (
        PromptEncoder(processor, Asking(), Buckets()),
        AnswerEncoder(processor, Asking(), Buckets(), 1, 0, None),
    ):
        row = encoder([own], 0, 0)
        whole = processor.encode(Asking().conversation(own)).tokens
        tokens = [*row.example.tokens, *(row.completions or [[]])[0]][: len(whole)]
        assert [*tokens] == whole.tolist() and row.records[0]["resized"] == [56, 56]


def test_given_answers_to_score(processor):
    texts = [["A dog.", "No"], ["", "Two words"]]
    completions = encode_texts(processor, texts, Buckets())
    for b in range(2):
        for g in range(2):
            n = int(completions.lengths[b, g])
            assert processor.tokenizer.decode(completions.tokens[b, g, :n]) == texts[b][g] + "<|im_end|>"
            assert completions.weights[b, g].tolist() == [1.0] * n + [0.0] * (completions.weights.shape[2] - n)


# ---------------------------------------------------------------- real photographs


@pytest.mark.parametrize(
    ("spec", "questions"),
    [("coco:bccd/train.json?task=detection,counting,grounding&group=1", 4), ("pages:sroie/pages.jsonl", 1),
     ("coco:coco128/instances.json?task=counting,detection&max_objects=10", 1)],
)  # fmt: skip
def test_real_photographs(processor, spec, questions):
    kind, _, path = spec.partition(":")
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the shared data")
    source = open_source(f"{kind}:{SHARED / 'data' / path}")
    asking = Asking({"style": "qwen2_5_vl"})
    with sft_batches(source, processor, 4, Buckets(), questions=questions, asking=asking) as batches:
        batch = next(batches)
        check_answers(processor, source, asking, batch, questions)
        for index, records in zip(batch.index, batch.records, strict=True):
            ids = [record["id"] for record in all_records(source, int(index))]
            assert {record["id"] for record in records} <= set(ids)
