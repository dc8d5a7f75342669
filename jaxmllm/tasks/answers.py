"""Reading and writing answers: end tokens, thinking blocks, box tokens and box JSON, shared by the tasks.

Model output is data. Nothing here evaluates it: numbers are matched by patterns, JSON is read by the strict standard
reader without NaN or Infinity. Every reader takes linear time, never raises, and looks at the first `MAX_CHARS`
characters only (a 2,048-token answer has about 8,000), which also bounds the work of a reward.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from jaxmllm.geometry import Boxes

MAX_CHARS = 65_536
END, PAD = "<|im_end|>", "<|endoftext|>"
REF_START, REF_END = "<|object_ref_start|>", "<|object_ref_end|>"
BOX_START, BOX_END = "<|box_start|>", "<|box_end|>"

SYSTEM = "You are a helpful assistant. "  # training; evaluation sends no system turn [perception_r1.md section 2]
THINKING_SYSTEM = (
    "You answer questions about images. Reason first, then answer: put the reasoning between <think> and </think> and "
    "the final answer between <answer> and </answer>, like this: <think> reasoning </think><answer> answer </answer>"
)
THINKING_SUFFIX = (
    " Output the thinking process in <think> </think> and final answer (number) in <answer> </answer> tags."
)
JSON_REQUEST = " Report the bbox coordinates in JSON format."


@dataclass(frozen=True)
class Style:
    """How a backbone writes boxes."""

    frame: str  # coordinate frame of the numbers, see geometry.FRAMES
    json: bool  # a JSON list; otherwise box tokens, so that completions must be decoded with special tokens kept
    words: str  # what a person calls it


STYLES = {
    # <|object_ref_start|>label<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>
    "qwen2_vl": Style("norm1000", False, "box tokens in 0-1000 of the image"),
    # ```json\n[{"bbox_2d": [x1, y1, x2, y2], "label": "label"}]\n```
    "qwen2_5_vl": Style("resized", True, "JSON in pixels of the resized image"),
    "qwen3_vl": Style("norm1000", True, "JSON in 0-1000 of the image"),
}
RULES = ("released", "corrected")
MATCHING = ("hungarian", "order")
StyleName = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
Rules = Literal["released", "corrected"]
Matching = Literal["hungarian", "order"]


def choose(value: str, known: Iterable[str], option: str) -> str:
    """`value` if it is one of `known`; else a ValueError that names the option and the choices."""
    if value not in known:
        raise ValueError(f"{option}={value!r} is unknown; use one of {', '.join(map(repr, known))}")
    return value


def clean(text: str) -> str:
    """The text cut to MAX_CHARS, without padding tokens, without outer blanks and one closing end token."""
    return text[:MAX_CHARS].replace(PAD, "").strip().removesuffix(END).strip()


# --- thinking -------------------------------------------------------------------------------------------------------


def thinking_format(text: str, rules: str = "corrected") -> bool:
    """Whether the whole text is `<think>..</think><answer>..</answer>`.

    released: nothing between, before or after the blocks, and no newline inside (the published pattern's dot does not
    match it). corrected: newlines and outer blanks are allowed, each tag must occur exactly once.
    """
    if choose(rules, RULES, "rules") == "released":
        if len(text) > MAX_CHARS:
            return False
        text = text.removesuffix("\n")  # the pattern's $ also matches before one last newline
        head, join, tail = "<think>", "</think><answer>", "</answer>"
        inner = text.find(join, len(head), len(text) - len(tail))
        return text.startswith(head) and text.endswith(tail) and inner >= 0 and "\n" not in text
    text = clean(text)
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return False
    if not (text.startswith("<think>") and text.endswith("</answer>")):
        return False
    close, open_ = text.find("</think>"), text.find("<answer>")
    return close < open_ and not text[close + len("</think>") : open_].strip()


def content(text: str, thinking: bool = False) -> str | None:
    """The bare answer in a completion, cleaned; with `thinking`, what the answer block holds (None without a block)."""
    text = clean(text)
    if not thinking:
        return text
    _, found, rest = text.partition("<answer>")
    return rest.partition("</answer>")[0].strip() if found else None


def wrap(answer: str, thinking: bool = False, thought: str = "") -> str:
    """The answer, inside thinking and answer blocks if asked."""
    return f"<think>{thought}</think><answer>{answer}</answer>" if thinking else answer


# --- numbers --------------------------------------------------------------------------------------------------------

_NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?+|\.[0-9]+)(?:[eE][+-]?[0-9]+)?+"
_PAIR = rf"(?:\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,?\s*\)|\[\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,?\s*\])"
_TWO_PAIRS = re.compile(
    rf"\s*(?:{_PAIR}\s*,\s*{_PAIR}|\(\s*{_PAIR}\s*,\s*{_PAIR}\s*,?\s*\)|\[\s*{_PAIR}\s*,\s*{_PAIR}\s*,?\s*\])\s*,?\s*",
    re.ASCII,
)
_NUMBERS = re.compile(_NUMBER)
_ITEMS = rf"\s*+{_NUMBER}\s*+(?:,\s*+{_NUMBER}\s*+)*+,?+\s*+"
_LIST = re.compile(rf"\s*+(?:\[{_ITEMS}\]|\({_ITEMS}\)|{_ITEMS})\s*+", re.ASCII)
_PAIR_CHARS = 256  # longest box content worth reading


def four_numbers(value: Any) -> list[float] | None:
    """`value` as four finite floats if it is a list of four JSON numbers, else None."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    return _finite(value)


def two_numbers(value: Any) -> list[float] | None:
    """`value` as two finite floats if it is a list of two JSON numbers, else None."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    return _finite(value)


def number_list(text: str) -> list[float] | None:
    """The numbers of a written list or tuple, brackets optional, as Python writes them; None for anything else."""
    match = _LIST.fullmatch(text)
    return None if match is None else [float(number) for number in _NUMBERS.findall(match[0])]


def _finite(values: list[Any]) -> list[float] | None:
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return None
    try:
        floats = [float(v) for v in values]
    except OverflowError:  # an integer beyond the range of floats
        return None
    return floats if all(map(math.isfinite, floats)) else None


def two_pairs(text: str) -> list[str] | None:
    """The four number literals of `(x1,y1),(x2,y2)`, round or square brackets, optionally wrapped once; else None."""
    if len(text) > _PAIR_CHARS or not _TWO_PAIRS.fullmatch(text):
        return None
    return _NUMBERS.findall(text)


def pair_box(text: str) -> list[float] | None:
    """[x1, y1, x2, y2] of a box token's content `(x1,y1),(x2,y2)`; None if unreadable or not finite."""
    literals = two_pairs(text)
    if literals is None:
        return None
    box = [float(v) for v in literals]
    return box if all(map(math.isfinite, box)) else None


# --- box tokens -----------------------------------------------------------------------------------------------------

_SEGMENT = re.compile(
    r"\s*<\|object_ref_start\|>([^<]*+)<\|object_ref_end\|>((?:<\|box_start\|>[^<]*+<\|box_end\|>)*+)\s*"
)
_BOX_TOKEN = re.compile(r"<\|box_start\|>|<\|box_end\|>|\n")


def token_segments(text: str) -> list[tuple[str, list[str]]] | None:
    """The text as object-ref segments: [(label, [box contents])]; None unless the whole text has that form."""
    text = text[:MAX_CHARS]
    segments, at = [], 0
    while at < len(text):
        match = _SEGMENT.match(text, at)
        if match is None:
            return None
        segments.append((match[1], token_boxes(match[2], across_lines=True)))
        at = match.end()
    return segments or None


def token_boxes(text: str, across_lines: bool = False) -> list[str]:
    """What stands between each box start and the next box end, anywhere in the text, in order.

    Unless `across_lines`, a content that spans a line break is skipped, as by the dot of the published pattern.
    """
    contents, start = [], None
    for token in _BOX_TOKEN.finditer(text, 0, MAX_CHARS):
        if token[0] == BOX_START:
            start = token.end() if start is None else start
        elif token[0] == BOX_END:
            if start is not None:
                contents.append(text[start : token.start()])
            start = None
        elif not across_lines:
            start = None
    return contents


def write_tokens(segments: Sequence[tuple[str, Int[np.ndarray, "_ 4"]]]) -> str:
    """Object-ref segments with box tokens, for whole-number boxes on the 0..1000 grid.

    Raises:
        ValueError: a label holds `<`, which would end it early.
    """
    parts = []
    for label, boxes in segments:
        if "<" in label:
            raise ValueError(f"label {label!r} holds '<', which box tokens cannot carry")
        parts.append(f"{REF_START}{label}{REF_END}")
        parts += [f"{BOX_START}({x1},{y1}),({x2},{y2}){BOX_END}" for x1, y1, x2, y2 in boxes]
    return "".join(parts)


# --- box JSON -------------------------------------------------------------------------------------------------------

_FLAT_OBJECT = re.compile(r"\{[^{}]*+\}")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a finite number")


def load_json(text: str) -> Any:
    """The value of a JSON text, None if it is not strict JSON (NaN, Infinity and bottomless nesting included)."""
    return _load(text[:MAX_CHARS])


def _load(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def json_list(text: str) -> list[Any] | None:
    """The list that the whole text is, with or without a code fence around it; None otherwise."""
    value = load_json(text[:MAX_CHARS].replace("```json", "").replace("```", ""))
    return value if isinstance(value, list) else None


def json_objects(text: str) -> list[dict[str, Any]]:
    """The objects of a list, read leniently: prose around it and a cut-off end are allowed, nested objects are not."""
    strict = json_list(text)
    if strict is not None:
        return [item for item in strict if isinstance(item, dict)]
    text = text[:MAX_CHARS]
    _, fence, body = text.partition("```json")
    candidates = _FLAT_OBJECT.findall(body.partition("```")[0] if fence else text)
    items = _load(f"[{','.join(candidates)}]")  # at once is three times as fast as one by one
    return [item for item in (map(_load, candidates) if items is None else items) if isinstance(item, dict)]


def json_box(item: Any) -> tuple[list[float], str] | None:
    """Box and label of an element `{"bbox_2d": [x1, y1, x2, y2], "label": text}`; None for anything else."""
    if not isinstance(item, dict) or not isinstance(item.get("label"), str):
        return None
    box = four_numbers(item.get("bbox_2d"))
    return None if box is None else (box, item["label"])


def write_json(items: Sequence[dict[str, Any]]) -> str:
    """A fenced JSON list, one object a line, as Qwen2.5-VL writes it."""
    lines = ",\n".join("\t" + json.dumps(item, ensure_ascii=False) for item in items)
    return f"```json\n[\n{lines}\n]\n```" if items else "```json\n[]\n```"


# --- both styles ----------------------------------------------------------------------------------------------------

Labelled = tuple[list[float], str]  # ([x1, y1, x2, y2], label)


def labelled_boxes(body: str, style: str) -> list[Labelled | None] | None:
    """Every box of an answer that is wholly in the style's format; None for an element that cannot be read.

    The answer is None where the whole text is in another format. Boxes are finite, but may be inverted.
    """
    if STYLES[choose(style, STYLES, "style")].json:
        items = json_list(body)
        return None if items is None else [json_box(item) for item in items]
    segments = token_segments(body)
    if segments is None:
        return None
    boxes = [(pair_box(text), label) for label, contents in segments for text in contents]
    return [None if box is None else (box, label) for box, label in boxes]


def plain_label(label: str) -> str:
    """A label without what is only spelling: case, blanks, a full stop at its end."""
    return " ".join(label.casefold().replace("_", " ").split()).strip(" .,;:!\"'")


def by_spelling(names: Iterable[str]) -> dict[str, str]:
    """Each name by its `plain_label`; names that differ in spelling alone are left out, they must be written as they are."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        found.setdefault(plain_label(name), []).append(name)
    return {plain: same[0] for plain, same in found.items() if len(same) == 1}


def write_boxes(segments: Sequence[tuple[str, Int[np.ndarray, "_ 4"]]], style: str) -> str:
    """Whole-number boxes per label, as `style` writes them."""
    if not STYLES[choose(style, STYLES, "style")].json:
        return write_tokens(segments)
    return write_json([{"bbox_2d": box, "label": label} for label, boxes in segments for box in boxes.tolist()])


def whole_boxes(boxes: Boxes) -> Int[np.ndarray, "N 4"]:
    """Boxes rounded to whole numbers of their frame, clipped to the image, each side kept at least one unit."""
    limit = np.array([max(int(side), 1) for side in boxes.extent()])
    grid = np.rint(boxes.clip().array).astype(np.int64).reshape(-1, 4)
    low = np.minimum(grid[:, :2], limit - 1)
    high = np.clip(grid[:, 2:], low + 1, limit)
    return np.concatenate([low, high], axis=-1)


def finish_prompt(text: str, style: str, thinking: bool) -> str:
    """The question with what the style and the answer form add: a request for JSON, the thinking suffix."""
    if STYLES[choose(style, STYLES, "style")].json:
        text += JSON_REQUEST
    return text + THINKING_SUFFIX if thinking else text
