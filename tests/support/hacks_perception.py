"""Cheap strategies against the Perception-R1 rewards."""

from functools import partial

from jaxmllm.tasks import answers, counting, detection, grounding, ocr
from tests.support.answer_texts import END, box, element, fenced, ref
from tests.support.reward_hacks import Hack

SIZE = {"size": [1000, 1000]}  # all frames coincide
WHOLE, CENTRE = [0, 0, 1000, 1000], [400, 400, 600, 600]
TILES = [[x, y, x + 100, y + 100] for x in range(0, 1000, 100) for y in range(0, 1000, 100)]


def write(style, boxes, labels):
    """An answer in the style's format with one label a box."""
    if style == "qwen2_5_vl":
        return fenced(*map(element, boxes, labels))
    segments = {}
    for b, label in zip(boxes, labels, strict=True):
        segments[label] = segments.get(label, "") + box(*b)
    return "".join(ref(label) + text for label, text in segments.items()) + END


CUP = {"expression": "cup", "box": [150, 500, 350, 700], **SIZE}


def grounding_hack(name, style, **options):
    def one(*boxes):
        return write(style, boxes, ["cup"] * len(boxes))

    return Hack(
        f"grounding, {name}",
        partial(grounding.reward, record=CUP, style=style, **options),
        honest=one([158, 495, 362, 690]),
        cheap={
            "empty answer": "",
            "no box": "I cannot find it.",
            "format only, no area": one([0, 0, 0, 0]),
            "format only, random corner": one([900, 0, 1000, 100]),
            "starts like a token": "<|object_ref_start|>",
            "whole image": one(WHOLE),
            "centre box": one(CENTRE),
            "box spam, right one last": one(*TILES, CUP["box"]),
            "huge numbers": one([0, 0, 10**12, 10**12]),
            "swapped corners": one([350, 700, 150, 500]),
            "expression repeated": "cup " * 50,
        },
    )


BIRDS = {"label": "bird", "points": [[100, 200], [300, 800], [500, 500], [850, 150], [900, 900]], "count": 5, **SIZE}


def counting_hack(name, style, missed=1, known=None, **options):
    def at(points):
        return write(style, [[x - 5, y - 5, x + 5, y + 5] for x, y in points], ["bird"] * len(points))

    near = [[x + 15, y - 10] for x, y in BIRDS["points"]]
    return Hack(
        f"counting, {name}",
        partial(counting.reward, record=BIRDS, style=style, **options),
        honest=at(near[missed:]),
        cheap={
            "empty answer": "",
            "number only": "There are 5 birds.",
            "format only, no box": write(style, [], []),
            "one box, whole image": write(style, [WHOLE], ["bird"]),
            "right count, all at the centre": at([[500, 500]] * 5),
            "usual count (3), all at the centre": at([[500, 500]] * 3),
            "grid spam, 9": at([[x, y] for x in (150, 500, 850) for y in (150, 500, 850)]),
            "grid spam, 100": at([[(b[0] + b[2]) / 2, (b[1] + b[3]) / 2] for b in TILES]),
            "one bird many times": at([[500, 500]] * 20),
            "every bird twice": at(near * 2),
            "huge numbers": at([[10**12, 10**12]] * 5),
        },
        known=known or {},
    )


STREET = {
    "boxes": [[100, 300, 200, 600], [400, 400, 700, 650], [750, 450, 900, 560]],
    "labels": ["person", "car", "dog"],
    **SIZE,
}


def detection_hack(name, style="qwen2_5_vl", slack=(8, 8, 8), known=None, **options):
    boxes, labels = STREET["boxes"], STREET["labels"]
    put = partial(write, style)
    return Hack(
        f"detection, {name}",
        partial(detection.reward, record=STREET, style=style, **options),
        honest=put([[v + by for v in b] for b, by in zip(boxes, slack, strict=True)], labels),
        cheap={
            "empty answer": "",
            "empty list": put([], []),
            "prose": "I see a person, a car and a dog.",
            "format only": put([[0, 0, 10, 10]], ["person"]),
            "whole image, one class": put([WHOLE], ["person"]),
            "whole image, every class": put([WHOLE] * 80, detection.COCO_IDS),
            "box spam, one class": put(TILES, ["person"] * len(TILES)),
            "every box, every class": put([b for b in boxes for _ in detection.COCO_IDS], [*detection.COCO_IDS] * 3),
            "right boxes, one class": put(boxes, ["person"] * 3),
            "right boxes ten times": put(boxes * 10, labels * 10),
            "surest object only": put(boxes[:1], labels[:1]),
            "surest object ten times": put(boxes[:1] * 10, labels[:1] * 10),
        },
        known=known or {},
    )


PAGE = {
    "text": "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of "
    "foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of Light."
}


def ocr_hack(rules):
    text = PAGE["text"]
    return Hack(
        f"ocr, {rules}",
        partial(ocr.reward, record=PAGE, rules=rules),
        honest=text.replace("w", "vv").replace("epoch", "epocb"),
        cheap={
            "empty answer": "",
            "blanks": " " * len(text),
            "repeated word": "the " * (len(text) // 4),
            "repeated phrase of the page": "it was the age of " * (len(text) // 18),
            "most frequent letters": "e t a o i n " * (len(text) // 12),
            "page twice": text * 2,
            "first half": text[: len(text) // 2],
            "words in alphabetical order": " ".join(sorted(text.split())),
            "letters in order": "".join(sorted(text)),
            "upper case": text.upper(),
        },
    )


CENTRE_TRICK = {"right count, all at the centre": "reward(..., reach=300): a far-off pair is worth nothing"}
LOOSE = (0, 45, 20)  # one box exact, the others just over the threshold
LOOSER = (20, 45, 20)  # all of them just over it
FEW_TRICK = {"surest object only": "Weights(penalty=True): every miss costs"}

HACKS = [
    *(grounding_hack(f"corrected, {style}", style) for style in ("qwen2_vl", "qwen2_5_vl")),
    grounding_hack("released", "qwen2_vl", rules="released"),
    *(counting_hack(f"corrected, {style}", style) for style in ("qwen2_vl", "qwen2_5_vl")),
    counting_hack("corrected, two birds missed", "qwen2_vl", missed=2, known=CENTRE_TRICK),
    counting_hack("corrected, two birds missed, reach 300", "qwen2_vl", missed=2, reach=300),
    counting_hack("released", "qwen2_vl", rules="released"),
    *(detection_hack(f"corrected, {style}", style) for style in ("qwen2_vl", "qwen2_5_vl")),
    detection_hack("corrected, two loose boxes", slack=LOOSE),
    detection_hack("corrected, two loose boxes, penalty", slack=LOOSE, weights=detection.Weights(penalty=True)),
    detection_hack("released", rules="released"),
    *(
        detection_hack(f"{rules}, all boxes loose", slack=LOOSER, rules=rules, known=FEW_TRICK)
        for rules in answers.RULES
    ),
    *(
        detection_hack(
            f"{rules}, all boxes loose, penalty", slack=LOOSER, rules=rules, weights=detection.Weights(penalty=True)
        )
        for rules in answers.RULES
    ),
    *(ocr_hack(rules) for rules in answers.RULES),
]
