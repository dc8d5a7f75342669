"""Pictures with objects, and what is true about them: drawn scenes, COCO and GQA annotations."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from jaxtyping import Int8

from jaxmllm.data.coco import CocoSource
from jaxmllm.data.formats import image_root
from jaxmllm.data.rows import existing, load_json
from jaxmllm.errors import InputError
from jaxmllm.tasks import relation_graphs
from jaxmllm.tasks.relation_graphs import SCENE_SUBSTITUTES, Objects, Oracle
from jaxmllm.tasks.relation_phrases import SUBSTITUTES
from jaxmllm.world.expressions import NEAR
from jaxmllm.world.scenes import ATTRIBUTES, SPATIAL, SceneSpec, make_scene

log = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")
SMALLEST = 0.005  # share of a photograph that a box must cover for its kind to be spoken of
MARGIN = 0.06  # dead zone of a photograph, share of its shorter side


@dataclasses.dataclass(frozen=True)
class Picture:
    """What is in one picture. `image`: a file, or the pixels of a drawn scene."""

    id: str
    image: Any
    size: tuple[int, int]
    oracle: Oracle
    relations: tuple[str, ...]  # that may be said
    substitutes: Mapping[str, tuple[str, ...]]  # for each relation


def split_of(name: str) -> str:
    """The split of a photograph: eight tenths train, one val, one test, by its name."""
    return {0: "test", 1: "val"}.get(crc32(name.encode()) % 10, "train")


def world(spec: SceneSpec, split: str, seed: int) -> Iterator[Picture]:
    """Scenes of the procedural world without end."""
    count = 0
    while True:
        scene = make_scene(spec, seed, split, count)
        shorter = min(spec.size)
        things = [{name: getattr(o, name) for name in ATTRIBUTES} | {"box": list(o.box)} for o in scene.objects]
        oracle = Oracle(things, tau=spec.margin * shorter, near=NEAR * shorter)
        known = {r: s for r, s in SCENE_SUBSTITUTES.items() if r in spec.relations}
        yield Picture(f"{split}-{seed}-{count}", scene.draw(), spec.size, oracle, spec.relations, known)
        count += 1


class PhotoOracle(Oracle):
    """Truth about a photograph from its boxes, stricter than in drawn scenes, since people see depth and extent.

    left of, right of, above, below: true if the centre lies that way by `tau` and more than across, and the boxes share at
    most a fifth of the smaller one's extent that way; false if it lies the other way by `tau`; else undecided. `stated`:
    relation -> pairs that somebody annotated; other relations of `closed` are taken as false elsewhere, which nothing verifies.
    Objects that are too small, or of a kind of which not each is marked, fit no phrase (`silent`).
    """

    def __init__(
        self, objects: Objects, size: tuple[int, int], silent: set[int], stated: Mapping[str, set] | None = None
    ):
        super().__init__(objects, tau=MARGIN * min(size), near=MARGIN * min(size))
        self.silent, self.stated = silent, stated or {}

    def candidates(self, words) -> list[int]:
        return [i for i in super().candidates(words) if i not in self.silent]

    def table(self, relation: str) -> Int8[np.ndarray, "N N"]:
        if relation not in self._tables:
            n = len(self.objects)
            if relation in SPATIAL:
                table = _apart(self.objects, relation, self.options["tau"])
            else:
                table = np.zeros((n, n), np.int8)
            for i, j in self.stated.get(relation, ()):
                table[i, j] = 1
            self._tables[relation] = table
        return self._tables[relation]


def _apart(objects: Objects, relation: str, tau: float) -> Int8[np.ndarray, "N N"]:
    boxes = np.array([o["box"] for o in objects], np.float64).reshape(-1, 4)
    low, high = boxes[:, :2], boxes[:, 2:]
    axis, sign = (0 if relation in ("left of", "right of") else 1), (1 if relation in ("left of", "above") else -1)
    offset = ((low + high)[None] - (low + high)[:, None]) / 2  # from i to j
    along, across = sign * offset[..., axis], np.abs(offset[..., 1 - axis])
    shared = np.minimum(high[:, None, axis], high[None, :, axis]) - np.maximum(low[:, None, axis], low[None, :, axis])
    extent = (high - low)[:, axis]
    few = shared <= 0.2 * np.minimum(extent[:, None], extent[None])
    table = np.where((along > tau) & (along > across) & few, 1, np.where(along < -tau, 0, -1)).astype(np.int8)
    np.fill_diagonal(table, 0)
    return table


def coco(path: str, images: str | None = None) -> Iterator[Picture]:
    """Photographs of a COCO JSON file. A category's name is the phrase; crowds and small boxes silence their category."""
    source = CocoSource(path, images=images)
    for index in range(len(source)):
        record = source[index]
        size = tuple(record["size"])
        boxes, labels = np.asarray(record["boxes"], np.float64).reshape(-1, 4), list(record["labels"])
        small = (boxes[:, 2:] - boxes[:, :2]).prod(-1) < SMALLEST * size[0] * size[1]
        vague = {name for name, tiny in zip(labels, small, strict=True) if tiny} | set(record.get("crowd_labels", ()))
        things = [{"shape": name, "box": box} for name, box in zip(labels, boxes.tolist(), strict=True)]
        silent = {i for i, name in enumerate(labels) if name in vague}
        known = {r: SCENE_SUBSTITUTES[r] for r in SPATIAL}
        oracle = PhotoOracle(things, size, silent)
        yield Picture(Path(record["images"][0]).stem, record["images"][0], size, oracle, SPATIAL, known)


def gqa(path: str, images: str | None = None) -> Iterator[Picture]:
    """Photographs of a GQA scene-graph file: {image: {"width", "height", "objects": {id: {"name", "x", "y", "w", "h",
    "attributes", "relations": [{"name", "object"}]}}}}. Entries that do not fit are left out with a warning."""
    file = existing(path)
    raw = load_json(file)
    if not isinstance(raw, dict) or not raw:
        raise InputError(f"{file}: not GQA scene graphs, which are an object of images")
    root = image_root(file, images, f"{next(iter(raw))}.jpg")
    for name, entry in raw.items():
        try:
            yield _scene_graph(name, entry, root)
        except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
            what = error if isinstance(error, InputError) else f"{type(error).__name__} {error}"
            log.warning("%s: image %s is left out: %s", file, name, what)


def _scene_graph(name: str, entry: Mapping[str, Any], root: Path) -> Picture:
    size = (int(entry["width"]), int(entry["height"]))
    things: list[dict[str, Any]] = []
    place: dict[str, int] = {}
    stated: dict[str, set[tuple[int, int]]] = {}
    for key, thing in entry["objects"].items():
        x, y, w, h = (float(thing[k]) for k in "xywh")
        if w <= 0 or h <= 0 or x < 0 or y < 0 or x + w > size[0] + 1 or y + h > size[1] + 1:
            raise InputError(f"objects[{key}]: box {[x, y, w, h]} is outside the picture of {size[0]} x {size[1]}")
        if not str(thing["name"]).strip():
            raise InputError(f"objects[{key}]: name is empty")
        place[key] = len(things)
        look = {"colour": str(thing["attributes"][0])} if thing.get("attributes") else {}
        things.append({"shape": str(thing["name"]), "box": [x, y, x + w, y + h], **look})
    for key, thing in entry["objects"].items():
        for relation in thing.get("relations", ()):
            if relation["object"] not in place:
                raise InputError(
                    f"objects[{key}]: relation to {relation['object']!r}, which is no object of the picture"
                )
            plain = str(relation["name"]).removeprefix("to the ")
            if plain in SUBSTITUTES:
                stated.setdefault(plain, set()).add((place[key], place[relation["object"]]))
    silent = {
        i for i, o in enumerate(things)
        if (o["box"][2] - o["box"][0]) * (o["box"][3] - o["box"][1]) < SMALLEST * size[0] * size[1]
    }  # fmt: skip
    oracle = PhotoOracle(things, size, silent, stated)
    return Picture(name, str(root / f"{name}.jpg"), size, oracle, tuple(stated), SUBSTITUTES)


def verified(relation: str) -> bool:
    """Whether boxes or attributes decide a relation: a mismatch by it is certain."""
    return relation in relation_graphs.RELATIONS
