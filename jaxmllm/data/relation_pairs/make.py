"""`make`: a folder of pairs from one of the kinds of data that `jaxmllm data relations --from` names."""

import dataclasses
import typing
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from jaxmllm.data.relation_pairs import build, pictures, written
from jaxmllm.data.relation_pairs.pictures import Picture
from jaxmllm.data.rows import existing
from jaxmllm.data.sources.spec import convert
from jaxmllm.errors import InputError
from jaxmllm.tasks.relation_graphs import CELLS
from jaxmllm.world.scenes import SceneSpec
from jaxmllm.world.source import DEFAULT_SPECS

KINDS = ("world", "coco", "gqa", "refcoco", "gitm")
PASSES = 4  # over the photographs of a file, whose pairs differ from pass to pass


def make(
    source: str,
    out: Path,
    cell: str = "S16",
    pairs: int = 2000,
    val_pairs: int = 200,
    test_pairs: int = 200,
    rivals: int = 1,
    per_picture: int = 4,
    apart: bool = True,
    seed: int = 0,
    images: str | None = None,
) -> dict[str, Any]:
    """Writes `out` with train, val and test files of records, and a summary, which it returns.

    InputError for an unknown kind or option, a folder that holds data already, and files that do not fit.
    """
    kind, _, rest = source.partition("?")[0].partition(":")
    path, query = rest, source.partition("?")[2]
    if kind not in KINDS:
        raise InputError(f"--from {source!r}: write one of {', '.join(KINDS)}, such as coco:instances.json")
    if cell not in CELLS:
        raise InputError(f"--cell {cell!r}: use one of {', '.join(CELLS)}")
    for name, value in (("pairs", pairs), ("per_picture", per_picture)):
        if value < 1:
            raise InputError(f"--{name} {value}: must be at least 1")
    if kind not in ("world", "refcoco") and query:
        raise InputError(f"--from {source!r}: {kind} takes no options after a question mark; images have --images")
    plan = build.parts(cell, pairs, val_pairs, test_pairs)
    if kind == "world":
        spec = _world(query)
        options = build.Options(seed, rivals, 1, apart)
        return build.build(lambda split: pictures.world(spec, split, seed), plan, options, out)
    if kind in ("coco", "gqa"):
        return build.build(_photographs(kind, path, images), plan, build.Options(seed, rivals, per_picture, apart), out)
    folder = build.Folder(out)
    if kind == "refcoco":
        whole = f"refcoco:{path}" + (f"?{query}" if query else "")
        found: dict[str, list[build.Record]] = {split: [] for split in pictures.SPLITS}
        for split, record in written.refcoco(whole, seed):
            found[split].append(record)
    else:
        root = existing(path, folder=True)
        written.refuse_pickles(root)
        if images is None:
            raise InputError("--images: name the folder of the GQA photographs")
        found = {split: list(written.gitm(root, split, existing(images, folder=True))) for split in pictures.SPLITS}
    limits = {"train": pairs, "val": val_pairs, "test": test_pairs}
    for split, rows in found.items():
        if rows and limits[split]:
            kept = list(_complete(rows, limits[split]))
            folder.write(split, [record | {"images": [folder.path(record["images"][0])]} for record in kept])
    return folder.summary


def _complete(rows: list[build.Record], pairs: int) -> Iterator[build.Record]:
    """Twins next to each other, so many pairs; without a twin a record is left out."""
    twins: dict[str, list[build.Record]] = {}
    for row in rows:
        twins.setdefault(row["twin"], []).append(row)
    for both in islice((both for both in twins.values() if len(both) == 2), pairs):
        yield from both


def _world(query: str) -> SceneSpec:
    base = DEFAULT_SPECS["relations"]
    assert isinstance(base, SceneSpec)
    hints, given = typing.get_type_hints(SceneSpec), {}
    for item in filter(None, query.split("&")):
        name, _, value = item.partition("=")
        if name not in hints:
            raise InputError(
                f"--from world: option {name!r} is unknown; use a field of the world's scenes: {', '.join(hints)}"
            )
        given[name] = convert(f"world: {name}", value, hints[name])
    return dataclasses.replace(base, **given)


def _photographs(kind: str, path: str, images: str | None) -> Any:
    read = {"coco": pictures.coco, "gqa": pictures.gqa}[kind]
    if kind == "coco":
        existing(path)

    def of(split: str) -> Iterator[Picture]:
        for _ in range(PASSES):
            for picture in read(path, images):
                if pictures.split_of(picture.id) == split:
                    yield picture

    return of
