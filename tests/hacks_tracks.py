"""Cheap strategies against the UTR reward and the counters of its sheet."""

from functools import partial

from jaxmllm.tasks import track_rewards, tracks
from tests.reward_hacks import Hack

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

HACKS = [
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
    )
]
