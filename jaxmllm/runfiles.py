"""Files of a run or evaluation folder: JSON written whole, JSON lines appended whole, the config that owns the folder.

A process may be killed at any moment: a JSON file is replaced in one step, and a line of a JSON-lines file that was cut
off is dropped when the file is next opened.
"""

import dataclasses
import enum
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmllm.errors import InputError


def not_a_bucket(path: str | Path, field: str) -> None:
    """InputError where a path is an address such as gs://BUCKET/FOLDER; `field` says where it was given."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):  # a Path has one slash left of two
        raise InputError(
            f"{field} = {str(path)!r}: addresses of buckets are not read or written. Mount the bucket as a folder, "
            "gcsfuse --implicit-dirs BUCKET FOLDER, and name that; launch/tpu_vm.sh, xpk.sh, jobset.yaml and skypilot.yaml mount "
            "one for runs/ and data/"
        )


def plain(value: Any) -> Any:
    """The value as JSON types: dataclasses become dicts, arrays lists, callables `module.name`, inf and nan strings."""
    if value is None or isinstance(value, str | bool | int):
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return str(value)


def replace_file(path: str | Path, data: bytes) -> None:
    """Writes `data` next to `path` and moves it there in one step: readers see the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `plain(value)` as JSON in one step."""
    replace_file(path, (json.dumps(plain(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. InputError naming the file when it is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, [] if there is none. A last line without line break was cut off and is left out.

    Raises InputError naming the file and the line when another line is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            rows.append(None)
        if not isinstance(rows[-1], dict):
            raise InputError(f"{path}: line {number} is not a JSON object; repair or remove it")
    return rows


class JsonLines:
    """Appends rows to a JSON-lines file, each append in one write; use as a context manager or close it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._drop_cut_off_line()

    def _drop_cut_off_line(self) -> None:
        size = os.fstat(self._file).st_size
        end, block = size, 4096
        while end:
            start = max(end - block, 0)
            at = os.pread(self._file, end - start, start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._file, end)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends all rows. If the disk takes only a part, that part is removed again and OSError is raised."""
        data = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, data)
            while written < len(data):  # only a full disk or a huge append writes less
                written += os.write(self._file, data[written:])
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def differences(old: Any, new: Any, ignore: Collection[str] = (), prefix: str = "") -> list[str]:
    """Lines "field: old -> new" for each field of two nested dicts that differs; `ignore`: dotted names left out."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]
    if prefix and old.get("name") != new.get(
        "name"
    ):  # another method: its options have nothing to do with the old one's
        return [f"{prefix}: {old.get('name')!r} -> {new.get('name')!r}"]
    lines = []
    for key in sorted(old.keys() | new.keys()):
        name = f"{prefix}.{key}" if prefix else key
        if name in ignore:
            continue
        if key not in old:
            lines.append(f"{name}: (absent) -> {new[key]!r}")
        elif key not in new:
            lines.append(f"{name}: {old[key]!r} -> (absent)")
        else:
            lines += differences(old[key], new[key], ignore, name)
    return lines


def claim(folder: str | Path, config: Any, ignore: Collection[str] = (), defaults: Any = None) -> list[str]:
    """Makes `folder` and writes `config.json` into it, or checks that the one there is the same.

    Returns a line for every field that differs and may: those named in `ignore` (dotted); the file keeps their first
    values. Raises InputError with the other differing fields when the folder belongs to another config. `defaults` stands
    for fields that the file lacks because they did not exist when it was written.
    """
    not_a_bucket(folder, "output folder")
    path = Path(folder) / "config.json"
    if path.exists():
        old, new = _filled(plain(defaults), read_json(path)), plain(config)
        lines = differences(old, new, ignore)
        if lines:
            raise InputError(
                f"{folder} belongs to another config: use another folder for this one, or give these fields their old "
                "values. A run goes on with other values in a new folder: --name NEW --resume_from OLD. Differing fields:\n  "
                + "\n  ".join(lines)
            )
        return [line for line in differences(old, new) if line not in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, config)
    return []


def _filled(defaults: Any, values: Any) -> Any:
    """Nested dicts `values` with the fields of `defaults` that they lack."""
    if not (isinstance(defaults, Mapping) and isinstance(values, Mapping)):
        return values
    return {**defaults, **{key: _filled(defaults.get(key), value) for key, value in values.items()}}
