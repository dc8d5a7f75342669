"""`jaxmllm data tracks`: clips with tracks out of real video."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxmllm.experts.video_tracks import write_tracks


def run(
    videos: Annotated[Path, tyro.conf.Positional],
    out: Path,
    detector: str = "motion",
    tracker: Literal["bytetrack", "sort"] = "bytetrack",
    min_frames: int = 4,
    min_score: float = 0.4,
    max_gaps: int = 8,
    preview: Path | None = None,
    max_bad_records: int = 0,
) -> None:
    """Tracks from real video: subjects found, linked through time and described, one line a video; needs the extra video.

    Train on them with clips:FILE. Videos that have a line already are left alone, so that a stopped call goes on.

    Args:
        videos: a video file, or a folder of them.
        out: JSON lines of clips.
        detector: motion (what moves before a still background), or module:function that makes one of your own.
        tracker: how boxes are linked.
        min_frames: tracks seen in fewer frames are dropped.
        min_score: so are tracks of a lower mean score of the detector.
        max_gaps: and tracks with more runs of frames missing.
        preview: a folder for pictures with the boxes drawn.
        max_bad_records: videos that may fail; the others are read.
    """
    keeping = {"min_frames": min_frames, "min_score": min_score, "max_gaps": max_gaps}
    write_tracks(videos, out, detector, tracker, keeping, preview, max_bad_records)
