"""Tracking figures against the field's own programs: trackeval's command on MOT files, GOT-10k's toolkit by its text."""

import numpy as np
import pytest
import trackeval

from jaxmllm.eval import tracking
from jaxmllm.eval.identities import FIGURES, identity_figures
from jaxmllm.tasks.track_rewards import identity_reward

SIZE = 200


def box(rng):
    low = rng.uniform(0, SIZE - 60, 2)
    return [*low, *(low + rng.uniform(20, 60, 2))]


def random_clip(rng):
    """True tracks with gaps, and a prediction with shifted, missing, invented and exchanged boxes."""
    gt, pred = {}, {}
    for i in range(rng.integers(1, 5)):
        start, step = np.array(box(rng)), rng.normal(0, 4, 2)
        frames = [t for t in range(1, 9) if rng.random() < 0.85]
        gt[i + 1] = {t: (start + np.tile(step * t, 2)).tolist() for t in frames}
        moved = {t: (np.array(b) + rng.normal(0, 4, 4)).tolist() for t, b in gt[i + 1].items() if rng.random() < 0.8}
        change = rng.integers(2, 9) if rng.random() < 0.4 else 99
        pred[10 + i] = {t: b for t, b in moved.items() if t < change}
        pred[20 + i] = {t: b for t, b in moved.items() if t >= change}
    pred[99] = {int(t): box(rng) for t in rng.choice(np.arange(1, 9), 2, replace=False)}
    return pred, gt


def by_trackeval(tmp_path, clips):
    """What trackeval's own evaluation of MOTChallenge folders says."""
    for side in ("truth", "answers/ours/data"):
        (tmp_path / side).mkdir(parents=True)
    names = [f"clip{k}" for k in range(len(clips))]
    for name, (pred, gt) in zip(names, clips, strict=True):
        (tmp_path / "truth" / name / "gt").mkdir(parents=True)
        (tmp_path / "truth" / name / "seqinfo.ini").write_text("[Sequence]\nseqLength=8\n")
        for tracks, file in (
            (gt, tmp_path / "truth" / name / "gt" / "gt.txt"),
            (pred, tmp_path / f"answers/ours/data/{name}.txt"),
        ):
            rows = [
                f"{t},{i},{x1!r},{y1!r},{x2 - x1!r},{y2 - y1!r},1,1,1"
                for i, frames in tracks.items()
                for t, (x1, y1, x2, y2) in ((t, [float(v) for v in b]) for t, b in frames.items())
            ]
            file.write_text("\n".join(rows) + "\n")
    dataset = trackeval.datasets.MotChallenge2DBox(
        {"GT_FOLDER": str(tmp_path / "truth"), "TRACKERS_FOLDER": str(tmp_path / "answers"), "PRINT_CONFIG": False,
         "SEQ_INFO": dict.fromkeys(names, 8), "SKIP_SPLIT_FOL": True, "DO_PREPROC": False}
    )  # fmt: skip
    quiet = {"PRINT_RESULTS": False, "PRINT_CONFIG": False, "OUTPUT_SUMMARY": False, "OUTPUT_DETAILED": False,
             "PLOT_CURVES": False, "TIME_PROGRESS": False, "LOG_ON_ERROR": None}  # fmt: skip
    metrics = [trackeval.metrics.HOTA(), trackeval.metrics.CLEAR({"PRINT_CONFIG": False}),
               trackeval.metrics.Identity({"PRINT_CONFIG": False})]  # fmt: skip
    found, _ = trackeval.Evaluator(quiet).evaluate([dataset], metrics)
    pooled = found["MotChallenge2DBox"]["ours"]["COMBINED_SEQ"]["pedestrian"]
    return {name: float(np.mean(pooled[family][field])) for name, (family, field) in FIGURES.items()}


@pytest.mark.parametrize("seed", range(3))
def test_identities_equal_trackeval_on_mot_files(tmp_path, seed, capsys):
    rng = np.random.default_rng(seed)
    clips = [random_clip(rng) for _ in range(4)]
    want = by_trackeval(tmp_path, clips)
    capsys.readouterr()
    found = identity_figures(clips)
    assert found == pytest.approx(want, abs=1e-6)
    assert 0 < found["hota"] < 1 and found["id_switches"] > 0  # a test of something
    assert not capsys.readouterr().out


def test_identities_of_one_clip_equal_the_reward_and_keys_may_be_text():
    for seed in range(20):
        pred, gt = random_clip(np.random.default_rng(seed))
        found = identity_figures([(pred, gt)])
        assert found["idf1"] == pytest.approx(identity_reward(pred, gt)["idf1"])
        text = [{str(i): {str(t): b for t, b in f.items()} for i, f in tracks.items()} for tracks in (pred, gt)]
        assert identity_figures([tuple(text)]) == found
    assert identity_figures([(gt, gt)])["hota"] == 1 and identity_figures([({}, gt)])["recall"] == 0
    assert identity_figures([]) == {}


def got10k_report(videos):
    """GOT-10k's toolkit (got10k 0.1.3, `ExperimentGOT10k.report` and `rect_iou`), on [left, top, width, height]."""
    ious = []
    for video in videos:
        bound, sides = video["size"], []
        for name in ("pred", "gt"):
            r = np.array(video[name], float)[1:]
            r[:, 2:] -= r[:, :2]
            r[:, 0], r[:, 1] = np.clip(r[:, 0], 0, bound[0]), np.clip(r[:, 1], 0, bound[1])
            r[:, 2] = np.clip(r[:, 2], 0, bound[0] - r[:, 0])
            r[:, 3] = np.clip(r[:, 3], 0, bound[1] - r[:, 1])
            sides.append(r)
        a, b = sides
        x1, y1 = np.maximum(a[:, 0], b[:, 0]), np.maximum(a[:, 1], b[:, 1])
        x2 = np.minimum(a[:, 0] + a[:, 2], b[:, 0] + b[:, 2])
        y2 = np.minimum(a[:, 1] + a[:, 3], b[:, 1] + b[:, 3])
        shared = np.maximum(x2 - x1, 0) * np.maximum(y2 - y1, 0)
        iou = shared / (a[:, 2:].prod(-1) + b[:, 2:].prod(-1) - shared + np.finfo(float).eps)
        ious.append(np.clip(iou, 0, 1)[np.asarray(video["visible"])[1:] > 0])
    iou = np.concatenate(ious)
    curve = np.greater(iou[:, None], np.linspace(0, 1, 101)[None]).mean(0)
    return {"ao": iou.mean(), "sr50": curve[50], "sr75": curve[75]}


def test_single_objects_equal_the_toolkit_of_got10k():
    rng = np.random.default_rng(3)
    videos = []
    for n in (2, 5, 30):
        gt = np.array([box(rng) for _ in range(n)])
        pred = gt + rng.normal(0, 12, gt.shape)
        videos.append({"pred": pred, "gt": gt, "size": [SIZE, SIZE - 30], "visible": rng.integers(0, 9, n).clip(0, 8)})
    found = tracking.got10k(videos)
    assert found == pytest.approx(got10k_report(videos), abs=1e-6) and 0.2 < found["ao"] < 0.9
