"""Motion that one frame and constant velocity do not give away: objects bounce, collide, hide, come, go and reach goals.

A clip has one event, drawn from `ClipSpec.events`. Its first frames look alike whatever the event will be: an object on
its way to another one may push it (collide), stop at it (goal) or pass behind it (occlude), and one on its way to the
border may turn back (bounce) or go out (leave). The frames before tell where, not what.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxmllm.world.scenes import SceneObject
from jaxmllm.world.streams import Stream

if TYPE_CHECKING:
    from jaxmllm.world.clips import ClipSpec

EVENTS = ("bounce", "collide", "occlude", "enter", "leave", "goal")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
STILL = "standing still"
HIDDEN = 0.5  # share of a box from which on it counts as out of sight, behind others or beyond the border
Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Event:
    """What happens in a clip: `frame` counts from 1, `who` and `to` are numbers of movers, back to front."""

    kind: str  # of EVENTS
    frame: int  # the first frame after contact, turning, hiding, coming into view or going out of it
    who: int
    to: int | None = None  # the object met, stopped at or passed behind


@dataclasses.dataclass(frozen=True)
class Course:
    """The paths of one clip: a whole box a frame and object, which may reach over the border or lie under another."""

    objects: tuple[SceneObject, ...]  # from back to front
    paths: tuple[tuple[Box, ...], ...]
    event: Event


def draw_course(kind: str, spec: "ClipSpec", objects: Sequence[SceneObject], stream: Stream) -> Course | None:
    """One event of a kind among the objects of a first frame; None where it does not fit the room and the speeds.

    An object that hides is moved behind the others. Objects without a part in the event stand still.
    """
    course = (_border if kind in ("bounce", "leave", "enter") else _meeting)(kind, spec, objects, stream)
    if course is None or not _apart(course):
        return None
    if kind in ("enter", "leave"):  # by what is seen, since places are rounded
        there = [box is not None for box in seen(course, spec.scene.size)[course.event.who]]
        if there.count(True) < 2 or all(there):
            return None
        frame = there.index(kind == "enter") + 1
        return dataclasses.replace(course, event=dataclasses.replace(course.event, frame=frame))
    return course


def _border(kind: str, spec: "ClipSpec", objects: Sequence[SceneObject], stream: Stream) -> Course | None:
    """An object that turns back at the border, goes over it, or comes over it to the place of its first frame."""
    for who in stream.shuffled(range(len(objects))):
        box, speed = objects[who].box, _speed(spec, stream)
        for name in stream.shuffled(list(DIRECTIONS)):
            axis, sign = _axis(name)
            room = spec.scene.size[axis] - box[axis + 2] if sign > 0 else box[axis]
            side = box[axis + 2] - box[axis]
            places = []
            for t in range(spec.total):
                way = speed * t
                if kind == "bounce" and way > room:
                    way = 2 * room - way
                # it comes in against the direction in which it would go out
                places.append(speed * (spec.total - 1 - t) if kind == "enter" else way)
            beyond = [place > room + HIDDEN * side for place in places]
            turns = [t for t in range(1, spec.total) if speed * t > room]
            if kind == "bounce":
                fits = bool(turns) and 1 < turns[0] < spec.total - 1 and min(places) >= 0
                frame = turns[0] + 1 if turns else 0
            else:  # seen in at least two frames, and out of view in at least one
                fits = 0 < sum(beyond) <= spec.total - 2
                frame = 0  # by what is seen: see `draw_course`
            if fits:
                path = tuple(_moved(box, axis, sign * place) for place in places)
                return _course(objects, {who: path}, spec, Event(kind, frame, who))
    return None


def _meeting(kind: str, spec: "ClipSpec", objects: Sequence[SceneObject], stream: Stream) -> Course | None:
    """An object on its way to another in its row or column: it pushes it on, stops at it or passes behind it."""
    pairs = [(a, b) for a in range(len(objects)) for b in range(len(objects)) if a != b]
    for who, to in stream.shuffled(pairs):
        mine, other = objects[who].box, objects[to].box
        for axis in stream.shuffled((0, 1)):
            across = 1 - axis
            shared = min(mine[across + 2], other[across + 2]) - max(mine[across], other[across])
            side = mine[across + 2] - mine[across]
            hides = mine[across] >= other[across] and mine[across + 2] <= other[across + 2]
            if shared < side / 2 or (kind == "occlude" and not hides):
                continue
            sign = 1 if other[axis] > mine[axis] else -1
            gap = other[axis] - mine[axis + 2] if sign > 0 else mine[axis] - other[axis + 2]
            speed = _speed(spec, stream)
            contact = next((t for t in range(1, spec.total) if speed * t > gap), spec.total)
            if gap < 0 or not 1 < contact < spec.total - 1:
                continue
            ways = [speed * t for t in range(spec.total)]
            paths = {who: [_moved(mine, axis, sign * (way if kind == "occlude" else min(way, gap))) for way in ways]}
            if kind == "collide":
                paths[to] = [_moved(other, axis, sign * max(way - gap, 0)) for way in ways]
            course = _course(objects, paths, spec, Event(kind, contact + 1, who, to))
            if all(_inside(box, spec.scene.size) for path in course.paths for box in path):
                return _behind(course) if kind == "occlude" else course
    return None


def _course(objects, paths, spec, event) -> Course:
    rest = [tuple(paths.get(k, (thing.box,) * spec.total)) for k, thing in enumerate(objects)]
    return Course(tuple(objects), tuple(rest), event)


def _behind(course: Course) -> Course:
    """The same with the object that hides drawn first."""
    who = course.event.who
    order = [who, *(k for k in range(len(course.objects)) if k != who)]
    to = None if course.event.to is None else order.index(course.event.to)
    event = dataclasses.replace(course.event, who=0, to=to)
    return Course(tuple(course.objects[k] for k in order), tuple(course.paths[k] for k in order), event)


def _apart(course: Course) -> bool:
    """Whether objects only touch where the event says so."""
    pair = {course.event.who, course.event.to}
    for a in range(len(course.paths)):
        for b in range(a):
            if course.event.kind == "occlude" and {a, b} == pair:
                continue
            if any(_shared(x, y) > 0 for x, y in zip(course.paths[a], course.paths[b], strict=True)):
                return False
    return True


def seen(course: Course, size: tuple[int, int]) -> list[tuple[Box | None, ...]]:
    """Every object's boxes, None where more than `HIDDEN` of one is beyond the border or under objects in front."""
    rows = []
    for k, path in enumerate(course.paths):
        row: list[Box | None] = []
        for t, box in enumerate(path):
            area = (box[2] - box[0]) * (box[3] - box[1])
            view = _shared(box, (0, 0, *size))
            covered = max((_shared(box, course.paths[j][t]) for j in range(k + 1, len(course.paths))), default=0)
            row.append(box if view - covered >= HIDDEN * area else None)
        rows.append(tuple(row))
    return rows


def actions(path: Sequence[Box]) -> tuple[tuple[int, int, str], ...]:
    """What a path does: spans (first frame, last frame, words) of going one way or standing still, frames from 1."""
    spans: list[tuple[int, int, str]] = []
    for t in range(1, len(path)):
        dx, dy = path[t][0] - path[t - 1][0], path[t][1] - path[t - 1][1]
        sign = ((dx > 0) - (dx < 0), (dy > 0) - (dy < 0))
        text = next((f"moving {name}" for name, way in DIRECTIONS.items() if way == sign), STILL)
        first = spans[-1][1] + 1 if spans else 1
        if spans and spans[-1][2] == text:
            spans[-1] = (spans[-1][0], t + 1, text)
        else:
            spans.append((first, t + 1, text))
    return tuple(spans)


def _speed(spec: "ClipSpec", stream: Stream) -> float:
    return stream.uniform(*spec.speed) * min(spec.scene.size)


def _axis(name: str) -> tuple[int, int]:
    dx, dy = DIRECTIONS[name]
    return (0, dx) if dx else (1, dy)


def _moved(box: Box, axis: int, way: float) -> Box:
    step = int(way + 0.5) if way >= 0 else -int(0.5 - way)
    moved = list(box)
    moved[axis] += step
    moved[axis + 2] += step
    return moved[0], moved[1], moved[2], moved[3]


def _inside(box: Box, size: tuple[int, int]) -> bool:
    return box[0] >= 0 and box[1] >= 0 and box[2] <= size[0] and box[3] <= size[1]


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Area of the intersection."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
