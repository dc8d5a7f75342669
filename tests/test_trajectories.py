"""Boxes and trajectories as text, the scores of a written trajectory, tracking measures."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmllm.eval import tracking
from jaxmllm.geometry import box_iou
from jaxmllm.tasks import trajectories
from jaxmllm.tasks.trajectories import parse_boxes, parse_trajectories, trajectory_reward, write_trajectories

# ---- strategies

low = st.integers(0, 999)
boxes = st.tuples(low, low, low, low).map(
    lambda c: [min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]) + 1, max(c[1], c[3]) + 1]
)
frame_sets = st.sets(st.integers(1, 12), min_size=1, max_size=5).map(sorted)
labels = st.text("abcXYZ019_- é", max_size=8).map(str.strip)


@st.composite
def track_lists(draw, first=False):
    ids = draw(st.lists(st.integers(1, 40), unique=True, min_size=1, max_size=4))
    out = []
    for i in ids:
        frames = sorted({1, 2, *draw(frame_sets)}) if first else draw(frame_sets)
        out.append({"id": i, "label": draw(labels), "frames": {t: draw(boxes) for t in frames}})
    return out


# ---- codec


@given(
    st.tuples(*[st.integers(-50, 2000)] * 4),
    st.integers(20, 1920),
    st.integers(20, 1080),
    st.sampled_from(["resize", "pad"]),
    st.sampled_from(["xyxy", "xywh"]),
)
def test_encoding_is_exact_truncation_after_clipping(box, w, h, mode, box_format):
    text = trajectories.encode_box(box, w, h, mode, box_format)
    x1, y1, x2, y2 = box if box_format == "xyxy" else (box[0], box[1], box[0] + box[2], box[1] + box[3])
    clipped = [min(max(x1, 0), w), min(max(y1, 0), h), min(max(x2, 0), w), min(max(y2, 0), h)]
    sides = (w, h, w, h) if mode == "resize" else (max(w, h),) * 4
    want = [math.floor(Fraction(v * 1000, side)) for v, side in zip(clipped, sides, strict=True)]
    assert text == "[" + ",".join(str(v).zfill(3) for v in want) + "]"
    back = trajectories.decode_box(want, w, h, mode)
    for v, side, b in zip(clipped, sides, back, strict=True):
        assert -1e-9 <= v - b < side / 1000 + 1e-9


def test_encoding_in_pixels_of_the_resized_image_and_bad_options():
    assert trajectories.quantize_box([64, 48, 320, 240], 640, 480, extent=(448, 448)) == [44, 44, 224, 224]
    assert trajectories.encode_box([0, 0, 640, 480], 640, 480) == "[000,000,1000,1000]"
    for options in ({"mode": "crop"}, {"box_format": "cxcywh"}):
        with pytest.raises(ValueError):
            trajectories.encode_box([0, 0, 1, 1], 10, 10, **options)


@given(track_lists())
def test_trajectories_round_trip(tracks):
    found = parse_trajectories(write_trajectories(tracks))
    assert [(f["id"], f["label"], f["frames"], f["closed"]) for f in found] == [
        (t["id"], t["label"], t["frames"], True) for t in tracks
    ]
    assert all(f["listed"] == sorted(t["frames"]) for f, t in zip(found, tracks, strict=True))


@given(
    st.dictionaries(
        st.text("ab T-9", min_size=1, max_size=6).filter(lambda s: s == s.strip()),
        st.lists(boxes, min_size=1, max_size=3),
        max_size=4,
    )
)
def test_detection_round_trip(found):
    assert trajectories.parse_detection(trajectories.write_detection(found)) == found


@pytest.mark.parametrize("box", [[5, 5, 5, 9], [9, 5, 5, 9], [5, 9, 9, 5], [-1, 0, 5, 5]])
def test_writing_refuses_what_is_no_box(box):
    with pytest.raises(ValueError, match="frame 3"):
        write_trajectories([{"id": 1, "label": "", "frames": {3: box}}])


def test_writing_refuses_labels_that_would_not_come_back():
    for label in ("a,b", "a<b", " a", "a:"):
        with pytest.raises(ValueError, match="label"):
            write_trajectories([{"id": 1, "label": label, "frames": {1: [0, 0, 1, 1]}}])
    with pytest.raises(ValueError, match="category"):
        trajectories.write_detection({"a:b": [[0, 0, 1, 1]]})


# text -> (id, closed, frames, listed) of each identity
SPELLINGS = {
    "Path<Id1>Frame1:[1,2,3,4]</Id1>": [(1, True, {1: [1, 2, 3, 4]}, [1])],
    "< id 07 >frame :1:[ 1 , -2.5 ,3.,.5 ]< / ID 7 >": [(7, True, {1: [1, -2.5, 3, 0.5]}, [1])],
    "<Id1>Frame1:[1,2,3,4]</Id2>": [(1, False, {1: [1, 2, 3, 4]}, [1])],
    "<Id1>Frame1:[1,2,3,4]<Id2>Frame1:[5,6,7,8]</Id2></Id1>": [
        (1, False, {1: [1, 2, 3, 4]}, [1]),
        (2, True, {1: [5, 6, 7, 8]}, [1]),
    ],
    "<Id1>Frame1:;Frame2:[1,2,3,4];Frame1:[9,9,9,9]": [(1, False, {2: [1, 2, 3, 4], 1: [9, 9, 9, 9]}, [2, 1])],
    "<Id1>Frame1:[1,2,3,4],[5,6,7,8];Frame1:[0,0,0,0]</Id1>": [(1, True, {1: [1, 2, 3, 4]}, [1, 1])],
    "<Id1>Frame1:[1,2,3];Frame2:[1,2,3,4,5];Frame3:[1,2,3,x]</Id1>": [(1, True, {}, [])],
    "<Id1></Id1> Frame1:[1,2,3,4]": [(1, True, {}, [])],
    "</Id1>Frame1:[1,2,3,4]": [],
    f"<Id1>Frame1:[{'9' * 400},0,1,2]</Id1>": [(1, True, {}, [])],
    f"<Id{'9' * 5000}>Frame1:[1,2,3,4]": [],
    "<Id１>Frame１:[１,2,3,4]</Id１>": [],
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_spellings(text):
    assert [(f["id"], f["closed"], f["frames"], f["listed"]) for f in parse_trajectories(text)] == SPELLINGS[text]


def test_labels_before_the_tag():
    text = "It is: this player <Id1></Id1>;T-shirt_2<Id2></Id2>,\nnext\nTrack3<Id3>x<Id4><Id5>"
    assert [f["label"] for f in parse_trajectories(text)] == ["this player", "T-shirt_2", "Track3", "x", ""]


BRACKETS = {
    "[1,2,3,4]": [[1, 2, 3, 4]],
    "[1 0, 2,\n3 ,4]": [[10, 2, 3, 4]],
    "[1,2,3,4;5,6,7,8][9,9,9,9]": [[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]],
    "[1,2,3,4;5,6,7]": [],
    "[1,2,3] [1,2,3,4,5] (1,2,3,4) [a,2,3,4] [1,2,3,4": [],
    "[[1,2,3,4],[-5.5,+6,.5,8.]]": [[1, 2, 3, 4], [-5.5, 6, 0.5, 8]],
    f"[1,2,3,{'9' * 400}]": [],
}


@pytest.mark.parametrize("text", BRACKETS)
def test_boxes_in_brackets(text):
    assert parse_boxes(text) == BRACKETS[text]


def test_repair_of_inverted_boxes():
    text = "[600,300,150,400] [10,300,150,20] [1,2,3,4] [5,5,5,5]"
    plain = [[1, 2, 3, 4], [5, 5, 5, 5]]  # an empty box is not inverted
    assert parse_boxes(text, "drop") == plain
    assert parse_boxes(text, "xywh") == [[600, 300, 750, 700], [10, 300, 160, 320], *plain]
    assert parse_boxes(text, "none") == [[600, 300, 150, 400], [10, 300, 150, 20], *plain]
    with pytest.raises(ValueError, match="repair"):
        parse_boxes(text, "swap")


# ---- scores of a written trajectory


@given(track_lists(first=True), st.booleans(), st.sampled_from(["id", "hungarian"]), st.randoms())
def test_perfect_answer_earns_one_whatever_the_order(tracks, given_first, match, random):
    gt = {t["id"]: t["frames"] for t in tracks}
    assert trajectory_reward(write_trajectories(tracks), gt, given_first, match=match) == {
        "format": 1.0,
        "iou": 1.0,
        "disp": 1.0,
        "reward": 1.0,
    }
    random.shuffle(tracks)
    as_json = json.loads(json.dumps(gt))  # numeric strings as keys
    assert trajectory_reward(write_trajectories(tracks), as_json, given_first, match=match)["reward"] == 1.0


@given(track_lists(first=True), track_lists(first=True), st.booleans())
def test_reward_equals_the_formula_and_swapping_objects_changes_nothing(gt_tracks, tracks, given_first):
    gt = {t["id"]: t["frames"] for t in gt_tracks}
    got = trajectory_reward(write_trajectories(tracks), gt, given_first)
    assert trajectory_reward(write_trajectories(tracks[::-1]), gt, given_first) == got
    pred = {t["id"]: t["frames"] for t in tracks}
    if not pred.keys() & gt.keys():
        assert got == {"format": 0, "iou": 0, "disp": 0, "reward": 0}
        return
    ious, disps = [], []
    for i, frames in gt.items():
        for t, true in frames.items():
            if given_first and t == 1:
                continue
            box = pred.get(i, {}).get(t)
            ious.append(0 if box is None else float(box_iou(box, true)))
            shift = (
                0
                if box is None
                else math.dist(
                    [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2], [(true[0] + true[2]) / 2, (true[1] + true[3]) / 2]
                )
            )
            size = math.sqrt((true[2] - true[0]) * (true[3] - true[1]))
            disps.append(0 if box is None else math.exp(-shift / size))
    right = {i: sorted(f) for i, f in pred.items()} == {i: sorted(f) for i, f in gt.items()}
    assert got["format"] == right
    assert got["iou"] == pytest.approx(np.mean(ious)) and got["disp"] == pytest.approx(np.mean(disps))
    assert got["reward"] == pytest.approx(0.1 * right + 0.6 * np.mean(ious) + 0.3 * np.mean(disps))


@given(track_lists(first=True))
def test_static_copy_is_the_first_box_repeated(tracks):
    gt = {t["id"]: t["frames"] for t in tracks}
    copied = [{**t, "frames": {k: t["frames"][1] for k in t["frames"]}} for t in tracks]
    assert trajectories.static_copy(gt) == {t["id"]: t["frames"] for t in copied}
    later = [(f[1], f[t]) for f in gt.values() for t in f if t != 1]
    iou = np.mean([float(box_iou(a, b)) for a, b in later])
    disp = np.mean(
        [
            math.exp(
                -math.hypot(a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3])
                / 2
                / math.sqrt((b[2] - b[0]) * (b[3] - b[1]))
            )
            for a, b in later
        ]
    )
    assert trajectory_reward(write_trajectories(copied), gt) == pytest.approx(
        {"format": 1, "iou": iou, "disp": disp, "reward": 0.1 + 0.6 * iou + 0.3 * disp}
    )


GT = {1: {1: [200, 300, 440, 620], 2: [220, 310, 470, 640]}, 2: {1: [0, 0, 100, 100], 2: [10, 0, 110, 100]}}
GOOD = (
    "<Id1>Frame1:[200,300,440,620];Frame2:[220,310,470,640]</Id1><Id2>Frame1:[0,0,100,100];Frame2:[10,0,110,100]</Id2>"
)
FLAWS = {  # change -> (format, iou) with frame 1 given
    "no closing tag": (GOOD.replace("</Id2>", ""), 0, 1),
    "wrong closing tag": (GOOD.replace("</Id2>", "</Id1>"), 0, 1),
    "extra identity": (GOOD + "<Id3>Frame1:[1,2,3,4]</Id3>", 0, 1),
    "repeated identity, first counts": (GOOD + "<Id1>Frame2:[0,0,1,1]</Id1>", 0, 1),
    "repeated frame, first counts": (GOOD.replace("</Id1>", ";Frame2:[0,0,1,1]</Id1>"), 0, 1),
    "extra frame": (GOOD.replace("</Id1>", ";Frame3:[0,0,1,1]</Id1>"), 0, 1),
    "frames out of order": (
        GOOD.replace("Frame1:[0,0,100,100];Frame2:[10,0,110,100]", "Frame2:[10,0,110,100];Frame1:[0,0,100,100]"),
        0,
        1,
    ),
    "first frame left out": (GOOD.replace("Frame1:[0,0,100,100];", ""), 0, 1),
    "missing identity": (GOOD[: GOOD.index("<Id2>")], 0, 0.5),
    "missing frame": (GOOD.replace(";Frame2:[10,0,110,100]", ""), 0, 0.5),
    "inverted box": (GOOD.replace("[10,0,110,100]", "[110,0,10,100]"), 0, 0.5),
    "empty box": (GOOD.replace("[10,0,110,100]", "[60,0,60,100]"), 0, 0.5),
    "box out of range": (GOOD.replace("[10,0,110,100]", "[10,0,1001,100]"), 0, 0.5),
    "prose around": (f"The path is {GOOD}. That is all.", 1, 1),
    "box out of range in the given frame": (GOOD.replace("[0,0,100,100]", "[0,0,100,1001]"), 0, 1),
    "other identities": (GOOD.replace("Id1", "Id7").replace("Id2", "Id8"), 0, 0),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_flaws_of_an_answer(flaw):
    text, form, iou = FLAWS[flaw]
    got = trajectory_reward(text, GT)
    assert (got["format"], got["iou"], got["disp"]) == (form, iou, iou)


def test_identities_that_the_prompt_did_not_name_are_paired_by_overlap():
    swapped = GOOD.replace("Id1", "Id0").replace("Id2", "Id1").replace("Id0", "Id2")
    assert trajectory_reward(swapped, GT, False)["iou"] < 0.01
    assert trajectory_reward(swapped, GT, False, match="hungarian") == {"format": 1, "iou": 1, "disp": 1, "reward": 1}
    other = GOOD.replace("Id1", "Id7")
    assert trajectory_reward(other, GT, False, match="hungarian")["reward"] == pytest.approx(0.9)  # no identity 7
    assert trajectory_reward("", GT, match="hungarian")["reward"] == 0


def test_displacement_gives_a_slope_where_boxes_do_not_overlap():
    def at(x):
        return trajectory_reward(
            f"<Id1>Frame1:[0,0,50,50];Frame2:[{x},0,{x + 50},50]</Id1>", {1: {1: [0, 0, 50, 50], 2: [0, 0, 50, 50]}}
        )

    rewards = [at(x)["reward"] for x in (100, 200, 400)]
    assert rewards == sorted(rewards, reverse=True) and rewards[0] > rewards[2] and at(100)["iou"] == 0


def test_constant_velocity():
    got = trajectories.constant_velocity({1: [0, 0, 10, 10], 3: [4, 0, 16, 10]}, [4, 7])
    np.testing.assert_allclose([got[4], got[7]], [[6, 0, 19, 10], [12, 0, 28, 10]])
    assert trajectories.constant_velocity({2: [1, 2, 3, 4]}, [9]) == {9: [1, 2, 3, 4]}
    shrinking = trajectories.constant_velocity({1: [0, 0, 10, 10], 2: [2, 0, 8, 10]}, [5])[5]
    assert shrinking == [2, 0, 8, 10]  # never inside out


# ---- measures


def test_ope_metrics_equal_loops_over_thresholds():
    rng = np.random.default_rng(0)
    for n in (1, 2, 9, 40):
        gt = rng.uniform(0, 200, (n, 4))
        gt[:, 2:] += gt[:, :2] - 60  # some are empty: target absent
        pred = gt + rng.normal(0, 15, (n, 4))
        success = precision = norm = 0
        for k in range(n):
            g = gt[k]
            p = g if k == 0 else pred[k]
            if g[2] <= g[0] or g[3] <= g[1]:
                continue
            iw, ih = min(p[2], g[2]) - max(p[0], g[0]), min(p[3], g[3]) - max(p[1], g[1])
            inter = max(iw, 0) * max(ih, 0)
            valid = p[2] > p[0] and p[3] > p[1]
            iou = inter / ((p[2] - p[0]) * (p[3] - p[1]) + (g[2] - g[0]) * (g[3] - g[1]) - inter) if valid else 0
            dx, dy = (p[0] + p[2] - g[0] - g[2]) / 2, (p[1] + p[3] - g[1] - g[3]) / 2
            success += sum(iou > i / 20 for i in range(21)) / 21
            precision += math.hypot(dx, dy) <= 20
            norm += math.hypot(dx / (g[2] - g[0]), dy / (g[3] - g[1])) <= 0.2
        got = tracking.ope_metrics(pred, gt)
        assert got == pytest.approx(
            {"success": success / n, "precision20": precision / n, "norm_precision20": norm / n}
        )


def test_perfect_tracker_and_bad_shapes():
    gt = np.array([[0, 0, 10, 10], [5, 5, 20, 20.0]])
    assert tracking.ope_metrics(gt, gt)["success"] == pytest.approx(20 / 21)
    zero = tracking.ope_metrics(np.zeros((2, 4)), gt)
    assert zero["success"] == pytest.approx(10 / 21)  # the first frame is given
    assert tracking.lasot([(gt, gt), (np.zeros((2, 4)), gt)])["success"] == pytest.approx(15 / 21)
    with pytest.raises(ValueError, match="frames, 4"):
        tracking.ope_metrics(gt[:1], gt)


def test_got10k_pools_frames_and_leaves_out_the_first_and_the_invisible():
    gt = np.array([[0, 0, 10, 10]] * 4)
    videos = [
        {"pred": gt, "gt": gt, "size": [20, 20], "visible": [1, 0, 1, 1]},
        {"pred": np.zeros((2, 4)), "gt": gt[:2], "size": [20, 20]},
        {"pred": [[0] * 4, [0, 0, 30, 10]], "gt": [[0, 0, 20, 10], [0, 0, 30, 10]], "size": [20, 20]},
    ]
    assert tracking.got10k(videos) == pytest.approx({"ao": 3 / 4, "sr50": 3 / 4, "sr75": 3 / 4})
    half = tracking.got10k([{"pred": [[0] * 4, [0, 0, 10, 5]], "gt": gt[:2], "size": [20, 20]}])
    assert half == {"ao": 0.5, "sr50": 0.0, "sr75": 0.0}


def test_first_frame_alone_has_no_overlap_to_average():
    assert math.isnan(trajectories.tracking_ao({}, {1: [0, 0, 1, 1]})["ao"])
    assert math.isnan(trajectories.ade_fde({}, {1: [0, 0, 1, 1]})["ade"])
    assert tracking.got10k([]) == {}


def test_displacement_of_missing_frames():
    gt = {1: [0, 0, 10, 10], 2: [3, 4, 13, 14], 3: [6, 8, 16, 18]}
    assert trajectories.ade_fde({}, gt)["ade"] == 7.5  # holds the true first box: 5 and 10
    assert trajectories.ade_fde({}, gt, "max")["fde"] == pytest.approx(1000 * math.sqrt(2))
    assert trajectories.ade_fde({"2": gt[2]}, gt) | {"distances": 0} == {"ade": 2.5, "fde": 5.0, "distances": 0}
    with pytest.raises(ValueError, match="missing"):
        trajectories.ade_fde({}, gt, "skip")


def test_pairwise_tracking_keeps_the_last_good_frame_as_template():
    asked = []
    replies = iter(
        [
            "dog<Id1>Frame1:[0,0,100,100];Frame2:[100,0,200,100]</Id1>",
            "nothing here",
            "[200,0,100,100]",
            "<Id1>Frame1:[0,0,100,100]</Id1>",
            "Here: [300, 0, 400, 100].",
        ]
    )

    def ask(template, frame, box):
        asked.append((template, frame, box))
        return next(replies)

    got = tracking.pairwise_track(ask, [0, 0, 64, 48], 6, (640, 480))
    np.testing.assert_allclose(got, [[0, 0, 64, 48], [64, 0, 128, 48], [0] * 4, [0] * 4, [0] * 4, [192, 0, 256, 48]])
    assert [(a, b) for a, b, _ in asked] == [(0, 1), (1, 2), (1, 3), (1, 4), (1, 5)]
    assert asked[2][2] == [64, 0, 128, 48]


def test_baselines_of_a_whole_video():
    gt = np.array([[0, 0, 10, 10], [2, 0, 12, 10], [4, 0, 14, 10], [7, 0, 17, 10.0]])
    np.testing.assert_allclose(tracking.static_track(gt), gt[[0, 0, 0, 0]])
    np.testing.assert_allclose(tracking.velocity_track(gt), [gt[0], gt[0], [4, 0, 14, 10], [6, 0, 16, 10]])
