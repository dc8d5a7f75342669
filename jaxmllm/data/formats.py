"""Reading data files row by row, and the base of all sources.

A source is index-addressable (`len`, `[i]`), the same on every process, and picklable, so that Grain's worker processes
can have a copy: what a source keeps is small, images stay on disk until the pipeline loads them.
"""

import array
import io
import json
import math
import operator
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from jaxmllm.errors import InputError

Record = dict[str, Any]
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
        """Equal for records of the same image."""
        images = self[index].get("images") or [None]
        return images[0] if isinstance(images[0], str) else index

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
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            raise InputError(f"{self.where(index)}: a field has the wrong form ({error})") from None


# ---------------------------------------------------------------- rows


class Rows:
    """Rows of a JSON list, a JSONL file, or Parquet files, as dicts.

    JSONL and Parquet stay on disk: of the first the places of the lines are kept, of the second one row group.
    """

    def __init__(self, path: str | Path):
        self.path = existing(path, folder=True)
        self._rows: _Parquet | _Lines | list[Any]
        if self.path.is_dir() or self.path.suffix == ".parquet":
            self._rows = _Parquet(self.path)
        elif self.path.suffix == ".jsonl":
            self._rows = _Lines(self.path)
        else:
            self._rows = load_json(self.path)
            if not isinstance(self._rows, list):
                raise InputError(f"{self.path}: expected a JSON list of records, got {type(self._rows).__name__}")
        if not len(self):
            raise InputError(f"{self.path}: the file holds no records")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        if not isinstance(row, dict):
            raise InputError(f"expected an object, got {type(row).__name__}")
        return dict(row)


class _Lines:
    """Lines of a JSONL file that are not blank."""

    def __init__(self, path: Path):
        self.path = path
        found, start = array.array("q"), 0  # compact: files have millions of lines
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                stop = start + len(line)
                if line.strip():
                    found.extend((start, stop, number))
                start = stop
        self.places = np.array(found, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        start, stop, line = self.places[index].tolist()
        with self.path.open("rb") as file:  # opened anew: threads share this object
            file.seek(start)
            raw = file.read(stop - start)
        try:
            return json.loads(raw, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {line} is not JSON ({error})") from None


class _Parquet:
    """Rows of one or more Parquet files, one row group in memory."""

    def __init__(self, path: Path):
        import pyarrow
        import pyarrow.parquet

        self.files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not self.files:
            raise InputError(f"{path}: the folder holds no *.parquet files")
        groups = []
        for number, file in enumerate(self.files):
            try:
                meta = pyarrow.parquet.read_metadata(file)
            except (OSError, pyarrow.ArrowException) as error:
                raise InputError(f"{file}: not readable as Parquet ({error})") from None
            groups += [(number, group, meta.row_group(group).num_rows) for group in range(meta.num_row_groups)]
        self.groups = groups
        self.ends = np.cumsum([0, *(rows for *_, rows in groups)])
        self._open()

    def _open(self) -> None:
        self._lock, self._held = threading.Lock(), -1
        self._table: Any = None

    def __getstate__(self):
        return {"files": self.files, "groups": self.groups, "ends": self.ends}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Record:
        import pyarrow.parquet

        group = int(np.searchsorted(self.ends, index, side="right")) - 1
        with self._lock:
            if group != self._held:
                number, inside, _ = self.groups[group]
                with pyarrow.parquet.ParquetFile(self.files[number]) as file:
                    self._table, self._held = file.read_row_group(inside), group
            table = self._table
        return table.slice(index - int(self.ends[group]), 1).to_pylist()[0]


def existing(path: str | Path, folder: bool = False) -> Path:
    """The path of a dataset file (with `folder`, or folder). InputError where it is missing or an empty file."""
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{path}: dataset not found")
    if path.is_dir():
        if not folder:
            raise InputError(f"{path}: this is a folder; give the file in it")
    elif path.stat().st_size == 0:
        raise InputError(f"{path}: the dataset file is empty")
    return Path(os.path.abspath(path))


def load_json(path: Path) -> Any:
    """The value in a JSON file. InputError, with the place of the mistake, where it is none."""
    try:
        return json.loads(path.read_bytes(), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a finite number")


# ---------------------------------------------------------------- fields


def numbers(value: Any, count: int | None, field: str) -> list[float]:
    """`value` as floats; InputError unless it is a list of `count` finite numbers (any count: None)."""
    items = list(value) if isinstance(value, list | tuple | np.ndarray) else None
    if items is None or (count is not None and len(items) != count):
        raise InputError(f"{field}: expected {'' if count is None else f'{count} '}numbers, got {shorten(value)}")
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int | float | np.number) or not math.isfinite(item):
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
    shown = repr(value)
    return shown if len(shown) <= length else shown[:length] + ".."


# ---------------------------------------------------------------- images


def image_size(image: Any) -> list[int]:
    """[W, H] of an image, upright, from its header alone where it is a file. InputError where it cannot be read."""
    if isinstance(image, np.ndarray):
        return [image.shape[1], image.shape[0]]
    if isinstance(image, Image.Image):
        return _upright(image)
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return _upright(opened)
    except FileNotFoundError:
        raise InputError(f"{image}: image file not found") from None
    except Exception as error:
        shown = image if isinstance(image, str) else "image"
        raise InputError(f"{shown}: cannot be read as an image ({error})") from None


def _upright(image: Image.Image) -> list[int]:
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return [image.height, image.width] if turned else [image.width, image.height]


def media(value: Any, root: Path) -> Any:
    """A cell that holds an image or a video: a path made absolute, or what the file holds itself.

    Hugging Face's {"bytes", "path"} is resolved; links are left to the loader, which refuses them.
    """
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return value["bytes"]
        value = value.get("path", value.get("url"))
    if isinstance(value, str):
        if "://" in value or value.startswith("data:"):
            return value
        return str(root / value.removeprefix("file://"))
    if value is None:
        raise InputError("an image or a video is empty")
    return value


def image_root(path: Path, images: str | None, sample: str | None) -> Path:
    """The folder of the images of an annotation file: `images`, or the one near `path` that holds `sample`.

    Tried, with `annotations/instances_val2017.json` as the example: `annotations/images`, `annotations`,
    `annotations/val2017`, `images`, `val2017`, `images/val2017` and the folder above.
    Raises InputError where none holds it.
    """
    if images is not None:
        root = Path(images).expanduser()
        if not root.is_dir():
            raise InputError(f"{root}: the images folder does not exist")
        return root.absolute()
    here = path if path.is_dir() else path.parent
    if sample is None or Path(sample).is_absolute() or "://" in sample:
        return here
    split = path.stem.rpartition("_")[2]
    tried = [here / "images", here, here / split]
    tried += [here.parent / "images", here.parent / split, here.parent / "images" / split, here.parent]
    for folder in tried:
        if (folder / sample).is_file():
            return folder
    listed = ", ".join(str(folder) for folder in dict.fromkeys(tried) if folder.is_dir())
    raise InputError(f"{path}: its image {sample!r} is in none of {listed}; name the folder with images=FOLDER")


# ---------------------------------------------------------------- sources of rows


class RowSource(Source):
    """Rows of a file, each made a record by `parse(row, root)`; `root` is the folder of the images."""

    def __init__(self, rows: Rows | Sequence[Record], parse: Callable[[Record, Path], Record], path: Path, root: Path):
        self.rows, self.parse, self.name, self.root = rows, parse, str(path), root

    def __len__(self) -> int:
        return len(self.rows)

    def _record(self, index: int) -> Record:
        row = self.rows[index]
        record = self.parse(row, self.root)
        return {**record, "id": str(row.get("id", index))}
