"""`jaxmllm data relations`: pairs of matched and mismatched expressions."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from jaxmllm.commands.options import Seed
from jaxmllm.data.relation_pairs.make import make
from jaxmllm.data.sources import open_source
from jaxmllm.world.preview import preview


def run(
    source: Annotated[str, tyro.conf.arg(name="from")],
    out: Path,
    cell: Literal["S11", "S16"] = "S16",
    pairs: int = 2000,
    val_pairs: int = 200,
    test_pairs: int = 200,
    rivals: int = 1,
    per_picture: int = 4,
    apart: bool = True,
    seed: Seed = 0,
    images: str | None = None,
) -> None:
    """Make pairs of matched and mismatched expressions: train, val and test files to read as records:OUT/train.jsonl.

    Args:
        source: world:?size=84x84 (fields of the world's scenes), coco:instances.json, gqa:sceneGraphs.json, refcoco:PATH, or
            gitm:FOLDER with the published files as JSON.
        out: folder to write.
        cell: length of training expressions: one or two relations in up to 11 or 16 words. Tests go beyond: ood_words,
            ood_edges, ood_depth.
        pairs: of training.
        val_pairs: of validation.
        test_pairs: of each test file.
        rivals: fewest other objects that the root's words alone fit; with 0 most referents need no relation.
        per_picture: most pairs of one photograph.
        apart: whether training and test share no combination of looks and relation; few photographs may need to.
        images: folder of the photographs, where it is not found near the file.
    """
    summary = make(source, out, cell, pairs, val_pairs, test_pairs, rivals, per_picture, apart, seed, images)
    table = Table("file", "pairs", "pictures", "verified", "language alone", title=str(out))
    for name, line in summary.items():
        alone = line.get("language_only")
        told = "" if alone is None else f"{alone:.3f}"
        table.add_row(name, str(line["pairs"]), str(line.get("pictures", 0)), str(line.get("verified", 0)), told)
    Console(highlight=False).print(table)
    first = next((name for name, line in summary.items() if line["pairs"]), None)
    if first is not None:
        print(f"preview: {preview(open_source(f'records:{out}/{first}.jsonl'), out / 'preview.png')}")
