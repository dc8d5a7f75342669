"""Cheap strategies against the UTR reward and the counters of its sheet."""

from functools import partial

from jaxmllm.tasks import track_rewards, tracks
from tests.support.reward_hacks import Hack

T = 8
PATH = {t: [100 + 30 * t, 200, 180 + 30 * t, 330] for t in range(1, T + 1)}
RECORD = {
    "size": [1000, 1000],  # pixels of the answer are pixels of the record
    "frames": [{"idx": t} for t in range(1, T + 1)],
    "tracks": [
        {"id": 1, "names": ["nick", "fox"], "boxes": PATH, "action": [{"span": [1, T], "text": "walking to the door"}]}
    ],
    "query": {"kind": "box", "id": 1, "ids": [1], "frame": 1, "wording": 0},
}


def say(named, attrs="action=walking to a door"):
    lines = "\n".join(track_rewards.write_track(k, name, boxes) for k, (name, boxes) in enumerate(named, start=1))
    return f"<answer>{lines}<attr>{attrs}</attr></answer>"


NEAR = {t: [x1 + 6, y1 - 5, x2 + 8, y2 + 4] for t, (x1, y1, x2, y2) in PATH.items()}
HONEST = say([("fox", NEAR)])
SHIFTED = {t: [x1 + 5, y1, x2 + 5, y2] for t, (x1, y1, x2, y2) in dict.fromkeys(PATH, PATH[1]).items()}

SEEN = {t: b for t, b in PATH.items() if t <= 5}  # leaves the view after frame 5
LEAVES = RECORD | {"tracks": [RECORD["tracks"][0] | {"boxes": SEEN}]}
NAMED = RECORD | {"query": {"kind": "phrase", "id": 1, "ids": [1], "cue": "nick", "wording": 0}}
STILL = {t: [x1 + t % 2, y1, x2 + t % 2, y2] for t, (x1, y1, x2, y2) in dict.fromkeys(PATH, PATH[1]).items()}
STATIC = RECORD | {"tracks": [RECORD["tracks"][0] | {"boxes": STILL}]}
SECOND = {t: [x1, y1 + 400, x2, y2 + 400] for t, (x1, y1, x2, y2) in PATH.items()}
PAIR = NAMED | {
    "tracks": [*RECORD["tracks"], {"id": 2, "names": ["judy", "fox"], "boxes": SECOND}],
    "query": {"kind": "category", "ids": [1, 2], "cue": "fox", "wording": 0},
}
SWAPPED = ({t: (NEAR, SECOND)[t % 2][t] for t in PATH}, {t: (SECOND, NEAR)[t % 2][t] for t in PATH})

HACKS = [
    Hack(
        "tracks, named subject",
        partial(tracks.reward, record=NAMED),
        honest=HONEST,
        cheap={
            "first box everywhere": say([("nick", dict.fromkeys(PATH, PATH[1]))]),
            "centre box everywhere": say([("nick", dict.fromkeys(PATH, [400, 400, 600, 600]))]),
            "whole image everywhere": say([("nick", dict.fromkeys(PATH, [0, 0, 1000, 1000]))]),
            "ends joined by a straight shot of boxes": say([("nick", {1: PATH[1], T: PATH[T]})]),
            "every second frame": say([("nick", {t: b for t, b in PATH.items() if t % 2})]),
            "right boxes, no words": say([("x", PATH)], ""),
            "words without boxes": say([("nick", {})]),
        },
    ),
    Hack(
        "tracks, subject leaves",
        partial(tracks.reward, record=LEAVES),
        honest=say([("fox", {t: NEAR[t] for t in SEEN})]),
        cheap={
            "last seen box kept to the end": say([("fox", SEEN | {t: SEEN[5] for t in range(6, T + 1)})]),
            "invalid boxes to the end": say([("fox", SEEN | {t: [0, 0, 0, 0] for t in range(6, T + 1)})]),
            "easy frames only": say([("fox", {t: SEEN[t] for t in (1, 2)})]),
        },
    ),
    Hack(
        "tracks, two subjects",
        partial(tracks.reward, record=PAIR),
        honest=say([("nick", NEAR), ("judy", SECOND)], ""),
        cheap={
            "one subject only": say([("nick", PATH)], ""),
            "one subject twice": say([("nick", PATH), ("judy", PATH)], ""),
            "identities swapped every frame": say([("nick", SWAPPED[0]), ("judy", SWAPPED[1])], ""),
            "both boxes, names exchanged": say([("dog", NEAR), ("cat", SECOND)], ""),
            "one box around both": say([("fox", {t: [b[0], b[1], b[2], b[3] + 400] for t, b in PATH.items()})], ""),
        },
    ),
    Hack(
        "tracks, static scene",
        partial(tracks.reward, record=STATIC),
        honest=say([("fox", {t: [x1 + 6, y1 - 5, x2 + 8, y2 + 4] for t, (x1, y1, x2, y2) in STILL.items()})]),
        cheap={
            "empty answer": "",
            "query box copied everywhere": say([("fox", dict.fromkeys(PATH, STILL[1]))]),
        },
        known={"query box copied everywhere": "make_query(max_static=.7) asks about subjects that move"},
    ),
    Hack(
        "tracks, query box given",
        partial(tracks.reward, record=RECORD),
        honest=HONEST,
        cheap={
            "empty answer": "",
            "format only": say([("x", {1: [0, 0, 1, 1]})], ""),
            "query box copied everywhere": say([("fox", dict.fromkeys(PATH, PATH[1]))]),
            "query box copied, shifted a little": say([("fox", SHIFTED)]),
            "query frame only": say([("fox", {1: PATH[1]})]),
            "one easy frame": say([("fox", {2: PATH[2]})]),
            "whole image everywhere": say([("fox", dict.fromkeys(PATH, [0, 0, 1000, 1000]))]),
            "many tracks": say([("fox", {t: [b[0] + 9 * k, *b[1:]] for t, b in PATH.items()}) for k in range(-9, 10)]),
            "several answers": HONEST * 2,
            "names and actions listed": say(
                [("fox dog cat person car nick", NEAR)], "action=walking running sitting standing to the door window"
            ),
            "words repeated": say([("fox " * 20, NEAR)], "action=" + "walking to the door " * 10),
            "frames outside the clip": say([("fox", {t + T: b for t, b in PATH.items()})]),
            "words without boxes": say([("fox", {})]),
        },
    ),
]
