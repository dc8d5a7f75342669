"""Attribute tracks over video (UTR): bidirectional queries, their answers, reward and measures.

Source: sheet utr.md sections 3 and 6. A query shows part of a subject's attributes and asks for all of it, the box in
every frame included: spatial to temporal and back. Text format and component rewards: `track_rewards`.

A clip record has `size`, optional `resized`, `frames` [{"idx": 1, "time": 0.0}, ..] (numbered from 1), optional
`caption` and `tracks` [{"id", "names": [name, .., category], "boxes": {"1": [x1, y1, x2, y2]}, "appearance": [..],
"location": [{"span": [1, 4], "text"}], "action": [{"span", "text"}]}] with boxes in original pixels and spans
inclusive. `make_query` turns it into a task record by adding `query`; the other functions here take that.

Options: `style` (coordinates, see `answers.STYLES`), `thinking`, and `form`: `"answer"` is the tagged form that the
reward reads, `"plain"` the sentence, track lines and caption of supervised training.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxmllm.geometry import Boxes, box_valid
from jaxmllm.tasks import answers, track_rewards

FORMS = ("answer", "plain")

# What is shown -> what is asked (sheet utr.md 3.3, T1 .. T5), with paraphrases.
QUERIES: dict[str, tuple[str, ...]] = {
    "box": (
        "Which subject is at {cue}? Say who it is and what it does, and give its box in every frame.",
        "There is a subject at {cue}. Name it, describe it and trace it through the clip.",
        "Starting from {cue}, identify the subject and report its whole trajectory.",
        "Tell me about the subject at {cue}: its name, its action and its trajectory.",
        "Follow whatever is at {cue} through all frames, and say what it is and what it is doing.",
    ),
    "phrase": (
        "Trace {cue} through the clip and say what it does.",
        "Where is {cue} in each frame, and what is it doing?",
        "Give the trajectory and the action of {cue}.",
        "Find {cue} in every frame it appears in. What does it do?",
        "Report the box of {cue} frame by frame and describe its action.",
    ),
    "event": (
        "Which subject is {cue}? Name it and trace it through the clip.",
        "Someone or something is {cue}. Who is it, and where is it in every frame?",
        "Identify the subject that is {cue} and give its trajectory.",
        "Find the one that is {cue}: its name and its box in each frame.",
        "Who is {cue}? Report the whole path.",
    ),
    "trajectory": (
        "A subject moves along {cue}. Who is it, what does it look like, and what does it do in which frames?",
        "Given the path {cue}, name the subject and describe its appearance and action, with the frames.",
        "The trajectory is {cue}. Say which subject this is, how it looks, and when it does what.",
        "Which subject has the trajectory {cue}? Describe it, its action and the frames of that action.",
        "Look along {cue}: name what moves there, its appearance, its action and when that happens.",
    ),
    "category": (
        "Trace every {cue} in the clip.",
        "Find all subjects that are {cue} and give each one's trajectory.",
        "Give the tracks of all {cue} subjects, one line each.",
        "Where is each {cue} in each frame? Keep one identity per subject.",
        "List every {cue} with its name and its box in every frame.",
    ),
}
CAPTION_QUESTIONS = (
    "Then describe the whole clip.",
    "Finish with a caption of the clip.",
    "After that, tell the whole story of the clip.",
    "Also summarise what happens overall.",
    "Close with a description of everything that happens.",
)
_ASKED = {
    "box": ("action", "location"),
    "phrase": ("action",),
    "event": (),
    "trajectory": ("appearance", "action", "frames"),
    "category": (),
}


# --- records --------------------------------------------------------------------------------------------------------


def cut_clip(
    record: Mapping[str, Any], rng: np.random.Generator, max_frames: int = 16, max_tracks: int = 4
) -> dict[str, Any]:
    """The record on at most `max_frames` evenly spaced frames, renumbered from 1, and `max_tracks` random tracks.

    `images`, where there is one per frame, are cut alike; a frame keeps its old number as `source`. Boxes without area
    inside the image, and attributes and tracks left without a frame, are dropped.
    """
    frames = record["frames"]
    chosen = [int(i) for i in np.linspace(0, len(frames) - 1, min(len(frames), max_frames))]
    number = {int(frames[i]["idx"]): k + 1 for k, i in enumerate(chosen)}
    extent = Boxes.of(record, []).extent()

    def visible(box):
        low, high = np.clip(box[:2], 0, extent), np.clip(box[2:], 0, extent)
        return bool(box_valid([*low, *high]))

    def spans(items):
        for item in items or ():
            inside = [new for old, new in number.items() if item["span"][0] <= old <= item["span"][1]]
            if inside:
                yield {"span": [min(inside), max(inside)], "text": item["text"]}

    tracks = []
    for track in record["tracks"]:
        boxes = {str(number[int(t)]): box for t, box in track["boxes"].items() if int(t) in number and visible(box)}
        if boxes:
            timed = {key: list(spans(track.get(key))) for key in ("location", "action")}
            tracks.append({**track, "boxes": boxes, **timed})
    if len(tracks) > max_tracks:
        tracks = [tracks[i] for i in sorted(rng.choice(len(tracks), max_tracks, replace=False))]
    out = {
        **record,
        "tracks": tracks,
        "frames": [{**frames[i], "idx": k + 1, "source": frames[i]["idx"]} for k, i in enumerate(chosen)],
    }
    if len(record.get("images") or ()) == len(frames):
        out["images"] = [record["images"][i] for i in chosen]
    return out


def _texts(track: Mapping[str, Any], key: str, frame: int | None = None) -> list[str]:
    """Texts of a timed attribute that hold in `frame`; all of them if none does."""
    items = track.get(key) or []
    here = [item["text"] for item in items if frame is not None and item["span"][0] <= frame <= item["span"][1]]
    return here or [item["text"] for item in items]


def _candidates(record: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """Every query of a kind that the record allows; cues that fit several subjects are left out."""
    found: list[tuple[str, dict[str, Any]]] = []
    total = len(record["frames"])
    for track in record["tracks"]:
        one = {"id": track["id"], "ids": [track["id"]]}
        if kind == "box":
            found += [(f"{track['id']}/{t}", {**one, "frame": int(t)}) for t in track["boxes"]]
        elif kind == "phrase":
            found += [(cue.lower(), {**one, "cue": cue}) for cue in (*track["names"], *(track.get("appearance") or ()))]
        elif kind == "event":
            found += [(cue.lower(), {**one, "cue": cue}) for cue in dict.fromkeys(_texts(track, "action"))]
            first, last = (f(map(int, track["boxes"])) for f in (min, max))
            if (first, last) != (1, total):
                found.append((f"{first}-{last}", {**one, "span": [first, last]}))
        elif kind == "trajectory":
            found.append((str(track["id"]), {**one, "frames": sorted(map(int, track["boxes"]))}))
    if kind == "category":
        groups: dict[str, list[Any]] = {}
        for track in record["tracks"]:
            groups.setdefault(track["names"][-1], []).append(track["id"])
        return [{"ids": ids, "cue": name} for name, ids in groups.items()]
    shared = {key for key, query in found for other, q in found if key == other and q["id"] != query["id"]}
    return [query for key, query in found if key not in shared]


def make_query(
    record: Mapping[str, Any],
    rng: np.random.Generator,
    kind: str | None = None,
    max_frames: int = 16,
    max_tracks: int = 4,
    caption_chance: float = 0.5,
) -> dict[str, Any] | None:
    """A task record for one random query of a clip; kinds uniform over those the clip allows. None if it allows none.

    Args:
        kind: a key of `QUERIES` to force it.
        caption_chance: how often the plain form also asks for the caption, when there is one.

    Raises:
        ValueError: unknown kind.
    """
    kinds = tuple(QUERIES) if kind is None else (answers.choose(kind, QUERIES, "kind"),)
    clip = cut_clip(record, rng, max_frames, max_tracks)
    options = {name: found for name in kinds if (found := _candidates(clip, name))}
    if not options:
        return None
    name = list(options)[rng.integers(len(options))]
    query = {"kind": name, **options[name][rng.integers(len(options[name]))]}
    query["wording"] = int(rng.integers(len(QUERIES[name])))
    if clip.get("caption") and rng.random() < caption_chance:
        query["caption_wording"] = int(rng.integers(len(CAPTION_QUESTIONS)))
    return {**clip, "task": "tracks", "query": query}


def _targets(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [track for track in record["tracks"] if track["id"] in record["query"]["ids"]]


def _golds(record: Mapping[str, Any]) -> dict[str, Any]:
    """{attribute: gold phrases, or [t1, t2] for `frames`} that the query asks for and the subject has."""
    query = record["query"]
    asked = _ASKED[query["kind"]]
    if not asked:
        return {}
    track = _targets(record)[0]
    actions = track.get("action") or []
    golds = {
        "appearance": list(track.get("appearance") or ()),
        "action": _texts(track, "action", query.get("frame")),
        "location": _texts(track, "location", query.get("frame")),
        # With several actions "when" has no one answer.
        "frames": [int(t) for t in actions[0]["span"]] if len(actions) == 1 else [],
    }
    return {key: golds[key] for key in asked if golds[key]}


def _whole(record: Mapping[str, Any], track: Mapping[str, Any], style: str) -> dict[int, list[int]]:
    """The track's boxes as whole numbers in the frame of the answer."""
    frames = sorted(map(int, track["boxes"]))
    by_int = track_rewards.by_frame(track["boxes"])
    boxes = Boxes.of(record, [by_int[t] for t in frames]).to(answers.STYLES[style].frame)
    return dict(zip(frames, answers.whole_boxes(boxes).tolist(), strict=True))


def ground_truth(record: Mapping[str, Any], style: str = "qwen2_5_vl") -> dict[str, Any]:
    """The `gt` of `track_rewards.utr_reward`, with boxes rounded as an answer writes them: the gold answer gets 1."""
    answers.choose(style, answers.STYLES, "style")
    return {
        "T": len(record["frames"]),
        "tracks": {t["id"]: {"names": t["names"], "boxes": _whole(record, t, style)} for t in _targets(record)},
        "query": record["query"],
        "attrs": _golds(record),
    }


# --- the task -------------------------------------------------------------------------------------------------------


def _cue(record: Mapping[str, Any], style: str) -> str:
    query = record["query"]
    kind = query["kind"]
    if kind in ("box", "trajectory"):
        boxes = _whole(record, _targets(record)[0], style)
        shown = [query["frame"]] if kind == "box" else query["frames"]
        return ";".join(f"Frame{t}:[{','.join(map(str, boxes[t]))}]" for t in shown)
    if "span" in query:
        first, last = query["span"]
        times = [frame.get("time") for frame in record["frames"]]
        seconds = f" ({times[first - 1]:.1f} ~ {times[last - 1]:.1f}s)" if None not in times else ""
        return f"in view in frames {first}-{last}{seconds}"
    return query["cue"]


def prompt(record: Mapping[str, Any], style: str = "qwen2_5_vl", form: str = "answer", thinking: bool = False) -> str:
    """The question of a task record, with the frames named first and the wanted format last."""
    answers.choose(form, FORMS, "form")
    answers.choose(style, answers.STYLES, "style")
    query, total = record["query"], len(record["frames"])
    lines = [
        f"The clip has {total} frames, Frame1 to Frame{total}.",
        QUERIES[query["kind"]][query["wording"]].format(cue=_cue(record, style)),
    ]
    skeleton = "Track k: name<Id k>Frame t:[xmin,ymin,xmax,ymax];...</Id k>"
    if form == "plain":
        if "caption_wording" in query:
            lines.append(CAPTION_QUESTIONS[query["caption_wording"]])
        return "\n".join([*lines, f"Write each trajectory as {skeleton}."])
    keys = list(_golds(record))
    attrs = f", then <attr>{'; '.join(f'{key}=...' for key in keys)}</attr>" if keys else ""
    think = "Reason between <think> and </think> first. " if thinking else ""
    return "\n".join([*lines, f"{think}Answer as <answer>, one line {skeleton} per subject{attrs}, </answer>."])


def answer(
    record: Mapping[str, Any],
    style: str = "qwen2_5_vl",
    form: str = "answer",
    thinking: bool = False,
    thought: str = "",
) -> str:
    """The gold completion; `thinking` and `thought` concern the tagged form."""
    answers.choose(form, FORMS, "form")
    answers.choose(style, answers.STYLES, "style")
    targets = _targets(record)
    lines = [track_rewards.write_track(t["id"], t["names"][0], _whole(record, t, style)) for t in targets]
    values = {key: f"{golds[0]}-{golds[1]}" if key == "frames" else golds[0] for key, golds in _golds(record).items()}
    if form == "answer":
        block = "\n".join([*lines, track_rewards.write_attrs(values)] if values else lines)
        return f"{f'<think>{thought}</think>' if thinking else ''}<answer>\n{block}\n</answer>"
    facts = [f"{key.capitalize()}: {value}." for key, value in values.items()]
    head = " ".join([f"Name: {t['names'][0]}." for t in targets] + facts)
    caption = [record["caption"]] if "caption_wording" in record["query"] else []
    return "\n".join([head, *lines, *caption])


def parse(text: str) -> dict[str, Any]:
    """`tracks` (see `track_rewards.parse_tracks`) and `attrs` of the one answer block, else of the whole text."""
    block = track_rewards.answer_block(text)
    block = text if block is None else block
    return {"tracks": track_rewards.parse_tracks(block), "attrs": track_rewards.parse_attrs(block)}


def reward(
    text: str,
    record: Mapping[str, Any],
    style: str = "qwen2_5_vl",
    weights: Sequence[float] = (0.5, 0.25, 0.25),
    lam_fmt: float = 0.1,
    iou_thr: float = 0.5,
    power: float = 1,
) -> dict[str, float] | None:
    """`track_rewards.utr_reward` of the tagged form; parts that have nothing to grade are absent. None without targets.

    Cheap strategies and their counters: sheet utr.md 6. Drop clips by `keep_sample` and flat groups by `informative`.
    """
    if not _targets(record):
        return None
    parts = track_rewards.utr_reward(text, ground_truth(record, style), weights, lam_fmt, iou_thr, power)
    named = {"reward": parts.pop("total"), **parts}
    return {key: value for key, value in named.items() if value is not None}


def metric(texts: Sequence[str], records: Sequence[Mapping[str, Any]], style: str = "qwen2_5_vl") -> dict[str, float]:
    """Mean reward and parts over the records that have them, and `static_traj`: the trajectory IoU, before any lift, of
    copying each target's query (or first) box to every frame.
    """
    scored = [reward(text, record, style) or {} for text, record in zip(texts, records, strict=True)]
    scored = [{**s, "static_traj": _static(ground_truth(r, style))} for s, r in zip(scored, records, strict=True) if s]
    keys = dict.fromkeys(key for row in scored for key in row)
    return {key: float(np.mean([row[key] for row in scored if key in row])) for key in keys}


# --- filters --------------------------------------------------------------------------------------------------------


def _static(gt: Mapping[str, Any]) -> float:
    shown = gt["query"].get("frame")
    values = []
    for track in gt["tracks"].values():
        boxes = track["boxes"]
        key = shown if shown in boxes else min(boxes)
        values.append(track_rewards.static_baseline(boxes[key], boxes, {key}))
    return float(np.mean(values)) if values else 0.0


def keep_sample(record: Mapping[str, Any], max_static: float = 0.7, min_frames: int = 4) -> bool:
    """Whether a task record can teach tracking by reward: it has targets, they move, and enough frames are graded."""
    gt = ground_truth(record)
    query = gt["query"]
    given = set(query.get("frames") or ([query["frame"]] if "frame" in query else []))
    graded = sum(len(track_rewards.by_frame(track["boxes"], given)) for track in gt["tracks"].values())
    return graded >= min_frames and _static(gt) <= max_static


def keep_track(
    track: Mapping[str, Any], min_frames: int = 4, min_score: float = 0.4, min_iou: float = 0.5, max_gaps: int = 1
) -> bool:
    """Whether a track made by a detector and a tracker is good enough for a label (sheet utr.md 7).

    Optional fields: `score`, the detector's confidence; `detector_iou`, IoU of its boxes with the tracker's. A gap is a
    run of missing frames.
    """
    frames = sorted(map(int, track["boxes"]))
    gaps = sum(b - a > 1 for a, b in zip(frames, frames[1:], strict=False))
    agree = track.get("score", 1.0) >= min_score and track.get("detector_iou", 1.0) >= min_iou
    return len(frames) >= min_frames and gaps <= max_gaps and agree


def informative(rewards: ArrayLike, min_std: float = 0.02) -> bool:
    """Whether a probe group's rewards differ enough to carry a signal."""
    return float(np.std(np.asarray(rewards, np.float64))) >= min_std


PARSERS = {
    "parse": parse,
    "parse_tracks": track_rewards.parse_tracks,
    "parse_attrs": track_rewards.parse_attrs,
    "answer_block": track_rewards.answer_block,
    "format_reward": lambda text: track_rewards.format_reward(text, 16),
    "frame_range": track_rewards.frame_range,
}
