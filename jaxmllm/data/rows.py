"""Rows of JSON, JSON lines, CSV and Parquet files as dicts; and the files themselves."""

import array
import csv
import io
import json
import math
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmllm.data.decoding import shown
from jaxmllm.errors import InputError

Record = dict[str, Any]
TABLES = {".csv": ",", ".tsv": "\t"}  # suffix -> what separates the columns, where the first line does not tell
READ = ".jsonl, .json, .csv, .tsv or .parquet"
_HUGE = re.compile(rb"\d[eE]\+?\d{3}|\d{300}")  # what may be a number beyond the largest float
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Rows:
    """Rows of a JSON list, JSON lines (whatever the file is called), a CSV file, or Parquet files, as dicts.

    JSON lines and Parquet stay on disk: of the first the places of the lines are kept, of the second one row group.
    """

    def __init__(self, path: str | Path):
        self.path = existing(path, folder=True)
        self._rows: _Parquet | _Lines | list[Any]
        if self.path.is_dir() or self.path.suffix == ".parquet":
            self._rows = _Parquet(self.path)
        elif self.path.suffix in TABLES:
            self._rows = _table(self.path)
        elif self.path.suffix in (".jsonl", ".ndjson") or is_lines(self.path):
            self._rows = _Lines(self.path)
        elif self.path.suffix == ".json":
            self._rows = load_json(self.path)
            if not isinstance(self._rows, list):
                raise InputError(f"{self.path}: expected a JSON list of records, got {_described(self._rows)}")
        else:
            raise InputError(f"{self.path}: {self.path.suffix or 'a file without a suffix'} is not read; write {READ}")
        if not len(self):
            raise InputError(f"{self.path}: the file holds no records")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        if not isinstance(row, dict):
            raise InputError(f"expected an object, got {type(row).__name__}")
        return dict(row)

    def column(self, name: str) -> Iterator[Any]:
        """One column of every row, None where a row lacks it; of Parquet nothing else is read."""
        if isinstance(self._rows, _Parquet):
            return self._rows.column(name)
        return (
            row.get(name) if isinstance(row, dict) else None for row in map(self._rows.__getitem__, range(len(self)))
        )


def _described(value: Any) -> str:
    """What a JSON file holds instead of a list of records, with the source that reads it."""
    if isinstance(value, dict) and {"images", "annotations"} <= value.keys():
        return "COCO JSON: write coco:FILE"
    lists = [key for key, held in value.items() if isinstance(held, list)] if isinstance(value, dict) else []
    hint = f" with the list{'s' if len(lists) > 1 else ''} {', '.join(lists)}: save one of them alone" if lists else ""
    return f"{type(value).__name__}{hint}"


def is_lines(path: Path) -> bool:
    """Whether the first line that is not blank is an object of its own, with more behind it."""
    with path.open("rb") as file:
        first = next((line.strip() for line in file if line.strip()), b"").removeprefix(b"\xef\xbb\xbf")
        if first[:1] != b"{" or first[-1:] != b"}" or not any(line.strip() for line in file):
            return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


class _Lines:
    """Lines of a file of JSON lines that are not blank."""

    def __init__(self, path: Path):
        self.path = path
        found, start = array.array("q"), 0  # compact: files have millions of lines
        with path.open("rb") as file:
            if file.read(2) in _UTF16:
                raise InputError(f"{path}: the file is UTF-16; save it as UTF-8")
            file.seek(0)
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
            return parse_json(raw)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {line} is not JSON ({error})") from None


def _table(path: Path) -> list[Record]:
    """Rows of a CSV file with a line of names. A cell that is a JSON list or object is read as one, an empty one is None."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the file is not UTF-8 ({error}); save it as UTF-8") from None
    separator = TABLES[path.suffix]
    head = text.partition("\n")[0]
    if separator not in head:
        separator = max(";\t,", key=head.count)
    csv.field_size_limit(2**31 - 1)  # pictures in base64 are longer than its default
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        names = [name.strip() for name in next(reader, [])]
        if len(set(names)) < len(names) or not all(names):
            raise InputError(f"{path}: line 1 must name the columns, each once; it is {names}")
        rows = []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise InputError(f"{path}: line {reader.line_num} has {len(cells)} columns, line 1 has {len(names)}")
            rows.append({name: _cell(cell) for name, cell in zip(names, cells, strict=True)})
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num} is not CSV ({error})") from None
    return rows


def _cell(text: str) -> Any:
    if text[:1] in ("[", "{"):
        try:
            return parse_json(text.encode())
        except (ValueError, RecursionError):
            pass
    return text or None


class _Parquet:
    """Rows of one or more Parquet files, one row group in memory."""

    def __init__(self, path: Path):
        import pyarrow
        import pyarrow.parquet

        self.files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not self.files:
            raise InputError(f"{path}: the folder holds no *.parquet files{_beside(path)}")
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

    def column(self, name: str) -> Iterator[Any]:
        import pyarrow.parquet

        for number, group, rows in self.groups:
            with pyarrow.parquet.ParquetFile(self.files[number]) as file:
                known = name in file.schema_arrow.names
                yield from file.read_row_group(group, [name])[name].to_pylist() if known else [None] * rows


class Exploded(Sequence[Record]):
    """Rows of which a column holds a list: one row for each of its items, with `-k` behind the row's name `key`."""

    def __init__(self, rows: Rows, column: str, key: str):
        self.rows, self.column, self.key = rows, column, key
        counts = [len(value) if isinstance(value, list) else 1 for value in rows.column(column)]
        self.ends = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: Any) -> Any:
        row_index = int(np.searchsorted(self.ends, index, side="right")) - 1
        row, k = self.rows[row_index], index - int(self.ends[row_index])
        if isinstance(row.get(self.column), list):
            row[self.column] = row[self.column][k]
        return row | {"id": f"{row.get(self.key, row_index)}-{k}"}


# ---------------------------------------------------------------- files


def existing(path: str | Path, folder: bool = False) -> Path:
    """The path of a dataset file (with `folder`, or folder). InputError where it is missing or an empty file."""
    path = Path(path).expanduser()
    if not os.path.exists(path):  # of Path it raises for a name that is too long
        raise InputError(f"{shown(path)}: dataset not found")
    if path.is_dir():
        if not folder:
            raise InputError(f"{path}: this is a folder; give the file in it{_beside(path)}")
    elif path.stat().st_size == 0:
        raise InputError(f"{path}: the dataset file is empty")
    return Path(os.path.abspath(path))


def _beside(folder: Path) -> str:
    """The files of a folder that may be meant."""
    found = sorted(file.name for file in folder.iterdir() if file.suffix in (".json", ".jsonl", *TABLES, ".parquet"))
    if found:
        return f": {', '.join(found[:3])}"
    return f"; of a folder of pictures write images:{folder}"


def load_json(path: Path) -> Any:
    """The value in a JSON file. InputError, with the place of the mistake, where it is none."""
    try:
        raw = path.read_bytes()
        if raw[:2] in _UTF16:
            raise InputError(f"{path}: the file is UTF-16; save it as UTF-8")
        return parse_json(raw)
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


def parse_json(raw: bytes) -> Any:
    """A JSON value. ValueError for what Python would read and others would not: NaN, 1e999, an object with a key twice."""
    huge = _finite if _HUGE.search(raw) else None  # a function for every float makes large files slow
    return json.loads(raw, parse_constant=_refuse, parse_float=huge, object_pairs_hook=_object)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is beyond the largest number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> Record:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice in an object")
    return found
