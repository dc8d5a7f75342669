"""Folders that TensorFlow Datasets prepared as ArrayRecord, read without TensorFlow."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxmllm.data.formats import Record, Source
from jaxmllm.errors import InputError


def is_prepared(folder: Path) -> bool:
    """Whether a folder, or the one version below it, was prepared by TFDS."""
    return folder.is_dir() and bool(_infos(folder))


def _infos(folder: Path) -> list[Path]:
    return [folder / "dataset_info.json"] if (folder / "dataset_info.json").is_file() else sorted(
        [*folder.glob("*/dataset_info.json"), *folder.glob("*/*/dataset_info.json")]
    )  # fmt: skip


def open_prepared(folder: Path, split: str | None) -> Source:
    """Referring expressions of TFDS's `ref_coco`, or records of the world's builder, told apart by their features."""
    infos = _infos(folder)
    if len(infos) != 1:
        found = ", ".join(str(info.parent) for info in infos) or "none"
        raise InputError(f"{folder}: expected one dataset prepared by TFDS, found {found}; name its version folder")
    folder = infos[0].parent
    try:
        info = json.loads(infos[0].read_text(encoding="utf-8"))
        splits = [entry["name"] for entry in info["splits"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{infos[0]}: not readable ({error})") from None
    if info.get("fileFormat") != "array_record":
        raise InputError(
            f"{folder}: prepared as {info.get('fileFormat')}, which needs TensorFlow to read; "
            "prepare it with file_format='array_record'"
        )
    if split is None and len(splits) == 1:
        split = splits[0]
    name = (split or "").partition("[")[0]  # TFDS's slices, train[:10%]
    if name not in splits:
        raise InputError(f"{folder}: split {split!r} is unknown; it has {', '.join(splits)}")
    prepared = Prepared(folder, str(split))
    if {"image", "objects"} <= set(prepared.features) and "refexp" in prepared.features["objects"]:
        return RefCocoTfds(prepared)
    if {"id", "images", "record"} <= set(prepared.features):
        return WorldTfds(prepared)
    raise InputError(f"{folder}: its features {', '.join(prepared.features)} are none that can be read here")


class Prepared:
    """One split, opened anew in each process; only the features asked for are decoded."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        self._open()

    def _open(self) -> None:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self.folder)
        self.features = builder.info.features
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._data = builder.as_data_source(split=self.split, deserialize_method=raw)
        self._subsets: dict[tuple[str, ...], Any] = {}

    def __getstate__(self):
        return {"folder": self.folder, "split": self.split}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int, *names: str) -> Record:
        """The named features of item `index`; `objects/bbox` is one inside a sequence."""
        if names not in self._subsets:
            self._subsets[names] = self._subset(names)
        return self._subsets[names].deserialize_example_np(self._data[index])

    def _subset(self, names: tuple[str, ...]) -> Any:
        import tensorflow_datasets as tfds

        found: dict[str, Any] = {}
        for name in names:
            outer, _, inner = name.rpartition("/") if name not in self.features else (name, "", "")
            if inner:
                found.setdefault(outer, {})[inner] = self.features[outer][inner]
            else:
                found[name] = self.features[name]
        sequences = {k: tfds.features.Sequence(v) if isinstance(v, dict) else v for k, v in found.items()}
        return tfds.features.FeaturesDict(sequences)


class WorldTfds(Source):
    """Records of the world, written by `jaxmllm.world.tfds_builder`; questions about one picture follow each other."""

    def __init__(self, prepared: Prepared):
        self.prepared, self.name = prepared, f"{prepared.folder} ({prepared.split})"

    def __len__(self) -> int:
        return len(self.prepared)

    def image_key(self, index: int) -> tuple[str, ...]:
        _, _, *picture, _ = self.prepared.read(index, "id")["id"].decode().split("-")
        return tuple(picture)  # split, seed, number

    def _record(self, index: int) -> Record:
        row = self.prepared.read(index, "images", "record")
        return {**json.loads(row["record"]), "images": list(row["images"])}


class RefCocoTfds(Source):
    """TFDS's `ref_coco`: one record an expression. Boxes are its shares of the sides, made pixels to 0.01."""

    def __init__(self, prepared: Prepared):
        self.prepared, self.name = prepared, f"{prepared.folder} ({prepared.split})"
        places = []
        for image in range(len(prepared)):
            refexp = prepared.read(image, "objects/refexp")["objects"]["refexp"]["raw"]
            places += [(image, k, n) for k, texts in enumerate(refexp) for n in range(len(texts))]
        self.places = np.array(places, np.int64).reshape(-1, 3)
        if not places:
            raise InputError(f"{self.name}: it holds no referring expressions")

    def __len__(self) -> int:
        return len(self.places)

    def image_key(self, index: int) -> int:
        return int(self.places[index, 0])

    def _record(self, index: int) -> Record:
        image, thing, number = self.places[index].tolist()
        row = self.prepared.read(image, "image", "image/id", "objects/bbox", "objects/refexp")
        height, width = row["image"].shape[:2]
        y1, x1, y2, x2 = row["objects"]["bbox"][thing].tolist()
        raw = row["objects"]["refexp"]["raw"][thing][number]
        return {
            "id": f"{row['image/id']}-{row['objects']['refexp']['refexp_id'][thing][number]}",
            "task": "grounding",
            "image_id": int(row["image/id"]),
            "images": [row["image"]],
            "size": [width, height],
            "expression": raw.decode() if isinstance(raw, bytes) else str(raw),
            "box": [round(v, 2) for v in (x1 * width, y1 * height, x2 * width, y2 * height)],
        }
