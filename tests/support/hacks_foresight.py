"""Cheap strategies against the trajectory reward."""

from functools import partial

from jaxmllm.tasks import foresight
from jaxmllm.tasks.trajectories import format_box
from tests.support.reward_hacks import Hack

PATH = {1: [100, 400, 200, 600], 2: [180, 390, 285, 585], 3: [260, 385, 365, 590], 4: [340, 380, 450, 580]}
SIZE = {"size": [1000, 1000], "frames": [{"idx": t} for t in PATH], "images": [None] * len(PATH)}


def path(boxes, i=1):
    return f"dog<Id{i}>" + ";".join(f"Frame{t}:{format_box(b)}" for t, b in boxes.items()) + f"</Id{i}>"


def moved(dx, dy):
    return {t: [b[0] + dx, b[1] + dy, b[2] + dx, b[3] + dy] for t, b in PATH.items()}


def every(box):
    return {t: box for t in PATH}


CLIP = {**SIZE, "tracks": [{"id": 7, "names": ["dog"], "boxes": {str(t): b for t, b in PATH.items()}}]}
CHEAP = {
    "empty answer": "",
    "copy of the query box": path(every(PATH[1])),
    "whole image": path(every([0, 0, 1000, 1000])),
    "centre box": path(every([400, 400, 600, 600])),
    "format only, tiny boxes": path(every([0, 0, 1, 1])),
    "first frame alone": path({1: PATH[1]}),
    "frames without boxes": "dog<Id1>Frame1:;Frame2:;Frame3:;Frame4:</Id1>",
    "swapped corners": path({t: [b[2], b[3], b[0], b[1]] for t, b in PATH.items()}),
    "outside the image": path({t: [b[0] - 2000, b[1], b[2], b[3]] for t, b in PATH.items()}),
    "many identities": ",".join(path(every([x, 300, x + 200, 600]), i) for i, x in enumerate(range(0, 800, 80), 1)),
    "many boxes a frame": "dog<Id1>"
    + ";".join(f"Frame{t}:[{x},380,{x + 110},580]" for t in PATH for x in range(0, 800, 110))
    + "</Id1>",
    "denial": "There is no dog in the given frames.",
}
TRACKING = CLIP | {"query": {"kind": "tracking", "ids": [7]}}
REFERRING = CLIP | {"query": {"kind": "referring", "ids": [7], "cue": "the running dog"}}
CHAT = CLIP | {
    "query": {
        "kind": "chat",
        "ids": [7],
        "question": "where is {subject} going",
        "future": "move right",
        "choices": ["move left", "move right"],
        "correct": "B",
    }
}

SLOW = {t: [100 + 2 * t, 400, 200 + 2 * t, 600] for t in PATH}  # a gap of one frame: the target hardly moves
CREEP = TRACKING | {"tracks": [CLIP["tracks"][0] | {"boxes": {str(t): b for t, b in SLOW.items()}}]}
ABSENT = CLIP | {"query": {"kind": "tracking", "ids": [], "absent": "red bus"}}

HACKS = [
    Hack("foresight, small gap", partial(foresight.reward, record=CREEP),
         path({t: [b[0] + 12, b[1] - 10, b[2] + 12, b[3] - 10] for t, b in SLOW.items()}),
         {"empty answer": "", "copy of the query box": path(every(SLOW[1]))},
         {"copy of the query box": "make_query(max_static=.85) draws no query whose static copy earns more"}),
    Hack("foresight, absent subject", partial(foresight.reward, record=ABSENT),
         "There is no red bus in the given frames.",
         {"empty answer": "", "some trajectory": path(PATH), "denial and a trajectory": f"There is no red bus. {path(PATH)}",
          "trajectory and a denial": f"{path(PATH)} There is no red bus in the given frames."}),
    Hack("foresight, tracking", partial(foresight.reward, record=TRACKING), path(moved(12, -10)), CHEAP),
    Hack("foresight, referring", partial(foresight.reward, record=REFERRING), path(moved(12, -10)), CHEAP),
    Hack("foresight, multiple choice", partial(foresight.reward, record=CHAT),
         path(moved(12, -10)) + " Answer: B.",
         {name: f"{text} Answer: B." for name, text in CHEAP.items()}
         | {"right letter alone": "B", "path without a letter": path(PATH), "both letters": f"{path(PATH)} A or B"}),
]  # fmt: skip
