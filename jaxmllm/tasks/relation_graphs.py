"""Relation graphs: expressions over a scene, their exact truth, and mismatched twins (GITM-MR; gitm_mr.md 1.3, 2.2, 6).

An expression is a rooted tree: nodes are noun phrases, edges are relations from a subject to an object, and the root is
what it refers to. Over a scene of known objects its truth is decided by search. A mismatched twin differs in one
relation, fits nothing, and has exactly one edge to blame: making that edge a wildcard repairs it, and no other does.

A scene is a list of objects {"box": [x1, y1, x2, y2], "size", "texture", "colour", "shape"} with any of these attributes
as words. Every relation of a pair is true, false or undecided (a dead zone of `tau` pixels); expressions never rest on an
undecided pair. The published pairs were made on photographs by a table of phrases: see `relation_phrases`.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int8

from jaxmllm.tasks.answers import choose

ATTRIBUTES = ("size", "texture", "colour", "shape")  # in the order in which English names them
SILENT = ("solid",)  # attribute values that are never spoken
NOUN = "object"  # stands in for a shape that is not named
SHAPES = ("chain", "star", "mixed")
Objects = Sequence[Mapping[str, Any]]

# Relation -> (as spoken, as spoken at length), grouped by what may replace what: a substitute suits the same context.
_GROUPS = (
    {"left of": ("left of", "to the left of"), "right of": ("right of", "to the right of"),
     "above": ("above", "above"), "below": ("below", "below"), "next to": ("next to", "right next to"),
     "inside": ("inside", "inside of"), "linked to": ("linked to", "linked to")},
    {"larger than": ("larger than", "larger than"), "smaller than": ("smaller than", "smaller than")},
    {"same colour as": ("the same colour as", "of the same colour as"),
     "same shape as": ("the same shape as", "of the same shape as")},
)  # fmt: skip
SPOKEN = {name: texts for group in _GROUPS for name, texts in group.items()}
RELATIONS = tuple(SPOKEN)
COMMON = tuple(name for name in RELATIONS if name not in ("inside", "linked to"))  # need no containers or drawn lines
# Attributes that the two ends of an edge may not name, subject and object: "a circle of the same shape as the star" and
# "the large star smaller than .." would be seen to be wrong without looking.
_HIDDEN = {
    "larger than": (("size",), ("size",)), "smaller than": (("size",), ("size",)),
    "same colour as": ((), ("colour", "shape")), "same shape as": ((), ("colour", "shape")),
}  # fmt: skip
SCENE_SUBSTITUTES = {name: tuple(other for other in group if other != name) for group in _GROUPS for name in group}

# Data splits by length: (edges, words, shape of the tree); gitm_mr.md 6, suggested sizes there.
CELLS = {
    "S11": ((1, 2), (1, 11), None),
    "S16": ((1, 2), (1, 16), None),
    "ood_words": ((1, 2), (17, 30), None),
    "ood_edges": ((3, 6), (1, 10_000), None),
    "ood_depth": ((3, 5), (1, 10_000), "chain"),
}


# ---- truth


def relation_table(
    objects: Objects,
    relation: str,
    links: Iterable[Sequence[int]] = (),
    tau: float = 12.0,
    near: float = 24.0,
) -> Int8[np.ndarray, "N N"]:
    """[i, j]: whether "object i `relation` object j" is true (1), false (0) or undecided (-1); the diagonal is 0.

    left of, right of, above, below: the centre lies more than `tau` that way, and more than across; false only if that
    fails by `tau`. next to: a gap under `near`, false from `near + tau`, and between container and content. inside: the
    box lies within the other, undecided where they only overlap. larger, smaller: the side (root of the area) differs by
    more than `tau`, false if it does not differ that way. same colour, same shape, linked to (`links` of index pairs):
    exact. `tau` and `near` are pixels of a 448-pixel picture's order; scale them with the picture.

    Raises:
        ValueError: unknown relation.
    """
    choose(relation, RELATIONS, "relation")
    n = len(objects)
    boxes = np.array([o["box"] for o in objects], np.float64).reshape(n, 4)
    low, high = boxes[:, :2], boxes[:, 2:]
    within = np.asarray((low[:, None] >= low[None]).all(-1) & (high[:, None] <= high[None]).all(-1))
    gap = np.linalg.norm(np.maximum(np.maximum(low[:, None] - high[None], low[None] - high[:, None]), 0), axis=-1)
    if relation in ("left of", "right of", "above", "below"):
        offset = ((low + high)[None] - (low + high)[:, None]) / 2  # from i to j
        axis, sign = (0 if relation in ("left of", "right of") else 1), (1 if relation in ("left of", "above") else -1)
        along, across = sign * offset[..., axis], np.abs(offset[..., 1 - axis])
        true, possible = (along > tau) & (along > across), (along > 0) & (along + tau > across)
    elif relation == "next to":
        apart = ~(within | within.T)
        true, possible = apart & (gap < near), apart & (gap < near + tau)
    elif relation == "inside":
        true, possible = within & ~within.T, (gap == 0) & ~within.T
    elif relation in ("larger than", "smaller than"):
        side = np.sqrt((high - low).prod(-1))
        excess = (side[:, None] - side[None]) * (1 if relation == "larger than" else -1)
        true, possible = excess > tau, excess > 0
    elif relation == "linked to":
        true = np.zeros((n, n), bool)
        for i, j in links:
            true[i, j] = true[j, i] = True
        possible = true
    else:
        values = np.array([o["colour" if "colour" in relation else "shape"] for o in objects])
        true = possible = values[:, None] == values[None]
    table = np.where(true, 1, np.where(possible, -1, 0)).astype(np.int8)
    np.fill_diagonal(table, 0)
    return table


@dataclass(frozen=True)
class Graph:
    """An expression over a scene: words of each node, edges (subject, object), the relation of each edge."""

    nodes: tuple[tuple[str, ...], ...]
    edges: tuple[tuple[int, int], ...]
    relations: tuple[str, ...]
    root: int = 0

    def replaced(self, edge: int, relation: str) -> "Graph":
        """The graph with another relation on one edge."""
        return Graph(self.nodes, self.edges, (*self.relations[:edge], relation, *self.relations[edge + 1 :]), self.root)


class Oracle:
    """Decides expressions over one scene by search. Relation tables are computed once each."""

    def __init__(self, objects: Objects, links: Iterable[Sequence[int]] = (), tau: float = 12.0, near: float = 24.0):
        self.objects = objects
        self._words = [{str(o[name]) for name in ATTRIBUTES if name in o} for o in objects]
        self.options: dict[str, Any] = {"links": [list(pair) for pair in links], "tau": tau, "near": near}
        self._tables: dict[str, np.ndarray] = {}

    def table(self, relation: str) -> Int8[np.ndarray, "N N"]:
        """`relation_table` of the scene."""
        if relation not in self._tables:
            self._tables[relation] = relation_table(self.objects, relation, **self.options)
        return self._tables[relation]

    def candidates(self, words: Iterable[str]) -> list[int]:
        """Objects that have all of the words as attributes; the bare noun fits everything."""
        wanted = set(words) - {NOUN}
        return [i for i, own in enumerate(self._words) if wanted <= own]

    def decided(self, graph: Graph) -> bool:
        """Whether no relation of the graph is undecided on a pair of objects that fit its two nodes."""
        fits = [self.candidates(words) for words in graph.nodes]
        return all(
            (self.table(relation)[np.ix_(fits[p], fits[c])] >= 0).all()
            for (p, c), relation in zip(graph.edges, graph.relations, strict=True)
        )

    def referents(self, graph: Graph, wildcard: int | None = None, injective: bool = True) -> set[int]:
        """Objects that the root can be, with every node a fitting object (all different if `injective`) and every edge
        true. The relation of edge `wildcard` does not matter."""
        fits = self.candidates(graph.nodes[graph.root])
        return {i for i in fits if self.assignment(graph, i, wildcard, injective) is not None}

    def assignment(
        self, graph: Graph, referent: int, wildcard: int | None = None, injective: bool = True
    ) -> dict[int, int] | None:
        """Node -> object with the root at `referent`, the first that makes every edge true; None if there is none."""
        fits = [self.candidates(words) for words in graph.nodes]
        tables = [self.table(relation) for relation in graph.relations]
        # Each node after its subject, so that a wrong choice is seen at once.
        order = _outwards(graph)

        def found(step: int, chosen: dict[int, int]) -> dict[int, int] | None:
            if step == len(order):
                return chosen
            edge = order[step]
            subject, node = graph.edges[edge]
            for i in fits[node]:
                if injective and i in chosen.values():
                    continue
                if edge == wildcard or tables[edge][chosen[subject], i] == 1:
                    whole = found(step + 1, chosen | {node: i})
                    if whole is not None:
                        return whole
            return None

        return found(0, {graph.root: referent})

    def to_blame(self, graph: Graph) -> list[int]:
        """Edges that, made a wildcard, give the graph a referent."""
        return [edge for edge in range(len(graph.edges)) if self.referents(graph, edge)]


def _outwards(graph: Graph) -> list[int]:
    """Edges from the root outwards."""
    reached, order = [graph.root], []
    for node in reached:
        for edge, (subject, object_) in enumerate(graph.edges):
            if subject == node:
                reached.append(object_)
                order.append(edge)
    return order


# ---- sampling


def sample_tree(n_edges: int, shape: str, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Edges of a tree with root 0, numbered as its expression mentions them: leaves before branches, depth first."""
    choose(shape, SHAPES, "shape")
    above = [
        0 if shape == "star" else child - 1 if shape == "chain" else int(rng.integers(child))
        for child in range(1, n_edges + 1)
    ]
    children: dict[int, list[int]] = {node: [] for node in range(n_edges + 1)}
    for child, parent in enumerate(above, 1):
        children[parent].append(child)
    edges: list[tuple[int, int]] = []
    number = itertools.count(1)

    def visit(node: int, name: int) -> None:
        for child in sorted(children[node], key=lambda c: bool(children[c])):
            edges.append((name, next(number)))
            visit(child, edges[-1][1])

    visit(0, 0)
    return edges


def edge_depths(edges: Sequence[tuple[int, int]], root: int = 0) -> list[int]:
    """Number of edges above each edge; subjects come before their objects' edges in `edges`."""
    depth = {root: 0}
    for subject, object_ in edges:
        depth[object_] = depth[subject] + 1
    return [depth[subject] for subject, _ in edges]


def balanced_kernel(
    frequency: Mapping[str, float], substitutes: Mapping[str, Sequence[str]] = SCENE_SUBSTITUTES
) -> dict[str, dict[str, float]]:
    """Q(r' | r) with `frequency(r) Q(r'|r) = frequency(r') Q(r|r')`: replacing leaves the frequencies as they are.

    A Metropolis chain on the substitutes that allow both directions. What is left to 1 means "choose another edge".
    """
    both = {
        r: [s for s in options if r in substitutes.get(s, ()) and frequency.get(s, 0) > 0]
        for r, options in substitutes.items()
        if frequency.get(r, 0) > 0
    }
    return {
        r: {s: min(1 / len(options), frequency[s] / (frequency[r] * len(both[s]))) for s in options}
        for r, options in both.items()
    }


def describe(
    obj: Mapping[str, Any], rng: np.random.Generator, hidden: Iterable[str] = (), chance: float = 0.5
) -> tuple[str, ...]:
    """A random subset of an object's attributes in English order, without the `hidden` ones; the shape or a bare noun
    closes it."""
    words = [
        str(obj[name])
        for name in ATTRIBUTES
        if name in obj and name not in hidden and obj[name] not in SILENT and (name == "shape" or rng.random() < chance)
    ]
    return tuple(words if "shape" in obj and "shape" not in hidden else [*words, NOUN])


def _ground(oracle: Oracle, edges, rng, relations, allowed) -> Graph | None:
    """Objects, descriptions and true relations for a tree; None if a node finds no object."""
    chosen = {0: int(rng.integers(len(oracle.objects)))}
    spoken = []
    for subject, node in edges:
        options = [
            (r, j)
            for r in relations
            for j in np.flatnonzero(oracle.table(r)[chosen[subject]] == 1).tolist()
            if j not in chosen.values()
            and (allowed is None or allowed(oracle.objects[chosen[subject]], r, oracle.objects[j]))
        ]
        if not options:
            return None
        wanted = {r for r, _ in options}
        relation = sorted(wanted)[rng.integers(len(wanted))]  # relations evenly, whatever the scene offers more of
        of_it = [j for r, j in options if r == relation]
        chosen[node] = of_it[rng.integers(len(of_it))]
        spoken.append(relation)
    hidden: dict[int, set[str]] = {node: set() for node in chosen}
    for edge, relation in zip(edges, spoken, strict=True):
        for node, names in zip(edge, _HIDDEN.get(relation, ((), ())), strict=True):
            hidden[node].update(names)
    nodes = tuple(describe(oracle.objects[chosen[node]], rng, hidden[node]) for node in sorted(chosen))
    return Graph(nodes, tuple(edges), tuple(spoken))


def sample_pair(
    oracle: Oracle,
    n_edges: int,
    shape: str,
    rng: np.random.Generator,
    relations: Sequence[str] = COMMON,
    kernel: Mapping[str, Mapping[str, float]] | None = None,
    tries: int = 100,
    rivals: int = 0,
    allowed: Callable[[Mapping[str, Any], str, Mapping[str, Any]], bool] | None = None,
) -> tuple[Graph, Graph, int] | None:
    """(matched graph, mismatched graph, wrong edge) over a scene, None if `tries` draws give none.

    The matched graph has exactly one referent. The mismatched one replaces one relation, drawn evenly over the depths of
    the tree, has no referent and that edge alone to blame. Both rest on decided pairs only. `relations` must be those
    that the scenes do show, or a substitute betrays itself; `kernel` gives the probabilities of the substitutes (see
    `balanced_kernel`), None: evenly. At least `rivals` objects but the referent fit the root's words alone: with 0, most
    referents can be found without a relation. `allowed(subject, relation, object)`: which true relations may be said.
    """
    for _ in range(tries):
        edges = sample_tree(n_edges, shape, rng)
        graph = _ground(oracle, edges, rng, relations, allowed)
        if graph is None or len(oracle.candidates(graph.nodes[graph.root])) <= rivals:
            continue
        if len(oracle.referents(graph)) != 1 or not oracle.decided(graph):
            continue
        depths = edge_depths(edges)
        depth = int(rng.integers(max(depths) + 1))
        at_depth = [edge for edge, d in enumerate(depths) if d == depth]
        wrong = at_depth[rng.integers(len(at_depth))]
        substitute = _substitute(graph.relations[wrong], rng, relations, kernel)
        if substitute is None:
            continue
        foil = graph.replaced(wrong, substitute)
        if oracle.decided(foil) and not oracle.referents(foil) and oracle.to_blame(foil) == [wrong]:
            return graph, foil, wrong
    return None


def _substitute(relation, rng, relations, kernel) -> str | None:
    if kernel is None:
        options = [s for s in SCENE_SUBSTITUTES[relation] if s in relations]
        return options[rng.integers(len(options))] if options else None
    chances = {s: p for s, p in kernel.get(relation, {}).items() if s in relations}
    stay = max(1 - sum(chances.values()), 0.0)
    drawn = rng.choice(len(chances) + 1, p=[*chances.values(), stay]) if chances else 0
    return list(chances)[drawn] if drawn < len(chances) else None


def balance(pairs: Sequence[tuple[Graph, Graph, int]]) -> list[int]:
    """Indices of pairs to keep so that every relation is as often replaced as it replaces: r -> r' as often as r' -> r.

    Then the words of both classes have equal frequencies exactly, whatever acceptance did to the kernel's balance.
    """
    kinds = [(graph.relations[edge], foil.relations[edge]) for graph, foil, edge in pairs]
    allowed = {kind: min(count, Counter(kinds)[kind[::-1]]) for kind, count in Counter(kinds).items()}
    kept = []
    for i, kind in enumerate(kinds):
        if allowed[kind]:
            allowed[kind] -= 1
            kept.append(i)
    return kept


# ---- words


def verbalise(graph: Graph, verbosity: int = 1) -> str:
    """The expression in words, separated by blanks.

    `verbosity` 0: `red circle left of small square`; 1: `the red circle that is left of the small square`; 2: `there is a
    red circle that is to the left of the small square`. Branches close with a comma where another relation follows.
    """
    return " ".join(text for text, _ in _pieces(graph, verbosity))


def relation_spans(graph: Graph, verbosity: int = 1) -> list[list[int]]:
    """Characters [start, end) of each edge's relation in `verbalise`."""
    spans, at = [[0, 0] for _ in graph.edges], 0
    for text, edge in _pieces(graph, verbosity):
        if edge is not None:
            spans[edge] = [at, at + len(text)]
        at += len(text) + 1
    return spans


def _pieces(graph: Graph, verbosity: int) -> list[tuple[str, int | None]]:
    """The expression in pieces, each with the edge whose relation it is."""
    children: dict[int, list[int]] = {}
    for edge, (subject, _) in enumerate(graph.edges):
        children.setdefault(subject, []).append(edge)

    def noun(node: int, article: str) -> str:
        words = " ".join(graph.nodes[node])
        return f"{'an' if article == 'a' and words[0] in 'aeiou' else article} {words}".strip()

    def pieces(node: int, article: str) -> list[tuple[str, int | None]]:
        out: list[tuple[str, int | None]] = [(noun(node, article), None)]
        before = None
        for edge in children.get(node, ()):
            object_ = graph.edges[edge][1]
            joint = "that is" if verbosity else ""
            if before is not None:
                joint = ", and" if before in children else "and"
            before, relation = object_, graph.relations[edge]
            out += [(joint, None)] if joint else []
            out.append((SPOKEN.get(relation, (relation, relation))[verbosity > 1], edge))
            out += pieces(object_, "the" if verbosity else "")
        return out

    body = pieces(graph.root, ("", "the", "a")[verbosity])
    return [("there is", None), *body] if verbosity > 1 else body


def _short(relation: str) -> str:
    return SPOKEN.get(relation, (relation,))[0]


def relation_record(
    oracle: Oracle, graph: Graph, wrong: int | None = None, original: str | None = None, verbosity: int = 1
) -> dict[str, Any]:
    """The fields of a relations record: a matched expression, or a mismatched one with its `wrong` edge.

    `original` is the relation that the wrong one replaced.
    """
    expression = verbalise(graph, verbosity)
    record = {
        "task": "relations",
        "expression": expression,
        "entities": [" ".join(words) for words in graph.nodes],
        "edges": [list(edge) for edge in graph.edges],
        "relations": [_short(relation) for relation in graph.relations],
        "spans": relation_spans(graph, verbosity),
        "root": graph.root,
        "rivals": len(oracle.candidates(graph.nodes[graph.root])) - 1,
        "match": wrong is None,
        "foil_pos": -1 if wrong is None else wrong,
        "foil_phrase": "none" if wrong is None else _short(graph.relations[wrong]),
        "target_phrase": "none" if original is None else _short(original),
        "length": len(expression.split()),
        "scene": {"objects": [dict(o) for o in oracle.objects], "relations": list(graph.relations), **oracle.options},
    }
    if wrong is None:
        record["box"] = list(oracle.objects[next(iter(oracle.referents(graph)))]["box"])
    return record


def in_cell(record: Mapping[str, Any], cell: str) -> bool:
    """Whether a record belongs to a split of `CELLS` by its edges, words and shape."""
    (fewest, most), (shortest, longest), shape = CELLS[choose(cell, CELLS, "cell")]
    chain = all(b[0] == a[1] for a, b in itertools.pairwise(record["edges"]))
    return (
        fewest <= len(record["edges"]) <= most and shortest <= record["length"] <= longest and (shape is None or chain)
    )


def chance_of_edges(counts: Iterable[int]) -> float:
    """Mean 1 / E: what guessing the wrong relation earns."""
    values = [1 / count for count in counts if count]
    return math.fsum(values) / len(values) if values else math.nan
