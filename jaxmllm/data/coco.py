"""COCO JSON as grounding, counting and detection records, and referring expressions in COCO's manner."""

import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxmllm.data.formats import Record, Source, box, choose, image_root, numbers, shorten
from jaxmllm.data.rows import existing, load_json
from jaxmllm.errors import InputError

log = logging.getLogger(__name__)
COCO_TASKS = ("detection", "counting", "grounding")
CROWD = ("drop", "keep")
ORDERS = ("file", "left")


class CocoSource(Source):
    """Questions about the images of a COCO JSON file (`images`, `annotations`, `categories`).

    - detection: one record an image. `crowd="drop"` leaves crowd regions out of `boxes` and `labels`; `"keep"` lists
      them too. Both give `crowd_boxes` and `crowd_labels`, which a metric must ignore.
    - counting: one record an image and category that occurs in it, except where a part of it is a crowd.
    - grounding: one record an image and category of which there is exactly one, which the name therefore singles out.

    `order`: objects of an image as the file lists them, or by their left side and then their upper one, as in the world: a
    sequence that can be learned.

    Annotations of images that the file does not list are left out and counted, and so are boxes without area. A category that
    no object has and that only heads others, as Roboflow's root does, is not asked for.

    Records carry `image_id`. `categories` keeps only objects with these names; `category_ids` maps names to the file's
    ids. Boxes are pixels of the original image. Images without an object asked for have no record, unless `empty`.
    """

    def __init__(
        self,
        path: str | Path,
        task: Sequence[str] = ("detection",),
        images: str | None = None,
        categories: Sequence[str] = (),
        crowd: str = "drop",
        max_objects: int = 0,
        empty: bool = False,
        order: str = "file",
    ):
        """`images`: folder of the images, else it is looked for near the file. `max_objects`: leave out questions
        with more objects in the answer, 0 for no limit. Raises InputError naming the file, the entry and the field.
        """
        path = existing(path)
        self.name, self.crowd = str(path), choose(crowd, CROWD, "crowd")
        self.tasks = tuple(choose(t, COCO_TASKS, "task") for t in ([task] if isinstance(task, str) else task))
        raw = load_json(path)
        if not isinstance(raw, dict) or not all(isinstance(raw.get(k), list) for k in ("images", "categories")):
            raise InputError(f"{path}: not COCO JSON, which is an object with lists images, annotations, categories")
        if not isinstance(raw.get("annotations"), list):
            raise InputError(f"{path}: annotations are missing; image_info files without them cannot be used here")
        self.category_ids = _categories(_asked_for(raw["categories"], raw["annotations"], path), categories, path)
        self.names = list(self.category_ids)
        self._read_images(raw["images"], path)
        by_left = choose(order, ORDERS, "order") == "left"
        self._read_annotations(raw["annotations"], {_id(entry["id"]) for entry in raw["categories"]}, path, by_left)
        self.root = image_root(path, images, self.files[0])
        self.index = self._questions(max_objects, empty)
        if not len(self.index):
            raise InputError(f"{path}: no image has a question for {', '.join(self.tasks)} with these options")

    def _read_images(self, entries: Sequence[Any], path: Path) -> None:
        if not entries:
            raise InputError(f"{path}: the list images is empty")
        self.files: list[str] = []
        self.image_ids: list[Any] = []
        sizes = []
        for k, entry in enumerate(entries):
            try:
                self.files.append(str(entry["file_name"]))
                self.image_ids.append(_id(entry["id"]))
                sizes.append((int(entry.get("width") or 0), int(entry.get("height") or 0)))
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path}: images[{k}]: file_name or id is missing or malformed ({error})") from None
        self.sizes = np.array(sizes, np.int64)  # width, height; 0 where the file does not say
        self._place = {image_id: k for k, image_id in enumerate(self.image_ids)}
        if len(self._place) < len(self.image_ids):
            raise InputError(f"{path}: two images have the same id")

    def _read_annotations(self, entries: Sequence[Any], known: set[Any], path: Path, by_left: bool) -> None:
        """Objects as arrays, ordered by image: 860,000 of them must fit in each worker."""
        column = {number: k for k, number in enumerate(self.category_ids.values())}
        rows, flat, absent = [], 0, 0
        for k, entry in enumerate(entries):
            try:
                image, category = self._place.get(_id(entry["image_id"])), _id(entry["category_id"])
                if image is None:  # a file of which some images were taken out
                    absent += 1
                    continue
                values = entry["bbox"]
                if category not in known:
                    raise InputError(f"category_id {category!r} is not in categories")
                if category not in column:
                    continue
                x, y, w, h = numbers(values, 4, "bbox")
            except (InputError, KeyError, TypeError, AttributeError) as error:
                reason = error if isinstance(error, InputError) else f"field {error} is missing or malformed"
                raise InputError(f"{path}: annotations[{k}]: {reason}") from None
            if w <= 0 or h <= 0:
                flat += 1
                continue
            rows.append((image, column[category], bool(entry.get("iscrowd", 0)), x, y, x + w, y + h))
        if absent:
            log.warning("%s: %d annotations of images that the file does not list are left out", path, absent)
            if absent == len(entries):
                raise InputError(f"{path}: no annotation has the image_id of an image, such as {self.image_ids[0]!r}")
        if flat:
            log.warning("%s: %d boxes without area are left out", path, flat)
        # stable: the file's order inside an image, unless another is asked for
        rows.sort(key=lambda row: (row[0], *row[3:5]) if by_left else row[0])
        table = np.array([row[:3] for row in rows], np.int64).reshape(-1, 3)
        self.labels = table[:, 1]  # index into names
        self.is_crowd = table[:, 2].astype(bool)
        self.boxes = np.array([row[3:] for row in rows]).reshape(-1, 4)
        self.ends = np.searchsorted(table[:, 0], np.arange(len(self.files) + 1))

    def _questions(self, limit: int, empty: bool) -> Int[np.ndarray, "records 3"]:
        """Rows (image, task, category), all questions of an image together."""
        found = []
        for image, (start, stop) in enumerate(pairwise(self.ends.tolist())):
            labels, crowd = self.labels[start:stop], self.is_crowd[start:stop]
            counts = np.bincount(labels[~crowd], minlength=len(self.names))
            blurred = set(labels[crowd].tolist())
            single = [c for c in np.flatnonzero(counts).tolist() if c not in blurred]
            for number, task in enumerate(self.tasks):
                objects = int((~crowd).sum()) if self.crowd == "drop" else len(labels)
                if task == "detection" and (objects or empty) and not (limit and objects > limit):
                    found.append((image, number, -1))
                elif task == "counting":
                    found += [(image, number, c) for c in single if not (limit and counts[c] > limit)]
                elif task == "grounding":
                    found += [(image, number, c) for c in single if counts[c] == 1]
        return np.array(found, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.index)

    def image_key(self, index: int) -> int:
        return int(self.index[index, 0])

    def where(self, index: int) -> str:
        return f"{self.name}, record {index} ({self.files[self.image_key(index)]})"

    def _record(self, index: int) -> Record:
        image, task, category = self.index[index].tolist()
        name, objects = self.tasks[task], np.arange(*self.ends[image : image + 2])
        head = {
            "id": f"{self.image_ids[image]}-{name}" + (f"-{self.names[category]}" if category >= 0 else ""),
            "task": name,
            "image_id": self.image_ids[image],
            "images": [str(self.root / self.files[image])],
            **({"size": self.sizes[image].tolist()} if self.sizes[image].all() else {}),
        }
        if name == "detection":
            return head | self._detection(objects)
        boxes = self.boxes[objects[self.labels[objects] == category]]
        label = self.names[category]
        if name == "grounding":
            return head | {"expression": label, "box": boxes[0].tolist()}
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        return head | {"label": label, "count": len(boxes), "points": centres.tolist(), "boxes": boxes.tolist()}

    def _detection(self, objects: Int[np.ndarray, "n"]) -> Record:
        def part(chosen):
            return self.boxes[chosen].tolist(), [self.names[c] for c in self.labels[chosen]]

        crowd = objects[self.is_crowd[objects]]
        boxes, labels = part(objects if self.crowd == "keep" else objects[~self.is_crowd[objects]])
        crowd_boxes, crowd_labels = part(crowd)
        return {
            "categories": list(self.names),
            "boxes": boxes,
            "labels": labels,
            "crowd_boxes": crowd_boxes,
            "crowd_labels": crowd_labels,
        }


def _id(value: Any) -> Any:
    """An id as other parts of the file may write it: 7, 7.0 and "7" are the same."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and value.isdecimal() and str(int(value)) == value else value


def _asked_for(entries: Sequence[Any], annotations: Sequence[Any], path: Path) -> list[Any]:
    """The categories without those that only head others, such as the root that Roboflow writes: no object carries them."""
    try:
        carried = {_id(thing.get("category_id")) for thing in annotations if isinstance(thing, dict)}
        heads = [
            entry
            for entry in entries
            if _id(entry["id"]) not in carried
            and any(other is not entry and other.get("supercategory") == entry["name"] for other in entries)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: categories need id and name ({error})") from None
    if heads:
        names = ", ".join(str(entry["name"]) for entry in heads)
        log.warning("%s: categories that no object has and that only head others are not asked for: %s", path, names)
    return [entry for entry in entries if entry not in heads]


def _categories(entries: Sequence[Any], wanted: Sequence[str], path: Path) -> dict[str, int]:
    """Name -> id in the order of the ids, of all categories or the wanted ones."""
    try:
        found = {str(entry["name"]): _id(entry["id"]) for entry in sorted(entries, key=lambda entry: _id(entry["id"]))}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: categories need id and name ({error})") from None
    if len(found) < len(entries):
        raise InputError(f"{path}: two categories have the same name")
    if not found:
        raise InputError(f"{path}: the list categories is empty")
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(f"{path}: categories: {missing[0]!r} is unknown; the file has {', '.join(found)}")
    return {name: number for name, number in found.items() if not wanted or name in wanted}


# ---------------------------------------------------------------- referring expressions


def referring_rows(path: Path, split: str | None, dataset: str | None) -> list[Record]:
    """Rows (see `records.referring`) of the JSON forms in which RefCOCO, RefCOCO+ and RefCOCOg are handed on:

    - a folder with `instances.json` and `refs*.json`, the UNC release with its pickles saved as JSON;
    - `refcoco.json`, written by TFDS's script: {"ref": [..], "coco_anns": {..}};
    - COCO JSON with one captioned entry in `images` for each expression (MDETR's files).

    `split` (val, testA, ..) and `dataset` (refcoco_unc, refcocog_umd, ..) choose where a file holds several.
    """
    if path.is_dir():
        refs = sorted(path.glob("refs*.json"))
        if len(refs) != 1 or not (path / "instances.json").is_file():
            raise InputError(f"{path}: expected instances.json and one refs*.json, found {len(refs)} of the latter")
        return _refs(load_json(refs[0]), load_json(path / "instances.json"), split, refs[0])
    raw = load_json(path)
    if isinstance(raw, dict) and {"ref", "coco_anns"} <= set(raw):
        return _tfds_refs(raw, split, dataset, path)
    if isinstance(raw, dict) and {"images", "annotations"} <= set(raw):
        return _captioned(raw, path)
    raise InputError(f"{path}: no known form of referring expressions in JSON")


def _pick(items: list[Any], split: str | None, path: Path, key: str = "split") -> list[Any]:
    known = list(dict.fromkeys(str(item.get(key)) for item in items))
    if split is None and len(known) > 1:
        raise InputError(f"{path}: it holds several; choose {key}={' or '.join(known)}")
    found = [item for item in items if split is None or str(item.get(key)) == split]
    if not found:
        raise InputError(f"{path}: {key} {split!r} is unknown; the file has {', '.join(known)}")
    return found


def _refs(refs: Any, instances: Any, split: str | None, path: Path) -> list[Record]:
    images = {entry["id"]: entry for entry in instances["images"]}
    objects = {entry["id"]: entry for entry in instances["annotations"]}
    rows = []
    for k, ref in enumerate(_pick(refs, split, path)):
        image, thing = images.get(ref.get("image_id")), objects.get(ref.get("ann_id"))
        if image is None or thing is None:
            raise InputError(f"{path}: refs[{k}]: its image_id or ann_id is not in instances.json")
        rows += [_row(ref["ref_id"], s, image, thing["bbox"]) for s in ref["sentences"]]
    return rows


def _tfds_refs(raw: Record, split: str | None, dataset: str | None, path: Path) -> list[Record]:
    refs = [{**ref, "name": f"{ref['dataset']}_{ref['dataset_partition']}"} for ref in raw["ref"]]
    refs = _pick(_pick(refs, dataset, path, "name"), split, path)
    rows = []
    for ref in refs:
        image = raw["coco_anns"][str(ref["image_id"])]["info"]
        rows += [_row(ref["ref_id"], s, image, ref["ann"]["bbox"]) for s in ref["sentences"]]
    return rows


def _row(ref_id: Any, sentence: Record, image: Record, bbox: Any) -> Record:
    return {
        "id": f"{ref_id}-{sentence['sent_id']}",
        "file_name": image["file_name"],
        "width": image["width"],
        "height": image["height"],
        "expression": sentence.get("sent") or sentence["raw"],
        "box": box(bbox, "bbox", "xywh"),
    }


def _captioned(raw: Record, path: Path) -> list[Record]:
    objects: dict[Any, list[Any]] = {}
    for thing in raw["annotations"]:
        objects.setdefault(thing.get("image_id"), []).append(thing)
    rows = []
    for k, image in enumerate(raw["images"]):
        things = objects.get(image.get("id"), [])
        if "caption" not in image or len(things) != 1:
            raise InputError(
                f"{path}: images[{k}]: expected a caption and one annotation, got "
                f"{shorten(image.get('caption'))} and {len(things)}; for plain COCO use coco:{path}"
            )
        sentence = {"sent_id": image["id"], "sent": image["caption"]}
        rows.append(_row(image.get("original_id", image["id"]), sentence, image, things[0]["bbox"]))
    return rows
