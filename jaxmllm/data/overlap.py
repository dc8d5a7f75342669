"""Records that are in the training data and in the evaluation's: figures on them say nothing about new ones."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxmllm.data.examples import Asking
from jaxmllm.data.sources import RecordSource, all_records
from jaxmllm.errors import InputError

MOST, SECONDS = 20_000, 2.0  # training items that are looked at, and for how long


def question_key(chat: Sequence[Mapping[str, Any]]) -> str:
    """A digest of what is asked about which pictures: of files their bytes, so that a copy by another name is the same."""
    digest = hashlib.sha256()
    for message in chat:
        content = message["content"]
        for part in [{"text": content}] if isinstance(content, str) else content:
            if (text := part.get("text")) is not None:
                digest.update(str(text).encode("utf-8", "surrogatepass"))
            for kind in ("image", "video"):
                if (picture := part.get(kind)) is not None:
                    digest.update(_picture(picture))
    return digest.hexdigest()


def _picture(value: Any) -> bytes:
    """Of a file its bytes, of an array or a Pillow image its pixels; of a folder of frames its name."""
    if isinstance(value, list | tuple):
        return b"".join(map(_picture, value))
    if isinstance(value, np.ndarray | Image.Image):
        return np.asarray(value).tobytes()
    if isinstance(value, bytes):
        return value
    return Path(value).read_bytes() if Path(value).is_file() else str(value).encode("utf-8", "surrogatepass")


def shared_records(
    training: RecordSource, evaluation: Mapping[str, RecordSource], samples: int, asking: Asking
) -> dict[str, str]:
    """By evaluation source, a sentence where some of its first `samples` records are training records too."""
    wanted: dict[str, dict[str, str]] = {}
    for name, source in evaluation.items():
        wanted[name] = {}
        for index in range(min(len(source), samples)):
            try:
                record = source[index]
                wanted[name][question_key(asking.conversation(record))] = str(record.get("id", index))
            except InputError:
                continue  # an evaluation says so itself
    began, seen = time.monotonic(), set()
    for index in range(min(len(training), MOST)):
        if time.monotonic() - began > SECONDS:
            break
        try:
            seen |= {question_key(asking.conversation(record)) for record in all_records(training, index)}
        except InputError:
            continue
    out = {}
    for name, keys in wanted.items():
        twice = [record for question, record in keys.items() if question in seen]
        if twice:
            some = ", ".join(twice[:5]) + (", .." if len(twice) > 5 else "")
            out[name] = f"{len(twice)} of the first {len(keys)} records are training records too ({some})"
    return out
