"""Conversations: a record is `messages`, as Hugging Face writes them, and its last turn is the right answer.

Figures compare texts: `exact_match` of short answers, edit distance and words in common. A run's own rewards stand before
them. Without `messages`, `text` is what a completion is compared with.
"""

import unicodedata
from dataclasses import dataclass
from typing import Any

from jaxmllm.tasks import answers, ocr
from jaxmllm.tasks.task import Record, Reward, Row, Shown, Task

SHORT = 8  # words of an answer that is compared as a whole


def last_turn(messages: Any) -> str:
    """The text of the last turn, where the assistant speaks it; "" where there is nothing to compare with."""
    if not messages or messages[-1]["role"] != "assistant":
        return ""
    content = messages[-1]["content"]
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content if part.get("type") == "text")


def same_answer(text: str, gold: str) -> bool:
    """Whether two short answers are the same but for case, blanks, full width and punctuation at the ends; numbers by value."""
    first, second = _flat(text), _flat(gold)
    if first == second:
        return True
    values = answers.number_list(first), answers.number_list(second)
    return values[0] is not None and len(values[0]) == 1 and values[0] == values[1]


def _flat(text: str) -> str:
    whole = " ".join(unicodedata.normalize("NFKC", answers.clean(text)).casefold().split())
    letters = [place for place, sign in enumerate(whole) if sign.isalnum()]
    if not letters:
        return whole
    start, end = letters[0], letters[-1] + 1
    return whole[start - (start > 0 and whole[start - 1] in "-+.") : end]  # -3 is not 3


@dataclass(frozen=True)
class Chat(Task):
    """The last turn of a conversation."""

    thinking: bool = False

    figures = {"exact_match": "higher", "edit_distance": "lower", "f1": "higher", "words": "neutral"}
    primary = ("exact_match", "edit_distance")

    def content(self, record: Record) -> list[dict[str, Any]]:
        content = self._asked(record)[-1]["content"]
        return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)

    def prompt(self, record: Record) -> str:
        return "".join(part["text"] for part in self.content(record) if part["type"] == "text")

    @staticmethod
    def _asked(record: Record) -> list[Any]:
        messages = list(record["messages"])
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages

    def gold(self, record: Record) -> str:
        """The last turn; `text`, or TRL's `solution`, where the conversation ends with a question."""
        said = last_turn(record.get("messages"))
        return said or str(record.get("text") or record.get("solution") or "")

    def reward(self, text: str, record: Record) -> Reward:
        """1 for the right short answer, else 0; None where the right answer is long, or there is none."""
        gold = self.gold(record)
        if not gold or len(gold.split()) > SHORT:
            return None
        return float(same_answer(answers.content(text, self.thinking) or "", gold))

    def row(self, text: str, record: Record) -> Row:
        """`exact_match` of answers of up to 8 words (`same_answer`); `edit_distance`, `f1` of words as of a page; `words`."""
        body, gold = answers.content(text, self.thinking) or "", self.gold(record)
        row = {"words": float(len(body.split()))}
        if not gold:
            return row
        page = ocr.page_metrics(body, gold)
        exact = self.reward(text, record)
        first = {} if exact is None else {"exact_match": float(exact)}  # type: ignore[arg-type]
        return {**first, "edit_distance": float(page["edit_distance"] or 0), "f1": float(page["f1"] or 0), **row}

    def title(self, record: Record) -> str:
        return self.prompt(record)

    def predicted(self, text: str, record: Record) -> Shown:
        return {"text": answers.content(text, self.thinking) or ""}

    def target(self, record: Record) -> Shown:
        return {"text": self.gold(record)}


PARSERS = {"same answer": lambda text: same_answer(text, "a cup"), "number": lambda text: same_answer(text, "12")}
