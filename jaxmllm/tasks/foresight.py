"""Foresight: trajectories of a subject over several frames, and what happens next (Merlin; merlin.md 3, 4, 6.2).

Two stages share the texts. Pre-training (FPT) writes the whole trajectory of a subject of whom the prompt shows one
observation, mixed with detection, referring, reasoning and captions. Instruction tuning (FIT, kind "chat") writes the
trajectory first and then the future statement. Every question names its task and the format of the answer, and a frame
tag stands directly before every image: prompts hold `<image>` where the images go, see `content`.

A record is a clip of the tracks task (`frames`, `tracks` with `boxes` in pixels for shown and later frames), or for
still images the fields of grounding and detection, with a `query`:

| `kind`      | asks for                                          | further fields                                       |
|-------------|---------------------------------------------------|------------------------------------------------------|
| `tracking`  | trajectories of the boxes shown in frame 1        | `ids`                                                |
| `referring` | the path of a phrase (appearance or action)       | `ids` (one), `cue`                                   |
| `generic`   | the same, by box or, with a `cue`, by phrase      | `ids` (one)                                          |
| `video_reg` | a short answer about a trajectory                 | `ids` (one), `text`                                  |
| `chat`      | the trajectory, then the future                   | `ids` (the first is the subject), `question`,        |
|             |                                                   | `future`, optional `motions`, or `choices`, `correct`|
| `detection` | boxes of the record's `categories`, or of all     |                                                      |
| `rec` `reg` | the `box` of the `expression`, or the reverse     |                                                      |
| `reasoning` | `answer` to `question`, `{0}`, .. for the `boxes` | `question`, `text`                                   |
| `caption`   | the `caption`, without any question               |                                                      |

All may hold `wording` (which carrier sentence), `horizon` (frames after the shown ones that the answer must cover as
well) and `absent` (something that is not there; the answer says so). `foresight_records.make_query` draws queries.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxmllm.geometry import Boxes
from jaxmllm.tasks import answers, trajectories
from jaxmllm.tasks.answers import MAX_CHARS, choose
from jaxmllm.tasks.task import Record, Reward, Row, Task
from jaxmllm.tasks.trajectories import (
    box_in_range,
    format_box,
    plain_box,
    quantize_box,
    trajectory_reward,
    write_frames,
    write_trajectories,
)

COORD_SPACES = {"norm1000": "norm1000", "abs": "resized"}  # name -> frame of geometry.Boxes
SPELLINGS = {"norm1000": format_box, "abs": plain_box}
OF_STYLE = {"qwen2_vl": "norm1000", "qwen2_5_vl": "abs", "qwen3_vl": "norm1000"}  # as a checkpoint of the style grounds

# Kind -> (task named in the question, format named in the question).
SKELETONS = {
    "detection": ("object detection", "category:[xmin,ymin,xmax,ymax]"),
    "tracking": ("object tracking", "class<Idi>Frame t:[xmin,ymin,xmax,ymax]</Idi>"),
    "referring": ("referring tracking", "Tracki<Idi>Frame t:[xmin,ymin,xmax,ymax]</Idi>"),
    "generic": ("trajectory prediction", "<Idi>Frame t:[xmin,ymin,xmax,ymax]</Idi>"),
    "rec": ("referring expression comprehension", "[xmin,ymin,xmax,ymax]"),
    "reg": ("referring expression generation", ""),
    "video_reg": ("video description", ""),
    "reasoning": ("visual reasoning", "[x0,y0,x1,y1] for the objects you mention"),
    "caption": ("captioning", ""),
    "chat": ("future reasoning", "object<Idi>Frame t:[xmin,ymin,xmax,ymax]</Idi>"),
}
TRACKED = ("tracking", "referring", "generic", "chat")  # kinds answered with trajectories

# Sentences that carry the question: {task}, {ask} (a request without capital or full stop), {reply}.
CARRIERS = (
    "Task: {task}. Please {ask}. Answer {reply}.",
    "This is {task}: {ask}. Reply {reply}.",
    "Please {ask}, as {task}, and write the result {reply}.",
    "In this {task} task, {ask}. Keep your answer {reply}.",
    "For {task}, {ask}. The answer must be written {reply}.",
    "Your task is {task}. You should {ask} and respond {reply}.",
    "Do {task} on what you see: {ask}. Respond {reply}, nothing else.",
    "Here is a {task} question: {ask}. Stick to an answer {reply}.",
    "Look closely, then {ask}. This is {task}, so answer {reply}.",
    "I need {task}. Can you {ask}? Give the result {reply}.",
    "Could you {ask}? Treat it as {task} and present the answer {reply}.",
    "We are doing {task}. Now {ask}. State your answer {reply}.",
    "Solve this by {task}: {ask}. Return the answer {reply}.",
    "As an expert in {task}, {ask}. Your reply has to be {reply}.",
    "{task} request: {ask}. Report it exactly {reply}.",
    "Carry out {task} and {ask}. Put the answer down {reply}.",
)
_LEADS = (
    "From its path, {subject} ",
    "Judging by its track, {subject} ",
    "Given its motion so far, {subject} ",
    "Over these frames {subject} is seen; it ",
    "Its trajectory shows that {subject} ",
)
_VERBS = (
    "is about to {future}",
    "will probably {future}",
    "is likely to {future} next",
    "looks set to {future}",
    "is going to {future}",
)
FUTURES = tuple(lead + verb for lead in _LEADS for verb in _VERBS)  # the subject comes first: path, then conclusion
_LABEL_CHARS = re.compile(r"[^\w -]+")  # what a label before an identity tag cannot hold
ABSENT = "There is no {absent} in the given frames."


# ---- what a record says


def _extent(record: Mapping[str, Any], coord_space: str) -> tuple[float, float]:
    frame = COORD_SPACES[choose(coord_space, COORD_SPACES, "coord_space")]
    return Boxes.of(record, []).extent(frame)


def _whole(record: Mapping[str, Any], box: Sequence[float], coord_space: str) -> list[int]:
    width, height = record["size"]
    return quantize_box(box, width, height, extent=_extent(record, coord_space))


def _box(record: Mapping[str, Any], box: Sequence[float], coord_space: str) -> str:
    return SPELLINGS[coord_space](_whole(record, box, coord_space))


def shown_frames(record: Mapping[str, Any]) -> int:
    """Number of images in the prompt."""
    return len(record["frames"]) if "frames" in record else len(record["images"])


def _subjects(record: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any]]]:
    """(identity in the text, track) of the queried tracks.

    Identities are 1..K by left side, then upper side, of the first box; in a chat the subject is 1 and leads.
    """
    query, tracks = record["query"], {track["id"]: track for track in record["tracks"]}
    chosen = [tracks[i] for i in query["ids"]]
    if query["kind"] == "chat":
        chosen = chosen[:1] if "choices" in query else chosen
    else:
        chosen.sort(key=lambda track: trajectories.int_keys(track["boxes"])[min(map(int, track["boxes"]))][:2])
    return list(enumerate(chosen, 1))


def ground_truth(record: Mapping[str, Any], coord_space: str = "norm1000") -> dict[int, dict[int, list[int]]]:
    """{identity: {frame: whole-number box}} over the shown frames and the horizon: what the answer must hold."""
    last = shown_frames(record) + record["query"].get("horizon", 0)
    return {
        i: {int(t): _whole(record, box, coord_space) for t, box in track["boxes"].items() if int(t) <= last}
        for i, track in _subjects(record)
    }


def _first_given(record: Mapping[str, Any]) -> bool:
    """Whether the prompt shows the subjects' boxes (and identities) of frame 1."""
    return "cue" not in record["query"]


# ---- prompts


def image_header(frames: int) -> str:
    """`frame1:<image>\\n,frame2:<image>\\n and frame3:<image>\\n,`, as the loader feeds it; `<image>\\n` for one image."""
    if frames == 1:
        return append_newlines("<image>")
    tags = [f"frame{t}:<image>" for t in range(1, frames + 1)]
    return append_newlines(",".join(tags[:-1]) + f" and {tags[-1]},")


def append_newlines(text: str) -> str:
    """A newline after every `<image>`, unless some `<image>` has one already (the released loader's rule)."""
    return text if "<image>\n" in text else text.replace("<image>", "<image>\n")


def _start(record: Mapping[str, Any], coord_space: str, frames: int = 1) -> str:
    """The first `frames` boxes of the queried tracks as they stand in a question; of a chat only the subject's."""
    labels, chat = _labels(record), record["query"]["kind"] == "chat"
    return write_trajectories(
        [
            {"id": i, "label": labels[i], "frames": {t: box for t, box in boxes.items() if t <= frames}}
            for i, boxes in ground_truth(record, coord_space).items()
            if i == 1 or not chat
        ],
        SPELLINGS[coord_space],
    )


def _labels(record: Mapping[str, Any]) -> dict[int, str]:
    """The words before each identity's tag: category, `Track1`, nothing, or free words in a chat."""
    kind = record["query"]["kind"]
    name = {"tracking": "{}", "referring": "Track{i}", "generic": "", "video_reg": "object", "chat": "this {}"}[kind]
    words = {i: _LABEL_CHARS.sub(" ", track["names"][-1]).strip() for i, track in _subjects(record)}
    return {i: word if kind == "chat" and i > 1 else name.format(word, i=i) for i, word in words.items()}


def _ask(record: Mapping[str, Any], coord_space: str) -> str:
    """The request of a question, without its carrier sentence."""
    query = record["query"]
    kind, absent = query["kind"], query.get("absent")
    if kind == "detection":
        wanted = [absent] if absent else record.get("categories")
        return f"detect {', '.join(wanted)} in the image" if wanted else "detect every object in the image"
    if kind == "rec":
        return f"give the box of {absent or record['expression']}"
    if kind == "reg":
        return f"describe the object at {_box(record, record['box'], coord_space)}"
    if kind == "reasoning":
        return fill_boxes(query["question"], record, coord_space)
    until = f", up to Frame{shown_frames(record) + query['horizon']}" if query.get("horizon") else ""
    if absent:
        return f"{'track' if kind == 'tracking' else 'give the path of'} {absent}{until}"
    if kind == "video_reg":
        return f"say what {_start(record, coord_space, shown_frames(record))} is doing"
    if kind in ("referring", "generic") and "cue" in query:
        return f"give the path of {query['cue']}{until}"
    start = _start(record, coord_space)
    if kind == "tracking":
        return f"track {start}{until}"
    if kind == "generic":
        return f"give the path of the subject {start}{until}"
    options = "".join(f" {chr(65 + n)}. {text}" for n, text in enumerate(query.get("choices", ())))
    return (
        query["question"].replace("{subject}", query.get("cue") or start)
        + until
        + (f" Options:{options}" if options else "")
    )


def prompt(record: Mapping[str, Any], coord_space: str = "norm1000", precise: bool = True) -> str:
    """The user's text with `<image>` where each image goes; see `content` for the message.

    `coord_space` "norm1000" writes 0..1000 of the image, "abs" pixels of the resized image, spelled as
    Qwen2.5-VL grounds.
    `precise=False` leaves out the task name and the format: the published ablation (AO 28.4 instead of 51.4).
    """
    query = record["query"]
    header = image_header(shown_frames(record))
    if query["kind"] == "caption":
        return header
    ask = _ask(record, coord_space)
    if not precise:
        return header + ask[:1].upper() + ask[1:] + "."
    task, skeleton = SKELETONS[choose(query["kind"], SKELETONS, "query kind")]
    reply = f"in the format {skeleton}" if skeleton else "as a short answer"
    if "choices" in query:
        reply += ", then the letter of the option as Answer: letter"
    carrier = CARRIERS[query.get("wording", 0) % len(CARRIERS)]
    text = carrier.replace("{task}", task).replace("{reply}", reply).replace("{ask}", ask)
    return header + text[:1].upper() + text[1:]


def content(record: Mapping[str, Any], coord_space: str = "norm1000", precise: bool = True) -> list[dict[str, Any]]:
    """The user's message in parts: text and the record's images in turn, as chat templates take them.

    Raises:
        ValueError: the number of places for images is not the number of images.
    """
    texts = prompt(record, coord_space, precise).split("<image>")
    if len(texts) - 1 != len(record["images"]):
        raise ValueError(
            f"the prompt has {len(texts) - 1} places for images, the record {len(record['images'])} images"
        )
    parts = [{"type": "text", "text": texts[0]}]
    for image, text in zip(record["images"], texts[1:], strict=True):
        parts += [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [part for part in parts if part.get("text") != ""]


def fill_boxes(text: str, record: Mapping[str, Any], coord_space: str = "norm1000") -> str:
    """`{0}`, `{1}`, .. replaced by the record's `boxes`; other braces stay."""
    boxes = record.get("boxes", ())
    return re.sub(
        r"\{([0-9]{1,4})\}",
        lambda m: _box(record, boxes[int(m[1])], coord_space) if int(m[1]) < len(boxes) else m[0],
        text,
    )


# ---- answers


def answer(record: Mapping[str, Any], coord_space: str = "norm1000", trajectory: bool = True) -> str:
    """The gold completion. `trajectory=False` leaves the path out of a chat's answer (the ablation without T-CoT).

    Raises:
        ValueError: a box is empty once written in whole numbers; drop tiny objects first (`foresight_records.is_tiny`).
    """
    query = record["query"]
    kind = query["kind"]
    if query.get("absent"):
        return ABSENT.format(absent=query["absent"].removeprefix("the "))
    if kind == "detection":
        found: dict[str, list[list[int]]] = {}
        for label, box in zip(record["labels"], record["boxes"], strict=True):
            found.setdefault(label, []).append(_whole(record, box, coord_space))
        return trajectories.write_detection(found, SPELLINGS[coord_space])
    if kind in ("rec", "reg"):
        return _box(record, record["box"], coord_space) if kind == "rec" else record["expression"]
    if kind == "reasoning":
        return fill_boxes(query["text"], record, coord_space)
    if kind in ("caption", "video_reg"):
        return record["caption"] if kind == "caption" else query["text"]
    labels, gt = _labels(record), ground_truth(record, coord_space)
    if kind == "chat":
        return _chat_answer(record, labels, gt, trajectory, SPELLINGS[coord_space])
    rows = [{"id": i, "label": labels[i], "frames": frames} for i, frames in gt.items()]
    text = write_trajectories(rows, SPELLINGS[coord_space])
    return f"Its path is {text}." if kind == "generic" else text


def _chat_answer(record, labels, gt, trajectory, spell) -> str:
    query = record["query"]

    def track(i):
        return labels[i] + (f"<Id{i}>{write_frames(gt[i], spell)}</Id{i}>" if trajectory else "")

    text = FUTURES[query.get("wording", 0) % len(FUTURES)].replace("{future}", query["future"])
    motions = query.get("motions", {})
    others = [f"{track(i)} {motions[str(t['id'])]}" for i, t in _subjects(record)[1:] if str(t["id"]) in motions]
    text = text.replace("{subject}", track(1)) + (f", because {' and '.join(others)}" if others else "") + "."
    return f"{text} Answer: {query['correct']}." if "choices" in query else text


def dialogue(record: Mapping[str, Any], coord_space: str = "norm1000") -> list[tuple[str, str]]:
    """A chat record as turns: a description (if there is a `caption`), the future of the subject, a follow-up.

    The follow-up is about the second involved track, whose identity was new in the answer before.
    """
    turns = [(prompt(record, coord_space), answer(record, coord_space))]
    header = image_header(shown_frames(record))
    if record.get("caption"):
        turns = [
            (header + "What happens in these frames?", record["caption"]),
            (turns[0][0].removeprefix(header), turns[0][1]),
        ]
    motions, labels = record["query"].get("motions", {}), _labels(record)
    for i, track in _subjects(record)[1:2]:
        if str(track["id"]) in motions:
            path = f"<Id{i}>{write_frames(ground_truth(record, coord_space)[i], SPELLINGS[coord_space])}</Id{i}>"
            turns.append(
                (
                    f"And what does the {labels[i]}<Id{i}></Id{i}> do?",
                    f"The {labels[i]}{path} {motions[str(track['id'])]}.",
                )
            )
    return turns


# ---- reading


def parse(text: str, kind: str = "tracking") -> Any:
    """What a completion holds: trajectories (see `trajectories.parse_trajectories`), {category: boxes} of a detection,
    the first box or None of "rec", and the text itself of kinds answered in words. Never raises on any text."""
    if choose(kind, SKELETONS, "kind") == "detection":
        return trajectories.parse_detection(text)
    if kind == "rec":
        return next(iter(trajectories.parse_boxes(text)), None)
    return trajectories.parse_trajectories(text) if kind in TRACKED else text.strip()


_CHOICE = re.compile(r"\banswer\b[^A-Za-z\n]{0,8}(?:is[^A-Za-z\n]{1,8})?(?:option )?\(?([A-Z])\b(?!')", re.IGNORECASE)
_LETTER = re.compile(r"\(?([A-Z])\)?[.:)]?")


def parse_choice(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the chosen option: the last `Answer: X`, a bare letter, or the one option whose text occurs.

    None where none of these names exactly one of the options. Never raises.
    """
    text = text[:MAX_CHARS].strip()
    letters = [chr(65 + n) for n in range(len(choices))]
    stated = _CHOICE.findall(text)
    bare = _LETTER.fullmatch(text)
    if stated or bare is not None:
        letter = stated[-1].upper() if stated else bare[1] if bare is not None else ""
        return letter if letter in letters else None
    named = [letter for letter, choice in zip(letters, choices, strict=True) if choice.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


# ---- reward and measures


def reward(text: str, record: Mapping[str, Any], coord_space: str = "norm1000") -> dict[str, float] | None:
    """`trajectories.trajectory_reward`, halved with the right letter where the record has `choices`; all in 0..1.

    Identities are compared by number if the prompt named them, else paired by IoU. A question about something absent
    earns 1 for saying so without any trajectory. None for kinds that are not answered with trajectories, and for chats
    whose future is free text, which stays supervised.
    """
    query = record["query"]
    if query["kind"] not in TRACKED or (query["kind"] == "chat" and "choices" not in query):
        return None
    if query.get("absent"):
        denied = text.strip().lower().startswith("there is no ") and not trajectories.parse_trajectories(text)
        return {"reward": float(denied)}
    given = _first_given(record)
    parts = trajectory_reward(
        text, ground_truth(record, coord_space), given, _extent(record, coord_space), "id" if given else "hungarian"
    )
    if "choices" not in query:
        return parts
    right = float(parse_choice(text, query["choices"]) == query["correct"])
    return parts | {"choice": right, "reward": 0.5 * parts["reward"] + 0.5 * right}


def static_reward(record: Mapping[str, Any], coord_space: str = "norm1000") -> float:
    """Trajectory reward of copying each first box to every frame; log it beside the policy's."""
    gt = ground_truth(record, coord_space)
    text = ",".join(f"<Id{i}>{write_frames(f)}</Id{i}>" for i, f in trajectories.static_copy(gt).items())
    return trajectory_reward(text, gt, _first_given(record), _extent(record, coord_space))["reward"]


@dataclass(frozen=True)
class Foresight(Task):
    """Trajectories as text, seen and still to come (Merlin)."""

    style: answers.StyleName = "qwen2_5_vl"
    coord_space: Literal["style", "norm1000", "abs"] = "style"  # norm1000: the published form
    precise: bool = True
    trajectory: bool = True

    figures = {
        **dict.fromkeys(("static_*", "hold_*", "velocity_*"), "neutral"),
        **dict.fromkeys(("ade", "fde", "future_ade", "future_fde"), "lower"),
        "*": "higher",
    }
    primary = ("ao", "ade")

    @property
    def space(self) -> str:
        """The coordinates that are written: those in which a checkpoint of the style grounds, unless told."""
        return OF_STYLE[self.style] if self.coord_space == "style" else self.coord_space

    def prompt(self, record: Record) -> str:
        return prompt(record, self.space, self.precise)

    def content(self, record: Record) -> list[dict[str, Any]]:
        return content(record, self.space, self.precise)

    def gold(self, record: Record) -> str:
        return answer(record, self.space, self.trajectory)

    def reward(self, text: str, record: Record) -> Reward:
        return reward(text, record, self.space)

    def row(self, text: str, record: Record) -> Row:
        """Tracking measures over the frames after the first, pooled over the record's frames.

        `ao`, `sr50`, `sr75`; `ade`, `fde` in units of the grid, where a missing frame costs the grid's diagonal; `coverage`,
        the share of frames with a valid box; `reward` and its parts. Three baselines stand beside them, each on the same
        frames as its figure: `static_*`, the first box copied, beside the plain names; `hold_*`, the last known box kept,
        and `velocity_*`, the last two known boxes continued at constant speed, beside `future_*`, the answer on the frames
        after the known ones (the horizon's; all but the first two without one). Kinds without trajectories have none.
        """
        if record["query"]["kind"] not in TRACKED:
            return {}
        row = dict(reward(text, record, self.space) or {})
        return row if record["query"].get("absent") else row | _tracking(text, record, self.space)


def _tracking(text: str, record: Mapping[str, Any], coord_space: str) -> dict[str, float]:
    gt, horizon = ground_truth(record, coord_space), record["query"].get("horizon", 0)
    gt = {1: gt[1]} if record["query"]["kind"] == "chat" else gt  # the question does not say who else is involved
    pairs = trajectories.match_identities(
        trajectories.parse_trajectories(text),
        gt,
        _first_given(record),
        _extent(record, coord_space),
        "id" if _first_given(record) else "hungarian",
    )
    extent = _extent(record, coord_space)
    pred = {i: {t: b for t, b in block["frames"].items() if box_in_range(b, extent)} for i, block in pairs.items()}
    known = shown_frames(record) if horizon else 2
    seen = {i: {t: box for t, box in true.items() if t <= known} for i, true in gt.items()}
    # Of the known frames only the last stays: it is the one that the measures leave out.
    later = {i: {t: box for t, box in true.items() if t >= max(seen[i])} for i, true in gt.items() if seen[i]}
    moved = {i: trajectories.constant_velocity(seen[i], list(true)) for i, true in later.items()}
    rows = {
        "": (pred, gt),
        "static_": (trajectories.static_copy(gt), gt),
        "future_": (pred, later),
        "hold_": (trajectories.static_copy(later), later),
        "velocity_": (moved, later),
    }
    return {
        prefix + name: value
        for prefix, (boxes, true) in rows.items()
        for name, value in trajectories.trajectory_scores(boxes, true, math.hypot(*extent)).items()
    }


PARSERS = {
    "trajectories": parse,
    "detection": lambda text: parse(text, "detection"),
    "box": lambda text: parse(text, "rec"),
    "boxes, xywh": lambda text: trajectories.parse_boxes(text, "xywh"),
    "choice": lambda text: parse_choice(text, ("turn left", "stop")),
    "reward": lambda text: trajectory_reward(text, {1: {1: [0, 0, 9, 9], 2: [1, 1, 9, 9]}}),
    "reward, hungarian": lambda text: trajectory_reward(text, {1: {1: [0, 0, 9, 9]}}, False, match="hungarian"),
}
