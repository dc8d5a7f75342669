"""Dialogues of answers and feedback about one image: as chat messages, and as rows of a visual reflection data set.

    user:      <image> question
    assistant: answer 1
    user:      feedback 1
    assistant: answer 2 ...

A turn is {"response", "reward" or "score", "feedback"}; the images stand in the first user turn only. Source: sheet
reper.md sections 2 and 3.4.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmllm.data.formats import Record, choose, media, numbers, shorten, text
from jaxmllm.errors import InputError

Conversation = list[dict[str, Any]]
Turn = dict[str, Any]
MAX_TURNS = 3  # answers of a training dialogue
REWARDED_BY = ("vlm", "rule")  # a judge's 0..10 with reasons, or a rule's 0..1


def say(role: str, words: str, images: Iterable[Any] = ()) -> dict[str, Any]:
    """One message: images, then the text."""
    return {"role": role, "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": words}]}


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
