"""A record, or several about one image, as a prompt and the completions to learn."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxmllm import tasks
from jaxmllm.data.annotations import upright
from jaxmllm.data.chat import Buckets, Example, Message, Processor, collate_completions
from jaxmllm.data.formats import Record, Source
from jaxmllm.data.images import PixelConfig, image_frames, resized_size
from jaxmllm.data.parts import checked_text
from jaxmllm.data.sources import RecordSource, all_records, where
from jaxmllm.data.turns import has_pictures
from jaxmllm.errors import InputError
from jaxmllm.tasks.chat import Chat, last_turn
from jaxmllm.tasks.task import Task, pictures
from jaxmllm.types import Completions

KEPT_PREFIXES = 256  # combinations of image sizes
Weigh = Callable[[Record, Sequence[int]], Sequence[float]]  # record, tokens of its answer -> a weight for each
_QUESTION, _ANSWER = "\x02question\x03", "\x02answer\x03"  # stand-ins that no template contains


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One row of a batch, unpadded."""

    index: int  # in the source
    records: list[Record]  # one, or one for each completion
    example: Example
    completions: list[list[int]] = dataclasses.field(default_factory=list)
    weights: list[list[float]] = dataclasses.field(default_factory=list)

    @property
    def sizes(self) -> Int[np.ndarray, "4"]:
        """Frames, windows of a frame, prompt tokens, completion tokens."""
        pictures = self.example.vision
        frames = sum(picture.grid[0] for picture in pictures)
        windows = max((picture.patches.shape[1] for picture in pictures), default=0)
        return np.array([frames, windows, len(self.example.tokens), max(map(len, self.completions), default=0)])


@dataclasses.dataclass(frozen=True)
class Asking:
    """How records become questions and gold answers.

    `options` are options of the tasks (style, thinking, wording, form, ..); each task takes those that it has. `system` is the
    system turn; None: the template's own.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    system: str | None = None

    def __post_init__(self):
        tasks.check_options(self.options)

    def task(self, record: Mapping[str, Any]) -> Task:
        """The record's task with these options."""
        return tasks.of(record, self.options)

    def parts(self, record: Record) -> list[dict[str, Any]]:
        """The user's message about a record of a task: its pictures and then the question, or as the task places them."""
        return self.task(record).content(record)

    def answer(self, record: Record) -> str:
        """The gold completion, without the end of the turn: of a chat its last turn."""
        return last_turn(record["messages"]) if "messages" in record else self.task(record).gold(record)

    def opening(self) -> list[Message]:
        """The system turn, if there is one."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def conversation(self, record: Record) -> list[Message]:
        """What the model is asked: a chat up to its last answer, or the record's pictures and then the question."""
        if "messages" not in record:
            return [*self.opening(), {"role": "user", "content": self.parts(record)}]
        messages: list[Message] = list(record["messages"])
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise InputError("messages: there is nothing to answer")
        return self.with_opening(messages)

    def title(self, record: Record) -> str:
        """What a record asks, in few words: what to find or count, or the last question of a chat."""
        if "messages" in record:
            return Chat().title(record)
        return self.task(record).title(record)

    def with_opening(self, messages: Sequence[Message]) -> list[Message]:
        """A chat with the system turn, unless it has its own."""
        return list(messages) if messages[0]["role"] == "system" else [*self.opening(), *messages]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


# ---------------------------------------------------------------- what the model sees


def sized(record: Record, pixels: PixelConfig) -> Record:
    """A copy with `size` and, of a record with images, `resized`: what rewards and metrics need to read boxes.

    Raises InputError where the image has another size than its annotations say, or they lie outside of it.
    """
    part = next((part for part in _parts(record) if part["type"] == "image"), None)
    if part is None:
        return dict(record)
    found = upright(record)
    width, height = found["size"]
    return {**found, "resized": list(resized_size(height, width, pixels, part)[::-1])}


class Sized(Source):
    """A source whose records went through `sized`, for evaluation without batches."""

    def __init__(self, source: RecordSource, pixels: PixelConfig):
        self.source, self.pixels, self.name = source, pixels, getattr(source, "name", "data")

    def __len__(self) -> int:
        return len(self.source)

    def where(self, index: int) -> str:
        return where(self.source, index)

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        try:
            return sized(record, self.pixels)
        except InputError as error:
            raise InputError(f"{self.where(index)}: {error}") from None


def _parts(record: Record) -> list[dict[str, Any]]:
    if "messages" not in record:
        return pictures(record)
    return [p for m in record["messages"] if not isinstance(m["content"], str) for p in m["content"]]


def cut(example: Example, length: int) -> Example:
    """The first `length` tokens, which must hold all pictures. `text` is left whole."""
    positions = example.positions[:, :length]
    return dataclasses.replace(
        example,
        tokens=example.tokens[:length],
        positions=positions,
        next_position=int(positions.max()) + 1,
        frame_of=example.frame_of[:length],
        token_of=example.token_of[:length],
    )


def extend(example: Example, ids: Sequence[int]) -> Example:
    """The example with more tokens of text at its end; `text` is left as it is."""
    n, start = len(ids), example.next_position
    line = np.broadcast_to(np.arange(start, start + n, dtype=np.int32), (3, n))
    nothing = np.full(n, -1, np.int32)
    return dataclasses.replace(
        example,
        tokens=np.concatenate([example.tokens, np.array(ids, np.int32)]),
        positions=np.concatenate([example.positions, line], axis=1),
        next_position=start + n,
        frame_of=np.concatenate([example.frame_of, nothing]),
        token_of=np.concatenate([example.token_of, nothing]),
    )


# ---------------------------------------------------------------- encoders


class Encoder:
    """What prompts and answers have in common: (source, index, place in the order) -> Encoded."""

    def __init__(self, processor: Processor, asking: Asking, buckets: Buckets):
        self.processor, self.asking, self.buckets = processor, asking, buckets
        self._prefixes: dict[tuple, Example] = {}
        # what the template writes between question and answer, and after the answer
        turns: list[Message] = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        text = self.render(turns)
        if text.count(_QUESTION) != 1 or text.count(_ANSWER) != 1:
            raise InputError("the chat template does not keep texts as they are")
        self.between, end = text.partition(_QUESTION)[2].split(_ANSWER)
        self.end = end.rstrip()

    def __getstate__(self):
        return self.__dict__ | {"_prefixes": {}}

    def split(self, record: Record) -> tuple[list[Message], list[dict[str, Any]], str]:
        """The turns before a record's one question, its parts up to the last picture, and the text after that."""
        opening, parts = self.asking.opening(), record.get("messages")
        if parts is None:
            parts = self.asking.parts(record)
        else:
            *opening, message, _ = self.asking.with_opening(parts)
            parts = message["content"] if not isinstance(message["content"], str) else [_text(message["content"])]
        end = 1 + max((k for k, part in enumerate(parts) if part["type"] != "text"), default=-1)
        return opening, parts[:end], checked_text("".join(part["text"] for part in parts[end:]))

    def prefix(self, opening: list[Message], parts: list[dict[str, Any]]) -> Example:
        """The prompt up to its last picture; without one, up to where the question begins.

        With images its tokens depend on the sizes and the texts alone, so they are kept.
        """
        key, frames = None, []
        if parts and all(part["type"] != "video" for part in parts):
            images = [part for part in parts if part["type"] == "image"]
            pixels = self.processor.pixel_config
            frames = [image_frames(part["image"], pixels, f"image {k}", part) for k, part in enumerate(images)]
            key = (repr(opening), *(picture.grid for picture in frames), *_texts(parts))
            if key in self._prefixes:
                return dataclasses.replace(self._prefixes[key], vision=frames)
        question = {"role": "user", "content": [*parts, _text(_QUESTION)]}
        example = self.processor.encode([*opening, question], add_generation_prompt=False)
        if not parts:
            return cut(example, len(self.ids([example.text.partition(_QUESTION)[0]])[0]))
        ends = np.flatnonzero(example.tokens == self.processor.model_config.vision_end_token_id)
        example = cut(example, int(ends[-1]) + 1)
        if key is not None:
            if len(self._prefixes) >= KEPT_PREFIXES:
                self._prefixes.clear()
            self._prefixes[key] = dataclasses.replace(example, vision=[])
        return example

    def seen(self, record: Record, example: Example) -> Record:
        """The record with `resized` where it has videos only."""
        if "resized" in record or not example.vision:
            return record
        _, rows, columns = example.vision[0].grid
        return {**record, "resized": [n * self.processor.pixel_config.patch_size for n in (columns, rows)]}

    def checked(self, row: Encoded) -> Encoded:
        """The row, if it fits the limit of prompts and the largest buckets."""
        length, limit = len(row.example.tokens), self.processor.max_prompt_length
        if length > limit:
            seen = sum(picture.tokens for picture in row.example.vision)
            raise InputError(
                f"the prompt has {length} tokens, {seen} of them vision, and max_prompt_length is {limit}: "
                "lower max_pixels, or raise the limit"
            )
        for field, size in zip(dataclasses.fields(self.buckets), row.sizes.tolist(), strict=True):
            self.buckets.fit(field.name, size)
        return row

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts, which went through `checked_text` before the template's own tokens were put around them."""
        return self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        return self.processor.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )


class PromptEncoder(Encoder):
    """One record, one prompt: what is sampled from. The same as `processor.encode(asking.conversation(record))`."""

    def __call__(self, source: RecordSource, index: int, place: int) -> Encoded:
        record = sized(source[index], self.processor.pixel_config)
        if "messages" in record or not pictures(record):
            example = self.processor.encode(self.asking.conversation(record))
        else:
            opening, parts, question = self.split(record)
            example = extend(self.prefix(opening, parts), self.ids([question + self.between])[0])
        return self.checked(Encoded(index, [self.seen(record, example)], example))


class AnswerEncoder(Encoder):
    """Gold answers to learn, as G completions of one prompt.

    Records of tasks, and several chats of one question that share their pictures: the prompt ends with the last picture,
    so that it is the same for all, and a completion is the question, the turn of the assistant and its answer. (Records
    whose prompt differs from the first one's, by a system turn or by texts between pictures, are left out.)

        prompt      <|im_start|>system ..<|im_end|> <|im_start|>user <|vision_start|> .. <|vision_end|>
        completion  Output the .. <|im_end|> <|im_start|>assistant [{"bbox_2d": ..}]<|im_end|>
        weights     0 0 0 0                                        1 1 1 1 1 1 1 1 1 1

    Other chats, one at a time: the prompt ends where the first answer after the last picture begins, the completion is
    the rest. What the assistant said before the last picture is context here; `turns.all_turns` gives it a row of its own.
    `mask_history`: of a chat the last answer alone has weight. Answers are tokenised apart from what precedes them, as they
    are sampled.
    """

    def __init__(
        self,
        processor: Processor,
        asking: Asking,
        buckets: Buckets,
        questions: int,
        seed: int,
        weigh: Weigh | None,
        mask_history: bool = False,
    ):
        super().__init__(processor, asking, buckets)
        self.mask_history = mask_history
        self.questions, self.seed, self.weigh = questions, seed, weigh

    def __call__(self, source: RecordSource, index: int, place: int) -> Encoded:
        records, draw = all_records(source, index), np.random.default_rng([self.seed, place])
        pixels = self.processor.pixel_config
        if "messages" in records[0] and not (len(records) > 1 and all(map(_is_pair, records))):
            return self._chat(index, sized(records[int(draw.integers(len(records)))], pixels))
        if len(records) > self.questions:
            records = [records[i] for i in sorted(draw.permutation(len(records))[: self.questions])]
        return self._shared(index, [sized(record, pixels) for record in records])

    def _shared(self, index: int, records: list[Record]) -> Encoded:
        asked = [self.split(record) for record in records]
        first, parts, _ = asked[0]
        prefix = self.prefix(first, parts)
        same = [k for k, (opening, own, _) in enumerate(asked) if opening == first and _frame(own) == _frame(parts)]
        records = [self.seen(records[k], prefix) for k in same]
        questions = [asked[k][2] + self.between for k in same]
        answers = [checked_text(self.asking.answer(record)) + self.end for record in records]
        ids = self.ids(questions + answers)
        pairs = list(zip(ids[: len(records)], ids[len(records) :], strict=True))
        weights = [[0.0] * len(q) + self._weights(record, a) for record, (q, a) in zip(records, pairs, strict=True)]
        return self._filled(index, records, prefix, [question + answer for question, answer in pairs], weights)

    def _filled(self, index: int, records: list[Record], example: Example, tokens: list, weights: list) -> Encoded:
        """With empty completions up to G."""
        rest: list[list] = [[]] * (self.questions - len(tokens))
        return self.checked(Encoded(index, records, example, tokens + rest, weights + rest))

    def _chat(self, index: int, record: Record) -> Encoded:
        messages = self.asking.with_opening(record["messages"])
        last = max((k for k, m in enumerate(messages) if has_pictures(m)), default=-1)
        answers = [k for k, m in enumerate(messages) if m["role"] == "assistant" and k > last]
        answers = answers[-1:] if self.mask_history else answers
        if not answers or answers[0] == 0:
            raise InputError("messages: there is no answer of the assistant after the last picture; nothing to learn")
        example = self.processor.encode(messages[: answers[0]])
        plain = [_without_pictures(message) for message in messages]
        for k, message in enumerate(plain):
            _check_texts(message, f"messages[{k}]")
        whole, at = self.render(plain[: answers[-1] + 1]).rstrip(), len(example.text)
        pieces = []
        for k in answers:
            head = self.render(plain[:k], add_generation_prompt=True)
            turn = self.render(plain[: k + 1]).rstrip()
            if not (whole.startswith(turn) and turn.startswith(head) and len(head) >= at):
                raise InputError("the chat template rewrites earlier turns; such a chat cannot be learned in one piece")
            pieces += [whole[at : len(head)], whole[len(head) : len(turn)]]
            at = len(turn)
        ids = self.ids(pieces)
        weights = [self._weights(record, piece) if k % 2 else [0.0] * len(piece) for k, piece in enumerate(ids)]
        return self._filled(index, [self.seen(record, example)], example, [sum(ids, [])], [sum(weights, [])])

    def _weights(self, record: Record, answer: list[int]) -> list[float]:
        if self.weigh is None:
            return [1.0] * len(answer)
        weights = [float(weight) for weight in self.weigh(record, answer)]
        if len(weights) != len(answer):
            raise InputError(f"weigh: {len(weights)} weights for an answer of {len(answer)} tokens")
        return weights


def _is_pair(record: Record) -> bool:
    """Whether a record is one question with its answer."""
    roles = [message["role"] for message in record.get("messages", ())]
    return "messages" not in record or roles[-2:] == ["user", "assistant"] and set(roles[:-2]) <= {"system"}


def _texts(parts: list[dict[str, Any]]) -> list[str | None]:
    return [part.get("text") for part in parts]


def _frame(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What else than the pictures themselves decides the prompt: texts, kinds and limits of size, in their order."""
    return [{key: value for key, value in part.items() if key not in ("image", "video")} for part in parts]


def _check_texts(message: Message, place: str) -> None:
    content = message["content"]
    for text in [content] if isinstance(content, str) else _texts(content):
        checked_text(text or "", place)


def _without_pictures(message: Message) -> Message:
    if isinstance(message["content"], str):
        return message
    parts = [part if part["type"] == "text" else {"type": part["type"]} for part in message["content"]]
    return {**message, "content": parts}


def encode_texts(
    processor: Processor, texts: Sequence[Sequence[str]], buckets: Buckets, end: str = "<|im_end|>"
) -> Completions:
    """Given answers [B][G] as completions to score after prompts; `end` is what the model writes after an answer."""
    flat = [text + end for group in texts for text in group]
    ids = iter(processor.tokenizer(flat, add_special_tokens=False)["input_ids"])
    return collate_completions([[next(ids) for _ in group] for group in texts], buckets)
