"""Cheap strategies against the caption reward."""

from functools import partial

from jaxmllm.tasks import captioning
from tests.support.reward_hacks import Hack

CAPTION = (
    "A small red square is left of a large blue circle. A striped green triangle is above the square. "
    "A yellow star lies on a wooden table."
)
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("square", "circle", "triangle", "star", "hexagon", "cross", "table", "cat", "dog", "person", "car")

HACKS = [
    Hack(
        "captioning, rule reward",
        partial(captioning.reward, record={"id": 1, "caption": CAPTION}),
        honest="There is a red square left of a big blue circle, and a green triangle is above the square. "
        "A yellow star is on a table.",
        cheap={
            "empty answer": "",
            "nothing said": "This is an image.",
            "one object": "A square.",
            "objects only": "A square, a circle, a triangle, a star and a table.",
            "every object": " ".join(f"A {shape}." for shape in SHAPES),
            "every object in every colour": " ".join(f"A {colour} {shape}." for shape in SHAPES for colour in COLOURS),
            "words repeated": "square circle triangle star table " * 20,
            "words repeated as sentences": "A square. A circle. A triangle. A star. " * 20,
            "colours swapped": "There is a blue square left of a green circle, and a red triangle is above the square. "
            "A wooden star is on a yellow table.",
            "relations swapped": "There is a red circle left of a big blue square, and a green star is above the table. "
            "A yellow triangle is on a circle.",
            "pleasant prose": "The picture beautifully captures a vivid mood, full of colour, light and harmony.",
        },
    )
]
