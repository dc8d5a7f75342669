"""Random views of photographs: a crop, mirrored or not, with boxes and points to match. For training on few pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageOps

from jaxmllm.data.annotations import upright
from jaxmllm.data.decoding import load_image
from jaxmllm.data.formats import Record, Source
from jaxmllm.data.selection import RecordSource, all_records, image_key, where
from jaxmllm.errors import InputError

SEEN = 0.3  # share of a box that must lie in the crop for its object to stay
_ATTEMPTS = 8  # crops tried for one in which every question keeps an object; then the whole picture


class Augmented(Source):
    """`views` random views of every record of `source`: item i is view i // len(source) of record i % len(source).

    A view is a crop of the picture's own shape, `crop` to 1 of its sides long, mirrored left to right and top to bottom half
    of the time each. Objects are listed by their left side and then their upper one. A view depends on `seed` and i alone,
    and records of one picture share it. View 0 is as random as the others: evaluate on the source itself. Raises InputError
    for records without exactly one image, and for chats, whose text cannot be changed to match.
    """

    def __init__(self, source: RecordSource, views: int, crop: float = 0.7, seed: int = 0):
        if views < 1 or not 0 < crop <= 1:
            raise InputError(f"augment: needs at least 1 view and a crop in 0..1, got {views} and {crop}")
        self.source, self.views, self.crop, self.seed = source, views, crop, seed
        self.name = getattr(source, "name", "data")

    def __len__(self) -> int:
        return self.views * len(self.source)

    def _record(self, index: int) -> Record:
        return self._seen([self.source[index % len(self.source)]], index)[0]

    def records(self, index: int) -> list[Record]:
        return self._seen(all_records(self.source, index % len(self.source)), index)

    def image_key(self, index: int) -> Any:
        view, inside = divmod(index, len(self.source))
        return view, image_key(self.source, inside)

    def where(self, index: int) -> str:
        return where(self.source, index % len(self.source))

    def _seen(self, records: list[Record], index: int) -> list[Record]:
        if any("messages" in record or len(record.get("images", ())) != 1 for record in records):
            raise InputError("augment: only for tasks about one image; leave it out")
        draw = np.random.default_rng([self.seed, index])
        image = load_image(records[0]["images"][0])
        records = [upright(record) for record in records]
        flips = draw.random(2) < 0.5
        found = [self._view(record, (0, 0), image.size, flips) for record in records]
        corner, size = (0, 0), image.size
        for _ in range(_ATTEMPTS):
            side = draw.uniform(self.crop, 1)
            width, height = (max(1, round(side * length)) for length in image.size)
            corner = int(draw.integers(image.width - width + 1)), int(draw.integers(image.height - height + 1))
            views = [self._view(record, corner, (width, height), flips) for record in records]
            if all(objects(view) or not objects(record) for view, record in zip(views, records, strict=True)):
                found, size = views, (width, height)
                break
        else:
            corner = (0, 0)
        picture = image.crop((*corner, corner[0] + size[0], corner[1] + size[1]))
        picture = _mirrored(picture, flips)
        return [{**view, "images": [picture]} for view in found]

    def _view(self, record: Record, corner: tuple[int, int], size: tuple[int, int], flips: np.ndarray) -> Record:
        """The record's numbers in the crop of `size` pixels at `corner`; objects outside of it are left out."""
        found = {**record, "size": list(size)}
        for boxes, companions in (("boxes", ("labels", "points")), ("crowd_boxes", ("crowd_labels",)), ("box", ())):
            if boxes not in record:
                continue
            moved, kept = _moved(np.reshape(record[boxes], (-1, 4)), corner, size, flips)
            order = np.flatnonzero(kept)
            if boxes == "boxes":  # an order by place must hold in the view
                order = order[np.lexsort((moved[order, 1], moved[order, 0]))]
            for name in companions:
                if name in record:
                    found[name] = [record[name][k] for k in order]
            found[boxes] = moved[order].tolist() if boxes != "box" else (moved[0].tolist() if kept[0] else [])
        if "points" in record:
            if "boxes" in record:
                corners = np.reshape(found["boxes"], (-1, 4))
                found["points"] = ((corners[:, :2] + corners[:, 2:]) / 2).tolist()
            else:
                found["points"] = _moved_points(np.reshape(record["points"], (-1, 2)), corner, size, flips).tolist()
        if "count" in record:
            found["count"] = len(found["points"])
        return found


def objects(record: Mapping[str, Any]) -> int:
    """How many objects a record's answer names."""
    if "box" in record:
        return int(len(record["box"]) > 0)
    return len(record.get("boxes", record.get("points", ())))


def _mirrored(picture: Image.Image, flips: Sequence[bool] | np.ndarray) -> Image.Image:
    picture = ImageOps.mirror(picture) if flips[0] else picture
    return ImageOps.flip(picture) if flips[1] else picture


def _moved(
    boxes: Float[np.ndarray, "N 4"], corner: tuple[int, int], size: tuple[int, int], flips: np.ndarray
) -> tuple[Float[np.ndarray, "N 4"], Bool[np.ndarray, "N"]]:
    """Boxes in the view, cut at its edges, and which of them are in it by SEEN of their area or more."""
    shifted = boxes - np.tile(corner, 2)
    cut = np.clip(shifted, 0, np.tile(size, 2))
    area = np.prod(shifted[:, 2:] - shifted[:, :2], axis=-1)
    kept = np.prod(cut[:, 2:] - cut[:, :2], axis=-1) >= SEEN * area
    for axis in np.flatnonzero(flips):
        cut[:, [axis, axis + 2]] = size[axis] - cut[:, [axis + 2, axis]]
    return cut, kept


def _moved_points(
    points: Float[np.ndarray, "N 2"], corner: tuple[int, int], size: tuple[int, int], flips: np.ndarray
) -> Float[np.ndarray, "M 2"]:
    """Points in the view; those outside of it are left out."""
    moved = points - corner
    moved = moved[((moved >= 0) & (moved <= size)).all(-1)]
    return np.where(flips, np.asarray(size) - moved, moved)
