"""Rows of other programs' files as records: chats, Perception-R1, PixMo-Count, referring expressions, pages.

Every function is `(row, root, **options) -> record`, `root` being the folder of the images, and raises InputError,
KeyError or TypeError on a bad row; the source adds file and index.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmllm import tasks
from jaxmllm.data import conversations
from jaxmllm.data.annotations import TOLERANCE
from jaxmllm.data.decoding import stored_size
from jaxmllm.data.formats import FRAMES, Record, box, choose, media, numbers, shorten, text, to_pixels
from jaxmllm.data.images import smart_resize
from jaxmllm.data.parts import content_of, read_part
from jaxmllm.errors import InputError
from jaxmllm.tasks.coco_ids import COCO_IDS

BOX_FORMS = ("xyxy", "xywh")
EXPRESSIONS = ("expression", "sent", "sentence", "caption", "answer")  # columns; the last is lmms-lab's
PR1_TASKS = ("grounding", "counting", "detection", "ocr")
PR1_PIXELS = (28, 3_136, 1_000_000)  # factor, fewest, most pixels of Perception-R1's resized images
_COCO_NAMES = {number: name for name, number in COCO_IDS.items()}
_PYTHON_TO_JSON = str.maketrans("'()", '"[]')
_TAG = re.compile(r"(<image>|<video>)")
_REGION = re.compile(r"region this sentence describes:\s*\"?(.+?)\"?\.?$", re.S)  # the question that VLM-R1 writes
_PLACE = re.compile(r"<bbox>|<ref-object>")

# ---------------------------------------------------------------- chats


def chat(row: Mapping[str, Any], root: Path, task: str | None = None) -> Record:
    """A row of any of the forms of `conversations.turns` as {"messages", "images", "videos", and every other column as it is}.

    Media: in the messages themselves ({"type": "image", "image": path}), or in `images` / `image` / `videos` / `video`,
    which fill in order the parts {"type": "image"} without a path, or the tags <image> and <video> of plain texts; without
    any such place they come before the first user text, as TRL does.
    """
    turns = conversations.turns(row)
    if row.get("objects") is not None and any(_PLACE.search(str(turn["content"])) for turn in turns):
        raise InputError(
            "objects: ms-swift's places <bbox> and <ref-object> are not filled in; write rows for records: with task, "
            "expression and box, so that boxes follow the model's style"
        )
    stores = {kind: _cells(row, kind) for kind in ("image", "video")}
    given = {kind: len(store) for kind, store in stores.items()}
    tagged = any(given.values())
    messages = [_message(turn, k, stores, root, tagged) for k, turn in enumerate(turns)]
    if any(stores.values()):
        first = next((m for m in messages if m["role"] == "user"), None)
        for kind, left in stores.items():
            if left and (len(left) < given[kind] or first is None):
                raise InputError(f"{kind}s: there are {given[kind]}, but places for {given[kind] - len(left)} of them")
        before = [{"type": kind, kind: media(cell, root)} for kind, left in stores.items() for cell in left]
        if first is not None:
            first["content"] = before + first["content"]
    parts = [part for message in messages for part in message["content"]]
    used = {*conversations.LISTS, "prompt", "completion", "images", "image", "videos", "video"}
    rest = {key: value for key, value in row.items() if key not in used}
    images = [part["image"] for part in parts if part["type"] == "image"]
    videos = [part["video"] for part in parts if part["type"] == "video"]
    posed = {} if task is None else {"task": task}
    return {**rest, **posed, "messages": messages, "images": images, **({"videos": videos} if videos else {})}


def _cells(row: Mapping[str, Any], kind: str) -> list[Any]:
    """What the columns of images (or videos) hold."""
    for column in (kind + "s", kind):
        value = row.get(column)
        if value is not None:
            return list(value) if isinstance(value, list | tuple) else [value]
    return []


def _message(turn: Any, number: int, stores: Mapping[str, list[Any]], root: Path, tagged: bool) -> dict[str, Any]:
    """One turn with its content as parts; takes the media that it has places for out of `stores`.

    `tagged`: <image> and <video> in a plain text of the user are places.
    """
    role, content = turn["role"], content_of(turn, f"messages[{number}]")
    if isinstance(content, str):
        if tagged and role != "assistant":
            pieces = [piece for piece in _TAG.split(content) if piece]
            content = [{"type": p[1:-1]} if _TAG.fullmatch(p) else {"type": "text", "text": p} for p in pieces]
        else:
            content = [{"type": "text", "text": content}]
    return {"role": role, "content": [_part(part, f"messages[{number}]", stores, root) for part in content]}


def _part(part: Any, where: str, stores: Mapping[str, list[Any]], root: Path) -> dict[str, Any]:
    kind, held, options = read_part(part, where)
    if kind == "text":
        return {"type": "text", "text": held}
    if held is None:
        if not stores[kind]:
            raise InputError(f"{where}: more places for {kind}s than {kind}s in the record")
        held = stores[kind].pop(0)
    if isinstance(held, list | tuple):
        return {"type": kind, kind: [media(frame, root) for frame in held], **options}
    return {"type": kind, kind: media(held, root), **options}


# ---------------------------------------------------------------- Perception-R1


def perception_r1(row: Mapping[str, Any], root: Path, task: str | None = None, frame: str | None = None) -> Record:
    """Rows `problem`, `image`, `solution` (or `clicks`) [perception_r1.md section 4]; the task is seen from the row.

    Boxes of grounding are pixels where the row also has `normalized_solution`, else on the 0..1000 grid, as the
    published reward reads them. Clicks are on the grid. Detection's boxes are pixels of the resized image of the
    published training. `frame` overrides the first two. VLM-R1's rows, with `conversations`, have boxes in pixels.
    """
    if "conversations" in row:
        row, frame = _vlm_r1(row), frame or "pixel"
    image, problem = media(row["image"], root), text(row, "problem")
    solution = row.get("solution")
    if isinstance(solution, str):
        solution = _literal(solution)
    task = task or _pr1_task(row, solution)
    record: Record = {"task": choose(task, PR1_TASKS, "task"), "images": [image]}
    if task == "ocr":
        return {**record, "text": text(row, "solution")}
    if task == "grounding":
        frame = choose(frame or ("pixel" if "normalized_solution" in row else "norm1000"), FRAMES, "frame")
        values = box(solution, "solution")
        size = [] if frame == "pixel" else stored_size(image)[0]
        return {**record, **_size(size), "expression": problem, "box": to_pixels(values, frame, size)}
    size = stored_size(image)[0]
    record["size"] = size
    if task == "counting":
        clicks: Any = row["clicks"] if "clicks" in row else solution
        points = [to_pixels(numbers(p, 2, "clicks"), frame or "norm1000", size) for p in clicks]
        return {**record, "label": problem, "count": len(points), "points": points}
    target: Any = solution
    ids, boxes = target["target_id"], target["target_box"]
    if len(ids) != len(boxes):
        raise InputError(f"solution: {len(ids)} target_id for {len(boxes)} target_box")
    unknown = [i for i in ids if i not in _COCO_NAMES]
    if unknown:
        raise InputError(f"solution: target_id {unknown[0]!r} is no COCO category")
    height, width = smart_resize(size[1], size[0], *PR1_PIXELS)
    scale = [size[0] / width, size[1] / height] * 2
    found = [[v * s for v, s in zip(box(b, "target_box"), scale, strict=True)] for b in boxes]
    return {**record, "categories": list(COCO_IDS), "boxes": found, "labels": [_COCO_NAMES[i] for i in ids]}


def _vlm_r1(row: Mapping[str, Any]) -> Record:
    """A row of VLM-R1's JSON lines (LLaVA's turns, boxes in pixels) as `problem` and `solution`."""
    asked, *answered = [turn for turn in conversations.turns(row) if turn["role"] != "system"]
    if len(answered) != 1 or not isinstance(answered[0]["content"], str) or not isinstance(asked["content"], str):
        raise InputError("conversations: expected one question and its answer")
    problem = _TAG.sub("", asked["content"]).strip()
    if described := _REGION.search(problem):
        problem = described.group(1)
    return {**row, "problem": problem, "solution": answered[0]["content"]}


def _size(size: Sequence[int]) -> Record:
    return {"size": list(size)} if size else {}


def _pr1_task(row: Mapping[str, Any], solution: Any) -> str:
    if "clicks" in row:
        return "counting"
    if isinstance(solution, Mapping):
        return "detection"
    return "grounding" if isinstance(solution, list | tuple) and len(solution) == 4 else "ocr"


def _literal(value: str) -> Any:
    """A list or mapping written as text, in JSON or as Python prints it; the text itself where it is something else."""
    if value[:1] in ("[", "(", "{"):
        for candidate in (value, value.translate(_PYTHON_TO_JSON)):
            try:
                return json.loads(candidate)
            except (ValueError, RecursionError):
                pass
    return value


# ---------------------------------------------------------------- single tasks


def pixmo_count(row: Mapping[str, Any], root: Path, frame: str = "pixel") -> Record:
    """PixMo-Count: `label`, `count`, `points` ([{"x", "y"}, ..] or {"x": [..], "y": [..]}) and an image.

    The image is a column `image` or, for the published table of links, a file in `root` named by `image_sha256` or by
    the last part of `image_url`.
    """
    choose(frame, FRAMES, "frame")
    image = media(row["image"], root) if row.get("image") is not None else _downloaded(row, root)
    record: Record = {"task": "counting", "images": [image], "label": text(row, "label")}
    count, points = row.get("count"), row.get("points")
    if points is not None:
        pairs = zip(points["x"], points["y"], strict=True) if isinstance(points, Mapping) else map(_pair, points)
        points = [numbers(list(pair), 2, "points") for pair in pairs]
        if frame != "pixel":
            record["size"] = stored_size(image)[0]
            points = [to_pixels(point, frame, record["size"]) for point in points]
        record["points"] = points
        if count is not None and count != len(points):
            raise InputError(f"count: {count!r}, but there are {len(points)} points")
        count = len(points)
    if not isinstance(count, int) or count < 0:
        raise InputError(f"count: expected a whole number, got {shorten(count)}")
    return {**record, "count": count}


def _pair(point: Any) -> Any:
    return (point["x"], point["y"]) if isinstance(point, Mapping) else point


def _downloaded(row: Mapping[str, Any], root: Path) -> str:
    names = [str(row.get("image_sha256") or ""), str(row.get("image_url") or "").rpartition("/")[2].partition("?")[0]]
    for name in filter(None, names):
        for path in (root / name, *(root / (name + suffix) for suffix in (".jpg", ".jpeg", ".png", ".webp"))):
            if os.path.isfile(path):
                return str(path)
    raise InputError(f"image: no file named {' or '.join(filter(None, names)) or 'by a hash or link'} in {root}")


def referring(row: Mapping[str, Any], root: Path, boxes: str = "xyxy") -> Record:
    """A referring expression: `image` or `file_name`, one of EXPRESSIONS, `box` / `bbox`.

    `boxes`: the form of the box, `xyxy` or `xywh`, in pixels.
    """
    form = choose(boxes, BOX_FORMS, "boxes")
    image = media(row["image"] if "image" in row else row["file_name"], root)
    field = next((f for f in EXPRESSIONS if f in row), "expression")
    record: Record = {"task": "grounding", "images": [image], **_size(_row_size(row)), "expression": text(row, field)}
    key = "box" if "box" in row else "bbox"
    return {**record, "box": box(row[key], key, form)}


def box_form(rows: Sequence[Record], root: Path, looks: int = 200) -> str:
    """The form that boxes of referring rows have: xyxy or xywh. RefCOCO is handed on in both.

    The numbers tell: read as xyxy an xywh box soon has no area, read as xywh an xyxy box soon leaves its image. `looks`: how
    many rows are looked at. Where both readings fit, a column `box` is xyxy, as in this library's own records.
    Raises InputError where both fit a column `bbox`, or neither fits.
    """
    fits, own = dict.fromkeys(BOX_FORMS, True), False
    for k in range(min(len(rows), looks)):
        try:
            row = rows[k]
            own |= "box" in row
            x1, y1, x2, y2 = numbers(row["box" if "box" in row else "bbox"], 4, "bbox")
        except (InputError, KeyError):  # a bad row: its reader's to judge
            continue
        fits["xyxy"] &= x2 > x1 and y2 > y1
        if fits["xyxy"] and fits["xywh"] and (size := _known_size(row, root)):
            fits["xyxy"] &= x2 <= size[0] + TOLERANCE and y2 <= size[1] + TOLERANCE
            fits["xywh"] &= x1 + x2 <= size[0] + TOLERANCE and y1 + y2 <= size[1] + TOLERANCE
    found = [form for form, fit in fits.items() if fit]
    if len(found) == 2 and own:
        return "xyxy"
    if len(found) != 1:
        reason = "both xyxy and xywh" if found else "neither xyxy nor xywh in all rows"
        raise InputError(f"boxes: their numbers fit {reason}; write boxes=xyxy or boxes=xywh")
    return found[0]


def _known_size(row: Record, root: Path) -> list[int]:
    """[W, H], stored, from the row or the image's header; empty where neither can be read."""
    try:
        return _row_size(row) or stored_size(media(row["image"] if "image" in row else row["file_name"], root))[0]
    except (InputError, KeyError):
        return []


def page(row: Mapping[str, Any], root: Path) -> Record:
    """A page: `file_name` (or `image`), `lines` [{"text", "quad": 8 numbers}] and, if it differs, the whole `text`."""
    image = media(row["image"] if "image" in row else row["file_name"], root)
    record: Record = {"task": "ocr", "images": [image], **_size(_row_size(row))}
    lines = [
        {"text": text(line, "text"), "quad": numbers(line["quad"], 8, f"lines[{k}].quad")}
        for k, line in enumerate(row.get("lines", []))
    ]
    whole = text(row, "text") if "text" in row or not lines else "\n".join(str(line["text"]) for line in lines)
    return {**record, "text": whole, **({"lines": lines} if lines else {})}


def _row_size(row: Mapping[str, Any]) -> list[int]:
    if "size" in row:
        return [int(v) for v in numbers(row["size"], 2, "size")]
    return [int(row["width"]), int(row["height"])] if "width" in row and "height" in row else []


def own(row: Mapping[str, Any], root: Path, task: str | None = None) -> Record:
    """A record as the tasks define them, written as a row; `images` and `videos` are paths."""
    name = task or str(row.get("task"))
    tasks.get(name)
    found = {kind + "s": [media(cell, root) for cell in _cells(row, kind)] for kind in ("image", "video")}
    return {**row, "task": name, "images": found["images"], **({"videos": found["videos"]} if found["videos"] else {})}
