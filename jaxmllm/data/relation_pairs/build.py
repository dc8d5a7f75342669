"""Pairs from pictures: cells by length, balance of words, no combination shared between training and test, files."""

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from PIL import Image

from jaxmllm.data.relation_pairs import pictures
from jaxmllm.data.relation_pairs.pictures import Picture
from jaxmllm.errors import InputError
from jaxmllm.runfiles import write_json
from jaxmllm.tasks import relation_graphs
from jaxmllm.tasks.relation_graphs import CELLS, Graph, in_cell, relation_record

Record = dict[str, Any]
Drawn = tuple[Graph, Graph, int, int]  # matched, mismatched, wrong edge, verbosity
OOD = ("ood_words", "ood_edges", "ood_depth")
DRAWS = 10  # for each pair of a picture that may give several


@dataclasses.dataclass(frozen=True)
class Part:
    """One file of pairs."""

    name: str
    split: str  # of pictures and of combinations
    cell: str
    pairs: int


@dataclasses.dataclass(frozen=True)
class Options:
    """How pairs are drawn."""

    seed: int = 0
    rivals: int = 1
    per_picture: int = 1  # pairs of one picture, at most
    apart: bool = True  # whether training and test share no combination of looks and relation


def parts(cell: str, train: int, val: int, test: int) -> list[Part]:
    """The files: training and validation in one cell, tests in it and beyond its length."""
    held = [Part(f"test_{name}", "test", name, test) for name in OOD if name != cell]
    return [
        Part("train", "train", cell, train),
        Part("val", "val", cell, val),
        Part("test_id", "test", cell, test),
        *held,
    ]


def combination_split(subject: Any, relation: str, object_: Any) -> str:
    """`test` for a quarter of all (look, relation, look), by what they are called; `train` for the others."""
    looks = [f"{o.get('colour', '')} {o['shape']}" for o in (subject, object_)]
    return "test" if crc32(f"{looks[0]}|{relation}|{looks[1]}".encode()) % 4 == 0 else "train"


def draw(picture: Picture, part: Part, options: Options, rng: np.random.Generator) -> Drawn | None:
    """(matched, mismatched, wrong edge, verbosity) of a picture in the part's cell; None if chance finds none."""
    (fewest, most), _, shape = CELLS[part.cell]
    ours = "test" if part.split == "test" else "train"

    def allowed(subject: Any, relation: str, object_: Any) -> bool:
        return not options.apart or combination_split(subject, relation, object_) == ours

    kernel = {r: {s: 1 / len(others) for s in others} for r, others in picture.substitutes.items()}
    shapes = relation_graphs.SHAPES
    found = relation_graphs.sample_pair(
        picture.oracle,
        int(rng.integers(fewest, most + 1)),
        shape or shapes[rng.integers(len(shapes))],
        rng,
        picture.relations if picture.substitutes is not pictures.SUBSTITUTES else tuple(pictures.SUBSTITUTES),
        kernel,
        tries=10,
        rivals=options.rivals,
        allowed=allowed,
    )
    if found is None:
        return None
    graph, foil, wrong = found
    verbosity = int(rng.integers(0, 3)) if part.cell != "ood_words" else 2
    twins = (relation_record(picture.oracle, g, 0, verbosity=verbosity) for g in (graph, foil))
    if not all(in_cell(twin, part.cell) for twin in twins):
        return None
    chosen = picture.oracle.assignment(graph, next(iter(picture.oracle.referents(graph))))
    assert chosen is not None
    things = [picture.oracle.objects[chosen[node]] for node in range(len(graph.nodes))]
    said = {(s, r, o) for g in (graph, foil) for (s, o), r in zip(g.edges, g.relations, strict=True)}
    return (*found, verbosity) if all(allowed(things[s], r, things[o]) for s, r, o in said) else None


def pairs(found: Iterable[Picture], part: Part, options: Options) -> list[tuple[Picture, Drawn]]:
    """So many pairs, or fewer where pictures end, in couples: one replaces r by r', the other r' by r, both as wordy.

    Then every word is as frequent in matched as in mismatched expressions.
    """
    rng = np.random.default_rng([options.seed, crc32(part.name.encode())])
    kept: list[tuple[Picture, Drawn]] = []
    waiting: dict[tuple[str, str, int], list[tuple[Picture, Drawn]]] = {}
    given: dict[str, set[Graph]] = {}
    barren = 0
    for picture in found:
        seen = given.setdefault(picture.id, set())
        before = len(seen)
        for _ in range(1 if options.per_picture == 1 else DRAWS * options.per_picture):
            drawn = draw(picture, part, options, rng)
            if len(seen) < options.per_picture and drawn is not None and drawn[0] not in seen:
                seen.add(drawn[0])
                graph, foil, wrong, verbosity = drawn
                old, new = graph.relations[wrong], foil.relations[wrong]
                others = waiting.get((new, old, verbosity))
                if others:
                    kept += [others.pop(0), (picture, drawn)]
                else:
                    waiting.setdefault((old, new, verbosity), []).append((picture, drawn))
        if len(kept) >= part.pairs - part.pairs % 2:
            break
        barren = 0 if len(seen) > before else barren + 1
        if barren >= 5000:
            raise InputError(
                f"{part.name}: 5000 pictures in a row gave no pair; lower rivals, or allow more objects or relations"
            )
    return kept


def records(made: Sequence[tuple[Picture, Drawn]], part: Part, image: Any, seed: int) -> Iterator[Record]:
    """Twins next to each other, in random order. `image(picture)`: the path that records hold."""
    rng = np.random.default_rng([seed, 1])
    for k, (picture, (graph, foil, wrong, verbosity)) in enumerate(made):
        oracle = picture.oracle
        chosen = oracle.assignment(graph, next(iter(oracle.referents(graph))))
        assert chosen is not None
        shared = {
            "images": [image(picture)],
            "size": list(picture.size),
            "candidates": [list(o["box"]) for o in oracle.objects],
            "node_boxes": [list(oracle.objects[chosen[node]]["box"]) for node in range(len(graph.nodes))],
            "twin": f"{part.name}-{k}",
            "unit": picture.id,
            "cell": part.cell,
            "verified": pictures.verified(foil.relations[wrong]),
        }
        twins = [
            relation_record(oracle, graph, verbosity=verbosity),
            relation_record(oracle, foil, wrong, graph.relations[wrong], verbosity),
        ]
        for n in rng.permutation(2):
            if not isinstance(oracle, pictures.PhotoOracle):
                yield {"id": f"{part.name}-{k}-{n}", **shared, **twins[n]}
            else:
                yield {"id": f"{part.name}-{k}-{n}", **shared, **{f: v for f, v in twins[n].items() if f != "scene"}}


class Folder:
    """Writes parts, drawn pictures and a summary."""

    def __init__(self, out: Path):
        if (out / "summary.json").exists():
            raise InputError(f"{out / 'summary.json'}: exists already; name a new folder")
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.summary: dict[str, Any] = {}
        self.words: Counter[tuple[str, bool]] = Counter()

    def path(self, image: str | Path) -> str:
        """A photograph's path from the folder."""
        return os.path.relpath(Path(image).resolve(), self.out.resolve())

    def image(self, picture: Picture) -> str:
        """Path of a picture from the folder; a drawn one is written there."""
        if isinstance(picture.image, str | Path):
            return self.path(picture.image)
        path = self.out / "images" / f"{picture.id}.png"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            Image.fromarray(np.asarray(picture.image)).save(path)
        return f"images/{path.name}"

    def write(self, name: str, found: Sequence[Record]) -> None:
        """One file and its line of the summary; no file without a record. Language alone learns from the first."""
        if not found:
            self.summary[name] = {"records": 0, "pairs": 0}
            return
        with (self.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        first = not self.words
        self.words = self.words or language(found)
        self.summary[name] = {
            "records": len(found),
            "pairs": sum(count == 2 for count in Counter(row["twin"] for row in found).values()),
            "pictures": len({row["unit"] for row in found}),
            "edges": dict(sorted(Counter(len(row["edges"]) for row in found).items())),
            "verified": sum(bool(row.get("verified")) for row in found),
            "language_only": None if first else language_only(self.words, found),
        }
        write_json(self.out / "summary.json", self.summary)


def grams(record: Record) -> list[str]:
    """Words and pairs of words of an expression."""
    words = ["^", *record["expression"].lower().split(), "$"]
    return [*words, *(f"{a} {b}" for a, b in zip(words, words[1:], strict=False))]


def language(rows: Iterable[Record]) -> Counter[tuple[str, bool]]:
    """How often each gram stands in a matched and in a mismatched expression."""
    return Counter((gram, bool(row["match"])) for row in rows for gram in grams(row))


def language_only(words: Counter[tuple[str, bool]], rows: Sequence[Record]) -> float | None:
    """Accuracy of a naive Bayes classifier of grams that never sees a picture: .5 where words tell nothing."""
    if not rows:
        return None

    def score(row: Record) -> float:
        return math.fsum(math.log((words[g, True] + 1) / (words[g, False] + 1)) for g in grams(row))

    scores = np.array([score(row) for row in rows])
    return float(np.mean(np.where(scores == 0, 0.5, (scores > 0) == np.array([row["match"] for row in rows]))))


def build(found: Any, plan: Sequence[Part], options: Options, out: Path) -> dict[str, Any]:
    """Writes every part and returns the summary. `found(split)`: the pictures of a split."""
    folder = Folder(out)
    for part in plan:
        if part.pairs:
            made = pairs(found(part.split), part, options)
            folder.write(part.name, list(records(made, part, folder.image, options.seed)))
    return folder.summary
