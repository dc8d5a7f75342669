"""A folder of pictures as chats: `images:FOLDER`."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jaxmllm.data import conversations, records
from jaxmllm.data.decoding import shown
from jaxmllm.data.formats import Record, RowSource
from jaxmllm.data.rows import Rows
from jaxmllm.data.sources.registry import register
from jaxmllm.errors import InputError

SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of Hugging Face's ImageFolder
PROMPT = "Describe this image in detail."


@register("images")
def open_images(path: str, prompt: str = PROMPT) -> RowSource:
    """Every picture below a folder, asked `prompt`. What the folder says is the answer, the first of these that it has:

    - a metadata file of Hugging Face's ImageFolder: `file_name` and columns that `chat:` knows, or `text`;
    - a text beside each picture, `a.txt` for `a.png`;
    - the name of the subfolder that a picture lies in.

    Raises InputError naming the folder where it holds no pictures.
    """
    folder = Path(path).expanduser()
    if not os.path.isdir(folder):
        raise InputError(f"{shown(folder)}: this is no folder; of a file write chat:FILE or another kind")
    folder = folder.absolute()
    listed = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    rows: Any = Rows(listed) if listed else [_row(folder, file) for file in _pictures(folder)]
    if not len(rows):
        raise InputError(f"{folder}: no pictures; expected files ending in {', '.join(SUFFIXES)}")
    return RowSource(rows, partial(chat, prompt=prompt), listed or folder, folder)


def _pictures(folder: Path) -> list[Path]:
    found = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return sorted(file for file in found if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))


def _row(folder: Path, file: Path) -> Record:
    inside = file.relative_to(folder)
    row = {"id": inside.as_posix(), "file_name": inside.as_posix()}
    if file.with_suffix(".txt").is_file():
        return row | {"text_file": str(file.with_suffix(".txt"))}
    return row | ({"answer": inside.parent.name} if inside.parent.name else {})


def chat(row: Mapping[str, Any], root: Path, prompt: str) -> Record:
    """One picture and what is asked about it."""
    row = dict(row)
    if "text_file" in row:
        row["answer"] = Path(row.pop("text_file")).read_text(encoding="utf-8").strip()
    elif "text" in row and not any(
        row.get(name) is not None for name in (*conversations.LISTS, *conversations.ANSWERS)
    ):
        row["answer"] = row.pop("text")
    if not any(row.get(name) is not None for name in (*conversations.LISTS, *conversations.QUESTIONS)):
        row["prompt"] = prompt
    return records.chat({**row, "image": row.pop("file_name")}, root)
