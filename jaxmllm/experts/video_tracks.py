"""Videos to JSON lines of clips with tracks and words, which the source `clips:` reads."""

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from jaxmllm.data.clip_files import videos
from jaxmllm.data.video import decode_frames, probe_video
from jaxmllm.errors import InputError
from jaxmllm.experts import words
from jaxmllm.experts.detectors import Detection, detect, open_detector
from jaxmllm.experts.linking import link
from jaxmllm.runfiles import JsonLines, read_lines
from jaxmllm.tasks.tracks import keep_track

log = logging.getLogger(__name__)
CROPS = 5  # frames of a track that its colour is judged in
SHOWN = 4  # frames of a video in the preview


def write_tracks(
    path: Path,
    out: Path,
    detector: str = "motion",
    tracker: str = "bytetrack",
    keeping: Mapping[str, Any] | None = None,
    preview: Path | None = None,
    max_bad_records: int = 0,
) -> None:
    """One line a video in `out`; those that have one are left alone. Options as in `command.tracks`.

    Args:
        keeping: options of `tasks.tracks.keep_track`.

    Raises:
        InputError: no video, no such detector, or more than `max_bad_records` videos that fail.
    """
    make = open_detector(detector)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {row["id"] for row in read_lines(out)}
    bad, files = 0, videos(path)
    with JsonLines(out) as lines:
        for file in files:
            name = str(file.relative_to(path)) if path.is_dir() else file.name
            if name in done:
                continue
            try:
                row = follow(file, make, tracker, keeping or {}, preview)
            except InputError as error:
                bad += 1
                if bad > max_bad_records:
                    raise
                log.warning("left out: %s", error)
                continue
            lines.append([{"id": name, "video": os.path.relpath(file, out.parent), **row}])
            print(f"{name}: {len(row['tracks'])} tracks", file=sys.stderr)
    print(f"read them as clips:{out}", file=sys.stderr)


def follow(
    file: Path, make: Any, tracker: str, keeping: Mapping[str, Any], preview: Path | None = None
) -> dict[str, Any]:
    """`fps`, `size` and the `tracks` of a video that pass `tasks.tracks.keep_track`."""
    total, fps = probe_video(file, None)
    size: list[int] = []

    def found() -> Iterator[list[Detection]]:
        detector = make()
        for t, image in enumerate(decode_frames(file, np.arange(total)), 1):
            size[:] = image.size
            yield detect(detector, np.asarray(image), f"{file}, frame {t}")

    kept = [track for track in link(found(), fps, tracker) if keep_track(track, **keeping)]
    _describe(file, kept, fps, size, preview)
    return {"fps": fps, "size": size, "tracks": kept}


def _describe(file: Path, kept: list[dict[str, Any]], fps: float, size: list[int], preview: Path | None) -> None:
    """Adds words to the tracks, and draws the preview: one more pass over the frames that are needed."""
    looks: dict[int, list[tuple[int, dict[str, Any]]]] = {}  # frame -> (place in `kept`, track)
    for k, track in enumerate(kept):
        frames = sorted(track["boxes"])
        for t in {frames[i] for i in np.linspace(0, len(frames) - 1, min(CROPS, len(frames))).astype(int)}:
            looks.setdefault(t, []).append((k, track))
    crowded = sorted({t for track in kept for t in track["boxes"]})
    drawn = {crowded[i] for i in np.linspace(0, len(crowded) - 1, SHOWN).astype(int)} if preview and crowded else set()
    wanted = sorted(looks.keys() | drawn)
    colours: dict[int, Counter[str]] = {k: Counter() for k in range(len(kept))}
    for t, image in zip(wanted, decode_frames(file, np.asarray(wanted) - 1) if wanted else (), strict=True):
        pixels = np.asarray(image)
        for k, track in looks.get(t, ()):
            x1, y1, x2, y2 = (int(v) for v in track["boxes"][t])
            colours[k][words.colour(pixels[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)])] += 1
        if preview and t in drawn:
            preview.mkdir(parents=True, exist_ok=True)
            pencil = ImageDraw.Draw(image)
            for track in kept:
                if t in track["boxes"]:
                    pencil.rectangle(track["boxes"][t], outline=(255, 60, 0), width=2)
                    pencil.text(track["boxes"][t][:2], str(track["id"]), fill=(255, 255, 0))
            Image.Image.save(image, preview / f"{file.stem}-{t:06d}.png")
    for k, track in enumerate(kept):
        track["appearance"] = [f"{colours[k].most_common(1)[0][0]} {track['names'][0]}"]
        track["action"] = words.motions(track["boxes"], fps)
        track["location"] = words.places(track["boxes"], size)
        track["boxes"] = {str(t): box for t, box in track["boxes"].items()}
