"""Index-addressable sources of world records: what training, evaluation and Grain read."""

import dataclasses
from collections.abc import Mapping
from typing import SupportsIndex

import numpy as np

from jaxmllm.errors import InputError
from jaxmllm.world.clips import Clip, ClipSpec, make_clip
from jaxmllm.world.pages import Page, PageSpec, make_page
from jaxmllm.world.questions import Record, SceneQuestions, clip_fields, ocr, tracks_record
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
    "relations": SceneSpec(objects=(5, 8), sizes=(("small", 0.1, 0.14), ("large", 0.2, 0.26)), repeat=0.2),
    "ocr": PageSpec(),
    "tracks": ClipSpec(),
    "foresight": ClipSpec(frames=4, horizon=2),
}
_ATTEMPTS = 64  # scenes tried for one that allows the questions


@dataclasses.dataclass(frozen=True)
class WorldSource:
    """Records of the procedural world; a random-access data source for Grain, picklable.

    Item i depends on (task, split, seed, i, spec) only: not on `length`, other items, the process or the machine. The
    picture does not depend on the task, so several tasks can ask about the same one.

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
        if self.length < 0 or self.questions < 1:
            raise InputError("length must be at least 0 and questions at least 1")

    @property
    def _weights(self) -> dict[str, float]:
        return {self.task: 1.0} if isinstance(self.task, str) else dict(self.task)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: SupportsIndex) -> Record:
        """The first record of picture `index`. Raises IndexError outside 0..length - 1."""
        return self._records(index, 1)[0]

    def records(self, index: SupportsIndex) -> list[Record]:
        """`questions` records that share picture `index`: the same array objects in `images`."""
        return self._records(index, self.questions)

    def content(self, index: SupportsIndex) -> Scene | Page | Clip:
        """The scene, page or clip behind the records, with all that is true about it."""
        return self._content(index)[0]

    def grid_targets(self, index: SupportsIndex, cell: int) -> dict[str, np.ndarray]:
        """What to tell a vision tower about each cell of `cell` x `cell` pixels: throw-away targets for its warm-up.

        Returns `image` (uint8 [H, W, 3]; of clips the first frame), and per field integers [H // cell, W // cell], -1
        where no object covers at least 4 % of the cell. Fields of the object that covers most of it: `shape`, `colour`,
        `size`, `texture`, as indices into the spec's tuples, and `x1`, `y1`, `x2`, `y2`, its box in pixels. On pages
        the objects are words and their one attribute is `word`, an index into the vocabulary, -1 for numbers.
        """
        content = self.content(index)
        if isinstance(content, Page):
            words = [word for line in content.lines for word in line.words]
            number = {word: k for k, word in enumerate(self.spec.vocabulary)}
            fields = {"word": [number.get(word.text.lower(), -1) for word in words]}
            image, owner = content.draw(), content.owner()
            boxes = [word.box for word in words]
        else:
            spec = self.spec.scene if isinstance(content, Clip) else self.spec
            things = [mover.thing for mover in content.movers] if isinstance(content, Clip) else content.objects
            image, owner = content.render(0) if isinstance(content, Clip) else content.render()
            names = {
                "shape": spec.shapes,
                "colour": spec.colours,
                "size": tuple(size[0] for size in spec.sizes),
                "texture": spec.textures,
            }
            fields = {name: [known.index(getattr(o, name)) for o in things] for name, known in names.items()}
            boxes = [thing.box for thing in things]
        fields |= {name: [box[k] for box in boxes] for k, name in enumerate(("x1", "y1", "x2", "y2"))}
        winner = _cell_winners(owner, cell, len(boxes))
        return {"image": image} | {
            name: np.append(np.array(values, np.int32), np.int32(-1))[winner] for name, values in fields.items()
        }

    def _content(self, index: SupportsIndex) -> tuple[Scene | Page | Clip, SceneQuestions | None]:
        i = index.__index__()
        if not 0 <= i < self.length:
            raise IndexError(f"item {i} of a world source of length {self.length}")
        address = (self.seed, self.split, i)
        if isinstance(self.spec, PageSpec):
            return make_page(self.spec, *address), None
        if isinstance(self.spec, ClipSpec):
            return make_clip(self.spec, *address), None
        for attempt in range(_ATTEMPTS):
            scene = make_scene(self.spec, *address, attempt)
            questions = SceneQuestions(scene, self.spec, Stream(*address, QUESTIONS))
            if questions.answerable:
                return scene, questions
        raise InputError(
            f"SceneSpec.depth: {self.spec.depth!r} relations were not possible in {_ATTEMPTS} scenes of "
            f"{self.spec.objects} objects; allow more objects or fewer relations"
        )

    def _records(self, index: SupportsIndex, count: int) -> list[Record]:
        content, questions = self._content(index)
        drawn = content.draw()
        images = drawn if isinstance(drawn, list) else [drawn]
        stream = questions.stream if questions else Stream(self.seed, self.split, index.__index__(), QUESTIONS)
        found = []
        for k in range(count):
            task = self._draw_task(stream)
            record: Record = {
                "id": f"world-{task}-{self.split}-{self.seed}-{index.__index__()}-{k}",
                "task": task,
                "images": images,
                "size": list(content.size),
            }
            if questions is not None:
                record |= getattr(questions, task)(k)
            elif isinstance(content, Page):
                record |= ocr(content)
            else:
                record = tracks_record(record | clip_fields(content), stream)
            found.append(record)
        return found

    def _draw_task(self, stream: Stream) -> str:
        weights = self._weights
        point = stream.uniform(0, sum(weights.values()))
        for task, weight in weights.items():
            point -= weight
            if point < 0:
                return task
        return next(task for task, weight in reversed(weights.items()) if weight)


def _cell_winners(owner: np.ndarray, cell: int, objects: int) -> np.ndarray:
    """Per cell, the object with most pixels in it; -1 if none has 4 % of them. Cells cut by the border are left out."""
    rows, columns = owner.shape[0] // cell, owner.shape[1] // cell
    if rows == 0 or columns == 0:
        raise ValueError(f"cell {cell} is larger than the picture {owner.shape[1]} x {owner.shape[0]}")
    blocks = owner[: rows * cell, : columns * cell].reshape(rows, cell, columns, cell).swapaxes(1, 2)
    blocks = blocks.reshape(rows * columns, cell * cell).astype(np.int64) + 1
    place = np.arange(rows * columns)[:, None] * (objects + 1)
    counts = np.bincount((blocks + place).ravel(), minlength=rows * columns * (objects + 1))
    counts = counts.reshape(rows, columns, objects + 1)[..., 1:]
    winner = counts.argmax(-1) if objects else np.full((rows, columns), -1)
    enough = counts.max(-1, initial=0) >= max(1, 0.04 * cell * cell)
    return np.where(enough, winner, -1)
