"""Dialogues of answers and feedback about one image: as chat messages, and as rows of a visual reflection data set.

    user:      <image> question
    assistant: answer 1
    user:      feedback 1
    assistant: answer 2 ...

A turn is {"response", "reward" or "score", "feedback"}; the images stand in the first user turn only. Source: sheet
reper.md sections 2 and 3.4.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmllm.data import conversations, records
from jaxmllm.data.formats import Record, RowSource, choose, media, numbers, shorten, text
from jaxmllm.data.images import load_image
from jaxmllm.data.rows import Rows
from jaxmllm.errors import InputError
from jaxmllm.runfiles import JsonLines

Conversation = list[dict[str, Any]]
Turn = dict[str, Any]
MAX_TURNS = 3  # answers of a training dialogue
REWARDED_BY = {"vlm": 10.0, "rule": 1.0}  # and the largest reward: a judge's 0..10 with reasons, or a rule's 0..1


def say(role: str, words: str, images: Iterable[Any] = ()) -> dict[str, Any]:
    """One message: images, then the text."""
    return {
        "role": role,
        "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": words}],
    }


def pictures(record: Mapping[str, Any]) -> list[Any]:
    """The record's `images`, or its one `image`."""
    return list(record["images"]) if "images" in record else [record["image"]]


def conversation(
    record: Mapping[str, Any], question: str, turns: Sequence[Turn] = (), system: str | None = None
) -> Conversation:
    """The question and the turns so far as chat messages; a turn without feedback ends on the answer."""
    messages = [say("system", system)] if system else []
    messages.append(say("user", question, pictures(record)))
    for turn in turns:
        messages.append(say("assistant", turn["response"]))
        if turn.get("feedback"):
            messages.append(say("user", turn["feedback"]))
    return messages


def reflection(row: Mapping[str, Any], root: Path) -> Record:
    """A row of a visual reflection data set: `image`, `question`, `source` (vlm or rule) and 1 to 3 `turns`, worst first.

    A turn has `response`, `reward` (0..10 of a vlm, 0..1 of a rule) and, but for the last, `feedback`. The record is a
    chat that keeps `turns` and `source`.
    """
    turns, question = row["turns"], text(row, "question")
    source = choose(row["source"], REWARDED_BY, "source")
    if not isinstance(turns, list) or not 1 <= len(turns) <= MAX_TURNS:
        raise InputError(f"turns: expected a list of 1 to {MAX_TURNS} answers, got {shorten(turns)}")
    found = []
    for k, turn in enumerate(turns):
        (reward,) = numbers([turn["reward"]], 1, f"turns[{k}].reward")
        last = k == len(turns) - 1
        if reward < 0:
            raise InputError(f"turns[{k}].reward: {reward} is below 0")
        if bool(turn.get("feedback")) == last:
            raise InputError(f"turns[{k}].feedback: every answer but the last has feedback, the last has none")
        said = None if last else text(turn, "feedback")
        found.append({"response": text(turn, "response"), "reward": reward, "feedback": said})
    image = media(row["image"], root)
    messages = conversation({"image": image}, question, found)
    return {"images": [image], "messages": messages, "turns": found, "source": source}


def write_dialogues(folder: Path, dialogues: Sequence[Mapping[str, Any]]) -> None:
    """Writes `folder/dialogues.jsonl`; images that are no files go to `folder/images`, once each."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for dialogue in dialogues:
        image = dialogue["image"]
        if isinstance(image, str | Path):
            path = str(Path(image).absolute())
        else:
            picture = load_image(image, str(dialogue["id"]))
            path = f"images/{hashlib.sha256(picture.tobytes()).hexdigest()[:16]}.png"
            picture.save(folder / path)
        rows.append({**dialogue, "image": path})
    with JsonLines(folder / "dialogues.jsonl") as file:
        file.append(rows)


def preference(row: Mapping[str, Any], root: Path) -> Record:
    """Ranked answers to one question: TRL's `prompt`, `chosen`, `rejected` with `images`; or a row of `reflection`.

    Of the latter all answers, without what was said between them. The record is a chat that ends with the best answer and
    keeps `answers`, texts with their rewards (0..1), the best one first.
    """
    if "turns" in row:
        record = reflection(row, root)
        ranked = sorted(record["turns"], key=lambda turn: -turn["reward"])
        answers = [(turn["response"], turn["reward"] / REWARDED_BY[record["source"]]) for turn in ranked]
        asked = record["messages"][:1]
    else:
        left_out = ("chosen", "rejected", *conversations.ANSWERS)
        record = records.chat({key: value for key, value in row.items() if key not in left_out}, root)
        answers = [(_answer(row, "chosen"), 1.0), (_answer(row, "rejected"), 0.0)]
        asked = record["messages"]
    if answers[0][1] <= answers[-1][1]:
        raise InputError("turns: the answers have equal rewards, so none is preferred")
    return {"images": record["images"], "messages": [*asked, say("assistant", answers[0][0])], "answers": answers}


def _answer(row: Mapping[str, Any], field: str) -> str:
    """A column that holds a text, or the one message of the assistant."""
    value = row[field]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content")
    return text({field: value}, field)


class Preferences(RowSource):
    """Rows of `preference`; `records` gives the best and the worst answer, or `every` one, as chats with their `reward`."""

    def __init__(self, rows: Rows | Sequence[Record], path: Path, root: Path, every: bool = False):
        super().__init__(rows, preference, path, root)
        self.every = every
        self.kept: Sequence[int] = range(len(rows))
        if "turns" in rows[0]:  # a third of a reflection data set has one answer only
            self.kept = [k for k in self.kept if len({turn.get("reward") for turn in rows[k].get("turns", ())}) > 1]

    def __len__(self) -> int:
        return len(self.kept)

    def where(self, index: int) -> str:
        return super().where(self.kept[index])

    def _record(self, index: int) -> Record:
        return super()._record(self.kept[index])

    def records(self, index: int) -> list[Record]:
        record = self[index]
        asked, ranked = record["messages"][:-1], record["answers"]
        given = ranked if self.every else (ranked[0], ranked[-1])
        return [{**record, "messages": [*asked, say("assistant", said)], "reward": r} for said, r in given]
