"""UTR tracks: parser and format corner by corner, rewards against brute force, queries and filters."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxmllm.tasks import track_rewards as tr
from jaxmllm.tasks import tracks

relaxed = settings(max_examples=60, deadline=None)
cells = st.integers(0, 12)
boxes = st.tuples(cells, cells, cells, cells)  # many are invalid
trajectories = st.dictionaries(st.integers(1, 6), boxes.map(list), max_size=6)
words = st.text("abcz ", min_size=1, max_size=8).filter(lambda s: s.strip() == s)


def area(box):
    """The unit cells that an integer box covers."""
    x1, y1, x2, y2 = box
    return {(x, y) for x in range(x1, x2) for y in range(y1, y2)}


def cell_iou(a, b):
    a, b = area(a), area(b)
    return len(a & b) / len(a | b) if a and b else 0.0


# --- trajectories ---------------------------------------------------------------------------------------------------


@relaxed
@given(trajectories, trajectories, st.sets(st.integers(1, 6), max_size=2), st.sampled_from([1, 2]))
def test_trajectory_iou_counts_cells(P, G, exclude, power):
    p = {t: box for t, box in P.items() if t not in exclude}
    g = {t: box for t, box in G.items() if t not in exclude}
    frames = p.keys() | g.keys()
    mean = volume = 0.0
    if p and g:
        mean = sum(cell_iou(p[t], g[t]) ** power for t in p.keys() & g.keys()) / len(frames)
        tubes = [{(t, *cell) for t in track for cell in area(track[t])} for track in (p, g)]
        volume = len(tubes[0] & tubes[1]) / max(len(tubes[0] | tubes[1]), 1)
    assert tr.trajectory_iou(P, G, exclude, power=power) == pytest.approx(mean)
    assert tr.trajectory_iou(P, G, exclude, "volume") == pytest.approx(volume)
    as_text = {str(t): box for t, box in P.items()}
    assert tr.trajectory_iou(as_text, G, exclude, power=power) == pytest.approx(mean)


@relaxed
@given(trajectories, trajectories, st.floats(0.1, 50), st.floats(0.1, 50))
def test_rescaling_an_axis_changes_nothing(P, G, sx, sy):
    def scaled(track):
        return {t: [x1 * sx, y1 * sy, x2 * sx, y2 * sy] for t, (x1, y1, x2, y2) in track.items()}

    for mode in ("mean", "volume"):
        assert tr.trajectory_iou(scaled(P), scaled(G), mode=mode) == pytest.approx(tr.trajectory_iou(P, G, mode=mode))


@relaxed
@given(trajectories, st.integers(1, 6))
def test_copying_the_query_box_has_no_lift(G, frame):
    assume(frame in G)
    copy = dict.fromkeys(G, G[frame])
    baseline = tr.static_baseline(G[frame], G, {frame})
    assert tr.lift(tr.trajectory_iou(copy, G, {frame}), baseline) == 0
    if baseline < 1 - 1e-6 and all(area(box) for box in G.values()) and len(G) > 1:
        assert tr.lift(tr.trajectory_iou(G, G, {frame}), baseline) == 1


def test_lift_corners():
    assert tr.lift(0.9, 1.0) == tr.lift(1.0, 1 - 1e-7) == 0
    assert tr.lift(0.2, 0.6) == 0 and tr.lift(0.8, 0.6) == pytest.approx(0.5) and tr.lift(1.0, 0.6) == 1
    with pytest.raises(ValueError, match="volume"):
        tr.trajectory_iou({1: [0, 0, 1, 1]}, {1: [0, 0, 1, 1]}, mode="sum")
    assert tr.trajectory_iou({1: [0, 0, 1e308, 1e308]}, {1: [0, 0, 1, 1]}, mode="volume") == 0


# --- identities -----------------------------------------------------------------------------------------------------

many = st.dictionaries(st.integers(1, 9), trajectories, max_size=3)


@relaxed
@given(many, many, st.sets(st.integers(1, 6), max_size=1), st.randoms(use_true_random=False))
def test_identity_is_the_best_of_all_matchings(pred, gt, exclude, random):
    def kept(tracks):
        return {i: {t: box for t, box in track.items() if t not in exclude} for i, track in tracks.items()}

    p, g = kept(pred), kept(gt)
    total = sum(map(len, p.values())), sum(map(len, g.values()))
    best = (0.0, 0)
    small, large, swap = (p, g, False) if len(p) <= len(g) else (g, p, True)
    for chosen in itertools.permutations(large, len(small)):
        pairs = [(j, i) if swap else (i, j) for i, j in zip(small, chosen, strict=True)]
        ious = [[cell_iou(p[i][t], g[j][t]) for t in p[i].keys() & g[j].keys()] for i, j in pairs]
        hits = sum(v >= 0.5 for row in ious for v in row)
        best = max(best, (hits + 1e-6 * sum(map(sum, ious)), hits))
    got = tr.identity_reward(pred, gt, 0.5, exclude)
    assert got["idtp"] == best[1]
    assert got["idf1"] == pytest.approx(2 * best[1] / sum(total) if all(total) else 0)
    assert all(any(cell_iou(p[i][t], g[j][t]) for t in p[i].keys() & g[j].keys()) for i, j in got["pairs"])
    labels = random.sample(range(20), len(pred))
    renamed = dict(zip(labels, pred.values(), strict=True))
    assert tr.identity_reward(renamed, gt, 0.5, exclude)["idf1"] == got["idf1"]


def test_overlap_decides_where_hits_do_not():
    far, near = {1: [8, 0, 18, 10]}, {1: [6, 0, 16, 10]}  # both below the threshold
    for pred in ({1: far, 2: near}, {1: near, 2: far}):
        got = tr.identity_reward(pred, {5: {1: [0, 0, 10, 10]}})
        assert got["pairs"] == [[next(i for i, track in pred.items() if track is near), 5]] and got["idtp"] == 0


def test_shotgun_of_tracks_costs_identity():
    gt = {1: {t: [t, 0, t + 4, 4] for t in range(1, 5)}}
    spam = {k: {t: [t + k, 0, t + k + 4, 4] for t in range(1, 5)} for k in range(10)}
    assert tr.identity_reward(gt, gt)["idf1"] == 1
    assert tr.identity_reward(spam, gt)["idf1"] == pytest.approx(2 * 4 / (40 + 4))


# --- words and times ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,golds,want",
    [
        ("The fox, grinning!", ["grinning fox"], 1),
        ("looking ahead", ["looks ahead", "looking"], 2 / 3),
        ("", "rabbit", 0),
        ("rabbit", "rabbit", 1),  # a phrase instead of a list
        ("rabbit", [], 0),
        ("the", ["a"], 0),
        ("ＦＯＸ", ["fox"], 1),  # full-width letters are the same letters after NFKC
        ("fox fox fox", ["fox"], 0.5),  # repeating does not pay
        ("fox fox", ["fox fox"], 1),
        ("fox rabbit bear wolf", ["fox"], 0.4),  # neither does listing
        ("grin-ning", ["grin ning"], 1),
    ],
)
def test_attribute_reward(text, golds, want):
    assert tr.attribute_reward(text, golds) == pytest.approx(want)


@relaxed
@given(st.lists(cells, min_size=4, max_size=4))
def test_temporal_iou_counts_frames(ends):
    s, e, s2, e2 = ends
    a, b = set(range(s, e)), set(range(s2, e2))
    want = len(a & b) / len(a | b) if a and b else 0
    assert tr.temporal_iou((s, e), (s2, e2)) == pytest.approx(want)


def test_frame_ranges():
    assert tr.frame_range("frames 2-5") == (2, 6) and tr.frame_range("2 ~ 5") == tr.frame_range("2 to 5") == (2, 6)
    assert tr.frame_range("frame two") is None


# --- the whole reward -----------------------------------------------------------------------------------------------


def walk(n, start=10, step=7):
    return {str(t): [start + step * t, 10, start + step * t + 30, 60] for t in range(1, n + 1)}


def gt(**changes):
    base = {
        "T": 5,
        "tracks": {
            "1": {"names": ["nick", "fox"], "boxes": walk(5)},
            "2": {"names": ["judy"], "boxes": walk(5, 90, -9)},
        },
        "query": {"id": 1, "frame": 1},
        "attrs": {"action": ["grinning"]},
    }
    return base | changes


def say(tracks_, attrs="action=grinning"):
    lines = [tr.write_track(i, name, {int(t): b for t, b in track.items()}) for i, (name, track) in tracks_.items()]
    return "<answer>" + "\n".join(lines) + (f"<attr>{attrs}</attr>" if attrs else "") + "</answer>"


RIGHT = {7: ("fox", walk(5)), 3: ("judy", walk(5, 90, -9))}


def test_the_perfect_answer_gets_one_whatever_its_ids():
    assert tr.utr_reward(say(RIGHT), gt()) == {"total": 1, "format": 1, "traj": 1, "id": 1, "attr": 1}


def test_the_query_frame_is_free_and_the_static_copy_earns_no_trajectory():
    one = gt(tracks={"1": gt()["tracks"]["1"]})
    without = {7: ("fox", {t: box for t, box in walk(5).items() if t != "1"})}
    assert tr.utr_reward(say(without), one)["total"] == 1
    copied = tr.utr_reward(say({7: ("fox", dict.fromkeys(walk(5), walk(5)["1"]))}), one)
    assert copied["traj"] == 0
    # An unqueried track is graded without lift.
    unqueried = tr.utr_reward(say({7: ("fox", dict.fromkeys(walk(5), walk(5)["1"]))}), gt(query=None))
    assert unqueried["traj"] == pytest.approx(tr.trajectory_iou(dict.fromkeys(walk(5), walk(5)["1"]), walk(5)) / 2)


def test_parts_are_means_and_wrong_answers_cost():
    parts = tr.utr_reward(say({7: ("wolf", walk(5))}), gt())
    assert parts["traj"] == 0.5 and parts["attr"] == pytest.approx(1 / 3)  # judy and both names are missing
    assert parts["id"] == pytest.approx(2 * 4 / (4 + 8))
    want = 0.1 + 0.9 * (0.5 * 0.5 + 0.25 * parts["id"] + 0.25 * parts["attr"])
    assert parts["total"] == pytest.approx(want)
    other = tr.utr_reward(say({7: ("wolf", walk(5))}), gt(), (1, 0, 3), 0.5)
    assert other["total"] == pytest.approx(0.5 + 0.5 * (0.5 + 3 / 3) / 4)
    assert tr.utr_reward(say(RIGHT, ""), gt())["attr"] == pytest.approx(2 / 3)  # missing key
    squared = tr.utr_reward(say({7: ("fox", walk(5, 12)), 3: RIGHT[3]}), gt(query=None), power=2)
    plain = tr.utr_reward(say({7: ("fox", walk(5, 12)), 3: RIGHT[3]}), gt(query=None))
    iou = 28 / 32
    assert plain["traj"] == pytest.approx((iou + 1) / 2) and squared["traj"] == pytest.approx((iou**2 + 1) / 2)


def test_frames_outside_the_clip_are_dropped():
    long = {7: ("fox", walk(5) | {"6": [0, 0, 5, 5], "0": [0, 0, 5, 5]}), 3: RIGHT[3]}
    parts = tr.utr_reward(say(long), gt())
    assert (parts["format"], parts["traj"], parts["id"]) == (0, 1, 1)


@pytest.mark.parametrize("text", ["", say(RIGHT) * 2, "no answer", "<answer></answer>"])
def test_no_or_several_answers_are_worth_nothing(text):
    assert tr.utr_reward(text, gt()) == {"total": 0, "format": 0, "traj": 0, "id": 0, "attr": 0}


def test_what_cannot_be_graded_is_left_out():
    bare = gt(tracks={"1": {"boxes": walk(5)}}, attrs={})
    parts = tr.utr_reward(say({7: ("x", walk(5))}, ""), bare)
    assert parts == {"total": 1, "format": 1, "traj": 1, "id": 1, "attr": None}
    words_only = tr.utr_reward(say({7: ("x", walk(1))}), {"T": 5, "attrs": {"action": ["grinning"]}})
    assert words_only == {"total": 1, "format": 1, "traj": None, "id": None, "attr": 1}
    nothing = tr.utr_reward(say({7: ("x", walk(1))}), {"T": 5})
    assert nothing["total"] == pytest.approx(0.1)
    # The query gives the only box away: no trajectory to grade, but the name still is.
    given = tr.utr_reward(
        say({7: ("fox", walk(1))}, ""), gt(tracks={"1": {"names": ["fox"], "boxes": walk(1)}}, attrs={})
    )
    assert given == {"total": 1, "format": 1, "traj": None, "id": None, "attr": 1}


@relaxed
@given(st.data())
def test_any_perfect_answer_gets_one(data):
    T = data.draw(st.integers(2, 6))
    ids = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=3, unique=True))
    target = {}
    for k, i in enumerate(ids):
        frames = data.draw(st.sets(st.integers(1, T), min_size=1))
        track = {t: [200 * k + 11 * t, 0, 200 * k + 11 * t + 9, 5] for t in frames}
        target[i] = {"names": [data.draw(words.filter(lambda w: tr.attribute_reward(w, [w]) > 0))], "boxes": track}
    shown = data.draw(st.sampled_from(ids))
    query = {"id": shown, "frame": min(target[shown]["boxes"])} if data.draw(st.booleans()) else None
    truth = {"T": T, "tracks": target, "query": query, "attrs": {"action": ["run"], "frames": [1, 2]}}
    labels = data.draw(st.permutations(range(40, 40 + len(ids))))
    text = say({new: (t["names"][0], t["boxes"]) for new, t in zip(labels, target.values(), strict=True)},
               "action=run; frames=1-2")  # fmt: skip
    parts = tr.utr_reward(text, truth)
    gradable = [t for t in target.values() if query is None or t["boxes"].keys() - {query["frame"]}]
    if gradable and len(gradable) == len(target):
        assert parts["total"] == pytest.approx(1)
    else:
        assert parts["traj"] in (None, 1) and parts["id"] in (None, 1)


def test_contrast_bonus():
    full, single = [1.0, 0.5, 0.375, 0.125], [0.25, 0.5]
    np.testing.assert_allclose(tr.contrast_bonus(full, single), [0.3, 0.3, 0, 0])
    np.testing.assert_allclose(tr.contrast_bonus(full, single, mu=0.125), 0)  # .5 is not above .375 + .125
    np.testing.assert_allclose(tr.contrast_bonus(full, [0.5]), 0)
    assert tr.contrast_bonus(full, []).tolist() == [0, 0, 0, 0]


# --- queries --------------------------------------------------------------------------------------------------------


def clip(frames=6, **changes):
    def path(start, step, shown):
        return {str(t): [start + step * t, 20, start + step * t + 100, 200] for t in shown}

    return {
        "id": "clip", "size": [640, 480], "resized": [644, 476], "caption": "A fox meets a rabbit.",
        "frames": [{"idx": t, "time": (t - 1) / 2} for t in range(1, frames + 1)],
        "tracks": [
            {"id": 4, "names": ["nick", "fox"], "boxes": path(0, 40, range(1, frames + 1)), "appearance": ["red fur"],
             "action": [{"span": [1, 4], "text": "grinning"}], "location": [{"span": [1, frames], "text": "on the side"}]},
            {"id": 9, "names": ["judy", "rabbit"], "boxes": path(420, -30, range(2, frames)), "appearance": ["grey fur"],
             "action": [{"span": [2, 3], "text": "running"}, {"span": [4, 5], "text": "waving"}]},
        ],
    } | changes  # fmt: skip


@pytest.mark.parametrize("style,frame", [("qwen2_5_vl", (644, 476)), ("qwen2_vl", (1000, 1000))])
@pytest.mark.parametrize("kind", list(tracks.QUERIES))
def test_the_gold_answer_of_every_query_gets_one(kind, style, frame):
    for seed in range(6):
        record = tracks.make_query(clip(), np.random.default_rng(seed), [kind])
        text = tracks.answer(record, style, thinking=bool(seed % 2), thought="it moves")
        parts = tracks.reward(text, record, style)
        assert all(value == pytest.approx(1) for value in parts.values()) and parts["attr"] == 1
        assert tracks.parse(text)["tracks"][0]["id"] in record["query"]["ids"]
        target = next(t for t in record["tracks"] if t["id"] == record["query"]["ids"][0])
        first = min(target["boxes"], key=int)
        written = next(t for t in tracks.parse(text)["tracks"] if t["id"] == target["id"])["boxes"][int(first)]
        scale = np.array(frame * 2) / np.array([640, 480] * 2)
        np.testing.assert_allclose(written, np.array(target["boxes"][first]) * scale, atol=0.5)
        other = "qwen2_vl" if style == "qwen2_5_vl" else "qwen2_5_vl"
        if kind != "trajectory":
            assert tracks.reward(text, record, other)["reward"] < 0.9  # the frames of text and record must agree


def test_prompts_name_frames_first_and_format_last():
    rng = np.random.default_rng(0)
    for kind in tracks.QUERIES:
        record = tracks.make_query(clip(), rng, [kind], caption_chance=1.0)
        lines = tracks.prompt(record).split("\n")
        assert "Frame1 to Frame6" in lines[0] and "Track k:" in lines[-1] and "<answer>" in lines[-1]
        assert "<think>" not in lines[-1] and "<think>" in tracks.prompt(record, thinking=True)
        plain = tracks.prompt(record, form="plain").split("\n")
        assert plain[2] in tracks.CAPTION_QUESTIONS and "<answer>" not in plain[-1]
        text = tracks.answer(record, form="plain")
        assert text.endswith(clip()["caption"]) and "<answer>" not in text
        assert tracks.parse(text)["tracks"] == tracks.parse(tracks.answer(record))["tracks"]
        assert all(5 <= len(wordings) <= 10 for wordings in tracks.QUERIES.values())


def test_kinds_are_mixed_uniformly_and_cues_name_one_subject():
    rng = np.random.default_rng(0)
    twins = clip()
    twins["tracks"][1] = twins["tracks"][1] | {"names": ["judy", "fox"], "appearance": ["red fur"]}
    seen = [tracks.make_query(twins, rng)["query"] for _ in range(500)]
    share = np.array([sum(q["kind"] == kind for q in seen) for kind in tracks.QUERIES]) / 500
    np.testing.assert_allclose(share, 0.2, atol=0.06)
    cues = {q.get("cue") for q in seen if q["kind"] == "phrase"}
    assert cues == {"nick", "judy"}  # fox and red fur fit both
    assert {tuple(q["ids"]) for q in seen if q["kind"] == "category"} == {(4, 9)}
    assert 0.4 < np.mean(["caption_wording" in q for q in seen]) < 0.6
    assert tracks.make_query(clip(tracks=[]), rng) is None
    with pytest.raises(ValueError, match="kind"):
        tracks.make_query(clip(), rng, ["T9"])


def test_long_clips_are_cut_and_renumbered():
    long = clip(40, images=list(range(40)))
    long["tracks"][0]["boxes"]["40"] = [700, 20, 800, 200]  # outside the image
    cut = tracks.cut_clip(long, max_frames=8)
    assert [f["idx"] for f in cut["frames"]] == list(range(1, 9)) and len(cut["tracks"]) == 2
    source = [f["source"] for f in cut["frames"]]
    assert source[0] == 1 and source[-1] == 40 and cut["images"] == [s - 1 for s in source]
    fox = cut["tracks"][0]
    for new, old in enumerate(source, start=1):
        if str(new) in fox["boxes"]:
            assert fox["boxes"][str(new)] == long["tracks"][0]["boxes"][str(old)]
    assert "8" not in fox["boxes"]
    grin = [new for new, old in enumerate(source, start=1) if old <= 4]
    assert fox["action"] == [{"span": [min(grin), max(grin)], "text": "grinning"}]
    assert long["tracks"][0]["boxes"]["1"] == clip(40)["tracks"][0]["boxes"]["1"]  # the record itself is untouched


def test_action_of_the_query_frame_is_the_gold():
    rng = np.random.default_rng(0)
    golds = {}
    for _ in range(200):
        record = tracks.make_query(clip(), rng, ["box"])
        if record["query"]["id"] == 9:
            golds[record["query"]["frame"]] = tracks.ground_truth(record)["attrs"]["action"]
    assert golds == {2: ["running"], 3: ["running"], 4: ["waving"], 5: ["waving"]}


def test_tracks_of_experts_that_are_good_enough():
    boxes_ = walk(6)
    assert tracks.keep_track({"boxes": boxes_, "score": 0.4, "detector_iou": 0.5})
    assert not tracks.keep_track({"boxes": boxes_, "score": 0.39})
    assert not tracks.keep_track({"boxes": boxes_, "detector_iou": 0.49})
    assert not tracks.keep_track({"boxes": walk(3)})
    assert tracks.keep_track({"boxes": {t: b for t, b in walk(8).items() if t not in "34"}})  # one gap
    assert not tracks.keep_track({"boxes": {t: b for t, b in walk(8).items() if t not in "35"}})  # two gaps


def test_metric_averages_the_parts_and_reports_the_static_copy():
    rng = np.random.default_rng(3)
    records = [tracks.make_query(clip(), rng, [kind]) for kind in ("phrase", "trajectory")]
    out = tracks.Tracks().metric([tracks.answer(records[0]), ""], records)
    assert out["reward"] == out["traj"] == out["format"] == out["attr"] == 0.5 and 0 < out["static_traj"] < 1
    assert tracks.Tracks().metric([], []) == {}


@pytest.mark.parametrize("option", [{"form": "json"}, {"style": "pixels"}])
def test_unknown_options_are_refused(option):
    record = tracks.make_query(clip(), np.random.default_rng(0))
    for call in (tracks.prompt, tracks.answer):
        with pytest.raises(ValueError, match=next(iter(option))):
            call(record, **option)


def test_rewards_are_finite_for_any_text():
    record = tracks.make_query(clip(), np.random.default_rng(0), ["box"])
    for text in ("[" * 10**6, say({1: ("a", {1: [0, 0, 10**300, 10**300]})}), "<Id1>" * 5000, "\ud800"):
        assert all(math.isfinite(value) for value in tracks.reward(text, record).values())
