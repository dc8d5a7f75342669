"""Conversations as other programs name them: LLaVA and ShareGPT, Alpaca, ms-swift, EasyR1, a table of questions and answers."""

from collections.abc import Mapping
from typing import Any

from jaxmllm.data.formats import shorten
from jaxmllm.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
SAME_ROLE = {  # ShareGPT's, OpenAI's older and LLaMA-Factory's names
    "human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant",
    "developer": "system", "function": "tool", "observation": "tool", "function_call": "assistant",
}  # fmt: skip
QUESTIONS = ("prompt", "query", "problem", "question", "instruction")  # columns, the first that a row has
ANSWERS = ("completion", "response", "output", "answer", "label")
LISTS = ("messages", "conversations", "conversation")


def turns(row: Mapping[str, Any]) -> list[Any]:
    """The row's turns, each {"role", "content", ..}.

    A list of them in `messages` or `conversations` ({"role", "content"}, or {"from", "value"}), or else one column of
    QUESTIONS (a text or turns; with Alpaca's `input` behind it), the earlier [question, answer] pairs of `history` before
    it, and one of ANSWERS behind it. A `system` column comes first.
    Raises KeyError with the columns that were looked for.
    """
    listed = next((name for name in LISTS if row.get(name) is not None), None)
    if listed is not None:
        if not isinstance(row[listed], list) or not row[listed]:
            raise InputError(f"{listed}: expected a list of turns")
        found = [_turn(turn, k, listed) for k, turn in enumerate(row[listed])]
        found += _said(row.get("completion"), "assistant", "completion")
    else:
        found = _question_and_answer(row)
    system = row.get("system")
    if isinstance(system, str) and system and found[0].get("role") != "system":
        found.insert(0, {"role": "system", "content": system})
    return found


def _question_and_answer(row: Mapping[str, Any]) -> list[Any]:
    asked = next((name for name in QUESTIONS if row.get(name) is not None), None)
    if asked is None:
        raise KeyError(" or ".join((*LISTS, *QUESTIONS)))
    question = row[asked]
    if asked == "instruction" and isinstance(row.get("input"), str) and row["input"]:
        question = f"{question}\n{row['input']}"
    found: list[Any] = []
    for k, pair in enumerate(row.get("history") or ()):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(f"history[{k}]: expected a question and an answer, got {shorten(pair)}")
        found += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    found += _said(question, "user", asked)
    if not found or found[-1]["role"] != "assistant":
        answered = next((name for name in ANSWERS if isinstance(row.get(name), str | int | float | list)), None)
        if answered is not None:
            value = row[answered]
            found += _said(value if isinstance(value, str | list) else str(value), "assistant", answered)
    if not found:
        raise InputError(f"{asked}: expected a text or a list of turns, got {shorten(question)}")
    return found


def _said(value: Any, role: str, column: str) -> list[Any]:
    """A column that holds a text or turns."""
    if value is None:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise InputError(f"{column}: expected a text or a list of turns, got {shorten(value)}")
    return [_turn(turn, k, column) for k, turn in enumerate(value)]


def _turn(turn: Any, number: int, column: str) -> dict[str, Any]:
    place = f"{column}[{number}]"
    if not isinstance(turn, Mapping) or not ("role" in turn or "from" in turn):
        raise InputError(f"{place}: expected an object with role and content, or from and value, got {shorten(turn)}")
    given = turn["role"] if "role" in turn else turn["from"]
    role = SAME_ROLE.get(given, given) if isinstance(given, str) else given
    if role not in ROLES:
        raise InputError(f"{place}.role: {given!r} is unknown; use one of {', '.join((*ROLES, *SAME_ROLE))}")
    content = turn["content"] if "content" in turn else turn.get("value")
    rest = {key: value for key, value in turn.items() if key in ("tool_calls",) and value}
    return {"role": role, "content": content, **rest}
