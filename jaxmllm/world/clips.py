"""Clips: shapes that move, with identity, box, place and action in every frame."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int8, UInt8

from jaxmllm.errors import InputError
from jaxmllm.world.dynamics import EVENTS, Event, draw_course, seen
from jaxmllm.world.dynamics import actions as dynamics_actions
from jaxmllm.world.scenes import SceneObject, SceneSpec, draw_layout, draw_objects
from jaxmllm.world.streams import EVENT, Stream

STILL = "standing still"
MOTIONS = {
    "moving right": (1, 0),
    "moving left": (-1, 0),
    "moving down": (0, 1),
    "moving up": (0, -1),
}
_PLACES = (("upper left", "top", "upper right"), ("left", "centre", "right"), ("lower left", "bottom", "lower right"))
_RETRIES = 256  # layouts tried for one clip
_TRIES = 24  # motions tried for one object before it is left where it is
Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class ClipSpec:
    """What clips look like. Every field is a difficulty knob."""

    scene: SceneSpec = SceneSpec(objects=(2, 4), gap=2)  # the first frame
    frames: int = 6  # frames shown
    horizon: int = 0  # frames that follow and are not shown: foresight asks for the boxes in them
    fps: float = 2.0  # frames a second, for the times of the record
    speed: tuple[float, float] = (0.04, 0.1)  # slowest and fastest motion a frame, share of the shorter side
    still: float = 0.2  # chance that an object does not move
    turn: float = 0.25  # chance that an object changes what it does on the way
    leave: float = 0.0  # chance that an object may move out of the view; it has no box where less than half is seen
    crossing: float = 0.35  # largest share of a box that another box may cover in any frame
    events: tuple[str, ...] = ()  # of dynamics.EVENTS: each clip has one of them, in place of turns and free motion
    subjects: int = 4  # most subjects that an answer traces
    kinds: tuple[str, ...] = ()  # kinds of question asked about the clip, of its task; none named: all
    max_static: float = 1.0  # most that one frame and the prompt may tell of a questioned track, as an overlap

    def __post_init__(self):
        if not set(self.events) <= set(EVENTS):
            raise InputError(f"ClipSpec.events: {self.events!r} must be of {', '.join(EVENTS)}")
        if self.subjects < 1:
            raise InputError("ClipSpec.subjects: must be at least 1")
        if self.frames < 2 or self.horizon < 0 or self.fps <= 0:
            raise InputError("ClipSpec: frames must be at least 2, horizon at least 0, fps above 0")
        if not 0 < self.speed[0] <= self.speed[1] <= 0.5:
            raise InputError(f"ClipSpec.speed: {self.speed!r} must be (slowest, fastest) within 0..0.5")
        for field in ("still", "turn", "leave", "crossing", "max_static"):
            if not 0 <= getattr(self, field) <= 1:
                raise InputError(f"ClipSpec.{field}: {getattr(self, field)!r} must be within 0..1")

    @property
    def total(self) -> int:
        """Frames shown and not shown."""
        return self.frames + self.horizon


@dataclasses.dataclass(frozen=True)
class Mover:
    """One identity: its look, its whole boxes (None: out of view) and what it does when."""

    thing: SceneObject
    boxes: tuple[Box | None, ...]  # of each frame, shown or not; may reach over the border
    actions: tuple[tuple[int, int, str], ...]  # first frame, last frame (counted from 1), text


@dataclasses.dataclass(frozen=True)
class Clip:
    """Movers from back to front. `draw` renders the frames that are shown."""

    spec: ClipSpec
    movers: tuple[Mover, ...]
    ground: str  # of drawing.GROUNDS
    address: tuple[int, str, int]  # seed, split, index
    event: Event | None = None  # what happens, with `spec.events`

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, pixels."""
        return self.spec.scene.size

    def draw(self) -> list[UInt8[np.ndarray, "H W 3"]]:
        """The frames shown."""
        return [self.render(t)[0] for t in range(self.spec.frames)]

    def render(self, frame: int) -> tuple[UInt8[np.ndarray, "H W 3"], Int8[np.ndarray, "H W"]]:
        """Frame number `frame` (from 0), and the number of the mover seen at each pixel, -1 for the ground."""
        boxes = [mover.boxes[frame] for mover in self.movers]
        objects = [
            None if box is None else dataclasses.replace(mover.thing, box=box)
            for mover, box in zip(self.movers, boxes, strict=True)
        ]
        return draw_objects(objects, self.spec.scene, self.ground, self.address, frame)

    def visible(self, number: int) -> dict[int, Box]:
        """Boxes of a mover cut to the view, by frame number from 1, in all frames where it is seen."""
        width, height = self.size
        return {
            t: (max(b[0], 0), max(b[1], 0), min(b[2], width), min(b[3], height))
            for t, b in enumerate(self.movers[number].boxes, 1)
            if b is not None
        }

    def places(self, number: int) -> list[tuple[int, int, str]]:
        """Where a mover is while it is seen: (first frame, last frame, one of nine parts of the view)."""
        spans: list[tuple[int, int, str]] = []
        for t, (x1, y1, x2, y2) in self.visible(number).items():
            text = place_of((x1, y1, x2, y2), self.size)
            if spans and spans[-1][2] == text and spans[-1][1] == t - 1:
                spans[-1] = (spans[-1][0], t, text)
            else:
                spans.append((t, t, text))
        return spans


def place_of(box: Sequence[float], size: Sequence[int]) -> str:
    """The one of nine parts of the view that holds the middle of a box."""
    column, row = (min(int((box[k] + box[k + 2]) * 3 // (2 * size[k])), 2) for k in (0, 1))
    return _PLACES[row][column]


def _steps(spec: ClipSpec, stream: Stream) -> tuple[list[tuple[float, float]], list[tuple[int, int, str]]]:
    """Moves from frame to frame in pixels, and the actions they make."""
    moves: list[tuple[float, float]] = []
    actions: list[tuple[int, int, str]] = []
    turn = stream.integer(2, spec.total - 2) if spec.total > 3 and stream.chance(spec.turn) else spec.total
    for end in dict.fromkeys((turn, spec.total)):
        before = actions[-1][2] if actions else None
        rest = stream.chance(spec.still) and before != STILL
        text = STILL if rest else stream.choice([motion for motion in MOTIONS if motion != before])
        dx, dy = MOTIONS.get(text, (0, 0))
        speed = stream.uniform(*spec.speed) * min(spec.scene.size)
        start = len(moves)
        moves += [(dx * speed, dy * speed)] * (end - 1 - start)
        actions.append((start + 1 if not actions else actions[-1][1] + 1, end, text))
    return moves, actions


def _path(box: Box, moves: Sequence[tuple[float, float]]) -> list[Box]:
    x, y, path = 0.0, 0.0, [box]
    for dx, dy in moves:
        x, y = x + dx, y + dy
        sx, sy = int(np.floor(x + 0.5)), int(np.floor(y + 0.5))
        path.append((box[0] + sx, box[1] + sy, box[2] + sx, box[3] + sy))
    return path


def _seen(path: Sequence[Box], size: tuple[int, int]) -> list[Box | None]:
    """The path with None where less than half of the box is in view."""
    seen: list[Box | None] = []
    for box in path:
        inside = [max(0, min(box[k + 2], size[k]) - max(box[k], 0)) for k in (0, 1)]
        half = 2 * inside[0] * inside[1] >= (box[2] - box[0]) * (box[3] - box[1])
        seen.append(box if half else None)
    return seen


def _crosses(path: Sequence[Box | None], others: Sequence[Sequence[Box | None]], limit: float) -> bool:
    """Whether the path covers more than `limit` of another box, or is covered so, in any frame."""
    for other in others:
        for a, b in zip(path, other, strict=True):
            if a is None or b is None:
                continue
            wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
            if wide > 0 and high > 0 and wide * high > limit * smaller:
                return True
    return False


def _mover(spec: ClipSpec, thing: SceneObject, others: list[list[Box | None]], stream: Stream) -> Mover | None:
    """The object with a motion that keeps to the spec; None if neither a motion nor standing still does."""
    width, height = spec.scene.size
    for _ in range(_TRIES):
        moves, actions = _steps(spec, stream)
        path = _path(thing.box, moves)
        seen = _seen(path, spec.scene.size)
        inside = all(b[0] >= 0 and b[1] >= 0 and b[2] <= width and b[3] <= height for b in path)
        may_leave = stream.chance(spec.leave)
        if (inside or may_leave) and not _crosses(seen, others, spec.crossing):
            return Mover(thing, tuple(seen), tuple(actions))
    rest = (thing.box,) * spec.total
    return None if _crosses(rest, others, spec.crossing) else Mover(thing, rest, ((1, spec.total, STILL),))


def make_clip(spec: ClipSpec, seed: int, split: str, index: int, attempt: int = 0) -> Clip:
    """The clip at an address, with at least one mover that moves; `attempt` as in `scenes.make_scene`.

    The split is decided by the first frame, as for scenes.

    Raises:
        InputError: the objects do not fit, or nothing in this spec can move.
    """
    event = Stream(seed, split, index, EVENT, attempt).choice(spec.events) if spec.events else ""
    for retry in range(_RETRIES):
        stream = Stream(seed, split, index, attempt=attempt * _RETRIES + retry)
        # few layouts have what an event needs, such as two objects in a row
        objects = draw_layout(spec.scene, split, stream, fewer=retry // (32 if spec.events else 4))
        if objects is None:
            continue
        kind = stream.choice(spec.scene.ground)
        if spec.events:
            course = draw_course(event, spec, objects, stream)
            if course is None:
                continue
            boxes = seen(course, spec.scene.size)
            told = zip(course.objects, boxes, map(dynamics_actions, course.paths), strict=True)
            return Clip(spec, tuple(Mover(*parts) for parts in told), kind, (seed, split, index), course.event)
        movers: list[Mover] = []
        for thing in objects:
            mover = _mover(spec, thing, [list(m.boxes) for m in movers], stream)
            if mover is None:
                break
            movers.append(mover)
        moving = any(mover.actions[0][2] != STILL or len(mover.actions) > 1 for mover in movers)
        if moving and len(movers) == len(objects):
            return Clip(spec, tuple(movers), kind, (seed, split, index))
    raise InputError(
        "ClipSpec: no clip with a moving object could be drawn; lower `still`, `speed`, `frames` or scene.objects, "
        "raise `crossing`, or allow other `events`"
    )
