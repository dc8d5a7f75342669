"""Clips with tracks: windows of annotated videos as records of the tracks and foresight tasks.

A reader (`clip_files`) gives `Footage`: frames that are read when they are asked for, and every track with its visibility. A
`ClipSource` cuts it into windows and draws one query about each. All tracks of a window are kept, so that it is decided on
all of them whether a cue is unique and who "every person" is.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmllm.data.formats import Record, Source, choose
from jaxmllm.data.video import decode_frames
from jaxmllm.errors import InputError
from jaxmllm.tasks import foresight_records, tracks

Track = dict[str, Any]  # id, names, boxes {frame: [x1, y1, x2, y2]}, visibility {frame: 0..1}, and timed attributes
KINDS = {"tracks": tuple(tracks.QUERIES), "foresight": foresight_records.KINDS}


@dataclasses.dataclass(frozen=True)
class VideoFrame:
    """One frame of a video file, decoded when it is looked at; the frames of its window are decoded together."""

    path: str
    index: int  # from 0
    window: tuple[int, ...]  # ascending, with `index`

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """uint8 [H, W, 3]. InputError naming the file where it ends before the window does."""
        return np.asarray(_decoded(self.path, self.window)[self.window.index(self.index)], dtype)

    def __str__(self) -> str:
        return f"{self.path}#{self.index}"


@functools.lru_cache(maxsize=4)
def _decoded(path: str, window: tuple[int, ...]) -> list[np.ndarray]:
    return [np.asarray(image) for image in decode_frames(Path(path), np.asarray(window))]


@dataclasses.dataclass
class Footage:
    """An annotated video. Frames count from 1; times are (frame - 1) / fps."""

    name: str
    frames: int
    fps: float
    size: tuple[int, int]  # width, height of the frames, pixels
    tracks: list[Track]
    pictures: Callable[[Sequence[int]], list[Any]]  # frames (from 1) -> images, as `load_image` takes them
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # `caption` and others of the record

    def __post_init__(self):
        if self.frames < 1:
            raise InputError(f"{self.name}: the video has no frames")
        if not self.fps > 0:
            raise InputError(f"{self.name}: fps {self.fps!r} must be above 0")
        ids = [track["id"] for track in self.tracks]
        for track in self.tracks:
            if ids.count(track["id"]) > 1:
                raise InputError(f"{self.name}: identity {track['id']} has two tracks")
            if not track.get("names"):
                raise InputError(f"{self.name}: identity {track['id']} has no name")
            if track["boxes"] and not 1 <= min(track["boxes"]) <= max(track["boxes"]) <= self.frames:
                raise InputError(
                    f"{self.name}: identity {track['id']} has boxes in frames {min(track['boxes'])} to "
                    f"{max(track['boxes'])}; the video has {self.frames}"
                )


@dataclasses.dataclass(frozen=True)
class OfFile:
    """`Footage.pictures` of a video file."""

    path: str

    def __call__(self, frames: Sequence[int]) -> list[VideoFrame]:
        window = tuple(t - 1 for t in frames)
        return [VideoFrame(self.path, index, window) for index in window]


@dataclasses.dataclass(frozen=True)
class OfFiles:
    """`Footage.pictures` of a picture a frame."""

    paths: tuple[str, ...]

    def __call__(self, frames: Sequence[int]) -> list[str]:
        return [self.paths[t - 1] for t in frames]


@dataclasses.dataclass(frozen=True)
class Windows:
    """How videos become clips, and what is asked about them. The options of every source of clips.

    Raises:
        InputError: an option beyond its range, or an unknown task or kind.
    """

    task: str = "tracks"  # tracks or foresight
    frames: int = 8  # frames shown of a window
    rate: float = 2.0  # frames a second of them; 0: every frame of the video
    horizon: int = 0  # frames after the shown ones that foresight asks for
    stride: int = 0  # frames shown from the start of one window to the start of the next; 0: windows do not overlap
    kinds: tuple[str, ...] = ()  # kinds of question; none: all
    subjects: int = 4  # most subjects that an answer traces
    max_static: float = 1.0  # most that one frame and the prompt may tell of a questioned track
    min_visibility: float = 0.25  # boxes of which less is seen are not asked for
    seed: int = 0

    def __post_init__(self):
        choose(self.task, KINDS, "task")
        for kind in self.kinds:
            choose(kind, KINDS[self.task], "kinds")
        for name, least in (("frames", 2), ("rate", 0), ("horizon", 0), ("stride", 0), ("subjects", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: {getattr(self, name)} must be at least {least}")
        if self.horizon and self.task != "foresight":
            raise InputError("horizon: only task=foresight asks for frames that are not shown")

    def step(self, fps: float) -> int:
        """Frames of the video from one shown frame to the next."""
        return max(round(fps / self.rate), 1) if self.rate else 1


class ClipSource(Source):
    """Windows of footage as records of one task, each with a query; windows without a subject seen twice are left out."""

    def __init__(self, name: str, footage: Sequence[Footage], windows: Windows | None = None):
        self.name, self.footage, self.windows = name, list(footage), windows or Windows()
        if not self.footage:
            raise InputError(f"{name}: no video was found")
        how, self._places = self.windows, []
        for number, video in enumerate(self.footage):
            step = how.step(video.fps)
            last = video.frames - (how.frames + how.horizon - 1) * step
            for start in range(1, last + 1, (how.stride or how.frames) * step):
                if self._tracks(video, self._frames(start, step)):
                    self._places.append((number, start))
        if not self._places:
            raise InputError(
                f"{name}: no window of {how.frames + how.horizon} frames at {how.rate:g} a second with a subject in two of "
                "them; take fewer frames or a higher rate"
            )

    def __len__(self) -> int:
        return len(self._places)

    def where(self, index: int) -> str:
        number, start = self._places[index]
        return f"{self.footage[number].name}, frame {start}"

    def image_key(self, index: int) -> int:
        return index

    def _frames(self, start: int, step: int) -> list[int]:
        return [start + step * k for k in range(self.windows.frames + self.windows.horizon)]

    def _tracks(self, video: Footage, frames: Sequence[int]) -> list[Track]:
        """The tracks in a window, renumbered from 1; those seen in fewer than two of its shown frames are left out."""
        number, found = {t: k for k, t in enumerate(frames, 1)}, []
        for track in video.tracks:
            seen = track.get("visibility", {})
            boxes = {
                str(number[t]): list(box)
                for t, box in track["boxes"].items()
                if t in number and seen.get(t, 1.0) >= self.windows.min_visibility
            }
            if sum(int(t) <= self.windows.frames for t in boxes) < 2:
                continue
            timed: dict[str, Any] = {key: _spans(track[key], number) for key in ("action", "location") if key in track}
            shown: dict[str, Any] = {str(number[t]): v for t, v in seen.items() if t in number}
            found.append({**track, "boxes": boxes, "visibility": shown, **timed})
        return found

    def clip(self, index: int) -> Record:
        """The window without a question: `images`, `size`, `frames` and all `tracks`."""
        number, start = self._places[index]
        video, how = self.footage[number], self.windows
        frames = self._frames(start, how.step(video.fps))
        shown = frames[: how.frames]
        return {
            **video.fields,
            "id": f"{video.name}-{start}",
            "unit": video.name,  # windows of one video are not independent
            "images": video.pictures(shown),
            "size": list(video.size),
            "fps": video.fps / how.step(video.fps),
            "frames": [{"idx": k, "time": (t - 1) / video.fps} for k, t in enumerate(shown, 1)],
            "tracks": self._tracks(video, frames),
        }

    def _record(self, index: int) -> Record:
        how, clip = self.windows, self.clip(index)
        rng = np.random.default_rng([how.seed, index])
        asked = draw_query(clip, rng, how)
        if asked is None:
            raise InputError("nothing can be asked about this window: take other kinds or a larger max_static")
        return asked


def draw_query(clip: Mapping[str, Any], rng: np.random.Generator, how: Windows) -> Record | None:
    """The clip with one query of the windows' task and kinds; None where it allows none."""
    if how.task == "tracks":
        return tracks.make_query(
            clip, rng, how.kinds, max_frames=how.frames, max_tracks=how.subjects, max_static=how.max_static
        )
    last = max(int(t) for track in clip["tracks"] for t in track["boxes"])
    horizon = min(how.horizon, last - how.frames) if how.horizon else 0
    return foresight_records.make_query(
        clip, rng, how.kinds, max(horizon, 0), max_tracks=how.subjects, max_static=how.max_static
    )


def _spans(items: Sequence[Mapping[str, Any]], number: Mapping[int, int]) -> list[dict[str, Any]]:
    found = []
    for item in items:
        inside = [new for old, new in number.items() if item["span"][0] <= old <= item["span"][1]]
        if inside:
            found.append({"span": [min(inside), max(inside)], "text": item["text"]})
    return found
