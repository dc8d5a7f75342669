"""`refcoco:PATH`: RefCOCO, + and g, in the forms in which they are handed on."""

from functools import partial
from pathlib import Path
from typing import Any

from jaxmllm.data import records
from jaxmllm.data.coco import referring_rows
from jaxmllm.data.formats import RowSource, Source, choose
from jaxmllm.data.rows import Exploded, Rows, existing, is_lines
from jaxmllm.data.sources.files import first_row, rows_source
from jaxmllm.data.sources.registry import register
from jaxmllm.data.tfds import is_prepared, open_prepared
from jaxmllm.errors import InputError


@register("refcoco")
def open_refcoco(
    path: str,
    images: str | None = None,
    split: str | None = None,
    dataset: str | None = None,
    boxes: str | None = None,
) -> Source:
    file = existing(path, folder=True)
    if is_prepared(file):
        return open_prepared(file, split)
    shards = file.is_dir() and any(file.glob("*.parquet"))
    if (file.is_dir() and not shards) or (file.suffix == ".json" and _starts_with_object(file) and not is_lines(file)):
        return rows_source(file, referring_rows(file, split, dataset), records.referring, "file_name", images)
    rows: Any = Rows(file)
    first = first_row(file, rows)
    if "answer" in first and "bbox" in first:  # lmms-lab's: several expressions a row, boxes as COCO writes them
        rows, boxes = Exploded(rows, "answer", "question_id"), boxes or "xywh"
    source = rows_source(file, rows, records.referring, "image", images)
    if boxes is None:
        try:
            boxes = records.box_form(rows, source.root)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
    return RowSource(
        rows, partial(records.referring, boxes=choose(boxes, records.BOX_FORMS, "boxes")), file, source.root
    )


def _starts_with_object(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip()[:1] == b"{"
