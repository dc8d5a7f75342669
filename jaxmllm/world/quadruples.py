"""Questions about the order of events that no single frame answers: four clips an item, closed by construction.

Two objects each take one step, between two shown frames. The four clips of an item are A then B, B then A, and both
reversed. Both orders begin and end alike, so the first and the last frame say nothing. A clip and its reversal hold the same
frames in another order and have different answers, so frames without order, and any one frame, even with its place in
the clip known, say nothing either. The question and its options are the same four times, so that the words say nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Float, UInt8

from jaxmllm.errors import InputError
from jaxmllm.world.clips import MOTIONS, Box
from jaxmllm.world.drawing import GROUNDS
from jaxmllm.world.scenes import SceneObject, SceneSpec, draw_layout, draw_objects
from jaxmllm.world.streams import QUESTIONS, Stream, check_split

Record = dict[str, object]
ORDERS = ("A then B", "B then A", "A then B, reversed", "B then A, reversed")
QUESTION = "These are the frames of a clip, in order. Which moves first? A. {0} B. {1} Answer with the letter."
_TRIES = 64


@dataclasses.dataclass(frozen=True)
class OrderSpec:
    """What the items look like."""

    scene: SceneSpec = SceneSpec(size=(84, 84), objects=(2, 3), gap=2)
    hold: int = 2  # frames shown before, between and after the two steps each
    step: tuple[float, float] = (0.12, 0.3)  # shortest and longest step, share of the shorter side

    def __post_init__(self):
        if self.hold < 1 or not 0 < self.step[0] <= self.step[1] < 1:
            raise InputError("OrderSpec: hold must be at least 1, and step (shortest, longest) within 0..1")
        if self.scene.objects[0] < 2:
            raise InputError("OrderSpec.scene.objects: two objects at least are needed")


class OrderQuadruples:
    """Chats about clips with frames as images, for training and evaluation; clip k of item i is at index 4 i + k.

    A record has `messages` (the last is the letter), `unit` (its item: the four are resampled together), `order` (of
    `ORDERS`), `size`, `things` (the two names in the order of the options) and `places` {"A": [box a frame], "B": ..}.
    Items of the splits are disjoint by the layout of the objects.
    """

    def __init__(self, split: str = "train", seed: int = 0, length: int = 100_000, spec: OrderSpec | None = None):
        self.split, self.seed, self.length, self.spec = check_split(split), seed, length, spec or OrderSpec()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: SupportsIndex) -> Record:
        i = index.__index__()
        if not 0 <= i < self.length:
            raise IndexError(f"item {i} of quadruples of length {self.length}")
        item, k = divmod(i, 4)
        objects, pair, moved, ground = self._item(item)
        order = (0, 1) if k in (0, 2) else (1, 0)
        states = [(False, False), tuple(who == order[0] for who in (0, 1)), (True, True)]
        if k >= 2:
            states.reverse()
        states = [state for state in states for _ in range(self.spec.hold)]
        first = order[0] if k < 2 else order[1]  # reversed, the last to move is the first
        address = (self.seed, self.split, item)
        names = [objects[who].name() for who in pair]
        images = [self._draw(objects, pair, moved, state, ground, address, t) for t, state in enumerate(states)]
        text = QUESTION.format(*names)
        return {
            "id": f"order-{self.split}-{self.seed}-{item}-{k}",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image", "image": image} for image in images),
                        {"type": "text", "text": text},
                    ],
                },
                {"role": "assistant", "content": "AB"[first]},
            ],
            "unit": f"{self.split}-{self.seed}-{item}",
            "order": ORDERS[k],
            "size": list(self.spec.scene.size),
            "things": names,
            "places": {
                letter: [list(moved[n] if state[n] else objects[who].box) for state in states]
                for n, (letter, who) in enumerate(zip("AB", pair, strict=True))
            },
        }

    def _item(self, item: int) -> tuple[tuple[SceneObject, ...], tuple[int, int], tuple[Box, Box], str]:
        """Objects of the first frame, the two that move, their boxes afterwards, and the ground."""
        scene = self.spec.scene
        for attempt in range(_TRIES):
            stream = Stream(self.seed, self.split, item, QUESTIONS, attempt)
            objects = draw_layout(scene, self.split, stream)
            if objects is None:
                continue
            a, b = stream.shuffled(range(len(objects)))[:2]
            if objects[a].name() == objects[b].name():
                continue
            boxes = [thing.box for thing in objects]
            for who in (a, b):
                dx, dy = MOTIONS[stream.choice(list(MOTIONS))]
                way = round(stream.uniform(*self.spec.step) * min(scene.size))
                x1, y1, x2, y2 = boxes[who]
                boxes[who] = (x1 + dx * way, y1 + dy * way, x2 + dx * way, y2 + dy * way)
            if _free(boxes, objects, (a, b), scene.size):
                names = [thing.name() for thing in objects]
                if names.count(names[a]) == names.count(names[b]) == 1:
                    return objects, (a, b), (boxes[a], boxes[b]), stream.choice(scene.ground or GROUNDS)
        raise InputError(f"OrderSpec: no item found in {_TRIES} layouts; allow smaller objects or steps")

    def _draw(self, objects, pair, moved, state, ground, address, frame) -> UInt8[np.ndarray, "H W 3"]:
        shown = list(objects)
        for n, who in enumerate(pair):
            if state[n]:
                shown[who] = dataclasses.replace(objects[who], box=moved[n])
        return draw_objects(shown, self.spec.scene, ground, address, frame)[0]


def _free(after: Sequence[Box], objects: Sequence[SceneObject], pair: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether nothing touches anything in any of the states, and all stay in view."""
    for who in pair:
        x1, y1, x2, y2 = after[who]
        if x1 < 0 or y1 < 0 or x2 > size[0] or y2 > size[1]:
            return False
        for other, thing in enumerate(objects):
            boxes = {thing.box, after[other]} if other != who else set()
            if any(min(x2, b[2]) > max(x1, b[0]) and min(y2, b[3]) > max(y1, b[1]) for b in boxes):
                return False
    return True


def places(record: Record) -> Float[np.ndarray, "frames 8"]:
    """Corners of the two objects in each frame, pixels: all that a perfect eye would see."""
    found = record["places"]
    assert isinstance(found, dict)
    return np.concatenate([np.asarray(found["A"], float), np.asarray(found["B"], float)], axis=1)
