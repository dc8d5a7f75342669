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
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxmllm.geometry import Boxes, box_iou, box_valid
from jaxmllm.tasks import answers, track_rewards
from jaxmllm.tasks.task import Record, Reward, Row, Task

FORMS = ("answer", "plain")
SAME = 0.95  # two subjects whose boxes overlap so much cannot be told apart by a box

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
        "A subject moves along {cue}. Who is it, what does it look like, and where does it go on to?",
        "Given the beginning {cue}, name and describe the subject and give its whole trajectory.",
        "The trajectory begins {cue}. Say which subject this is, how it looks, and where it moves until the end.",
        "Which subject starts along {cue}? Describe it and trace it through all frames.",
        "Look along {cue}: name what moves there and its appearance. Track it to the end.",
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
    "box": ("action",),  # where it is then follows from the box
    "phrase": ("action",),
    "event": (),
    "trajectory": ("appearance",),  # what it does follows from the path
    "category": (),
}


# --- records --------------------------------------------------------------------------------------------------------


def cut_clip(record: Mapping[str, Any], max_frames: int = 16) -> dict[str, Any]:
    """The record on at most `max_frames` evenly spaced frames, renumbered from 1, with all tracks seen in them.

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


def _candidates(record: Mapping[str, Any], kind: str, max_tracks: int) -> list[dict[str, Any]]:
    """Every query of a kind that the record allows: cues that fit one subject of all, and "every" with at most
    `max_tracks` subjects, since an answer lists all of them.
    """
    found: list[dict[str, Any]] = []
    total = len(record["frames"])
    if kind == "category":
        groups: dict[str, list[Any]] = {}
        for track in record["tracks"]:
            groups.setdefault(track["names"][-1], []).append(track["id"])
        return [{"ids": ids, "cue": name} for name, ids in groups.items() if len(ids) <= max_tracks]
    for track in record["tracks"]:
        one = {"id": track["id"], "ids": [track["id"]]}
        others = [other for other in record["tracks"] if other["id"] != track["id"]]
        frames = sorted(map(int, track["boxes"]))
        if kind == "box":
            found += [{**one, "frame": t} for t in frames if not any(_same_box(track, other, t) for other in others)]
        elif kind == "phrase":
            found += [
                {**one, "cue": cue}
                for cue in _looks(track)
                if not any(track_rewards.fits(cue, _looks(o)) for o in others)
            ]
        elif kind == "event":
            cues = dict.fromkeys(_texts(track, "action"))
            found += [
                {**one, "cue": c} for c in cues if not any(track_rewards.fits(c, _texts(o, "action")) for o in others)
            ]
            span = [frames[0], frames[-1]]
            if span != [1, total] and not any(span == _span(other) for other in others):
                found.append({**one, "span": span})
        elif kind == "trajectory" and len(frames) > 2:  # two boxes or more begin it, one or more go on
            found.append({**one, "frames": frames[: max(2, len(frames) // 2)]})
    return found


def _looks(track: Mapping[str, Any]) -> list[str]:
    return [*track["names"], *(track.get("appearance") or ())]


def _span(track: Mapping[str, Any]) -> list[int]:
    frames = list(map(int, track["boxes"]))
    return [min(frames), max(frames)]


def _same_box(track: Mapping[str, Any], other: Mapping[str, Any], frame: int) -> bool:
    mine, theirs = (track_rewards.by_frame(t["boxes"]).get(frame) for t in (track, other))
    return mine is not None and theirs is not None and float(box_iou(mine, theirs)) > SAME


def make_query(
    record: Mapping[str, Any],
    rng: np.random.Generator,
    kinds: Sequence[str] = (),
    max_frames: int = 16,
    max_tracks: int = 4,
    caption_chance: float = 0.5,
    max_static: float = 1.0,
) -> dict[str, Any] | None:
    """A task record for one random query of a clip; kinds uniform over those the clip allows. None if it allows none.

    Args:
        kinds: keys of `QUERIES` to draw from; empty: all.
        max_tracks: most subjects that an answer lists.
        caption_chance: how often the plain form also asks for the caption, when there is one.
        max_static: queries are drawn of subjects that move: what the prompt and one frame tell overlaps at most so much
            with their tracks, see `unwatched`.

    Raises:
        ValueError: unknown kind.
    """
    names = [answers.choose(kind, QUERIES, "kind") for kind in kinds] or list(QUERIES)
    clip = cut_clip(record, max_frames)
    options = {
        name: kept
        for name in names
        if (kept := [q for q in _candidates(clip, name, max_tracks) if max_static >= 1 or _moves(clip, q, max_static)])
    }
    if not options:
        return None
    name = list(options)[rng.integers(len(options))]
    query = {"kind": name, **options[name][rng.integers(len(options[name]))]}
    query["wording"] = int(rng.integers(len(QUERIES[name])))
    if clip.get("caption") and rng.random() < caption_chance:
        query["caption_wording"] = int(rng.integers(len(CAPTION_QUESTIONS)))
    return {**clip, "task": "tracks", "query": query}


def _moves(clip: Mapping[str, Any], query: Mapping[str, Any], max_static: float) -> bool:
    tracks = [track["boxes"] for track in clip["tracks"] if track["id"] in query["ids"]]
    return unwatched(tracks, _shown(query)) <= max_static


def unwatched(tracks: Sequence[Mapping[Any, Sequence[float]]], given: Sequence[int]) -> float:
    """Mean overlap with the tracks of the best guess from the prompt's frames `given` and one more frame; 1 for tracks
    without any other frame.
    """
    graded = [track for track in tracks if track_rewards.by_frame(track, given)]
    return float(np.mean([track_rewards.unwatched_overlap(t, given) for t in graded])) if graded else 1.0


def _shown(query: Mapping[str, Any]) -> list[int]:
    """Frames whose box the prompt gives."""
    return list(query.get("frames") or ([query["frame"]] if "frame" in query else []))


def _targets(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [track for track in record["tracks"] if track["id"] in record["query"]["ids"]]


def _golds(record: Mapping[str, Any]) -> dict[str, Any]:
    """{attribute: gold phrases} that the query asks for and the subject has."""
    query = record["query"]
    asked = _ASKED[query["kind"]]
    if not asked:
        return {}
    track = _targets(record)[0]
    golds = {"appearance": list(track.get("appearance") or ()), "action": _texts(track, "action", query.get("frame"))}
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
        return ";".join(f"Frame{t}:[{','.join(map(str, boxes[t]))}]" for t in _shown(query))
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
    values = {key: golds[0] for key, golds in _golds(record).items()}
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
    rules: str = "corrected",
) -> dict[str, float] | None:
    """`track_rewards.utr_reward` of the tagged form; parts that have nothing to grade are absent. None without targets.

    `rules` "corrected" grades what is above the prompt and the best single frame (`lifted`), and nothing where that leaves
    no track to follow. "released" is the sheet's form, where one frame and copied boxes earn two thirds.
    Cheap strategies and their counters: sheet utr.md 6.
    """
    answers.choose(rules, answers.RULES, "rules")
    if not _targets(record):
        return None
    parts = track_rewards.utr_reward(
        text, ground_truth(record, style), weights, lam_fmt, iou_thr, power, rules == "corrected"
    )
    if rules == "corrected" and parts["traj"] is None and parts["id"] is None:
        return None
    named = {"reward": parts.pop("total"), **parts}
    return {key: value for key, value in named.items() if value is not None}


@dataclass(frozen=True)
class Tracks(Task):
    """Trajectories and attributes of subjects of a clip."""

    style: answers.StyleName = "qwen2_5_vl"
    form: Literal["answer", "plain"] = "answer"
    thinking: bool = False
    rules: Literal["released", "corrected"] = "corrected"

    figures = {"static_*": "neutral", "*": "higher"}
    primary = ("reward", "traj")

    def prompt(self, record: Record) -> str:
        return prompt(record, self.style, self.form, self.thinking)

    def gold(self, record: Record) -> str:
        return answer(record, self.style, self.form, self.thinking)

    def reward(self, text: str, record: Record) -> Reward:
        return reward(text, record, self.style, rules=self.rules)

    def row(self, text: str, record: Record) -> Row:
        """The reward and its parts where the record has them, and `static_traj`: the trajectory IoU, before any lift, of
        the best guess from the prompt and one frame (`unwatched`).
        """
        scored = reward(text, record, self.style, rules=self.rules)
        return {**scored, "static_traj": _static(ground_truth(record, self.style))} if scored else {}


# --- filters --------------------------------------------------------------------------------------------------------


def _static(gt: Mapping[str, Any]) -> float:
    return unwatched([track["boxes"] for track in gt["tracks"].values()], _shown(gt["query"]))


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


PARSERS = {
    "parse": parse,
    "parse_tracks": track_rewards.parse_tracks,
    "parse_attrs": track_rewards.parse_attrs,
    "answer_block": track_rewards.answer_block,
    "format_reward": lambda text: track_rewards.format_reward(text, 16),
    "frame_range": track_rewards.frame_range,
}
