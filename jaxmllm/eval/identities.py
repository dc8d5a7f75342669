"""Multi-object tracking figures by the field's own tool: HOTA, CLEAR and identity, computed by trackeval.

Sources: HOTA, arXiv 2009.07736; CLEAR MOT, doi 10.1155/2008/246309; IDF1, arXiv 1609.01775. Tracks are mappings
{identity: {frame: [x1, y1, x2, y2]}}; keys may be numeric strings, as JSON writes them. Boxes are continuous, in the same
coordinates on both sides. Identities of the prediction are arbitrary labels. Single-object figures: `eval.tracking`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmllm.errors import InputError
from jaxmllm.geometry import pairwise_iou
from jaxmllm.tasks.trajectories import Frames, int_keys

Tracks = Mapping[Any, Frames]

# our name -> (trackeval's family, its field); higher is better for all but the counts of errors
FIGURES = {
    "hota": ("HOTA", "HOTA"),
    "deta": ("HOTA", "DetA"),
    "assa": ("HOTA", "AssA"),
    "loca": ("HOTA", "LocA"),
    "mota": ("CLEAR", "MOTA"),
    "motp": ("CLEAR", "MOTP"),
    "precision": ("CLEAR", "CLR_Pr"),
    "recall": ("CLEAR", "CLR_Re"),
    "id_switches": ("CLEAR", "IDSW"),
    "fragments": ("CLEAR", "Frag"),
    "idf1": ("Identity", "IDF1"),
    "idp": ("Identity", "IDP"),
    "idr": ("Identity", "IDR"),
}


def identity_figures(clips: Sequence[tuple[Tracks, Tracks]]) -> dict[str, float]:
    """The `FIGURES` of (prediction, truth) pairs of tracks, pooled over clips as trackeval pools sequences.

    HOTA and its parts are means over the 19 thresholds .05 .. .95; CLEAR and identity match from an IoU of 0.5. All are
    in 0..1 but `mota`, which may be negative, and the counts `id_switches` and `fragments`. Empty without a clip.

    Raises:
        InputError: trackeval is not installed (it comes with the extra `video`).
    """
    try:
        from trackeval.metrics import CLEAR, HOTA, Identity
    except ImportError:
        raise InputError("tracking figures need trackeval: pip install 'jaxmllm[video]'") from None
    if not clips:
        return {}
    quiet = {"PRINT_CONFIG": False}
    families = {"HOTA": HOTA(), "CLEAR": CLEAR(quiet), "Identity": Identity(quiet)}
    rows = [_sequence(pred, gt) for pred, gt in clips]
    pooled = {
        name: family.combine_sequences({str(k): family.eval_sequence(row) for k, row in enumerate(rows)})
        for name, family in families.items()
    }
    return {name: float(np.mean(pooled[family][field])) for name, (family, field) in FIGURES.items()}


def _sequence(pred: Tracks, gt: Tracks) -> dict[str, Any]:
    """One clip in trackeval's form: identities numbered from 0, and a matrix of overlaps for every frame."""
    sides = [{i: int_keys(frames) for i, frames in enumerate(tracks.values()) if frames} for tracks in (gt, pred)]
    sides = [dict(enumerate(tracks.values())) for tracks in sides]
    frames = sorted({t for tracks in sides for boxes in tracks.values() for t in boxes})
    ids = [[np.array([i for i in tracks if t in tracks[i]], int) for t in frames] for tracks in sides]
    boxes = [
        [np.array([tracks[i][t] for i in there], float).reshape(-1, 4) for t, there in zip(frames, seen, strict=True)]
        for tracks, seen in zip(sides, ids, strict=True)
    ]
    return {
        "num_timesteps": len(frames),
        "gt_ids": ids[0],
        "tracker_ids": ids[1],
        "similarity_scores": [pairwise_iou(g, p) for g, p in zip(*boxes, strict=True)],
        "num_gt_ids": len(sides[0]),
        "num_tracker_ids": len(sides[1]),
        "num_gt_dets": sum(map(len, ids[0])),
        "num_tracker_dets": sum(map(len, ids[1])),
    }
