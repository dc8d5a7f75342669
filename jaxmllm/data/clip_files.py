"""Readers of annotated videos: MOT15/17/20 and DanceTrack, GOT-10k, LaSOT, and the library's own JSON lines of clips.

Each gives `Footage`. Boxes become [x1, y1, x2, y2] in pixels from 0; MOT's files count pixels from 1.
"""

import configparser
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxmllm.data.clips import ClipSource, Footage, OfFile, OfFiles, Track, Windows
from jaxmllm.data.decoding import image_size
from jaxmllm.data.formats import Record, Source, box, numbers
from jaxmllm.data.rows import existing
from jaxmllm.data.video import FRAME_SUFFIXES, probe_video
from jaxmllm.errors import InputError

MOT_CLASSES = {1: "person", 2: "person on a vehicle", 3: "car", 4: "bicycle", 5: "motorbike", 7: "standing person"}
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")


def mot(root: Path) -> list[Footage]:
    """Sequences of the MOT challenge: folders with `gt/gt.txt`, `seqinfo.ini` and pictures, at any depth below `root`."""
    return [_mot_sequence(file.parent.parent) for file in _found(root, "gt/gt.txt")]


def _mot_sequence(folder: Path) -> Footage:
    info = _ini(folder / "seqinfo.ini", "Sequence")
    pictures = _pictures(folder / info.get("imdir", "img1"))
    width, height = (int(info[key]) if key in info else 0 for key in ("imwidth", "imheight"))
    size = (width, height) if width and height else _size(pictures[0])
    tracks: dict[int, Track] = {}
    for line, row in _rows(folder / "gt" / "gt.txt"):
        t, i, x, y, w, h, counted, *rest = row
        label = int(rest[0]) if rest else -1
        # MOT15 has no classes but -1, and world coordinates after them
        if not counted or (label not in MOT_CLASSES and label >= 0) or w <= 0 or h <= 0:
            continue
        name = MOT_CLASSES.get(label, "person")
        track = tracks.setdefault(int(i), {"id": int(i), "names": [name], "boxes": {}, "visibility": {}})
        if int(t) in track["boxes"]:
            raise InputError(
                f"{folder / 'gt' / 'gt.txt'}, line {line}: identity {int(i)} has two boxes in frame {int(t)}"
            )
        track["boxes"][int(t)] = _inside([x - 1, y - 1, x - 1 + w, y - 1 + h], size)
        track["visibility"][int(t)] = rest[1] if len(rest) > 1 and 0 <= rest[1] <= 1 and label >= 0 else 1.0
    return Footage(
        folder.name,
        len(pictures),
        float(info.get("framerate", 30)),
        size,
        _seen(tracks.values()),
        OfFiles(tuple(pictures)),
    )


def got10k(root: Path) -> list[Footage]:
    """Sequences of GOT-10k: folders with `groundtruth.txt`, `meta_info.ini`, `cover.label` and pictures."""
    found = []
    for file in _found(root, "groundtruth.txt"):
        folder, meta = file.parent, _ini(file.parent / "meta_info.ini", "METAINFO")
        pictures = _pictures(folder)
        cover = [v / 8 for v in _column(folder / "cover.label")] if (folder / "cover.label").is_file() else []
        name = meta.get("object_class", "object")
        action = meta.get("motion_class", "")
        found.append(
            _single(folder, pictures, float(meta.get("anno_fps", "10Hz").rstrip("Hhz")), [name], cover, action)
        )
    return found


def lasot(root: Path) -> list[Footage]:
    """Sequences of LaSOT: `<category>/<category>-N` with `groundtruth.txt`, `img`, flags of absence and `nlp.txt`."""
    found = []
    for file in _found(root, "groundtruth.txt"):
        folder = file.parent
        pictures = _pictures(folder / "img")
        hidden = [_column(folder / f) for f in ("full_occlusion.txt", "out_of_view.txt") if (folder / f).is_file()]
        seen = [0.0 if any(flags) else 1.0 for flags in zip(*hidden, strict=False)]
        category = re.sub(r"-\d+$", "", folder.name)
        video = _single(folder, pictures, 30.0, [category], seen, "")
        if (folder / "nlp.txt").is_file() and (said := (folder / "nlp.txt").read_text(encoding="utf-8").strip()):
            video.tracks[0]["appearance"] = [said]
        found.append(video)
    return found


def _single(
    folder: Path, pictures: Sequence[str], fps: float, names: list[str], seen: Sequence[float], action: str
) -> Footage:
    """One object; a row [x, y, w, h] a frame, without area where it is absent."""
    size = _size(pictures[0])
    track: Track = {"id": 1, "names": names, "boxes": {}, "visibility": {}}
    rows = list(_rows(folder / "groundtruth.txt"))
    if len(rows) != len(pictures):
        raise InputError(f"{folder}: groundtruth.txt has {len(rows)} rows for {len(pictures)} frames")
    for t, (_, (x, y, w, h, *_rest)) in enumerate(rows, 1):
        if w > 0 and h > 0:
            track["boxes"][t] = _inside([x, y, x + w, y + h], size)
            track["visibility"][t] = seen[t - 1] if t <= len(seen) else 1.0
    if action:
        track["action"] = [{"span": [1, len(pictures)], "text": action}]
    return Footage(folder.name, len(pictures), fps, size, _seen([track]), OfFiles(tuple(pictures)))


def clips(path: Path) -> list[Footage]:
    """JSON lines of clips: `video` (a file beside it) or `images`, `fps`, `size`, `tracks`, optional `caption`.

    A track has `id`, `names`, `boxes` {frame from 1: [x1, y1, x2, y2]}, optional `visibility` {frame: 0..1}, `appearance`,
    `action` and `location` [{"span", "text"}]. `jaxmllm data tracks` writes such files.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            found.append(_clip(json.loads(line, object_pairs_hook=_unique), path.parent, where))
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON ({error})") from None
        except InputError as error:
            raise error if str(error).startswith(where) else InputError(f"{where}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: a field is missing or has the wrong form ({error})") from None
    return found


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a key that occurs twice is refused, where `json` would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise InputError(
            f"{next(n for n in names if names.count(n) > 1)!r} is written twice, such as two boxes in a frame"
        )
    return found


def _clip(row: dict[str, Any], root: Path, where: str) -> Footage:
    if "video" in row:
        file = root / row["video"]
        if not file.is_file():
            raise InputError(f"{where}: video {file} not found")
        total, rate = probe_video(file, row.get("fps"))
        pictures: Callable = OfFile(str(file))
    else:
        files = [str(root / name) for name in row["images"]]
        if absent := next((file for file in files if not Path(file).is_file()), None):
            raise InputError(f"{where}: image {absent} not found")
        total, rate, pictures = len(files), float(row["fps"]), OfFiles(tuple(files))
    times = [frame["idx"] for frame in row.get("frames", ())]
    if times != sorted(set(times)):
        raise InputError(f"{where}: frames are out of order")
    width, height = (int(v) for v in numbers(row["size"], 2, "size"))
    tracks = []
    for track in row["tracks"]:
        name = f"tracks, identity {track['id']}, frame"
        boxes = {int(t): box(b, f"{name} {t}") for t, b in track["boxes"].items()}
        if len(boxes) < len(track["boxes"]):
            raise InputError(f"{where}: identity {track['id']} has two boxes in a frame")
        seen = {int(t): float(v) for t, v in track.get("visibility", {}).items()}
        tracks.append({**track, "boxes": boxes, "visibility": seen})
    fields = {"caption": row["caption"]} if row.get("caption") else {}
    return Footage(
        str(row.get("id") or row.get("video") or where), total, rate, (width, height), tracks, pictures, fields
    )


def videos(root: Path) -> list[Path]:
    """The video files in a folder, or the one given, by name."""
    files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        raise InputError(f"{root}: no video file ({', '.join(VIDEO_SUFFIXES)})")
    return files


class Videos(Source):
    """Plain videos, each with the same question: to see what a model says."""

    def __init__(self, path: str, question: str):
        self.name, self.question = path, question
        self.files = videos(existing(path, folder=True))

    def __len__(self) -> int:
        return len(self.files)

    def where(self, index: int) -> str:
        return str(self.files[index])

    def _record(self, index: int) -> Record:
        file = str(self.files[index])
        parts = [{"type": "video", "video": file}, {"type": "text", "text": self.question}]
        return {"id": file, "task": "chat", "messages": [{"role": "user", "content": parts}]}


def open_videos(path: str, question: str = "Describe the video.") -> Source:
    return Videos(path, question)


READERS: dict[str, Callable[[Path], list[Footage]]] = {"mot": mot, "got10k": got10k, "lasot": lasot, "clips": clips}


def opener(kind: str) -> Callable[..., ClipSource]:
    """The function that opens a kind of `READERS` with the options of `Windows`."""

    def open_clips(
        path: str,
        task: str = "tracks",
        frames: int = 8,
        rate: float = 2.0,
        horizon: int = 0,
        stride: int = 0,
        kinds: tuple[str, ...] = (),
        subjects: int = 4,
        max_static: float = 1.0,
        min_visibility: float = 0.25,
        seed: int = 0,
    ) -> ClipSource:
        how = Windows(
            task, frames, rate, horizon, stride, kinds, subjects, max_static, min_visibility, seed
        )  # before a file is read
        return ClipSource(path, READERS[kind](existing(path, folder=kind != "clips")), how)

    return open_clips


# ---------------------------------------------------------------- pieces


def _found(root: Path, name: str) -> list[Path]:
    files = sorted(root.rglob(name))
    if not files:
        raise InputError(f"{root}: no sequence, which is a folder with {name}")
    return files


def _pictures(folder: Path) -> list[str]:
    files = sorted(str(f) for f in folder.iterdir() if f.suffix.lower() in FRAME_SUFFIXES) if folder.is_dir() else []
    if not files:
        raise InputError(f"{folder}: no frames")
    return files


def _size(picture: str) -> tuple[int, int]:
    width, height = image_size(picture)
    return width, height


def _ini(path: Path, section: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path, encoding="utf-8")
        return dict(parser[section]) if parser.has_section(section) else {}
    except (configparser.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None


def _rows(path: Path) -> Iterator[tuple[int, list[float]]]:
    """(line, numbers) of a file of numbers with commas, blanks or tabs between."""
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            row = [float(v) for v in re.split(r"[,\s]+", text.strip().rstrip(","))]
        except ValueError:
            raise InputError(f"{path}, line {line}: {text[:60]!r} is no row of numbers") from None
        if len(row) < 4:
            raise InputError(f"{path}, line {line}: expected four numbers at least, got {len(row)}")
        yield line, [v if v == v else 0.0 for v in row]  # LaSOT writes NaN where there is nothing


def _column(path: Path) -> list[float]:
    try:
        return [float(v) for v in re.split(r"[,\s]+", path.read_text(encoding="utf-8").strip()) if v]
    except ValueError:
        raise InputError(f"{path}: expected numbers") from None


def _inside(corners: Sequence[float], size: Sequence[float]) -> list[float]:
    return [min(max(v, 0.0), float(size[k % 2])) for k, v in enumerate(corners)]


def _seen(tracks) -> list[Track]:
    """The tracks without boxes that lie outside the picture."""
    for track in tracks:
        track["boxes"] = {t: b for t, b in track["boxes"].items() if b[0] < b[2] and b[1] < b[3]}
    return [track for track in tracks if track["boxes"]]
