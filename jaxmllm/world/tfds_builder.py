"""Slices of the world on disk: a TFDS builder that writes ArrayRecord. `jaxmllm.data.tfds` reads them.

No TensorFlow, neither for writing nor for reading. (TFDS's `Image` inside a `Sequence` would need it, so the frames of
a record are one zlib-compressed uint8 tensor.) The folder is an ordinary TFDS data set, which
`tfds.builder_from_directory(folder).as_data_source(split)` reads too.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxmllm.errors import InputError
from jaxmllm.world.source import WorldSource


class WorldDataset(tfds.core.GeneratorBasedBuilder):
    """Records of world sources, one source a split, in index order; every question about a picture is an item."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None  # no citation or tag files
    url_infos: dict[str, Any] = {}  # no downloads; looking for their checksums would import importlib_resources

    def __init__(self, *, sources: Mapping[str, WorldSource], start: int = 0, stop: int | None = None, **kwargs):
        self._sources, self._start, self._stop = sources, start, stop
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        sources = "; ".join(f"{name}: {source!r}" for name, source in self._sources.items())
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Procedural scenes, pages and clips. Items {self._start}..{self._stop or 'end'} of {sources}",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "images": tfds.features.Tensor(shape=(None, None, None, 3), dtype=np.uint8, encoding="zlib"),
                    "record": tfds.features.Text(doc="all other fields, as JSON"),
                }
            ),
            disable_shuffling=True,  # items keep the order of their index
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {name: self._generate_examples(source) for name, source in self._sources.items()}

    def _generate_examples(self, source: WorldSource) -> Iterator[tuple[int, dict[str, Any]]]:
        stop = len(source) if self._stop is None else min(self._stop, len(source))
        for index in range(self._start, stop):
            for k, record in enumerate(source.records(index)):
                rest = {key: value for key, value in record.items() if key != "images"}
                example = {"id": record["id"], "images": np.stack(record["images"]), "record": json.dumps(rest)}
                yield index * source.questions + k, example


def materialise(
    sources: Mapping[str, WorldSource], folder: str | Path, start: int = 0, stop: int | None = None
) -> Path:
    """Writes items start..stop - 1 of each source as one split of a TFDS data set in ArrayRecord files.

    Returns the folder of the data set, inside `folder`: what `data.tfds.open_prepared` and TFDS itself open.

    Raises:
        InputError: the slice is empty, or the folder already holds such a data set.
    """
    if any(start >= (len(source) if stop is None else min(stop, len(source))) for source in sources.values()):
        raise InputError(f"slice {start}..{stop}: a source has no such items")
    builder = WorldDataset(sources=sources, start=start, stop=stop, data_dir=str(folder), file_format="array_record")
    target = Path(builder.data_dir)
    if target.exists():
        raise InputError(f"{target}: there is a data set already; remove it or choose another folder")
    builder.download_and_prepare()
    return target
