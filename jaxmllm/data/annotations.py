"""Boxes and points of a record as they lie in the upright picture, which is what the model sees.

Most tools annotate the pixels as they are stored and know nothing of a photo's EXIF orientation, while every loader turns
the picture. Coordinates are therefore taken to be on the stored pixels, and turned with it, unless the record says
otherwise: by a `size` that only the upright picture has, or by `orientation` "upright" (option `annotated=upright`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmllm.data.decoding import stored_size
from jaxmllm.data.formats import Record, Source, choose, shorten
from jaxmllm.data.selection import RecordSource, all_records, image_key, where
from jaxmllm.errors import InputError
from jaxmllm.geometry import turned

ANNOTATED = ("stored", "upright")  # the pixels that boxes were drawn on
TOLERANCE = 2.0  # pixels that an annotation may lie outside its image: files round
_BOXES, _POINTS = ("box", "boxes", "crowd_boxes"), ("points",)


def upright(record: Record, clip: bool = False) -> Record:
    """A copy with `size` [W, H] of the upright picture, coordinates turned to lie on it, and `orientation` "upright".

    The picture is the record's first image. `clip` cuts boxes that leave it at its edges. Raises InputError where the image
    has another size than its annotations say, where they lie outside of it, or where nothing of a box is left.
    """
    stored, orientation = stored_size(_first_image(record))
    actual = stored[::-1] if orientation in (5, 6, 7, 8) else stored
    said = list(record.get("size", actual if record.get("orientation") == "upright" else stored))
    if said not in (stored, actual):
        raise InputError(
            f"size: the image is {actual[0]} x {actual[1]}, its annotations are for {said[0]} x {said[1]}"
            + (f" (stored {stored[0]} x {stored[1]} and turned by EXIF)" if stored != actual else "")
        )
    on_stored = record.get("orientation") != "upright" and said == stored
    found = {**record, "size": actual, "orientation": "upright"}
    for field in (*_BOXES, *_POINTS):
        if field not in record:
            continue
        values = np.asarray(record[field], np.float64)
        pairs = values.reshape(-1, 2)
        if clip and field in _BOXES:
            values = np.clip(pairs, 0, said).reshape(values.shape)
            _check_area(record, field, values)
            found[field] = values.tolist()
        elif not ((pairs >= -TOLERANCE) & (pairs <= np.array(said) + TOLERANCE)).all():
            cure = "; option clip=true cuts such boxes" if field in _BOXES else ""
            raise InputError(
                f"{field}: {shorten(record[field])} leaves the image of {said[0]} x {said[1]} pixels{cure}"
            )
        if on_stored and orientation != 1:
            found[field] = turned(values, orientation, stored).tolist()
    if on_stored and orientation != 1 and "lines" in record:
        found["lines"] = [
            line | {"quad": turned(np.reshape(line["quad"], (4, 2)), orientation, stored).reshape(-1).tolist()}
            for line in record["lines"]
        ]
    return found


def _first_image(record: Mapping[str, Any]) -> Any:
    if "messages" not in record:
        return record["images"][0]
    parts = (part for m in record["messages"] if not isinstance(m["content"], str) for part in m["content"])
    return next(part["image"] for part in parts if part["type"] == "image")


def _check_area(record: Record, field: str, boxes: np.ndarray) -> None:
    x1, y1, x2, y2 = boxes.reshape(-1, 4).T
    if not ((x2 > x1) & (y2 > y1)).all():
        raise InputError(f"{field}: {shorten(record[field])} has a box of which nothing lies in the image")


class Placed(Source):
    """A source whose records are `upright`: with boxes `annotated` on the stored or the upright pixels, and clipped or not."""

    def __init__(self, source: RecordSource, annotated: str = "stored", clip: bool = False):
        self.source, self.clip, self.name = source, clip, getattr(source, "name", "data")
        self.upright = choose(annotated, ANNOTATED, "annotated") == "upright"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        try:
            return self._placed(record)
        except InputError as error:
            raise InputError(f"{self.where(index)}: {error}") from None

    def records(self, index: int) -> list[Record]:
        return [self._placed(record) for record in all_records(self.source, index)]

    def image_key(self, index: int) -> Any:
        return image_key(self.source, index)

    def where(self, index: int) -> str:
        return where(self.source, index)

    def _placed(self, record: Record) -> Record:
        if not record.get("images"):
            return record
        return upright(record | {"orientation": "upright"} if self.upright else record, self.clip)
