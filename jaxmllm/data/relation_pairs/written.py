"""Pairs from expressions that people or the published templates wrote: RefCOCO's and GITM-MR's own files."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmllm.data.relation_pairs.pictures import split_of
from jaxmllm.data.rows import existing, load_json
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.tasks.relation_parser import parse_expression
from jaxmllm.tasks.relation_phrases import edge_of_span, phrase_foil

Record = dict[str, Any]
log = logging.getLogger(__name__)
CONVERT = (
    "python -c \"import json, pickle, sys; json.dump(pickle.load(open(sys.argv[1], 'rb')), open(sys.argv[2], 'w'), "
    'default=lambda x: x.tolist())" IN.pkl OUT.json'
)


def refcoco(spec: str, seed: int) -> Iterator[tuple[str, Record]]:
    """(split, record): each expression with a relation of the published table, and a twin that nothing verifies.

    The graph is parsed. Candidates are the boxes that expressions of the same picture refer to.
    """
    source = open_source(spec)
    by_picture: dict[str, list[Record]] = defaultdict(list)
    for k in range(len(source)):
        record = source[k]
        by_picture[str(record["images"][0])].append(dict(record))
    rng = np.random.default_rng(seed)
    for picture, rows in by_picture.items():
        boxes = sorted({tuple(row["box"]) for row in rows})
        for n, row in enumerate(rows):
            made = parsed(row["expression"]) | {
                "task": "relations",
                "box": list(row["box"]),
                "match": True,
                "foil_pos": -1,
            }
            foil = phrase_foil(made, rng) if made["edges"] and len(boxes) > 1 else None
            if foil is None:
                continue
            name = Path(picture).stem
            shared = {
                "images": [picture],
                "candidates": [list(box) for box in boxes],
                "twin": f"{name}-{n}",
                "unit": name,
                "verified": False,
                **({"size": row["size"]} if "size" in row else {}),
            }
            for m, twin in enumerate((made, foil)):
                yield split_of(name), {"id": f"{name}-{n}-{m}", **shared, **twin}


def parsed(expression: str) -> Record:
    """The fields of a matched record that a parse gives."""
    if not expression.strip():
        raise InputError("expression: it has no words")
    return {
        "expression": expression,
        **parse_expression(expression),
        "parsed": True,
        "foil_phrase": "none",
        "target_phrase": "none",
        "length": len(expression.split()),
    }


def gitm(folder: Path, split: str, images: Path) -> Iterator[Record]:
    """Records of one split of the published folder: `expression/{split}_expressions_{ori_rel,foil_rel}.json`.

    Graphs come from `parse/{split}_graphs.json` and `.._foil_rel_graphs.json` where they exist (sentence id -> {"entities",
    "edges", "relations", "root"}), else they are parsed. Twins are found by their words: a mismatch with its own phrase put
    back is the match. Entries that do not fit are left out with a warning. InputError for pickles and missing files.
    """
    sides = {}
    for side in ("ori_rel", "foil_rel"):
        sides[side] = load_json(existing(folder / "expression" / f"{split}_expressions_{side}.json"))
        if not isinstance(sides[side], list):
            raise InputError(f"{folder}: {split}_expressions_{side}.json must be a list of expressions")
    matches: dict[tuple[str, Any], int] = {}
    for k, row in enumerate(sides["ori_rel"]):
        matches.setdefault((str(row.get("image_id")), row.get("expression")), k)  # of several alike the first
    for side, rows in sides.items():
        graphs = _graphs(folder / "parse", split if side == "ori_rel" else f"{split}_foil_rel")
        for k, row in enumerate(rows):
            try:
                yield _published(row, k, side, graphs, matches, images)
            except (InputError, KeyError, TypeError, ValueError) as error:
                what = f"field {error} is missing" if isinstance(error, KeyError) else error
                log.warning("%s: %s[%d] is left out: %s", folder, side, k, what)


def _graphs(folder: Path, name: str) -> Mapping[str, Any]:
    if (folder / f"{name}_graphs.json").exists():
        found = load_json(folder / f"{name}_graphs.json")
        return found if isinstance(found, dict) else {}
    return {}


def refuse_pickles(folder: Path) -> None:
    """InputError naming the first pickle of a folder that has no JSON beside it."""
    for path in sorted(folder.rglob("*.pkl")):
        if path.name.endswith("_graphs.pkl") and not path.with_suffix(".json").exists():
            raise InputError(
                f"{path}: a pickle runs code when it is read, so it is not. Convert it where you trust it, and put the JSON "
                f"beside it: {CONVERT}. Or take the pickle away: the graphs are parsed then"
            )


def _published(row: Mapping[str, Any], k: int, side: str, graphs: Mapping, matches: Mapping, images: Path) -> Record:
    expression, image = str(row["expression"]), str(row["image_id"])
    x, y, w, h = (float(v) for v in row["bbox"])
    if w <= 0 or h <= 0 or x < 0 or y < 0:
        raise InputError(f"bbox: {[x, y, w, h]} is no box")
    record = parsed(expression)
    graph = graphs.get(str(row.get("sent_id", k)))
    if graph is not None:
        record |= {name: graph[name] for name in ("entities", "edges", "relations", "root")} | {"parsed": False}
        record.pop("spans")
    match = side == "ori_rel"
    record |= {"task": "relations", "id": f"{side}-{k}", "images": [str(images / f"{image}.jpg")], "unit": image}
    record |= {"match": match, "foil_pos": -1, "box": [x, y, x + w, y + h], "verified": False}
    if match:
        return record | {"twin": f"{image}-{k}"}
    phrase, target = str(row["foil_phrase"]), str(row["target_phrase"])
    start = expression.find(phrase)
    if start < 0:
        raise InputError(f"foil_phrase: {phrase!r} is not in the expression")
    twin = matches.get((image, expression[:start] + target + expression[start + len(phrase) :]))
    record |= {
        "foil_phrase": phrase,
        "target_phrase": target,
        "twin": f"{image}-{f'foil-{k}' if twin is None else twin}",
    }
    edge = int(row["foil_pos"]) if graph is not None else edge_of_span(record["spans"], [start, start + len(phrase)])
    if not 0 <= edge < len(record["edges"]):
        raise InputError(f"foil_pos: the graph has no relation {phrase!r}")
    del record["box"]
    return record | {"foil_pos": edge}
