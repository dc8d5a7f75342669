"""Sources that are rows of a file."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jaxmllm.data.formats import Record, RowSource, image_root, media
from jaxmllm.data.rows import Rows, existing
from jaxmllm.errors import InputError


def file_source(path: str, parse: Callable[..., Record], column: str, images: str | None, **options: Any) -> RowSource:
    """Rows of a file; `column` is where the first row has the path of an image, which tells where images are."""
    file = existing(path, folder=True)
    return rows_source(file, Rows(file), parse, column, images, **options)


def rows_source(
    file: Path, rows: Any, parse: Callable[..., Record], column: str, images: str | None, **options: Any
) -> RowSource:
    root = image_root(file, images, _first_image(first_row(file, rows), column))
    return RowSource(rows, partial(parse, **options), file, root)


def first_row(file: Path, rows: Any) -> Record:
    try:
        return rows[0]
    except InputError as error:
        raise InputError(f"{file}, record 0: {error}") from None


def _first_image(row: Mapping[str, Any], column: str) -> str | None:
    for key in (column, "image", "images", "file_name"):
        cell = row.get(key)
        cell = cell[0] if isinstance(cell, list) and cell else cell
        if cell is not None:
            try:
                cell = media(cell, Path())
            except InputError:
                return None
            return cell if isinstance(cell, str) else None
    return None
