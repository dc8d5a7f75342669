"""Relations between objects and referring expressions that fit exactly one object.

A relation of a pair is true, false or undecided: every relation has a margin in pixels, true above +t, false below -t
and undecided between, with t = `SceneSpec.margin` times the shorter side. Undecided pairs are never asked about, and no
object that could be meant is undecided, so a question has one answer also for a reader with other ideas of "left".
"""

import dataclasses
from collections.abc import Sequence
from functools import cache
from itertools import combinations

import numpy as np
from jaxtyping import Float

from jaxmllm.world.scenes import ATTRIBUTES, SceneObject, SceneSpec, phrase
from jaxmllm.world.streams import Stream

NEAR = 0.08  # "next to": gap between the boxes, share of the picture's shorter side
LARGER = 1.2  # "larger than": ratio of the sides
_SPOKEN = {"same colour as": "of the same colour as", "same shape as": "of the same shape as"}


def relation_margins(objects: Sequence[SceneObject], relation: str, size: tuple[int, int]) -> Float[np.ndarray, "N N"]:
    """Margin in pixels of "object i `relation` object j" for every pair; an object is in no relation to itself.

    left of, right of, above, below: the centre lies that way, and farther that way than across. next to: the boxes are
    less than NEAR apart. larger/smaller than: by sides. same colour/shape: +-infinity.
    """
    boxes = np.array([o.box for o in objects], np.float64)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    side = boxes[:, 2] - boxes[:, 0]
    if relation in ("left of", "right of", "above", "below"):
        offset = centre[None] - centre[:, None]  # from i to j
        axis = 0 if relation in ("left of", "right of") else 1
        sign = 1 if relation in ("left of", "above") else -1
        margins = sign * offset[..., axis] - np.abs(offset[..., 1 - axis])
    elif relation == "next to":
        gaps = np.maximum(boxes[:, None, :2] - boxes[None, :, 2:], boxes[None, :, :2] - boxes[:, None, 2:])
        margins = NEAR * min(size) - np.clip(gaps, 0, None).max(-1)
    elif relation == "larger than":
        margins = side[:, None] - LARGER * side[None]
    elif relation == "smaller than":
        margins = side[None] - LARGER * side[:, None]
    else:
        kind = {"same colour as": "colour", "same shape as": "shape"}[relation]
        values = np.array([getattr(o, kind) for o in objects])
        margins = np.where(values[:, None] == values[None], np.inf, -np.inf)
    np.fill_diagonal(margins, -np.inf)
    return margins


def spoken(relation: str) -> str:
    """The relation as it stands between two noun phrases."""
    return _SPOKEN.get(relation, relation)


@dataclasses.dataclass(frozen=True)
class Expression:
    """A noun phrase, with the relation that narrows it down if `depth` is above 0."""

    target: int  # the one object it fits, index into the scene's objects
    attributes: tuple[str, ...]  # what the words name, of scenes.ATTRIBUTES
    words: tuple[str, ...]
    relation: str | None = None
    landmark: "Expression | None" = None

    @property
    def depth(self) -> int:
        """Number of relations."""
        return 0 if self.landmark is None else 1 + self.landmark.depth

    def __str__(self) -> str:
        """`red circle left of the blue square that is above the star`: each relation belongs to the noun before it."""
        text, node, joint = phrase(self.words, "shape" in self.attributes), self, " "
        while node.landmark is not None and node.relation is not None:
            relation, node = node.relation, node.landmark
            text += f"{joint}{spoken(relation)} the {phrase(node.words, 'shape' in node.attributes)}"
            joint = " that is "
        return text


def _bits(matrix: np.ndarray) -> list[int]:
    """Per column j, the set of rows i that are true, as the bits of an integer."""
    return (matrix.astype(np.int64) << np.arange(len(matrix))[:, None]).sum(0).tolist()


@cache
def _subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [subset for k in range(len(names) + 1) for subset in combinations(names, k)]


class Referring:
    """All unique expressions of one scene. Sets of objects are bit masks, so that looking at all of them is cheap.

    An expression of depth d is admitted only if its d-th relation is needed: the words alone fit two objects or more.
    Its landmark is itself a unique expression.
    """

    def __init__(self, objects: Sequence[SceneObject], spec: SceneSpec):
        self.objects = objects
        varied = {"size": spec.sizes, "texture": spec.textures, "colour": spec.colours, "shape": spec.shapes}
        self._names = tuple(name for name in ATTRIBUTES if len(varied[name]) > 1)
        dead = spec.margin * min(spec.size)
        self._true, self._open = {}, {}  # relation -> per j, the i that are (or may be) in relation to j
        for relation in spec.relations:
            margins = relation_margins(objects, relation, spec.size)
            self._true[relation] = _bits(margins > dead)
            self._open[relation] = _bits(margins >= -dead)
        same: dict[tuple[str, str], int] = {}  # (attribute, value) -> objects that have it
        for i, thing in enumerate(objects):
            for name in self._names:
                value = name, getattr(thing, name)
                same[value] = same.get(value, 0) | 1 << i
        self._fits = [self._descriptions(thing, same) for thing in objects]
        # depth -> target -> (attributes, relation, landmark)
        self._levels: list[list[list[tuple]]] = [
            [[(names, None, None) for names, fits in t.items() if fits == 1 << i] for i, t in enumerate(self._fits)]
        ]

    def _descriptions(self, thing: SceneObject, same: dict[tuple[str, str], int]) -> dict[tuple[str, ...], int]:
        """Every description of an object by attributes, with the objects it fits."""
        table = {}
        for names in _subsets(self._names):
            if "texture" in names and thing.texture == "solid":
                continue
            fits = (1 << len(self.objects)) - 1
            for name in names:
                fits &= same[name, getattr(thing, name)]
            table[names] = fits
        return table

    def _level(self, depth: int) -> list[list[tuple]]:
        while len(self._levels) <= depth:
            landmarks = [j for j, found in enumerate(self._levels[-1]) if found]
            self._levels.append([self._related(i, landmarks) for i in range(len(self.objects))])
        return self._levels[depth]

    def _related(self, i: int, landmarks: Sequence[int]) -> list[tuple]:
        me, found = 1 << i, []
        for relation, true in self._true.items():
            for j in landmarks:
                if not true[j] & me:
                    continue
                possible = self._open[relation][j]
                found += [(n, relation, j) for n, fits in self._fits[i].items() if fits != me and fits & possible == me]
        return found

    def targets(self, depth: int) -> list[int]:
        """Objects that have an expression of this depth."""
        return [i for i, found in enumerate(self._level(depth)) if found]

    def expression(self, target: int, depth: int, stream: Stream) -> Expression:
        """One of the target's expressions of this depth, each as likely; the target must be one of `targets(depth)`."""
        names, relation, landmark = stream.choice(self._level(depth)[target])
        below = None if landmark is None else self.expression(landmark, depth - 1, stream)
        return Expression(target, names, self.objects[target].words(names), relation, below)

    def labels(self) -> dict[tuple[str, ...], tuple[tuple[str, ...], list[int]]]:
        """Every description by attributes of some object: words -> (attribute names, objects that it fits)."""
        found = {}
        for thing, table in zip(self.objects, self._fits, strict=True):
            for names, fits in table.items():
                found[thing.words(names)] = names, [k for k in range(len(self.objects)) if fits >> k & 1]
        return found

    def true_pairs(self) -> list[tuple[int, str, int]]:
        """All relations that are true beyond doubt: (i, relation, j)."""
        n = len(self.objects)
        return [(i, r, j) for r, true in self._true.items() for j in range(n) for i in range(n) if true[j] >> i & 1]
