"""Detections linked to tracks by the `trackers` package: ByteTrack (arXiv 2110.06864) or SORT (arXiv 1602.00763)."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxmllm.data.formats import choose
from jaxmllm.errors import InputError
from jaxmllm.experts.detectors import Detection

TRACKERS = {"bytetrack": "ByteTrackTracker", "sort": "SORTTracker"}


def link(frames: Iterable[Sequence[Detection]], fps: float, tracker: str = "bytetrack") -> list[dict[str, Any]]:
    """Tracks {id, names, boxes {frame from 1: [x1, y1, x2, y2]}, score} of the detections of consecutive frames.

    `score` is the mean of the detector's, a name the most frequent one. InputError without the extra `video`.
    """
    choose(tracker, TRACKERS, "tracker")
    try:
        import supervision
        import trackers
    except ImportError:
        raise InputError("tracks from video need trackers and OpenCV: pip install 'jaxmllm[video]'") from None
    # every detection may begin a track: weak ones were left out before
    linker = getattr(trackers, TRACKERS[tracker])(frame_rate=fps, track_activation_threshold=0.3)
    tracks: dict[int, dict[str, Any]] = {}
    for t, found in enumerate(frames, 1):
        given = supervision.Detections(
            xyxy=np.array([d.box for d in found], np.float64).reshape(-1, 4),
            confidence=np.array([d.score for d in found], np.float64),
            data={"name": np.array([d.name for d in found], dtype=object)},
        )
        linked = linker.update(given)
        rows = zip(linked.tracker_id, linked.xyxy, linked.confidence, linked.data.get("name", ()), strict=False)
        for number, box, score, name in rows:
            if number >= 0:  # -1: not confirmed yet
                track = tracks.setdefault(int(number), {"boxes": {}, "scores": [], "names": []})
                track["boxes"][t] = [round(float(v), 1) for v in box]
                track["scores"].append(float(score))
                track["names"].append(str(name))
    return [
        {
            "id": k,
            "names": [Counter(track["names"]).most_common(1)[0][0]],
            "boxes": track["boxes"],
            "score": round(float(np.mean(track["scores"])), 3),
        }
        for k, track in enumerate(tracks.values(), 1)
    ]
