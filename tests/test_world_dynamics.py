"""Events of clips: they happen when the record says, follow from the motion before, and constant velocity misses them."""

from collections import Counter

import numpy as np
import pytest

from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.tasks.trajectories import constant_velocity
from jaxmllm.world.clips import ClipSpec, make_clip
from jaxmllm.world.dynamics import EVENTS
from jaxmllm.world.scenes import SceneSpec

SCENE = SceneSpec(size=(84, 84), objects=(2, 4), gap=2)


def clips(*events, count=40):
    spec = ClipSpec(scene=SCENE, frames=8, events=events)
    return [make_clip(spec, 0, "train", index) for index in range(count)]


def steps(boxes):
    """Moves of the upper left corner from frame to frame where both are seen, by the later frame (from 1)."""
    pairs = zip(boxes, boxes[1:], strict=False)
    return {t: (b[0] - a[0], b[1] - a[1]) for t, (a, b) in enumerate(pairs, 2) if a and b}


def test_kinds_are_even_and_the_split_names_the_clips():
    seen = Counter(clip.event.kind for clip in clips(*EVENTS, count=180))
    assert set(seen) == set(EVENTS) and max(seen.values()) < 2 * min(seen.values())
    again = make_clip(ClipSpec(scene=SCENE, frames=8, events=EVENTS), 0, "val", 3)
    assert again == make_clip(ClipSpec(scene=SCENE, frames=8, events=EVENTS), 0, "val", 3)


def test_what_bounces_turns_round_in_view():
    for clip in clips("bounce"):
        mover, event = clip.movers[clip.event.who], clip.event
        assert None not in mover.boxes and [a[2] for a in mover.actions][0] != mover.actions[-1][2]
        moves = steps(mover.boxes)
        first, last = np.array(moves[2]), np.array(moves[clip.spec.total])
        assert first @ last < 0 and all(np.array(moves[t]) @ first > 0 for t in range(2, event.frame))


def test_pushed_objects_take_over_the_motion_and_goals_stop_it():
    for clip in clips("collide", "goal", count=60):
        event = clip.event
        mine, other = (steps(clip.movers[k].boxes) for k in (event.who, event.to))
        assert all(other[t] == (0, 0) for t in range(2, event.frame))
        assert all(mine[t] == (0, 0) for t in range(event.frame + 1, 9)) and mine[2] != (0, 0)
        pushed = [other[t] for t in range(event.frame + 1, 9)]
        if event.kind == "goal":
            assert set(pushed) <= {(0, 0)}
        elif pushed:
            assert all(np.array(move) @ np.array(mine[2]) > 0 for move in pushed)
            assert clip.movers[event.to].actions[-1][2] == clip.movers[event.who].actions[0][2]


def test_the_hidden_have_no_box_and_few_pixels():
    hidden = 0
    for clip in clips("occlude"):
        boxes = clip.movers[clip.event.who].boxes
        assert boxes[0] is not None and clip.event.who == 0
        for frame, box in enumerate(boxes):
            if box is None:
                hidden += 1
                assert (clip.render(frame)[1] == 0).sum() < 0.75 * max(
                    (clip.render(f)[1] == 0).sum() for f, b in enumerate(boxes) if b
                )
    assert hidden > 40


def test_who_comes_was_away_and_who_leaves_is_gone():
    for clip in clips("enter", "leave"):
        there = [box is not None for box in clip.movers[clip.event.who].boxes]
        assert there == sorted(there, reverse=clip.event.kind == "leave") and 2 <= sum(there) < 8
        change = there.index(clip.event.kind == "enter")
        assert clip.event.frame == change + 1


def test_constant_velocity_misses_what_happens():
    """The frames before the event do not tell the boxes after it."""
    misses = []
    for clip in clips("bounce", "collide", "goal", count=60):
        event = clip.event
        boxes = {t: b for t, b in enumerate(clip.movers[event.who].boxes, 1)}
        guess = constant_velocity({t: boxes[t] for t in (1, 2)}, [8])[8]
        misses.append(abs(np.array(guess) - boxes[8]).max() / 84)
    assert np.mean(misses) > 0.1


def test_sources_take_events_and_refuse_others():
    record = open_source("world:tracks?size=84x84&objects=2-4&frames=8&events=occlude,enter")[0]
    assert any(len(track["boxes"]) < 8 for track in record["tracks"])
    with pytest.raises(InputError, match="events"):
        open_source("world:tracks?events=explode")
