"""Foresight records: clip sampling, cleaning, queries and future statements from annotations (merlin.md 3.1, 3.2, 4).

The published chat data was written by a language model and never released; here the future of a subject is built from
its annotated later frames: the next action, the displacement, or the first meeting with another subject.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmllm.geometry import box_area, box_center, box_intersection
from jaxmllm.tasks import foresight
from jaxmllm.tasks.answers import choose
from jaxmllm.tasks.track_rewards import fits
from jaxmllm.tasks.trajectories import int_keys

CLIP_LENGTHS = {2: 0.25, 3: 0.25, 4: 0.25, 5: 0.25}  # frames of a clip -> probability
CLIP_GAPS = {
    1: 0.2,
    3: 0.8 / 3,
    4: 0.8 / 3,
    5: 0.8 / 3,
}  # source frames between them; 1 is what pairwise tracking meets
TINY = 1 / 32  # of the image, by the longest side: the area reading would contradict printed samples
MAX_CATEGORIES = 15
NEGATIVE_SHARE = 0.1  # of tracking, referring and detection questions
KINDS = ("tracking", "referring", "generic", "video_reg", "chat")
OBSERVATIONS = ("location", "appearance", "action")
QUESTIONS = (
    "what will {subject} do next",
    "predict what {subject} is going to do",
    "say where {subject} is heading",
    "tell me how {subject} will go on after these frames",
    "describe the next move of {subject}",
)
MOVES = {  # direction -> what the subject does; y grows downwards
    (1, 0): "move right", (-1, 0): "move left", (0, 1): "move down", (0, -1): "move up",
    (1, 1): "move down and right", (-1, 1): "move down and left", (1, -1): "move up and right",
    (-1, -1): "move up and left", (0, 0): "stay where it is",
}  # fmt: skip
SPEEDS = ((0.15, None), (0.75, " slowly"), (math.inf, " quickly"))  # displacement in sizes of the box, up to -> word


def sample_clip(total: int, rng: np.random.Generator) -> list[int]:
    """Indices of a training clip in a video of `total` frames: a drawn length and a fixed drawn gap that fit.

    Raises:
        ValueError: fewer than two frames.
    """
    fitting = [
        (length, gap, p * q)
        for length, p in CLIP_LENGTHS.items()
        for gap, q in CLIP_GAPS.items()
        if (length - 1) * gap < total
    ]
    if not fitting:
        raise ValueError(f"a clip needs at least 2 frames, the video has {total}")
    weights = np.array([weight for *_, weight in fitting])
    length, gap, _ = fitting[rng.choice(len(fitting), p=weights / weights.sum())]
    start = int(rng.integers(total - (length - 1) * gap))
    return [start + gap * k for k in range(length)]


def is_tiny(box: Sequence[float], size: Sequence[float]) -> bool:
    """Whether both sides are under 1/32 of the image's."""
    return max((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]) < TINY


def clean_tracks(record: Mapping[str, Any], frames: int) -> list[Mapping[str, Any]]:
    """Tracks that are in view in frame 1 and hold no tiny box in the first `frames` frames.

    Raises:
        ValueError: a box with x2 <= x1 or y2 <= y1, as an x, y, w, h annotation would give.
    """
    kept = []
    for track in record["tracks"]:
        boxes = {t: box for t, box in int_keys(track["boxes"]).items() if t <= frames}
        for t, (x1, y1, x2, y2) in boxes.items():
            if not (x1 < x2 and y1 < y2):
                raise ValueError(f"track {track['id']}, frame {t}: {[x1, y1, x2, y2]} is not [x1, y1, x2, y2]")
        if 1 in boxes and not any(is_tiny(box, record["size"]) for box in boxes.values()):
            kept.append(track)
    return kept


def detection_record(record: Mapping[str, Any], rng: np.random.Generator, every: bool = True) -> dict[str, Any]:
    """A foresight record of a detection record: tiny objects dropped, at most 15 categories, grouped by category.

    `every` asks for everything, else for the categories by name.
    """
    pairs = [
        (label, box)
        for label, box in zip(record["labels"], record["boxes"], strict=True)
        if not is_tiny(box, record["size"])
    ]
    names = list(dict.fromkeys(label for label, _ in pairs))
    names = [names[i] for i in sorted(rng.permutation(len(names))[:MAX_CATEGORIES])]
    pairs = [pair for name in names for pair in pairs if pair[0] == name]
    query = {"kind": "detection", "wording": int(rng.integers(1 << 16))}
    return {
        **record,
        "task": "foresight",
        "query": query,
        "categories": [] if every else names,
        "labels": [label for label, _ in pairs],
        "boxes": [box for _, box in pairs],
    }


def make_query(
    record: Mapping[str, Any],
    rng: np.random.Generator,
    kinds: Sequence[str] = (),
    horizon: int = 0,
    absent: str | None = None,
    max_tracks: int = 4,
    max_static: float = 1.0,
) -> dict[str, Any] | None:
    """A foresight record for one random query of a clip; None if the clip allows none of the kinds.

    The subject is shown by an observation drawn from those it has: location, appearance or action. A phrase that shows it
    fits no other track of the clip.

    Args:
        kinds: of `KINDS`, one of which is drawn; empty: all.
        horizon: frames after the shown ones that the answer must cover; chats with a multiple-choice question need later
            frames of the subject.
        absent: a phrase that fits nothing in the clip, in the words of `cues_of`: asked for as if it were there.
        max_static: a query that copying the first box already answers so well (`foresight.static_reward`) is not drawn.

    Raises:
        ValueError: unknown kind, an annotation that is no box, or a horizon that the tracks do not reach.
    """
    shown = len(record["frames"])
    last = max((int(t) for track in record["tracks"] for t in track["boxes"]), default=0)
    if horizon and shown + horizon > last:
        raise ValueError(f"horizon {horizon}: the tracks end at frame {last}, {shown} are shown")
    tracks = clean_tracks(record, shown + horizon)
    query: dict[str, Any] = {"wording": int(rng.integers(1 << 16))} | ({"horizon": horizon} if horizon else {})
    out = {**record, "task": "foresight", "query": query}
    names = [choose(kind, KINDS, "kind") for kind in kinds] or list(KINDS)
    if absent:
        asked = [kind for kind in names if kind in ("referring", "generic")] or ["referring"]
        query |= {"kind": asked[rng.integers(len(asked))], "ids": [], "absent": absent}
        return out
    for name in rng.permutation(names).tolist():
        drawn = _draw(name, tracks, record, shown, rng, max_tracks)
        if drawn is None:
            continue
        found = {**out, "query": {**query, "kind": name, **drawn}}
        if max_static >= 1 or name not in foresight.TRACKED or foresight.static_reward(found) <= max_static:
            return found
    return None


def cues_of(track: Mapping[str, Any], shown: int) -> dict[str, str]:
    """Phrases that show a track, by observation: what it looks like, and what it does in the first frames."""
    cues = {"appearance": [f"the {c}" for c in (track.get("appearance") or ())[:1]]}
    cues["action"] = [f"the {track['names'][-1]} {c}" for c in _actions(track, 1, shown)[:1]]
    return {name: found[0] for name, found in cues.items() if found}


def phrases_of(track: Mapping[str, Any], shown: int) -> list[str]:
    """All that is said of a track in the frames shown: a cue that fits one of these fits the track."""
    looks = [*track["names"], *(track.get("appearance") or ())]
    return [*looks, *(f"{look} {action}" for look in looks for action in _actions(track, 1, shown))]


def _draw(kind, tracks, record, shown, rng, max_tracks) -> dict[str, Any] | None:
    if not tracks:
        return None
    order = [tracks[i] for i in rng.permutation(len(tracks))]
    if kind == "tracking":
        return {"ids": [track["id"] for track in order[: int(rng.integers(1, max_tracks + 1))]]}

    def cues(track):
        others = [other for other in record["tracks"] if other["id"] != track["id"]]
        said = [phrase for other in others for phrase in phrases_of(other, shown)]
        return {name: cue for name, cue in cues_of(track, shown).items() if not fits(cue, said)}

    if kind == "chat":
        futures = ((track, future_of(track, record["tracks"], shown)) for track in order)
        return next((future_query(t, f, rng, cues(t).get("appearance")) for t, f in futures if f is not None), None)
    for track in order:
        if kind == "video_reg":
            action = _actions(track, 1, shown)
            if action:
                return {"ids": [track["id"]], "text": f"It is {' and then '.join(dict.fromkeys(action))}."}
            continue
        known = cues(track)
        observations = [name for name in OBSERVATIONS if name in known or (name == "location" and kind == "generic")]
        if observations:
            chosen = observations[rng.integers(len(observations))]
            return {"ids": [track["id"]], "observation": chosen} | ({"cue": known[chosen]} if chosen in known else {})
    return None


def _actions(track: Mapping[str, Any], first: int, last: int) -> list[str]:
    """Actions of a track that hold in some frame of first..last, in order."""
    spans = sorted((item["span"][0], item["span"][1], item["text"]) for item in track.get("action") or ())
    return [text for a, b, text in spans if b >= first and a <= last]


def displacement(start: Sequence[float], end: Sequence[float]) -> tuple[str, str]:
    """What a move from one box to another is, in words: direction (one of eight, or staying) and how fast."""
    shift = box_center(end) - box_center(start)
    distance = float(np.hypot(*shift)) / math.sqrt(max(float(box_area(start)), 1e-9))
    speed = next(word for limit, word in SPEEDS if distance <= limit)
    if speed is None:
        return MOVES[0, 0], ""
    # An axis counts if its shift is at least tan(22.5 degrees) of the other's.
    x, y = (int(np.sign(v)) if abs(v) > math.tan(math.pi / 8) * abs(w) else 0 for v, w in (shift, shift[::-1]))
    return MOVES[x, y], speed


def _meeting(track, tracks, shown: int) -> Mapping[str, Any] | None:
    """The first track whose box the track's box will overlap, among those it does not touch in the last shown frame."""
    mine = int_keys(track["boxes"])
    for t in sorted(t for t in mine if t > shown):
        for other in tracks:
            theirs = int_keys(other["boxes"])
            if other["id"] == track["id"] or not {t, shown} <= theirs.keys() or shown not in mine:
                continue
            if box_intersection(mine[t], theirs[t]) > 0 and not box_intersection(mine[shown], theirs[shown]) > 0:
                return other
    return None


def future_of(track: Mapping[str, Any], tracks: Sequence[Mapping[str, Any]], shown: int) -> dict[str, Any] | None:
    """What a track does after frame `shown`, None without a later box.

    `future` in words, preferring the first meeting, then a new action, then the displacement; `direction` and `speed` of
    the displacement; `ids` and `motions` of the track that it meets.
    """
    boxes = int_keys(track["boxes"])
    later = [t for t in boxes if t > shown]
    if not later or shown not in boxes:
        return None
    direction, speed = displacement(boxes[shown], boxes[max(later)])
    found: dict[str, Any] = {"direction": direction, "speed": speed, "ids": [], "motions": {}}
    found["future"] = direction + speed
    meeting, actions = _meeting(track, tracks, shown), _actions(track, shown + 1, max(later))
    if meeting is not None:
        theirs = int_keys(meeting["boxes"])
        how = "".join(displacement(theirs[min(theirs)], theirs[shown]))
        found |= {
            "future": f"run into the {meeting['names'][-1]}",
            "ids": [meeting["id"]],
            "motions": {str(meeting["id"]): how.replace(" ", "s ", 1)},
        }  # moves left, stays where it is
    elif actions and actions[0] not in _actions(track, shown, shown):
        found["future"] = f"start {actions[0]}"
    return found


def future_query(
    track: Mapping[str, Any], future: Mapping[str, Any], rng: np.random.Generator, cue: str | None = None
) -> dict[str, Any]:
    """The fields of a chat query; half of the time a multiple-choice question about the displacement (four options).

    The question alone must not tell the answer: the options are the four directions of the true one's kind, straight or
    diagonal, at one speed, and the subject is named by its look (`cue`), since a place near the border gives the direction
    away. So a subject without a cue of its own, or one that stays, is asked about in free words.
    """
    question = QUESTIONS[rng.integers(len(QUESTIONS))]
    if rng.random() < 0.5 or cue is None or future["direction"] == MOVES[0, 0]:
        return {
            "ids": [track["id"], *future["ids"]],
            "motions": dict(future["motions"]),
            "future": future["future"],
            "question": question,
        }
    turns = {move: sum(map(abs, step)) for step, move in MOVES.items()}  # 1: straight, 2: diagonal
    options = [move for move, n in turns.items() if n == turns[future["direction"]]]
    order = rng.permutation(4).tolist()
    return {
        "ids": [track["id"]],
        "cue": cue,
        "future": future["direction"] + future["speed"],
        "question": question,
        "choices": [options[i] + future["speed"] for i in order],
        "correct": chr(65 + order.index(options.index(future["direction"]))),
    }
