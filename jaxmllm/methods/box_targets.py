"""Warm-up targets of annotated photographs: what each cell of a picture shows, from the boxes of detection records."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxmllm.data.examples import sized
from jaxmllm.data.images import PixelConfig, load_image
from jaxmllm.data.sources import RecordSource, where
from jaxmllm.errors import InputError
from jaxmllm.world.grid import cell_winners


class BoxTargets:
    """Detection records as pictures with `grid_targets`, see `WorldSource.grid_targets`: the fields are `label` and the box.

    An object covers the ellipse in its box, and smaller ones lie on larger ones. Coordinates are pixels of the resized
    picture. Raises InputError for records of another task, and where pictures differ in their resized size.
    """

    def __init__(self, source: RecordSource, pixels: PixelConfig):
        self.source, self.pixels = source, pixels
        first = source[0]
        if first.get("task") != "detection" or "categories" not in first:
            raise InputError(
                f"{where(source, 0)}: a vision warm-up needs sources of the world, or detection records with categories"
            )
        self.words: dict[str, tuple[str, ...]] = {"label": tuple(first["categories"])}
        self.size: list[int] = sized(first, pixels)["resized"]

    def __len__(self) -> int:
        return len(self.source)

    def grid_targets(self, index: int, cell: int) -> dict[str, Any]:
        record = sized(self.source[index], self.pixels)
        if record["resized"] != self.size:
            raise InputError(f"{where(self.source, index)}: resized to {record['resized']}, others to {self.size}")
        scale = np.tile(np.divide(self.size, record["size"]), 2)
        boxes = np.reshape(record["boxes"], (-1, 4)) * scale
        winner = cell_winners(ellipses(boxes, self.size), cell, len(boxes))
        whole = np.clip(np.rint(boxes), 0, np.tile(self.size, 2)).astype(np.int32)
        names = self.words["label"]
        # the last row is what a cell without an object finds
        table = np.full((len(boxes) + 1, 5), -1, np.int32)
        table[:-1, 0], table[:-1, 1:] = [names.index(label) for label in record["labels"]], whole
        found = {name: table[winner, k] for k, name in enumerate(("label", "x1", "y1", "x2", "y2"))}
        return found | {"image": load_image(record["images"][0], where(self.source, index))}


def ellipses(boxes: Float[np.ndarray, "N 4"], size: list[int]) -> Int[np.ndarray, "H W"]:
    """Number of the object that each pixel shows, -1 for none: the ellipse in its box, smaller ones on top."""
    y, x = np.mgrid[: size[1], : size[0]] + 0.5
    owner = np.full((size[1], size[0]), -1)
    half = np.maximum((boxes[:, 2:] - boxes[:, :2]) / 2, 0.5)
    for k in np.argsort(-half.prod(-1), kind="stable"):
        centre = (boxes[k, :2] + boxes[k, 2:]) / 2
        owner[((x - centre[0]) / half[k, 0]) ** 2 + ((y - centre[1]) / half[k, 1]) ** 2 <= 1] = k
    return owner
