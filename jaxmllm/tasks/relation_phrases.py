"""Mismatched expressions on photographs, by the published table of relation phrases (gitm_mr.md 1.3, 2.9).

Unlike the twins of `relation_graphs` these are unverified: the substitute may be true as well.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmllm.tasks.answers import MAX_CHARS, load_json

# The published table of relation phrases and their substitutes; "left of" stands for "to the left of".
_SIDES = ("left of", "right of")
SUBSTITUTES = {
    "left of": ("right of", "in front of", "behind"),
    "right of": ("left of", "in front of", "behind"),
    "wearing": ("holding", "carrying", "looking at"),
    "in front of": ("behind", "right of", "left of"),
    "behind": ("in front of", "right of", "left of"),
    "holding": ("looking at", "behind"),
    "on top of": ("on the side of", "near", "next to"),
    "above": ("near", "next to", "behind", "in front of"),
    "below": ("near", "next to", "in front of", "behind"),
    "sitting on": ("near", "next to", "behind", "in front of", "left of", "right of"),
    "next to": ("in front of", "behind"),
    "carrying": ("looking at", "behind"),
    "inside": ("near", "next to", "behind", "in front of", "left of", "right of"),
    "under": ("above", "on top of", "next to", "in front of", "behind"),
    "standing on": ("walking on",),
    "walking on": ("standing on",),
    "standing in": ("walking in",),
    "walking in": ("standing in",),
    "eating": ("holding", "looking at", "behind"),
    "playing with": ("standing by", "behind"),
    "playing": ("standing by", "behind"),
    "riding": ("behind", "in front of", "left of", "right of"),
    "riding on": ("behind", "in front of", "left of", "right of"),
    "walking down": ("standing on",),
    "throwing": ("holding", "behind"),
    "standing behind": ("standing in front of",),
    "standing in front of": ("standing behind",),
}


def phrase_foil(record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any] | None:
    """A mismatched twin by the published table: one relation phrase of a matched record replaced by a substitute.

    Needs `expression`, `relations` and the character `spans` of the relations. None if no relation is in the table. The
    twin is unverified: the original relation may have been replaced by one that is true as well.
    """
    known = [e for e, relation in enumerate(record["relations"]) if _plain(relation) in SUBSTITUTES]
    if not known:
        return None
    edge = known[rng.integers(len(known))]
    options = SUBSTITUTES[_plain(record["relations"][edge])]
    name = options[rng.integers(len(options))]
    phrase = f"to the {name}" if name in _SIDES else name
    (start, end), text = record["spans"][edge], record["expression"]
    shift = len(phrase) - (end - start)
    spans = [[a + shift * (a >= end), b + shift * (b >= end)] for a, b in record["spans"]]
    relations = list(record["relations"])
    relations[edge] = phrase
    expression = text[:start] + phrase + text[end:]
    twin = {k: v for k, v in record.items() if k != "box"}
    return twin | {
        "expression": expression,
        "relations": relations,
        "spans": spans,
        "match": False,
        "foil_pos": edge,
        "foil_phrase": phrase,
        "target_phrase": record["relations"][edge],
        "length": len(expression.split()),
    }


def _plain(phrase: str) -> str:
    plain = " ".join(phrase.lower().split())
    return plain.removeprefix("to the ")


def edge_of_span(spans: Sequence[Sequence[int]], span: Sequence[int]) -> int:
    """The edge whose relation phrase overlaps a replaced span most; -1 if none does. For graphs of another parser."""
    overlaps = [min(b, span[1]) - max(a, span[0]) for a, b in spans]
    best = int(np.argmax(overlaps)) if overlaps else -1
    return best if best >= 0 and overlaps[best] > 0 else -1


def parse_graph(text: str, expression: str) -> dict[str, Any]:
    """`entities`, `edges`, `relations`, `root` of a graph written as JSON, for expressions without a parse.

    Expected: {"nodes": ["red circle", ..], "edges": [[0, "left of", 1], ..]}. Every node and relation must occur in the
    expression, edges must form a tree with one root. Anything else falls back to one node and no edge, with which
    matching and grounding still work. Never raises on any text.
    """
    alone = {"entities": [expression], "edges": [], "relations": [], "root": 0}
    start, end = text[:MAX_CHARS].find("{"), text[:MAX_CHARS].rfind("}")
    value = load_json(text[start : end + 1]) if 0 <= start < end else None
    nodes, edges = (value.get("nodes"), value.get("edges")) if isinstance(value, dict) else (None, None)
    if not isinstance(nodes, list) or not isinstance(edges, list) or not nodes or len(nodes) > 64:
        return alone
    said = expression.lower()
    if not all(isinstance(node, str) and node.strip() and node.lower() in said for node in nodes):
        return alone
    for edge in edges:
        shaped = isinstance(edge, list) and len(edge) == 3 and isinstance(edge[1], str) and edge[1].lower() in said
        if not shaped or not all(type(v) is int and 0 <= v < len(nodes) for v in (edge[0], edge[2])):
            return alone
    pairs = [[edge[0], edge[2]] for edge in edges]
    roots = set(range(len(nodes))) - {child for _, child in pairs}
    if len(pairs) != len(nodes) - 1 or len(roots) != 1 or len({child for _, child in pairs}) != len(pairs):
        return alone
    root = roots.pop()
    reached = {root}
    for _ in pairs:
        reached |= {child for parent, child in pairs if parent in reached}
    if len(reached) < len(nodes):
        return alone
    return {"entities": nodes, "edges": pairs, "relations": [edge[1] for edge in edges], "root": root}
