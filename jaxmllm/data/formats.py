"""The base of all sources, and the fields of rows.

A source is index-addressable (`len`, `[i]`), the same on every process, and picklable, so that Grain's worker processes
can have a copy: what a source keeps is small, images stay on disk until the pipeline loads them.
"""

import hashlib
import operator
import os
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmllm.data.decoding import data_uri, shown
from jaxmllm.data.decoding import image_size as image_size
from jaxmllm.data.nearest import nearest
from jaxmllm.data.rows import Record, Rows
from jaxmllm.errors import InputError

LARGEST = sys.float_info.max  # whole numbers of JSON may lie beyond it
FRAMES = ("pixel", "percent", "norm1000")  # what coordinates in a file are measured in


class Source:
    """Records by index. A subclass sets `name` (the file) and writes `__len__` and `_record`.

    Whatever is wrong with a row becomes one InputError that names the file and the index.
    """

    name: str

    def __len__(self) -> int:
        raise NotImplementedError

    def _record(self, index: int) -> Record:
        raise NotImplementedError

    def image_key(self, index: int) -> Hashable:
        """Equal for records of the same images and videos, all of them in their order."""
        record = self[index]
        held = [*record.get("images", ()), *record.get("videos", ())]
        keys = tuple(map(media_key, held))
        return keys if keys and None not in keys else index

    def where(self, index: int) -> str:
        """How messages name a record."""
        return f"{self.name}, record {index}"

    def __getitem__(self, index: int) -> Record:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: no record {index}, there are {len(self)}")
        try:
            return self._record(index)
        except InputError as error:
            raise InputError(f"{self.where(index)}: {error}") from None
        except KeyError as error:
            raise InputError(f"{self.where(index)}: field {error} is missing") from None
        except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
            raise InputError(f"{self.where(index)}: a field has the wrong form ({error})") from None


# ---------------------------------------------------------------- fields


def numbers(value: Any, count: int | None, field: str) -> list[float]:
    """`value` as floats; InputError unless it is a list of `count` finite numbers (any count: None)."""
    items = list(value) if isinstance(value, list | tuple | np.ndarray) else None
    if items is None or (count is not None and len(items) != count):
        raise InputError(f"{field}: expected {'' if count is None else f'{count} '}numbers, got {shorten(value)}")
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int | float | np.number) or not abs(float(item)) <= LARGEST:
            raise InputError(f"{field}: {shorten(item)} is not a finite number")
    return [float(item) for item in items]


def box(value: Any, field: str, form: str = "xyxy") -> list[float]:
    """[x1, y1, x2, y2] of a box in the form `xyxy` or `xywh`; InputError where it has no area."""
    x1, y1, x2, y2 = numbers(value, 4, field)
    if form == "xywh":
        x2, y2 = x1 + x2, y1 + y2
    if x2 <= x1 or y2 <= y1:
        raise InputError(f"{field}: {shorten(value)} is a box without area")
    return [x1, y1, x2, y2]


def to_pixels(values: Sequence[float], frame: str, size: Sequence[float]) -> list[float]:
    """Alternating x, y of `frame` (one of FRAMES) as pixels of an image of `size` [W, H]."""
    if frame == "pixel":
        return list(values)
    scale = {"percent": 100.0, "norm1000": 1000.0}[frame]
    return [value * size[i % 2] / scale for i, value in enumerate(values)]


def text(row: Mapping[str, Any], field: str) -> str:
    """A field that must be a non-blank text."""
    value = row[field]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{field}: expected a text, got {shorten(value)}")
    return value


def choose(value: str, known: Iterable[str], option: str) -> str:
    """`value` if it is one of `known`, else an InputError that lists them."""
    if value not in known:
        raise InputError(f"{option}: {value!r} is unknown; use one of {', '.join(known)}")
    return value


def shorten(value: Any, length: int = 60) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= length else text[:length] + ".."


# ---------------------------------------------------------------- images


def media(value: Any, root: Path) -> Any:
    """A cell that holds an image or a video: a path made absolute, or what the file holds itself.

    Hugging Face's {"bytes", "path"} and OpenAI's {"url"} are resolved, data URIs decoded; links are left to the loader,
    which refuses them.
    """
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return value["bytes"]
        value = value.get("path", value.get("url"))
    if isinstance(value, str):
        if value.startswith("data:"):
            return data_uri(value)
        if "://" in value and not value.startswith("file://"):
            return value
        return str(root / value.removeprefix("file://"))
    if value is None:
        raise InputError("an image or a video is empty")
    return value


def media_key(value: Any) -> Hashable:
    """Equal for the same picture or video: its path, a digest of its bytes; None where that cannot be told."""
    if isinstance(value, list | tuple):
        keys = tuple(map(media_key, value))
        return keys if None not in keys else None
    if isinstance(value, bytes):
        return hashlib.sha256(value).digest()
    return value if isinstance(value, str) else None


def image_root(path: Path, images: str | None, sample: str | None) -> Path:
    """The folder of the images of an annotation file: `images`, or the one near `path` that holds `sample`.

    Tried, with `annotations/instances_val2017.json` as the example: `annotations/images`, `annotations`,
    `annotations/val2017`, `images`, `val2017`, `images/val2017` and the folder above.
    Raises InputError where none holds it.
    """
    if images is not None:
        root = Path(images).expanduser()
        if not os.path.isdir(root):
            raise InputError(f"{shown(root)}: the images folder does not exist")
        return root.absolute()
    here = path if path.is_dir() else path.parent
    if sample is None or Path(sample).is_absolute() or "://" in sample:
        return here
    split = path.stem.rpartition("_")[2]
    tried = [here / "images", here, here / split]
    tried += [here.parent / "images", here.parent / split, here.parent / "images" / split, here.parent]
    for folder in tried:
        if os.path.isfile(folder / sample):
            return folder
    listed = ", ".join(str(folder) for folder in dict.fromkeys(tried) if folder.is_dir())
    raise InputError(f"{path}: its image {shown(sample)!r} is in none of {listed}; name the folder with images=FOLDER")


# ---------------------------------------------------------------- sources of rows


class RowSource(Source):
    """Rows of a file, each made a record by `parse(row, root)`; `root` is the folder of the images."""

    kind = ""  # of the spec that it was opened with

    def __init__(self, rows: Rows | Sequence[Record], parse: Callable[[Record, Path], Record], path: Path, root: Path):
        self.rows, self.parse, self.name, self.root = rows, parse, str(path), root

    def __len__(self) -> int:
        return len(self.rows)

    def _record(self, index: int) -> Record:
        row = self.rows[index]
        try:
            record = self.parse(row, self.root)
        except KeyError as error:
            raise InputError(f"field {error} is missing; {nearest(row, self.kind)}") from None
        name = row.get("id")
        return {**record, "id": str(index if name is None else name)}
