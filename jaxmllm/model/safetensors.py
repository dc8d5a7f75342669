"""Files of safetensors: which tensors a checkpoint folder holds, and where their bytes lie.

Nothing is memory-mapped. The headers are checked before a byte of a tensor is read.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmllm.errors import InputError

log = logging.getLogger(__name__)
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def is_readable(self) -> bool:
        """Of a known dtype, of as many bytes as its shape needs, all of them in the file."""
        if self.dtype not in DTYPES or self.end > self.file.stat().st_size:
            return False
        return self.end - self.start == math.prod(self.shape) * jnp.dtype(DTYPES[self.dtype]).itemsize

    def read(self, first: int = 0, rows: int | None = None) -> np.ndarray:
        """All of it, or `rows` entries of its leading axis."""
        dtype, row = jnp.dtype(DTYPES[self.dtype]), math.prod(self.shape[1:])
        count = math.prod(self.shape) if rows is None else rows * row
        found = np.fromfile(self.file, dtype, count, offset=self.start + first * row * dtype.itemsize)
        return found.reshape(self.shape if rows is None else (rows, *self.shape[1:]))


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ; json keeps the last of equal ones without a word."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"{key} stands there twice")
        content[key] = value
    return content


def read_header(file: Path) -> dict[str, Stored]:
    """Name -> tensor of one file. InputError when the header is not one of the safetensors format, or tensors share bytes."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(f"{file}: truncated or not a safetensors file (header of {length} bytes, file of {size})")
        text = handle.read(length)
    base, tensors = 8 + length, {}
    try:
        for name, raw in json.loads(text, object_pairs_hook=_once).items():
            if name != "__metadata__":
                start, end = (int(offset) for offset in raw["data_offsets"])
                shape = tuple(int(n) for n in raw["shape"])
                if start < 0 or min(shape, default=0) < 0:
                    raise ValueError(f"{name} has a negative size")
                tensors[name] = Stored(file, str(raw["dtype"]), shape, base + start, base + end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: not a safetensors file, its header cannot be read ({error!r})") from None
    in_order = sorted(
        (name for name in tensors if tensors[name].end > tensors[name].start), key=lambda n: tensors[n].start
    )
    for one, other in zip(in_order, in_order[1:], strict=False):
        if tensors[other].start < tensors[one].end:
            raise InputError(f"{file}: corrupt, the bytes of {one} and {other} overlap; download or export it again")
    return tensors


def _shards(index: Path) -> list[Path]:
    """The files that an index names, all of them inside its folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not a safetensors index ({error!r})") from None
    if outside or not names:
        raise InputError(f"{index}: weight_map must name files of the folder, got {', '.join(outside) or 'none'}")
    lost = [name for name in names if not (index.parent / name).is_file()]
    if lost:
        raise InputError(f"{index}: shards missing from the folder: {', '.join(lost)}")
    return [index.parent / name for name in names]


def weight_files(folder: Path) -> list[Path]:
    """The files that make the checkpoint: `model.safetensors`, or the shards of its index.

    Where a folder holds both, `model.safetensors` counts, as in transformers, unless the index names it; a warning says so.
    """
    index, single = folder / INDEX, folder / SINGLE
    if not index.exists() and not single.is_file():
        raise InputError(f"{folder}: no {SINGLE} or {INDEX} (only safetensors are read)")
    if not single.is_file():
        return _shards(index)
    if not index.exists():
        return [single]
    try:
        shards = _shards(index)
    except InputError as error:
        shards, why = [], str(error)
    else:
        why = f"{len(shards)} shards are named by {index.name}"
    if single in shards:
        return shards
    age = max((file.stat().st_mtime for file in shards), default=0) - single.stat().st_mtime
    log.warning(
        "%s holds two checkpoints: %s is read, as transformers does, and %s is not (%s)%s. Remove the one you do not mean",
        folder,
        SINGLE,
        INDEX,
        why,
        ", although its shards are newer" if age > 1 else "",
    )
    return [single]


def read_headers(folder: str | Path, canonical: Any = str) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder, by `canonical(name)`. InputError for a tensor that is there twice."""
    tensors: dict[str, Stored] = {}
    for file in weight_files(Path(folder)):
        for spelling, tensor in read_header(file).items():
            name = canonical(spelling)
            if name in tensors:
                raise InputError(
                    f"{file}: holds {spelling}, and {tensors[name].file.name} holds the same tensor {name}; remove one"
                )
            tensors[name] = tensor
    return tensors


def equal(one: Stored, other: Stored, rows: int = 1024) -> bool:
    """Whether two tensors hold the same numbers, read a few rows at a time up to the first difference."""
    if one.shape != other.shape:
        return False

    def part(tensor: Stored, first: int) -> np.ndarray:
        return tensor.read(first, min(rows, tensor.shape[0] - first)).astype(np.float32)

    return all(np.array_equal(part(one, first), part(other, first)) for first in range(0, one.shape[0], rows))


def is_finite(numbers: np.ndarray) -> bool:
    """No NaN and no infinity, by the largest exponent: several times faster than `isfinite` on half-precision numbers."""
    if numbers.dtype.itemsize != 2 or not numbers.size:
        return bool(np.isfinite(numbers).all())
    bits = np.ascontiguousarray(numbers).view(np.uint16) & 0x7FFF
    return bool(bits.max() < (0x7C00 if numbers.dtype == np.float16 else 0x7F80))
