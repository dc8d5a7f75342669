"""Records: what is asked about a scene, page or clip, with its exact answer.

A record is a plain dict with `id`, `task`, `images`, `size` and the fields of its task. Lists of objects are ordered by
left side, then upper side, so that an answer that lists them has one right order.
"""

from collections.abc import Container, Sequence
from functools import cached_property
from typing import Any

from jaxmllm.errors import InputError
from jaxmllm.tasks import foresight_records, relation_graphs
from jaxmllm.tasks import tracks as task_tracks
from jaxmllm.tasks.relation_graphs import Graph, Oracle, relation_record
from jaxmllm.tasks.track_rewards import fits
from jaxmllm.world.clips import Clip, make_clip
from jaxmllm.world.expressions import NEAR, Referring, spoken
from jaxmllm.world.pages import Page
from jaxmllm.world.scenes import ATTRIBUTES, Scene, SceneObject, SceneSpec, phrase
from jaxmllm.world.streams import QUESTIONS, Stream

Record = dict[str, Any]
QUESTION_KINDS = {"tracks": tuple(task_tracks.QUERIES), "foresight": foresight_records.KINDS}  # of clips, by task
_NUMBERS = ("no", "a", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def in_order(objects: Sequence[SceneObject], members: Sequence[int]) -> list[int]:
    """Members sorted by left side, then upper side."""
    return sorted(members, key=lambda i: objects[i].box[:2])


# --- scenes ---------------------------------------------------------------------------------------------------------


class SceneQuestions:
    """Questions about one scene; the methods, named like the tasks, give the k-th question's fields.

    Consecutive questions of a task ask about different objects as far as the scene allows.
    """

    def __init__(self, scene: Scene, stream: Stream):
        self.objects, self.spec, self.address, self.stream = scene.objects, scene.spec, scene.address, stream
        self.referring = Referring(scene.objects, scene.spec)
        self._twin: Record | None = None  # the second question of a pair, not asked yet
        self._spare: tuple[Graph, Graph, int] | None = None  # used when chance finds no other pair
        self._sorted = in_order(scene.objects, range(len(scene.objects)))

    @cached_property
    def _turns(self) -> list[int]:
        """The order in which objects are asked about."""
        return self.stream.shuffled(range(len(self.objects)))

    def answerable(self, tasks: Container[str]) -> bool:
        """Whether the scene has expressions with every number of relations that the spec asks for."""
        depths = range(self.spec.depth[0], self.spec.depth[1] + 1)
        if "grounding" in tasks and not all(self.referring.targets(depth) for depth in depths):
            return False
        if "relations" in tasks:
            self._spare = self._pair()
            return self._spare is not None
        return True

    def grounding(self, k: int) -> Record:
        """`expression` fits exactly one object, whose `box` it is; `depth` counts its relations."""
        depth = self.stream.integer(*self.spec.depth)
        possible = self.referring.targets(depth)
        targets = [i for i in self._turns if i in possible]
        expression = self.referring.expression(targets[k % len(targets)], depth, self.stream)
        return {"expression": str(expression), "box": list(self.objects[expression.target].box), "depth": depth}

    def counting(self, k: int) -> Record:
        """`label`, how many objects it fits (`count`), their `boxes` and centres (`points`).

        The count is drawn evenly from those that occur, so that no count is the answer to most questions.
        """
        label = None
        if self.stream.chance(self.spec.zero_counts):
            label = absent_name(self.spec, self.objects, self.stream)
        members: list[int] = []
        if label is None:
            by_count: dict[int, list[tuple]] = {}
            for words, (names, fits) in sorted(self.referring.labels().items()):
                by_count.setdefault(len(fits), []).append((phrase(words, "shape" in names), fits))
            label, members = self.stream.choice(by_count[self.stream.choice(sorted(by_count))])
        things = [self.objects[i] for i in in_order(self.objects, members)]
        return {
            "label": label,
            "count": len(things),
            "points": [list(thing.centre) for thing in things],
            "boxes": [list(thing.box) for thing in things],
        }

    def detection(self, k: int) -> Record:
        """`boxes` and `labels` of all objects; `categories` lists all labels of the spec, present or not."""
        things = [self.objects[i] for i in self._sorted]
        return {
            "categories": categories(self.spec),
            "boxes": [list(thing.box) for thing in things],
            "labels": [thing.name(self.spec.category) for thing in things],
        }

    def relations(self, k: int) -> Record:
        """An expression that fits one object (`match`, with its `box`) or, with one relation replaced, none (`foil_pos`).

        The fields are those of `tasks.relation_graphs.relation_record`. Questions come in twins on the same picture, the
        true and the false one in random order.
        """
        if self._twin is None:
            pair = self._pair() or self._spare
            assert pair is not None  # see `answerable`
            graph, foil, wrong = pair
            verbosity = self.stream.integer(*self.spec.verbosity)
            twins = self.stream.shuffled((
                relation_record(self._oracle, graph, verbosity=verbosity),
                relation_record(self._oracle, foil, wrong, graph.relations[wrong], verbosity),
            ))  # fmt: skip
            name = "-".join(map(str, (*self.address, k)))
            twins = [twin | {"twin": name} for twin in twins]
            self._twin = twins[1]
            return twins[0]
        record, self._twin = self._twin, None
        return record

    @cached_property
    def _oracle(self) -> Oracle:
        things = [{name: getattr(o, name) for name in ATTRIBUTES} | {"box": list(o.box)} for o in self.objects]
        shorter = min(self.spec.size)
        return Oracle(things, tau=self.spec.margin * shorter, near=NEAR * shorter)

    def _pair(self) -> tuple[Graph, Graph, int] | None:
        """A matched and a mismatched expression graph and the wrong edge; None if chance finds none."""
        edges = self.stream.integer(max(1, self.spec.depth[0]), max(1, self.spec.depth[1]))
        shape = self.stream.choice(relation_graphs.SHAPES)
        return relation_graphs.sample_pair(
            self._oracle,
            edges,
            shape,
            self.stream.generator(),
            self.spec.relations,
            tries=20,
            rivals=self.spec.rivals,
        )

    def captioning(self, k: int) -> Record:
        """`caption` names every object, then relations of objects that can be told apart.

        `objects` holds {"name", "attributes", "box"}, `relations` the stated ones: [subject, relation, object], subject
        and object as indices into `objects`.
        """
        things = [self.objects[i] for i in self._sorted]
        names = [thing.name() for thing in things]
        unique = [i for i, name in enumerate(names) if names.count(name) == 1]
        rank = {i: position for position, i in enumerate(self._sorted)}
        pairs = [(rank[i], relation, rank[j]) for i, relation, j in self.referring.true_pairs()]
        relations: list[tuple[int, str, int]] = []
        for subject, other in zip(unique, unique[1:], strict=False):
            true = [relation for i, relation, j in pairs if (i, j) == (subject, other)]
            if true:
                relations.append((subject, self.stream.choice(true), other))
        shown = [_several(name, names.count(name)) for name in dict.fromkeys(names)]
        sentences = [f"The image shows {listing(shown)}."]
        sentences += [f"The {names[i]} is {spoken(relation)} the {names[j]}." for i, relation, j in relations]
        described = ("size", "texture", "colour")
        objects = [{"name": t.shape, "attributes": list(t.words(described)), "box": list(t.box)} for t in things]
        return {"caption": " ".join(sentences), "objects": objects, "relations": [list(r) for r in relations]}


def absent_name(spec: SceneSpec, objects: Sequence[SceneObject], stream: Stream) -> str | None:
    """Colour and shape of something that is not among the objects; None if chance finds nothing."""
    present = {(thing.colour, thing.shape) for thing in objects}
    for _ in range(20):
        words = (stream.choice(spec.colours), stream.choice(spec.shapes))
        if words not in present:
            return " ".join(words)
    return None


def categories(spec: SceneSpec) -> list[str]:
    """Every label that detection in this world can give."""
    sizes = tuple(size[0] for size in spec.sizes)
    values = {"size": sizes, "texture": spec.textures, "colour": spec.colours, "shape": spec.shapes}
    found: list[tuple[str, ...]] = [()]
    for name in ATTRIBUTES:
        if name in spec.category:
            found = [(*words, value) for words in found for value in values[name]]
    return [phrase([word for word in words if word != "solid"], "shape" in spec.category) for words in found]


def _several(name: str, count: int) -> str:
    if count == 1:
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    number = _NUMBERS[count] if count < len(_NUMBERS) else str(count)
    return f"{number} {name}{'es' if name.endswith('s') else 's'}"


def listing(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


# --- pages ----------------------------------------------------------------------------------------------------------


def ocr(page: Page) -> Record:
    """`text` in reading order and the `lines` with their quads [x1, y1, .. x4, y4], clockwise from the upper left."""
    return {"text": page.text, "lines": [{"text": line.text, "quad": line.quad} for line in page.lines]}


# --- clips ----------------------------------------------------------------------------------------------------------


def clip_fields(clip: Clip) -> Record:
    """`frames`, `caption` and `tracks` as in the tracks task; identities are numbered by the first box's left side.

    A track has the boxes, places and actions of all frames, those after the last shown one included; the caption tells
    the shown ones only.
    """
    order = sorted(range(len(clip.movers)), key=lambda i: clip.movers[i].thing.box[:2])
    tracks: list[Record] = []
    story = []
    for number, i in enumerate(order, 1):
        mover, boxes = clip.movers[i], clip.visible(i)
        thing = mover.thing
        spans = [(max(a, min(boxes)), min(b, max(boxes)), text) for a, b, text in mover.actions]
        actions: list[Record] = [{"span": [a, b], "text": text} for a, b, text in spans if a <= b]
        tracks.append(
            {
                "id": number,
                "names": [thing.name(("colour", "shape")), thing.shape],
                "boxes": {str(t): list(box) for t, box in boxes.items()},
                "appearance": [thing.name()],
                "location": [{"span": [a, b], "text": text} for a, b, text in clip.places(i)],
                "action": actions,
            }
        )
        name = thing.name()
        # what is not shown yet is not told
        deeds = " and then ".join(action["text"] for action in actions if action["span"][0] <= clip.spec.frames)
        story.append(f"{'An' if name[0] in 'aeiou' else 'A'} {name} is {deeds}.")
    return {
        "fps": clip.spec.fps,
        "frames": [{"idx": t + 1, "time": t / clip.spec.fps} for t in range(clip.spec.frames)],
        "caption": " ".join(story),
        "tracks": tracks,
    }


def clip_answerable(clip: Clip, tasks: Container[str]) -> bool:
    """Whether the clip allows a question of every task, of the kinds and with the motion that its spec asks for."""
    if not clip.spec.kinds and clip.spec.max_static >= 1:
        return True
    record, stream = {"id": "", "size": list(clip.size)}, Stream(*clip.address, QUESTIONS)
    drawn = {"tracks": _tracks_query, "foresight": _foresight_query}
    return all(draw(clip, record, stream) is not None for task, draw in drawn.items() if task in tasks)


def tracks(clip: Clip, record: Record, stream: Stream) -> Record:
    """A clip's record with one query about it, as the tracks task draws them."""
    return _asked(_tracks_query(clip, record, stream), record)


def _tracks_query(clip: Clip, record: Record, stream: Stream) -> Record | None:
    fields, kinds = record | clip_fields(clip), _kinds(clip, "tracks")
    spec = clip.spec
    return task_tracks.make_query(
        fields, stream.generator(), kinds, max_tracks=spec.subjects, max_static=spec.max_static
    )


def _kinds(clip: Clip, task: str) -> list[str]:
    return [kind for kind in clip.spec.kinds if kind in QUESTION_KINDS[task]]


def foresight(clip: Clip, record: Record, stream: Stream) -> Record:
    """A clip's record with one foresight query; half of them ask for the frames of the horizon as well.

    The task's share of negatives asks for something that is not in the clip.
    """
    return _asked(_foresight_query(clip, record, stream), record)


def _foresight_query(clip: Clip, record: Record, stream: Stream) -> Record | None:
    record = record | clip_fields(clip)
    last = max(int(t) for track in record["tracks"] for t in track["boxes"])
    horizon = stream.choice((0, max(0, last - clip.spec.frames)))
    spec, kinds, absent = clip.spec, _kinds(clip, "foresight"), None
    if stream.chance(foresight_records.NEGATIVE_SHARE) and (not kinds or {"referring", "generic"} & set(kinds)):
        absent = _absent_cue(clip, record, stream)
    return foresight_records.make_query(
        record, stream.generator(), kinds, horizon, absent, max_tracks=spec.subjects, max_static=spec.max_static
    )


def _absent_cue(clip: Clip, record: Record, stream: Stream) -> str | None:
    """A cue that fits nothing in the clip. It is drawn from another clip as cues for what is there are, so that the words
    of a question do not tell whether its subject exists.
    """
    said = [p for track in record["tracks"] for p in foresight_records.phrases_of(track, clip.spec.frames)]
    seed, split, _ = clip.address
    for _ in range(8):
        other = make_clip(clip.spec, seed, split, stream.integer(0, 2**32 - 1))
        fields = {"size": list(other.size)} | clip_fields(other)
        drawn = foresight_records.make_query(fields, stream.generator(), ["referring"])
        if drawn is not None and not fits(drawn["query"]["cue"], said):
            return drawn["query"]["cue"]
    return None


def _asked(query: Record | None, record: Record) -> Record:
    if query is None:
        raise InputError(f"{record['id']}: nothing can be asked about this clip; enlarge ClipSpec.scene.sizes")
    return query
