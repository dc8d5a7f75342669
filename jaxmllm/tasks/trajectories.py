"""Boxes and trajectories as text, and the scores of a written trajectory (Merlin, arXiv 2312.00589).

    box          [071,402,235,829]                      whole numbers 0..1000, three digits at least, no blanks
    trajectory   person<Id1>Frame1:[..];Frame2:[..]</Id1>,dog<Id2>Frame1:[..]</Id2>
    detection    person:[..],[..];dog:[..].

Numbers are `floor(1000 v / side)` of the unresized image (`coord_space` "norm1000"), or pixels of the image that the
model sees ("abs"). A frame in which a target is out of view is left out. In memory a trajectory is a mapping
{frame: [x1, y1, x2, y2]} with frames from 1; keys may be numeric strings, as JSON writes them; merlin.md 3.1, 6.2, 7.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmllm.geometry import box_center, box_iou, box_valid, center_error, hungarian
from jaxmllm.tasks.answers import MAX_CHARS, choose

GRID = (1000.0, 1000.0)
MODES = ("resize", "pad")
MISSING_COST = 1000 * math.sqrt(2)  # the diagonal of the 0..1000 grid

Frames = Mapping[Any, Sequence[float]]  # keys: int or numeric string
Tracks = Mapping[Any, Frames]
Spell = Callable[[Sequence[int]], str]  # writes a whole-number box

# ---- writing


def _divisor(w: float, h: float, mode: str) -> tuple[float, float]:
    """What the coordinates are divided by: each axis by its side, or (padding to a square) both by the longer side."""
    return (w, h) if choose(mode, MODES, "mode") == "resize" else (max(w, h),) * 2


def quantize_box(
    box: Sequence[float],
    w: float,
    h: float,
    mode: str = "resize",
    box_format: str = "xyxy",
    extent: tuple[float, float] = GRID,
) -> list[int]:
    """Whole numbers of a pixel box after clipping to the w x h image: `floor(v * extent / divisor)` on each axis.

    `box_format` is "xyxy" or "xywh"; `extent` is the size of the target grid, the resized image for "abs" coordinates.
    """
    x1, y1, x2, y2 = map(float, box)
    if choose(box_format, ("xyxy", "xywh"), "box_format") == "xywh":
        x2, y2 = x1 + x2, y1 + y2
    divisors = _divisor(w, h, mode)
    # Multiplied first: 57 / 100 * 1000 is 569.99.. in floating point.
    return [
        math.floor(min(max(v, 0.0), (w, h)[i % 2]) * extent[i % 2] / divisors[i % 2])
        for i, v in enumerate((x1, y1, x2, y2))
    ]


def format_box(q: Sequence[int]) -> str:
    """`[071,402,235,829]`: padded to three digits, without blanks, so that the length in tokens is constant."""
    return "[" + ",".join(f"{v:03d}" for v in q) + "]"


def plain_box(q: Sequence[int]) -> str:
    """`[71, 402, 235, 829]`: as Qwen2.5-VL grounds, without padding, whose numbers such a checkpoint has never written."""
    return str([int(v) for v in q])


def encode_box(
    box: Sequence[float],
    w: float,
    h: float,
    mode: str = "resize",
    box_format: str = "xyxy",
    extent: tuple[float, float] = GRID,
) -> str:
    """A pixel box as text; see `quantize_box`."""
    return format_box(quantize_box(box, w, h, mode, box_format, extent))


def decode_box(
    q: Sequence[float], w: float, h: float, mode: str = "resize", extent: tuple[float, float] = GRID
) -> list[float]:
    """Pixels of a written box, `q * divisor / extent`, without a half-step shift: never above what was written."""
    divisors = _divisor(w, h, mode)
    return [v * divisors[i % 2] / extent[i % 2] for i, v in enumerate(q)]


def write_frames(frames: Frames, spell: Spell = format_box) -> str:
    """`Frame1:[..];Frame2:[..]`, frames ascending, of whole-number boxes, each written by `spell`.

    Raises:
        ValueError: a box with x2 <= x1, y2 <= y1 or a negative coordinate (an x, y, w, h box or a swapped corner).
    """
    parts = []
    for t, box in sorted(int_keys(frames).items()):
        q = [int(v) for v in box]
        if not (q[0] < q[2] and q[1] < q[3] and min(q) >= 0):
            raise ValueError(f"frame {t}: box {list(box)} is not [x1, y1, x2, y2] with 0 <= x1 < x2 and 0 <= y1 < y2")
        parts.append(f"Frame{t}:{spell(q)}")
    return ";".join(parts)


def write_trajectories(tracks: Sequence[Mapping[str, Any]], spell: Spell = format_box) -> str:
    """Object after object, `label<Id1>Frame1:[..];Frame2:[..]</Id1>`, joined by commas.

    Each track has `id`, `label` (may be empty) and `frames` of whole-number boxes.

    Raises:
        ValueError: see `write_frames`; or a label with a character that the reader would not give back.
    """
    parts = []
    for track in tracks:
        label = track.get("label", "")
        if _label(label, len(label)) != label:
            raise ValueError(f"label {label!r} may hold only letters, digits, '_', '-' and inner blanks")
        parts.append(f"{label}<Id{track['id']}>{write_frames(track['frames'], spell)}</Id{track['id']}>")
    return ",".join(parts)


def write_detection(boxes: Mapping[str, Sequence[Sequence[int]]], spell: Spell = format_box) -> str:
    """`person:[..],[..];dog:[..].` of whole-number boxes per category; empty text without any."""
    for category in boxes:
        if not category or category != category.strip() or any(c in category for c in ":;[]"):
            raise ValueError(f"category {category!r} may not be empty or hold outer blanks, ':', ';' or brackets")
    return ";".join(f"{c}:{','.join(map(spell, found))}" for c, found in boxes.items()) + ("." if boxes else "")


# ---- reading

_NUMBER = r"[+-]?+(?:[0-9]++(?:\.[0-9]*+)?+|\.[0-9]++)"
_B = r"\s*+"
_PART = re.compile(
    rf"<{_B}(?P<close>/?+){_B}id{_B}(?P<id>[0-9]{{1,18}}){_B}>"
    rf"|frame{_B}:?+(?P<frame>[0-9]{{1,18}}):{_B}\[(?P<box>{_B}{_NUMBER}(?:{_B},{_B}{_NUMBER}){{3}}{_B})\]",
    re.ASCII | re.IGNORECASE,
)
_GROUP = rf"{_NUMBER}(?:,{_NUMBER}){{3}}"
_BRACKET = re.compile(rf"\[({_GROUP}(?:;{_GROUP})*+)\]")


MAX_IDENTITIES = 1000


def _label(text: str, end: int) -> str:
    """The longest run of letters, digits, `_`, `-` and blanks that ends at `end`, stripped."""
    start = end
    while start and (text[start - 1].isalnum() or text[start - 1] in "_- "):
        start -= 1
    return text[start:end].strip()


def _numbers(literals: Sequence[str]) -> list[float] | None:
    values = [float(v) for v in literals]
    return values if all(map(math.isfinite, values)) else None


def parse_trajectories(text: str) -> list[dict[str, Any]]:
    """Every identity in a text, in order: `id`, `label`, `closed`, `frames` {t: box}, `listed` (frames as written).

    `<Id N>` and `</Id N>` may hold blanks and any case. A body ends at the first closing tag before the next opening
    tag, else there, else at the end; it is closed if that closing tag carries its own number. Inside, `Frame t:[box]`
    in the spellings of the data (`frame:1:`, `Frame2: [..]`); a frame without a box is skipped, the first box of a
    frame counts. Never raises; only the first 65,536 characters and 1,000 identities are read.
    """
    text = text[:MAX_CHARS]
    found: list[dict[str, Any]] = []
    current = None  # the identity whose body we are in
    for part in _PART.finditer(text):
        if part["frame"] is not None:
            box = _numbers(part["box"].split(",")) if current is not None else None
            if box is not None:
                current["listed"].append(int(part["frame"]))
                current["frames"].setdefault(int(part["frame"]), box)
        elif part["close"]:
            if current is not None:
                current["closed"] = int(part["id"]) == current["id"]
            current = None
        elif len(found) == MAX_IDENTITIES:
            break
        else:
            label = _label(text, part.start())
            current = {"id": int(part["id"]), "label": label, "closed": False, "frames": {}, "listed": []}
            found.append(current)
    return found


def parse_boxes(text: str, repair: str = "none") -> list[list[float]]:
    """Every bracketed group of exactly four numbers, blanks ignored; `;` may separate several groups in one bracket.

    `repair` says what becomes of a box with x1 > x2 or y1 > y2: "none" keeps it, "drop" removes it, "xywh" reads it as
    x, y, width, height (foreign text only; when scoring, an inverted box is invalid). Never raises on any text.
    """
    choose(repair, ("none", "xywh", "drop"), "repair")
    boxes = []
    for bracket in _BRACKET.finditer("".join(text[:MAX_CHARS].split())):
        for group in bracket[1].split(";"):
            box = _numbers(group.split(","))
            if box is not None and (box[0] > box[2] or box[1] > box[3]):
                if repair == "xywh":
                    box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
                    box = box if all(map(math.isfinite, box)) else None
                elif repair == "drop":
                    box = None
            if box is not None:
                boxes.append(box)
    return boxes


def parse_detection(text: str) -> dict[str, list[list[float]]]:
    """Boxes per category of `person:[..],[..];dog:[..].`; never raises."""
    found: dict[str, list[list[float]]] = {}
    for part in text[:MAX_CHARS].split(";"):
        category, _, rest = part.partition(":")
        boxes = parse_boxes(rest)
        if category.strip() and boxes:
            found.setdefault(category.strip(), []).extend(boxes)
    return found


# ---- scores


def int_keys(mapping: Mapping[Any, Any]) -> dict[int, Any]:
    """The mapping with integer keys, as JSON's numeric strings mean them."""
    return {int(key): value for key, value in mapping.items()}


def tracking_ao(pred: Frames, gt: Frames) -> dict[str, Any]:
    """`ious` of the frames of `gt` but the smallest, their mean `ao`, the shares `sr50` and `sr75` above 0.5 and 0.75.

    A missing or invalid prediction has IoU 0. Without a frame to score the shares are NaN.
    """
    pred, gt = int_keys(pred), int_keys(gt)
    ious = [float(box_iou(pred[t], gt[t])) if t in pred else 0.0 for t in sorted(gt)[1:]]
    if not ious:
        return {"ious": [], "ao": math.nan, "sr50": math.nan, "sr75": math.nan}
    return {"ious": ious, "ao": float(np.mean(ious))} | {
        f"sr{100 * threshold:.0f}": float(np.mean(np.array(ious) > threshold)) for threshold in (0.5, 0.75)
    }


def ade_fde(pred: Frames, gt: Frames, missing: str = "hold", cost: float = MISSING_COST) -> dict[str, Any]:
    """`distances` of centres on the frames of `gt` but the smallest, in the unit of the boxes, mean `ade`, last `fde`.

    A missing frame repeats the last predicted box, at first the true first box ("hold"), or costs `cost` ("max"): silence
    must not be worth as much as holding still. The default is the diagonal of the 0..1000 grid.
    NaN without a frame to score.
    """
    choose(missing, ("hold", "max"), "missing")
    pred, gt = int_keys(pred), int_keys(gt)
    first, *rest = sorted(gt)
    last, distances = gt[first], []
    for t in rest:
        last = pred.get(t, last)
        absent = t not in pred and missing == "max"
        distances.append(cost if absent else float(center_error(last, gt[t])))
    mean, final = (float(np.mean(distances)), distances[-1]) if rest else (math.nan, math.nan)
    return {"distances": distances, "ade": mean, "fde": final}


def trajectory_scores(pred: Mapping[int, Any], gt: Mapping[int, Any], cost: float = MISSING_COST) -> dict[str, float]:
    """`ao`, `sr50`, `sr75`, `ade`, `fde` and `coverage` (the share of frames that have a box), pooled over identities and all
    their frames but the first; empty without a frame to score. A missing frame has IoU 0 and the distance `cost`.
    """
    ious = [iou for i, true in gt.items() for iou in tracking_ao(pred.get(i, {}), true)["ious"]]
    if not ious:
        return {}
    moves = [ade_fde(pred.get(i, {}), true, "max", cost) for i, true in gt.items() if len(true) > 1]
    there = [t in pred.get(i, {}) for i, true in gt.items() for t in sorted(true)[1:]]
    scores = {
        "ao": np.mean(ious),
        "sr50": np.mean(np.array(ious) > 0.5),
        "sr75": np.mean(np.array(ious) > 0.75),
        "ade": np.mean([d for move in moves for d in move["distances"]]),
        "fde": np.mean([m["fde"] for m in moves]),
        "coverage": np.mean(there),
    }
    return {name: float(value) for name, value in scores.items()}


def box_in_range(box: Sequence[float], extent: tuple[float, float] = GRID) -> bool:
    """0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height of the grid."""
    x1, y1, x2, y2 = box
    return 0 <= x1 < x2 <= extent[0] and 0 <= y1 < y2 <= extent[1]


def trajectory_reward(
    text: str,
    gt: Tracks,
    given_first: bool = True,
    extent: tuple[float, float] = GRID,
    match: str = "id",
) -> dict[str, float]:
    """`reward` = 0.1 `format` + 0.6 `iou` + 0.3 `disp` of the trajectories in a text, all in 0..1.

    `iou` and `disp` = exp(-centre distance / sqrt(w h) of the true box) are means over all (identity, frame) of `gt`;
    frame 1 is left out if its box was in the prompt (`given_first`). A missing, inverted or out-of-range box counts 0
    in both. `format` is 1 iff the text holds exactly the identities of `gt`, each closed, each listing exactly its
    frames in order, all boxes in range. Of a repeated identity or frame the first counts.

    `match` "id" compares equal identities and is all 0 if none of them occurs; "hungarian" pairs identities by largest
    mean IoU, for prompts that named no identity.
    """
    gt = {i: int_keys(frames) for i, frames in int_keys(gt).items()}
    blocks = parse_trajectories(text)
    pairs = match_identities(blocks, gt, given_first, extent, match)
    if not pairs:
        return {"format": 0.0, "iou": 0.0, "disp": 0.0, "reward": 0.0}
    ious, nearness = [], []
    for i, frames in gt.items():
        for t in _graded(frames, given_first):
            box = pairs[i]["frames"].get(t) if i in pairs else None
            scores = (0.0, 0.0)
            if box is not None and box_in_range(box, extent):
                scores = float(box_iou(box, frames[t])), _nearness(box, frames[t])
            ious.append(scores[0])
            nearness.append(scores[1])
    right = Counter(block["id"] for block in blocks) == Counter(gt.keys()) and len(pairs) == len(gt)
    right = right and all(
        block["closed"]
        and block["listed"] == sorted(gt[i])
        and all(box_in_range(box, extent) for box in block["frames"].values())
        for i, block in pairs.items()
    )
    iou, disp = (float(np.mean(values)) if values else 0.0 for values in (ious, nearness))
    return {"format": float(right), "iou": iou, "disp": disp, "reward": 0.1 * right + 0.6 * iou + 0.3 * disp}


def _nearness(box: Sequence[float], gt: Sequence[float]) -> float:
    size = math.sqrt(max(gt[2] - gt[0], 0) * max(gt[3] - gt[1], 0))
    return math.exp(-float(center_error(box, gt)) / size) if size > 0 else 0.0


def _graded(frames: Frames, given_first: bool) -> list[int]:
    """Frames that the answer has to predict."""
    return [t for t in sorted(frames) if not (given_first and t == 1)]


def match_identities(
    blocks: Sequence[Mapping[str, Any]],
    gt: Tracks,
    given_first: bool = True,
    extent: tuple[float, float] = GRID,
    match: str = "id",
) -> dict[int, Mapping[str, Any]]:
    """{true identity: its block of `parse_trajectories`}; of a repeated identity the first block counts.

    `match` as in `trajectory_reward`; "hungarian" maximises the total of mean IoU, and every block finds a partner.
    """
    gt = {i: int_keys(frames) for i, frames in int_keys(gt).items()}
    written: dict[int, Mapping[str, Any]] = {}
    for block in blocks:
        written.setdefault(block["id"], block)
    if choose(match, ("id", "hungarian"), "match") == "id":
        return {i: written[i] for i in gt if i in written}

    def mean_iou(true, found):
        ious = [
            float(box_iou(found[t], true[t])) if t in found and box_in_range(found[t], extent) else 0.0
            for t in _graded(true, given_first)
        ]
        return float(np.mean(ious)) if ious else 0.0

    found = list(written.values())
    score = np.array([[mean_iou(true, block["frames"]) for block in found] for true in gt.values()])
    rows, columns = hungarian(-score.reshape(len(gt), len(found)))
    return {list(gt)[r]: found[c] for r, c in zip(rows, columns, strict=True)}


# ---- baselines


def static_copy(gt: Tracks) -> dict[int, dict[int, list[float]]]:
    """Every frame of each identity filled with its first box: nearly unbeatable at small gaps, the obvious shortcut."""
    tracks = {i: int_keys(frames) for i, frames in int_keys(gt).items()}
    return {i: {t: list(frames[min(frames)]) for t in sorted(frames)} for i, frames in tracks.items()}


def constant_velocity(known: Frames, frames: Sequence[int]) -> dict[int, list[float]]:
    """Boxes at `frames`, going on from the last two known boxes at equal speed and growth; a single one is repeated."""
    boxes = {t: np.asarray(box, float) for t, box in sorted(int_keys(known).items())}
    *_, last = boxes
    before = sorted(boxes)[-2] if len(boxes) > 1 else last
    step = (boxes[last] - boxes[before]) / max(last - before, 1)
    out = {}
    for t in frames:
        box = boxes[last] + step * (t - last)
        if not box_valid(box):  # shrunk to nothing: keep the size, move the centre
            shift = box_center(box) - box_center(boxes[last])
            box = boxes[last] + np.tile(shift, 2)
        out[t] = box.tolist()
    return out
