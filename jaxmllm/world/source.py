"""Index-addressable sources of world records: what training, evaluation and Grain read."""

import dataclasses
from collections.abc import Mapping
from typing import SupportsIndex

import numpy as np

from jaxmllm.errors import InputError
from jaxmllm.world.clips import Clip, ClipSpec, make_clip
from jaxmllm.world.grid import grid_targets
from jaxmllm.world.pages import Page, PageSpec, make_page
from jaxmllm.world.questions import QUESTION_KINDS, Record, SceneQuestions, clip_answerable, foresight, ocr, tracks
from jaxmllm.world.scenes import Scene, SceneSpec, make_scene
from jaxmllm.world.streams import QUESTIONS, Stream, check_split

Spec = SceneSpec | PageSpec | ClipSpec
SCENE_TASKS = ("grounding", "counting", "detection", "captioning", "relations")
PAGE_TASKS = ("ocr",)
CLIP_TASKS = ("tracks", "foresight")
TASKS = (*SCENE_TASKS, *PAGE_TASKS, *CLIP_TASKS)

# What a task is drawn on unless told otherwise.
DEFAULT_SPECS: dict[str, Spec] = {
    "grounding": SceneSpec(),
    "counting": SceneSpec(objects=(2, 8), sizes=(("small", 0.12, 0.16), ("large", 0.22, 0.28)), repeat=0.5),
    "detection": SceneSpec(),
    "captioning": SceneSpec(),
    "relations": SceneSpec(
        objects=(5, 8), sizes=(("small", 0.1, 0.14), ("large", 0.2, 0.26)), repeat=0.2, depth=(1, 2)
    ),
    "ocr": PageSpec(),
    "tracks": ClipSpec(),
    "foresight": ClipSpec(frames=4, horizon=2),
}
_CLIP_QUESTIONS = {"tracks": tracks, "foresight": foresight}
_ATTEMPTS = 64  # scenes tried for one that allows the questions


@dataclasses.dataclass(frozen=True)
class WorldSource:
    """Records of the procedural world; a random-access data source for Grain, picklable.

    Item i depends on (task, split, seed, i, spec) only: not on `length`, other items, the process or the machine. The
    picture does not depend on the task, so several tasks can ask about the same one; only a scene that does not allow
    the wanted expressions is drawn anew. (Which relation, track or foresight
    query is drawn comes from numpy's Generator, whose values numpy may change in a release; nothing else does.)

    >>> source = WorldSource("grounding", split="val", length=512)
    >>> record = source[7]                       # {"id", "task", "images", "size", "expression", "box", ..}
    >>> mixed = WorldSource({"grounding": 3, "counting": 1}, questions=6)
    >>> len(mixed.records(7))                    # six questions about one picture
    6
    """

    task: str | Mapping[str, float]  # one of TASKS, or tasks with weights, all of scenes or all of clips
    split: str = "train"  # train, val or test: disjoint by content, see `streams`
    seed: int = 0
    length: int = 100_000
    spec: Spec | None = None  # None: DEFAULT_SPECS of the (first) task
    questions: int = 1  # records per picture in `records`
    twins: bool = False  # of relations: items 2 k and 2 k + 1 are the two expressions of one pair, about picture k

    def __post_init__(self):
        check_split(self.split)
        tasks = list(self._weights)
        families = ((SCENE_TASKS, SceneSpec), (PAGE_TASKS, PageSpec), (CLIP_TASKS, ClipSpec))
        kind = next((kind for family, kind in families if tasks and set(tasks) <= set(family)), None)
        if kind is None:
            raise InputError(
                f"task: {self.task!r} is unknown or mixes scenes, pages and clips; use tasks of one of "
                f"{SCENE_TASKS}, {PAGE_TASKS}, {CLIP_TASKS}"
            )
        if not all(weight >= 0 for weight in self._weights.values()) or not sum(self._weights.values()) > 0:
            raise InputError(f"task: weights {self.task!r} must be at least 0 and not all 0")
        if self.spec is None:
            object.__setattr__(self, "spec", DEFAULT_SPECS[tasks[0]])
        if not isinstance(self.spec, kind):
            raise InputError(f"spec: task {self.task!r} needs a {kind.__name__}, got {type(self.spec).__name__}")
        known = [name for task in tasks for name in QUESTION_KINDS.get(task, ())]
        for name in getattr(self.spec, "kinds", ()):
            if name not in known:
                raise InputError(f"ClipSpec.kinds: {name!r} is unknown; use {', '.join(known)}")
        if self.length < 0 or self.questions < 1:
            raise InputError("length must be at least 0 and questions at least 1")
        if self.twins and (tasks != ["relations"] or self.questions > 1):
            raise InputError("twins: they are of the task relations alone, without questions")

    @property
    def _weights(self) -> dict[str, float]:
        return {self.task: 1.0} if isinstance(self.task, str) else dict(self.task)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: SupportsIndex) -> Record:
        """The first record of picture `index`. Raises IndexError outside 0..length - 1."""
        if self.twins:
            picture, which = divmod(self._inside(index), 2)
            return self._records(picture, 2)[which]
        return self._records(index, 1)[0]

    def records(self, index: SupportsIndex) -> list[Record]:
        """`questions` records that share picture `index`: the same array objects in `images`."""
        return [self[index]] if self.twins else self._records(index, self.questions)

    def content(self, index: SupportsIndex) -> Scene | Page | Clip:
        """The scene, page or clip behind the records, with all that is true about it."""
        i = self._inside(index)
        return self._content(i // 2 if self.twins else i)[0]

    def grid_targets(self, index: SupportsIndex, cell: int) -> dict[str, np.ndarray]:
        """What to tell a vision tower about each cell of `cell` x `cell` pixels: throw-away targets for its warm-up.

        Returns `image` (uint8 [H, W, 3]; of clips the first frame), and per field integers [H // cell, W // cell], -1
        where no object covers at least 4 % of the cell. Fields of the object that covers most of it: `shape`, `colour`,
        `size`, `texture`, as indices into the spec's tuples, and `x1`, `y1`, `x2`, `y2`, its box in pixels. On pages
        the objects are words and their one attribute is `word`, an index into the vocabulary, -1 for numbers.
        """
        return grid_targets(self.content(index), cell)

    def _inside(self, index: SupportsIndex) -> int:
        i = index.__index__()
        if not 0 <= i < self.length:
            raise IndexError(f"item {i} of a world source of length {self.length}")
        return i

    def _content(self, index: SupportsIndex) -> tuple[Scene | Page | Clip, SceneQuestions | None]:
        i = self._inside(index)
        address, spec = (self.seed, self.split, i), self.spec
        if isinstance(spec, PageSpec):
            return make_page(spec, *address), None
        if isinstance(spec, ClipSpec):
            clips = (make_clip(spec, *address, attempt) for attempt in range(_ATTEMPTS))
            clip = next((clip for clip in clips if clip_answerable(clip, self._weights)), None)
            if clip is None:
                raise InputError(
                    f"ClipSpec.kinds, max_static: {spec.kinds}, {spec.max_static} leave nothing to ask in {_ATTEMPTS} "
                    "clips; allow more, or raise `speed`, `frames` or `turn`"
                )
            return clip, None
        assert spec is not None  # set by __post_init__
        for attempt in range(_ATTEMPTS):
            scene = make_scene(spec, *address, attempt)
            questions = SceneQuestions(scene, Stream(*address, QUESTIONS))
            if questions.answerable(self._weights):
                return scene, questions
        raise InputError(
            f"SceneSpec.depth: {spec.depth!r} relations were not possible in {_ATTEMPTS} scenes of {spec.objects} "
            "objects; allow more objects or fewer relations"
        )

    def _records(self, index: SupportsIndex, count: int) -> list[Record]:
        content, questions = self._content(index)
        images = content.draw() if isinstance(content, Clip) else [content.draw()]
        stream = questions.stream if questions else Stream(*content.address, QUESTIONS)
        found = []
        for k in range(count):
            task = self._draw_task(stream)
            name = f"world-{task}-{self.split}-{self.seed}-{index.__index__()}-{k}"
            record: Record = {"id": name, "task": task, "images": images, "size": list(content.size)}
            record["unit"] = "-".join(map(str, content.address))  # questions of one picture are not independent
            if questions is not None:
                record |= getattr(questions, task)(k)
            elif isinstance(content, Clip):
                record = _CLIP_QUESTIONS[task](content, record, stream)
            elif isinstance(content, Page):
                record |= ocr(content)
            found.append(record)
        return found

    def _draw_task(self, stream: Stream) -> str:
        weights = {task: weight for task, weight in self._weights.items() if weight}
        point = stream.uniform(0, sum(weights.values()))
        for task, weight in weights.items():
            point -= weight
            if point < 0:
                return task
        return next(reversed(weights))  # rounding
