"""Track text of UTR: writer, parser, strict format, and the verifiable rewards on it (sheet utr.md 3.3 and 6).

A track is `Track1: nick<Id1>Frame1:[x1,y1,x2,y2];Frame2:[x1,y1,x2,y2]</Id1>`: an arbitrary number, a name, an identity
and one box per frame the subject is seen in, frames from 1. For reinforcement learning the whole answer is

    [<think> .. </think>] <answer> track lines [<attr>key=value; key=value</attr>] </answer>

Trajectories are dicts {frame: [x1, y1, x2, y2]}; keys may be ints or strings of ints. All boxes of one call must be in
one coordinate frame (the caller converts); the rewards do not depend on which.
"""

import math
import re
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from jaxmllm.geometry import box_area, box_intersection, box_iou, box_valid, hungarian
from jaxmllm.tasks.answers import clean
from jaxmllm.tasks.trajectories import constant_velocity

Trajectory = Mapping[Any, Sequence[float]]  # frame (int or its digits) -> [x1, y1, x2, y2]

_NUMBER = r"(-?[0-9]++(?:\.[0-9]++)?+)"
_FLAGS = re.ASCII | re.IGNORECASE
_ID = re.compile(r"<\s*+(/?+)\s*+id\s*+([0-9]{1,9}+)\s*+>", _FLAGS)
_ENTRY = re.compile(r"frame\s*+([0-9]{1,9}+)\s*+:\s*+\[\s*+" + r"\s*+,\s*+".join([_NUMBER] * 4) + r"\s*+\]", _FLAGS)
_TRACK = re.compile(r"track\s*+[0-9]++\s*+:", _FLAGS)
_TAG = re.compile(r"<(/?)(think|answer|attr)>", _FLAGS)
FULL = 1 - 1e-6  # a baseline from here on leaves no room above it
GUESS = 2 / 3  # F1 of one right word of two: what naming some motion earns without seeing which
_RANGE = re.compile(r"([0-9]{1,9}+)\s*+(?:-|~|to)\s*+([0-9]{1,9}+)", _FLAGS)


# --- text -----------------------------------------------------------------------------------------------------------


def write_track(track_id: int, name: str, boxes: Mapping[int, Sequence[int]]) -> str:
    """One canonical track line: ASCII tags, no blanks, frames ascending; absent frames are left out.

    Raises:
        ValueError: the name holds `<`, `>` or a line break, which the line cannot carry.
    """
    if any(c in name for c in "<>\n\r"):
        raise ValueError(f"track name {name!r} holds '<', '>' or a line break, which a track line cannot carry")
    entries = ";".join(f"Frame{t}:[{','.join(str(int(v)) for v in boxes[t])}]" for t in sorted(boxes))
    return f"Track{track_id}: {name}<Id{track_id}>{entries}</Id{track_id}>"


def write_attrs(attrs: Mapping[str, str]) -> str:
    """`<attr>key=value; key=value</attr>`; `;`, `<` and `>` in a value become blanks."""
    return "<attr>" + "; ".join(f"{k}={re.sub('[;<>]', ' ', v).strip()}" for k, v in attrs.items()) + "</attr>"


def _blocks(text: str) -> list[tuple[int, int, int, int]]:
    """(id, start of the opening tag, start and end of the body) of each `<id N> .. </id N>`, not overlapping."""
    tags = list(_ID.finditer(text))
    closing = defaultdict(list)
    for tag in tags:
        if tag[1]:
            closing[int(tag[2])].append(tag)
    blocks, at = [], 0
    for tag in tags:
        if tag[1] or tag.start() < at:
            continue
        same = closing[int(tag[2])]
        k = bisect_left(same, tag.end(), key=lambda close: close.start())
        if k < len(same):
            blocks.append((int(tag[2]), tag.start(), tag.end(), same[k].start()))
            at = same[k].end()
    return blocks


def _entries(body: str) -> list[tuple[int, list[float]]]:
    """(frame, box) in text order, repeats kept; boxes that are not finite dropped."""
    found = ((int(m[1]), [float(m[i]) for i in range(2, 6)]) for m in _ENTRY.finditer(body))
    return [(frame, box) for frame, box in found if all(map(math.isfinite, box))]


def parse_tracks(text: str) -> list[dict[str, Any]]:
    """Tracks in text order: `id`, `name`, `boxes` {frame: [x1, y1, x2, y2]}; of a repeated id or frame the first wins.

    Case and blanks in tags do not matter. The name is what stands between the last `Track k:` on the line and `<id`.
    """
    text = clean(text)
    tracks, previous = {}, 0
    for track_id, tag, start, end in _blocks(text):
        head = text[max(previous, text.rfind("\n", previous, tag) + 1) : tag]
        previous = end
        if track_id in tracks:
            continue
        prefixes = list(_TRACK.finditer(head))
        name = head[prefixes[-1].end() :] if prefixes else ""
        boxes: dict[int, list[float]] = {}
        for frame, box in _entries(text[start:end]):
            boxes.setdefault(frame, box)
        tracks[track_id] = {"id": track_id, "name": re.sub("[<>]", "", name).strip(), "boxes": boxes}
    return list(tracks.values())


def _sections(text: str, name: str) -> list[str]:
    """Contents of `<name> .. </name>` in text order, each from the first opening tag to the next closing tag."""
    found, start = [], None
    for tag in _TAG.finditer(text):
        if tag[2].lower() != name:
            continue
        if tag[1]:
            if start is not None:
                found.append(text[start : tag.start()])
            start = None
        elif start is None:
            start = tag.end()
    return found


def parse_attrs(text: str) -> dict[str, str]:
    """{key: value} of the first `<attr>` block; keys in lower case, the first value of a key wins."""
    attrs: dict[str, str] = {}
    for item in next(iter(_sections(clean(text), "attr")), "").split(";"):
        key, equals, value = item.partition("=")
        if equals and key.strip():
            attrs.setdefault(key.strip().lower(), value.strip())
    return attrs


def answer_block(text: str) -> str | None:
    """Content of the one answer block; None if there is none or several."""
    blocks = _sections(clean(text), "answer")
    return blocks[0] if len(blocks) == 1 else None


def format_reward(text: str, T: int) -> float:
    """1.0 if the text is exactly an optional think block and one answer block of well-formed tracks, else 0.0.

    Well-formed: at least one track; tags balanced and not nested; ids unique; every track non-empty with unique frames
    in 1..T and valid boxes, and nothing that looks like an entry but is none.
    """
    text = clean(text)
    shape = [(tag[1] + tag[2]).lower() for tag in _TAG.finditer(text)]
    thought = ["think", "/think"] if shape[:1] == ["think"] else []
    frame = thought + ["answer", "/answer"]
    if shape not in (frame, frame[:-1] + ["attr", "/attr"] + frame[-1:]):
        return 0.0
    opening, *_, closing = [tag for tag in _TAG.finditer(text) if tag[2].lower() == "answer"]
    before = text[: opening.start()]
    if thought:
        tags = list(_TAG.finditer(before))
        before = before[: tags[0].start()] + before[tags[1].end() :]
    if before.strip() or text[closing.end() :].strip():
        return 0.0
    body = text[opening.end() : closing.start()]
    blocks = _blocks(body)
    ids = [block[0] for block in blocks]
    if not ids or len(set(ids)) < len(ids) or len(_ID.findall(body)) != 2 * len(ids):
        return 0.0
    return float(all(_well_formed(body[start:end], T) for _, _, start, end in blocks))


def _well_formed(body: str, T: int) -> bool:
    entries = _entries(body)
    frames = [t for t, _ in entries]
    return (
        0 < len(entries) == len(set(frames)) == body.count("[") == body.lower().count("frame")
        and all(1 <= t <= T for t in frames)
        and bool(box_valid([box for _, box in entries]).all())
    )


# --- trajectories ---------------------------------------------------------------------------------------------------


def by_frame(trajectory: Trajectory, exclude: Collection[int] = ()) -> dict[int, Sequence[float]]:
    """The trajectory with int keys, without the excluded frames."""
    return {int(t): box for t, box in trajectory.items() if int(t) not in exclude}


def _stack(trajectories: Sequence[Mapping[int, Sequence[float]]], frames: Sequence[int]) -> Float[np.ndarray, "N F 4"]:
    """Boxes of every trajectory on the same frames, NaN (an invalid box) where absent."""
    absent = (math.nan,) * 4
    rows = [[trajectory.get(t, absent) for t in frames] for trajectory in trajectories]
    return np.asarray(rows, np.float64).reshape(len(trajectories), len(frames), 4)


def trajectory_iou(
    P: Trajectory,
    G: Trajectory,
    exclude: Collection[int] = (),
    mode: Literal["mean", "volume"] = "mean",
    power: float = 1,
) -> float:
    """Overlap of a predicted and a true trajectory, in 0..1; 0 if either is empty after exclusion.

    `mean`: sum of IoU ** power over the frames of both, divided by the frames of either, so that missing and spurious
    frames count as 0. `volume`: shared area over joint area, summed over frames.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in ("mean", "volume"):
        raise ValueError(f"unknown mode {mode!r}; use mean or volume")
    excluded = {int(t) for t in exclude}
    P, G = by_frame(P, excluded), by_frame(G, excluded)
    if not P or not G:
        return 0.0
    p, g = _stack([P, G], sorted(P.keys() | G.keys()))
    if mode == "mean":
        return float(np.sum(box_iou(p, g) ** power) / len(p))
    shared = box_intersection(p, g)
    joint = float(np.sum(box_area(p) + box_area(g) - shared))
    return float(np.sum(shared)) / joint if 0 < joint < math.inf else 0.0


def static_baseline(
    qbox: Sequence[float],
    G: Trajectory,
    exclude: Collection[int] = (),
    mode: Literal["mean", "volume"] = "mean",
    power: float = 1,
) -> float:
    """`trajectory_iou` of the query box copied to every frame of G: what an answer without any tracking is worth."""
    return trajectory_iou(dict.fromkeys(G, qbox), G, exclude, mode, power)


def lift(r: float, b: float) -> float:
    """Share of the room above the baseline b that r covers: clip((r - b) / (1 - b), 0, 1); 0 if b leaves no room."""
    return 0.0 if b >= FULL else min(max((r - b) / (1 - b), 0.0), 1.0)


def unwatched(track: Trajectory, given: Collection[int] = ()) -> list[dict[int, Sequence[float]]]:
    """What one frame and the prompt say about a track, a guess for each of its frames: the box of that frame copied to
    all others. Where the prompt gives two frames or more (`given`) they go on at constant speed instead.
    """
    boxes = by_frame(track)
    known = {t: box for t, box in boxes.items() if t in given}
    if len(known) < 2:
        return [dict.fromkeys(boxes, box) for box in boxes.values()]
    path = {**constant_velocity(known, list(boxes)), **known}
    return [{**path, t: box} for t, box in boxes.items()]


def unwatched_overlap(track: Trajectory, given: Collection[int] = (), power: float = 1) -> float:
    """The best `trajectory_iou` among `unwatched` on the frames not given: the worth of not following the track."""
    return max((trajectory_iou(guess, track, given, power=power) for guess in unwatched(track, given)), default=0.0)


def _unwatched_identity(tracks: Mapping[int, Trajectory], given: Collection[int], iou_thr: float) -> float:
    """The best IDF1 of all tracks guessed from the prompt and one frame, the same for all."""
    guesses = {i: dict(zip(by_frame(track), unwatched(track, given), strict=True)) for i, track in tracks.items()}
    frames = {t for guess in guesses.values() for t in guess}
    rows = ({i: guess[t] for i, guess in guesses.items() if t in guess} for t in frames)
    return max((identity_reward(row, tracks, iou_thr, given)["idf1"] for row in rows), default=0.0)


def identity_reward(
    pred: Mapping[Any, Trajectory],
    gt: Mapping[Any, Trajectory],
    iou_thr: float = 0.5,
    exclude: Collection[int] = (),
) -> dict[str, Any]:
    """IDF1 of the best one-to-one matching; predicted ids are arbitrary labels.

    The matching maximises the frames with IoU >= iou_thr (IDTP) plus 1e-6 times the summed IoU; a pair that never
    overlaps is no pair.

    Returns:
        `pairs` [[predicted id, true id], ..] by predicted id, `idtp`, and `idf1` = 2 IDTP / (predicted + true boxes),
        0 if either has no box.
    """
    excluded = {int(t) for t in exclude}
    pred = {int(i): by_frame(track, excluded) for i, track in pred.items()}
    gt = {int(i): by_frame(track, excluded) for i, track in gt.items()}
    boxes = sum(map(len, pred.values())), sum(map(len, gt.values()))
    if not all(boxes):
        return {"pairs": [], "idtp": 0, "idf1": 0.0}
    frames = sorted(set().union(*gt.values()))
    p, g = _stack(list(pred.values()), frames)[:, None], _stack(list(gt.values()), frames)[None]
    iou = box_iou(p, g)  # [P, G, F]
    seen = ~np.isnan(p[..., 0] + g[..., 0])
    hits, overlap = np.sum((iou >= iou_thr) & seen, axis=-1), np.sum(iou, axis=-1)
    rows, columns = hungarian(-np.where(overlap > 0, hits + 1e-6 * overlap, 0.0))
    kept = [(r, c) for r, c in zip(rows, columns, strict=True) if overlap[r, c] > 0]
    pred_ids, gt_ids = list(pred), list(gt)
    idtp = int(sum(hits[r, c] for r, c in kept))
    return {
        "pairs": sorted([pred_ids[r], gt_ids[c]] for r, c in kept),
        "idtp": idtp,
        "idf1": 2 * idtp / sum(boxes),
    }


# --- words and times ------------------------------------------------------------------------------------------------


def tokens(text: str) -> Counter[str]:
    """The words of a phrase as a multiset; case, articles and signs dropped."""
    words = re.sub("[^a-z0-9 ]", " ", unicodedata.normalize("NFKC", text).lower()).split()
    return Counter(w for w in words if w not in ("a", "an", "the"))


def fits(cue: str, phrases: Sequence[str]) -> bool:
    """Whether a phrase says all that the cue says: "red fox" fits the cue "the fox"."""
    return any(tokens(cue) <= tokens(phrase) for phrase in phrases)


def attribute_reward(p: str, golds: str | Sequence[str]) -> float:
    """Best token F1 (words counted as a multiset) of the phrase with any gold phrase; case, articles, signs dropped."""
    golds = [golds] if isinstance(golds, str) else golds
    mine, best = tokens(p), 0.0
    for gold in map(tokens, golds):
        shared = (mine & gold).total()
        if shared:
            best = max(best, 2 * shared / (mine.total() + gold.total()))
    return best


def temporal_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """IoU of two half-open intervals (start, end); 0 if either is empty. Frames t1-t2 are the interval (t1, t2 + 1)."""
    (s, e), (s2, e2) = a, b
    if not (e > s and e2 > s2):
        return 0.0
    shared = max(0.0, min(e, e2) - max(s, s2))
    return shared / (e - s + e2 - s2 - shared)


def frame_range(text: str) -> tuple[int, int] | None:
    """The half-open interval (t1, t2 + 1) of the first `t1-t2` (also `~`, `to`) in the text; None if there is none."""
    found = _RANGE.search(clean(text))
    return (int(found[1]), int(found[2]) + 1) if found else None


def _attribute_score(value: str | None, golds: Sequence[Any] | str) -> float:
    """Score of one `<attr>` value: phrases by token F1; a gold [t1, t2] of numbers by IoU of the frame ranges."""
    if value is None:
        return 0.0
    if len(golds) == 2 and isinstance(golds[0], int) and isinstance(golds[1], int):
        span = frame_range(value)
        return temporal_iou(span, (golds[0], golds[1] + 1)) if span else 0.0
    return attribute_reward(value, golds)


# --- the whole reward -----------------------------------------------------------------------------------------------


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are there; None without any."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def _above(value: float, baseline: float) -> float | None:
    """The lift over a baseline; None where it leaves no room."""
    return None if baseline >= FULL else lift(value, baseline) if baseline else value


def utr_reward(
    text: str,
    gt: Mapping[str, Any],
    weights: Sequence[float] = (0.5, 0.25, 0.25),
    lam_fmt: float = 0.1,
    iou_thr: float = 0.5,
    power: float = 1,
    lifted: bool = False,
) -> dict[str, float | None]:
    """lam format + (1 - lam) (w1 traj + w2 id + w3 attr) / (w1 + w2 + w3), in 0..1 (sheet utr.md 6).

    Args:
        text: completion.
        gt: `T` frames; `tracks` {id: {"names": [..], "boxes": trajectory}}; `query` None or {"id", "frame"}: the frame
            whose box the prompt gives away (`frames`: several); `attrs` {key: phrases, or [t1, t2] for a frame range}.
        weights: of trajectory, identity and attributes. What has nothing to grade is None and left out.
        lam_fmt: weight of the format.
        iou_thr: IoU from which a frame counts as tracked.
        power: of the IoU in the trajectory part; 2 sharpens late training.
        lifted: every part earns only its lift over what the prompt and one frame give: trajectories and identity over
            `unwatched`, names over the query's `cue`, actions over `GUESS`. What leaves no room is not graded.

    Returns:
        `total`, `format`, `traj`, `id`, `attr`. Without exactly one answer block everything but the format is 0.

    The query frame is excluded for all tracks and the queried track earns only its lift over copying the query box. A
    track seen in excluded frames only has nothing to grade; if that is true of all, names are matched on all frames.
    """
    T, query = int(gt["T"]), gt.get("query") or {}
    given = query.get("frames") or ([query["frame"]] if "frame" in query else [])
    excluded = {int(t) for t in given}
    tracks = {int(i): track for i, track in (gt.get("tracks") or {}).items()}
    true = {i: by_frame(track.get("boxes") or {}) for i, track in tracks.items()}
    gradable = {i: boxes for i, boxes in true.items() if by_frame(boxes, excluded)}
    block = answer_block(text)
    found = parse_tracks(block) if block is not None else []
    pred = {track["id"]: {t: box for t, box in track["boxes"].items() if 1 <= t <= T} for track in found}
    names = {track["id"]: track["name"] for track in found}

    identity = identity_reward(pred, true, iou_thr, excluded if gradable else ())
    match = {g: p for p, g in identity["pairs"]}
    overlaps: list[float | None] = []
    for i, boxes in gradable.items():
        overlap = trajectory_iou(pred[match[i]], boxes, excluded, power=power) if i in match else 0.0
        if lifted:
            overlaps.append(_above(overlap, unwatched_overlap(boxes, excluded, power)))
            continue
        qbox = query.get("box") or boxes.get(int(query["frame"])) if "frame" in query else None
        if qbox is not None and str(query.get("id")) == str(i):
            overlap = lift(overlap, static_baseline(qbox, boxes, excluded, power=power))
        overlaps.append(overlap)

    attrs = parse_attrs(block) if block is not None else {}
    cue = str(query.get("cue", "")) if lifted else ""
    words = [
        _above(attribute_reward(names[match[i]], golds) if i in match else 0.0, attribute_reward(cue, golds))
        for i in (gradable or true)
        if (golds := [name for name in tracks[i].get("names") or () if not (cue and tokens(name) <= tokens(cue))])
    ]
    for key, golds in (gt.get("attrs") or {}).items():
        guess = GUESS if lifted and key == "action" else 0.0
        words.append(_above(_attribute_score(attrs.get(key.lower()), golds), guess))

    same = identity["idf1"] if gradable else None
    if lifted and same is not None:
        same = _above(same, _unwatched_identity(gradable, excluded, iou_thr))
    parts = {"traj": _mean(overlaps), "id": same, "attr": _mean(words)}
    graded = [(w, value) for w, value in zip(weights, parts.values(), strict=True) if value is not None]
    scale = sum(w for w, _ in graded)
    content = sum(w * value for w, value in graded) / scale if scale > 0 else 0.0
    form = format_reward(text, T)
    return {"total": lam_fmt * form + (1 - lam_fmt) * content, "format": form, **parts}


def contrast_bonus(
    r_full: ArrayLike, r_single: ArrayLike, alpha: float = 0.3, mu: float = 0.0, good: float = 0.5
) -> Float[np.ndarray, "G"]:
    """Bonus for each full-video sample: alpha where r >= good, if the full video beats one frame on average by > mu.

    The single-frame samples are not trained on (sheet utr.md 6; T-GRPO's rule with one frame for shuffled frames).
    """
    full, single = np.asarray(r_full, np.float64), np.asarray(r_single, np.float64)
    helps = bool(full.size and single.size) and full.mean() > single.mean() + mu
    return np.where(helps & (full >= good), alpha, 0.0)
