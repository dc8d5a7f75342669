"""Messages and their parts, as Hugging Face, OpenAI and qwen-vl-utils write them, in one form."""

import json
import numbers
import re
from collections.abc import Mapping
from typing import Any

from jaxmllm.data.decoding import data_uri
from jaxmllm.errors import InputError

KINDS = ("text", "image", "video")
SIZES = (
    "min_pixels",
    "max_pixels",
    "resized_height",
    "resized_width",
)  # qwen-vl-utils' limits of one picture, in pixels
COUNTS = ("min_frames", "max_frames", "nframes", "total_pixels")
RATES = ("fps", "sample_fps", "source_fps")  # frames a second
TIMES = ("video_start", "video_end")  # seconds
OPTIONS = {"image": SIZES, "video": (*RATES, *COUNTS, *TIMES, *SIZES)}
CONTROL = re.compile(r"<\|(?:im_start|im_end|endoftext|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>")


def content_of(message: Mapping[str, Any], place: str) -> str | list[Any]:
    """A message's content, a text or a list of parts; tool calls are written into it as Qwen's own template writes them.

    Beside tool calls None counts as no words, as OpenAI writes it.
    """
    content, calls = message.get("content"), message.get("tool_calls")
    if content is None and calls:
        content = ""
    if not isinstance(content, str | list | tuple):
        raise InputError(f"{place}: content must be a text or a list of parts, got {type(content).__name__}")
    if not calls:
        return content if isinstance(content, str) else list(content)
    if not isinstance(calls, list | tuple):
        raise InputError(f"{place}: tool_calls must be a list")
    written = "\n".join(_call(call, place) for call in calls)
    if isinstance(content, str):
        return f"{content}\n{written}" if content else written
    return [*content, {"type": "text", "text": f"\n{written}" if content else written}]


def _call(call: Any, place: str) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{place}: a tool call needs a function with a name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):  # OpenAI writes JSON in a text
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise InputError(f"{place}: arguments of {function['name']} are not JSON ({error})") from None
    called = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{called}\n</tool_call>"


def read_part(part: Any, place: str) -> tuple[str, Any, dict[str, Any]]:
    """(kind, what it holds, options): of a text the words, of an image or a video what a reader takes, or None.

    Fields that are None count as absent: tables fill every row with every column. Raises InputError naming `place` for
    another kind, an unknown field, or an option that is no number.
    """
    fields = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    names = ("text", "image", "video", "image_url", "video_url")
    given = fields.get("type", next((name for name in names if name in fields), None)) if fields else part
    kind = {"image_url": "image", "video_url": "video"}.get(given, given) if isinstance(given, str) else given
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{place}: a part needs the type text, image or video, got {str(given)[:40]!r}")
    holders = ("text",) if kind == "text" else (kind, f"{kind}_url", "path", "url", "base64")
    options = {key: fields[key] for key in OPTIONS.get(kind, ()) if key in fields}
    if unknown := fields.keys() - {"type", *holders, *options}:
        known = [*holders, *OPTIONS.get(kind, ())]
        raise InputError(f"{place}: {kind} part has unknown fields {sorted(unknown)}; known are {known}")
    held = next((fields[key] for key in holders if key in fields), None)
    if kind == "text":
        if not isinstance(held, str):
            raise InputError(f"{place}: a part of type text has no text")
        return kind, held, {}
    if "base64" in fields and held is fields["base64"]:
        held = data_uri(f"data:;base64,{held}")
    if isinstance(held, Mapping) and "url" in held:
        held = held["url"]
    return kind, held, _numbers(options, place)


def _numbers(options: dict[str, Any], place: str) -> dict[str, Any]:
    for key, value in options.items():
        whole = key in SIZES or key in COUNTS
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
            raise InputError(f"{place}: {key} is {value!r}; it must be a {'whole ' if whole else ''}number")
        if whole and value < 1:
            raise InputError(f"{place}: {key} is {value!r}; it must be at least 1")
    if ("resized_height" in options) != ("resized_width" in options):
        raise InputError(f"{place}: resized_height and resized_width go together")
    if options.get("min_pixels", 1) > options.get("max_pixels", float("inf")):
        raise InputError(f"{place}: min_pixels {options['min_pixels']} is above max_pixels {options['max_pixels']}")
    if "sample_fps" in options:  # what qwen-vl-utils calls the rate of frames that were sampled before
        options.setdefault("fps", options.pop("sample_fps"))
    return options


def checked_text(text: str, place: str = "") -> str:
    """The text. InputError where it spells a token that ends a turn or stands for a picture, or holds half a character.

    Written by a user or found on the web, such a token would be read as the template's own.
    """
    prefix = f"{place}: " if place else ""
    if found := CONTROL.search(text):
        raise InputError(
            f"{prefix}control and placeholder tokens must not be written in a text, it has {found.group()}; "
            "write it with a space, or leave it out"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise InputError(f"{prefix}the text has half of a surrogate pair, {half}; repair it or leave it out") from None
    return text


def spelled(text: str) -> str:
    """A model's words for use in a prompt: control tokens are taken apart, so that they are words there too."""
    return CONTROL.sub(lambda found: f"<| {found.group()[2:-2]} |>", text)
