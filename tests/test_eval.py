"""Evaluation against brute force, pycocotools run from the written files, and itself when interrupted."""

import contextlib
import io
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from jaxmllm import intervals, tasks
from jaxmllm.errors import InputError
from jaxmllm.eval import measure, tables
from jaxmllm.eval.harness import evaluate
from jaxmllm.geometry import box_iou
from jaxmllm.intervals import Interval
from jaxmllm.runfiles import read_lines
from jaxmllm.tasks import coco_ap as coco
from jaxmllm.tasks import counting, detection, grounding, ocr

SHARED = Path(os.environ.get("JAXMLLM_SHARED") or Path(__file__).resolve().parents[2] / "shared")
NAMES = ["cat", "dog", "owl"]


def grounding_records(n, seed=0, **fields):
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 300, (n, 2))
    high = low + rng.integers(20, 180, (n, 2))
    return [
        {"id": f"g{i}", "task": "grounding", "size": [500, 500], "expression": f"thing {i}", "box": [*a, *b], **fields}
        for i, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True))
    ]


def counting_records(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"id": f"c{i}", "task": "counting", "size": [100, 80], "label": ("cat", "dog")[i % 2], "count": k, "points": p}
        for i, k in enumerate(rng.integers(1, 6, n).tolist())
        for p in [rng.integers(10, 70, (k, 2)).tolist()]
    ]


def detection_records(n, seed=0, side=200):
    rng = np.random.default_rng(seed)
    records = []
    for i in range(n):
        low = rng.integers(0, side // 2, (rng.integers(1, 6), 2))
        boxes = np.concatenate([low, low + rng.integers(20, side // 2, low.shape)], axis=1).tolist()
        labels = [NAMES[k] for k in rng.integers(0, 3, len(boxes))]
        head = {"id": f"d{i}", "task": "detection", "size": [side, side], "categories": NAMES}
        records.append(head | {"boxes": boxes, "labels": labels})
    return records


def noisy_boxes(record, rng):
    """An answer with moved, missing, extra and wrongly named boxes."""
    found = [
        ([v + rng.integers(-9, 10) for v in box], label if rng.random() < 0.8 else "owl")
        for box, label in zip(record["boxes"], record["labels"], strict=True)
        if rng.random() < 0.85
    ]
    found += [([5, 5, 60 + i, 60], "cat") for i in range(rng.integers(0, 3))]
    return {"boxes": [[float(v) for v in box] for box, _ in found], "labels": [label for _, label in found]}


def scorer(truth, found):
    """COCOeval by pycocotools' own loading, silently."""
    with contextlib.redirect_stdout(io.StringIO()):
        target = COCO()
        target.dataset = json.loads(json.dumps(truth))
        target.createIndex()
        run = COCOeval(target, target.loadRes(json.loads(json.dumps(found))), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


# --- intervals ------------------------------------------------------------------------------------------------------


def test_bootstrap_counts_are_draws_with_replacement_and_do_not_depend_on_chunks(monkeypatch):
    whole = np.concatenate(list(intervals.resample(7, 50, seed=3)))
    assert whole.shape == (50, 7) and (whole.sum(1) == 7).all() and whole.max() > 1
    monkeypatch.setattr(intervals, "_CHUNK", 21)
    chunks = list(intervals.resample(7, 50, seed=3))
    assert len(chunks) == 17 and (np.concatenate(chunks) == whole).all()
    assert (np.concatenate(list(intervals.resample(7, 50, seed=4))) != whole).any()


def test_ratio_statistic_equals_repeating_the_records():
    rng = np.random.default_rng(0)
    top, bottom = rng.random((9, 2)), rng.integers(0, 3, (9, 2)).astype(float)
    value, samples = intervals.value_and_samples(intervals.ratio(top, bottom), 9, 40, seed=1)
    np.testing.assert_allclose(value, top.sum(0) / bottom.sum(0))
    for counts, sample in zip(np.concatenate(list(intervals.resample(9, 40, 1))), samples, strict=True):
        rows = np.repeat(np.arange(9), counts)
        np.testing.assert_allclose(sample, top[rows].sum(0) / bottom[rows].sum(0))


def test_interval_of_a_mean_has_the_width_of_its_standard_error_and_covers_the_truth():
    rng = np.random.default_rng(0)
    values = rng.random((400, 1))
    found = intervals.percentiles(*intervals.value_and_samples(intervals.ratio(values, np.ones_like(values)), 400))[0]
    error = values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    covered = 0
    for _ in range(200):
        sample = (rng.random((60, 1)) < 0.4).astype(float)
        i = intervals.percentiles(*intervals.value_and_samples(intervals.ratio(sample, np.ones((60, 1))), 60, 200))[0]
        covered += i.low <= 0.4 <= i.high
    assert 0.88 <= covered / 200 <= 0.99


def test_nothing_to_count_gives_no_interval():
    value, samples = intervals.value_and_samples(intervals.ratio(np.zeros((3, 1)), np.zeros((3, 1))), 3, 10)
    (found,) = intervals.percentiles(value, samples)
    assert np.isnan(found.value) and found.low is None


# --- COCO AP --------------------------------------------------------------------------------------------------------


def brute_force_ap(records, found, threshold):
    """AP by the definition, one class at a time: greedy matches in answer order, interpolated precision."""
    values = []
    for name in NAMES:
        hits, total = [], 0
        for record, answer in zip(records, found, strict=True):
            true = [b for b, label in zip(record["boxes"], record["labels"], strict=True) if label == name]
            free, total = list(range(len(true))), total + len(true)
            for box, label in zip(answer["boxes"], answer["labels"], strict=True):
                if label == name:
                    overlap, best = max([(float(box_iou(box, true[j])), j) for j in free], default=(0.0, -1))
                    hits.append(overlap >= threshold)
                    if hits[-1]:
                        free.remove(best)
        if not total:
            continue
        points, right = [], 0
        for seen, hit in enumerate(hits, 1):
            right += hit
            points.append((right / total, right / seen))
        levels = [max([p for r, p in points if r >= level], default=0.0) for level in np.linspace(0, 1, 101)]
        values.append(np.mean(levels))
    return np.mean(values)


@pytest.mark.parametrize("seed", range(6))
def test_ap_equals_brute_force_and_pycocotools(seed):
    rng = np.random.default_rng(seed)
    records = detection_records(12, seed)
    found = [noisy_boxes(record, rng) for record in records]
    ids = coco.category_ids(records)
    truth, results = coco.ground_truth(records, ids), coco.results(records, found, ids)
    names, statistic = coco.ap_statistic(truth, results)
    value = dict(zip(names, statistic(np.ones((1, 12), np.int64))[0], strict=True))
    steps = [brute_force_ap(records, found, t) for t in coco.IOU_THRESHOLDS]
    assert value["AP"] == pytest.approx(np.mean(steps), abs=1e-12)
    assert (value["AP50"], value["AP75"]) == pytest.approx((steps[0], steps[5]), abs=1e-12)
    assert 0.05 < value["AP"] < 0.95
    run = scorer(truth, results)
    theirs = dict(zip(("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"), run.stats, strict=False))
    for name, expected in theirs.items():
        assert (name in value) == (expected >= 0) and value.get(name, expected) == pytest.approx(expected, abs=1e-12)
    for k, category in enumerate(run.params.catIds):
        name = next(row["name"] for row in truth["categories"] if row["id"] == category)
        assert value[f"AP/{name}"] == pytest.approx(run.eval["precision"][:, :, k, 0, 2].mean(), abs=1e-12)


def test_ap_with_crowds_equals_pycocotools():
    rng = np.random.default_rng(1)
    records = detection_records(10, 1)
    for record in records[::2]:
        record |= {"crowd_boxes": [[0, 0, 120, 120]], "crowd_labels": ["cat"]}
    records[0]["boxes"].append([0, 0, 120, 120])  # a source may list the crowd among the objects too
    records[0]["labels"].append("cat")
    ids = coco.category_ids(records)
    truth = coco.ground_truth(records, ids)
    results = coco.results(records, [noisy_boxes(record, rng) for record in records], ids)
    assert sum(row["iscrowd"] for row in truth["annotations"]) == 5
    value = coco.ap_statistic(truth, results)[1](np.ones((1, 10), np.int64))[0]
    assert value[:3] == pytest.approx(scorer(truth, results).stats[:3], abs=1e-12)
    plain = [{**row, "iscrowd": 0} for row in truth["annotations"]]
    other = coco.ap_statistic({**truth, "annotations": plain}, results)[1](np.ones((1, 10), np.int64))[0]
    assert other[0] != value[0]


def test_a_resample_equals_pycocotools_on_repeated_images():
    """With one box an image and class, counting an image twice is the same as having it twice."""
    rng = np.random.default_rng(2)
    records = [{**r, "boxes": r["boxes"][:1], "labels": r["labels"][:1]} for r in detection_records(15, 2)]
    found = [{k: v[:1] for k, v in noisy_boxes(record, rng).items()} for record in records]
    ids = coco.category_ids(records)
    _, statistic = coco.ap_statistic(coco.ground_truth(records, ids), coco.results(records, found, ids))
    for counts in np.concatenate(list(intervals.resample(15, 8, seed=5))):
        rows = np.repeat(np.arange(15), counts)
        again, guess = [records[i] for i in rows], [found[i] for i in rows]
        expected = scorer(coco.ground_truth(again, ids), coco.results(again, guess, ids)).stats[0]
        assert statistic(counts[None])[0][0] == pytest.approx(expected, abs=1e-12)


def test_ap_of_nothing_said_is_zero_and_without_truth_there_is_none():
    records = detection_records(3)
    ids = coco.category_ids(records)
    truth = coco.ground_truth(records, ids)
    names, statistic = coco.ap_statistic(truth, [])
    assert (statistic(np.ones((2, 3), np.int64)) == 0).all() and "AP" in names
    names, statistic = coco.ap_statistic({**truth, "annotations": []}, [])
    assert names == [] and statistic(np.ones((2, 3), np.int64)).shape == (2, 0)


def test_category_and_image_ids():
    records = detection_records(2)
    assert coco.category_ids(records) == {"cat": 1, "dog": 2, "owl": 3}
    assert coco.category_ids(records, {"owl": 1, "dog": 7, "cat": 9, "more": 2}) == {"cat": 9, "dog": 7, "owl": 1}
    assert coco.category_ids([{"categories": ["toothbrush", "person"]}]) == {"toothbrush": 90, "person": 1}
    assert coco.image_ids([{"image_id": 5}, {"image_id": 3}]) == [5, 3]
    assert coco.image_ids([{"image_id": "a"}, {}]) == [1, 2]
    with pytest.raises(InputError, match="image_id 4 occurs twice"):
        coco.image_ids([{"id": "a", "image_id": 4}, {"id": "b", "image_id": 4}])
    with pytest.raises(InputError, match="'d0'.*'fox'"):
        coco.ground_truth([{**records[0], "labels": ["fox"] * len(records[0]["labels"])}], {"cat": 1})


# --- harness --------------------------------------------------------------------------------------------------------


def gold(records):
    modules = {"grounding": grounding, "counting": counting, "detection": detection, "ocr": ocr}
    return [modules[r["task"]].answer(r) for r in records]


@pytest.mark.parametrize("style", ["qwen2_vl", "qwen2_5_vl"])
def test_gold_answers_score_one_in_original_pixels(tmp_path, style):
    """Boxes are written in the style's frame; sizes are chosen so that rounding there loses nothing."""
    records = [{**r, "resized": [100, 400]} for r in detection_records(8)]
    for r in records:
        r["boxes"] = (np.array(r["boxes"]) // 2 * 2).tolist()
    got = evaluate(
        lambda batch: [detection.answer(r, style=style) for r in batch],
        records,
        out_dir=tmp_path,
        options={"style": style},
        n_resamples=50,
    )
    figures = got.sources["detection"].figures
    assert all(figures[name] == Interval(1.0, 1.0, 1.0) for name in ("AP", "AP50", "AP75", "AP/cat", "precision", "f1"))
    for line, record in zip(read_lines(tmp_path / "predictions.jsonl"), records, strict=True):
        np.testing.assert_allclose(line["prediction"]["boxes"], record["boxes"], rtol=1e-12)
        assert line["prediction"]["labels"] == line["target"]["labels"] == record["labels"]
    wrong = [{k: v for k, v in r.items() if k != "resized"} for r in records]
    mistaken = evaluate(
        lambda batch: [detection.answer({**r, "resized": [100, 400]}, style="qwen2_5_vl") for r in batch],
        wrong,
        out_dir=tmp_path / "wrong",
        n_resamples=10,
    )
    assert mistaken.sources["detection"].figures["AP"].value < 0.5


def test_figures_are_the_tasks_own_and_files_say_the_same(tmp_path):
    records = grounding_records(12) + counting_records(40)
    texts = dict(zip([r["id"] for r in records], gold(records), strict=True))
    texts |= {"g0": "no box", "g1": '[{"bbox_2d": [0, 0, 500, 500], "label": "x"}]', "c0": texts["c1"], "c3": ""}
    got = evaluate(lambda b: [texts[r["id"]] for r in b], records, out_dir=tmp_path, batch_size=5, n_resamples=100)
    for task in ("grounding", "counting"):
        own = [r for r in records if r["task"] == task]
        expected = tasks.get(task).metric([texts[r["id"]] for r in own], own)
        figures = got.sources[task].figures
        assert {name: figures[name].value for name in expected} == pytest.approx(expected)
        assert all(f.low is not None and f.low <= f.value <= f.high for f in figures.values())
        assert got.sources[task].n == len(own)
    cats = [r for r in records if r.get("label") == "cat"]
    assert got.sources["counting"].figures["accuracy/cat"].value == pytest.approx(
        counting.Counting().metric([texts[r["id"]] for r in cats], cats)["accuracy"]
    )
    assert measure.load(tmp_path) == got
    assert got.flat()["grounding/IoU"] == got.sources["grounding"].figures["IoU"].value
    lines = read_lines(tmp_path / "predictions.jsonl")
    assert [line["id"] for line in lines] == [r["id"] for r in records]
    assert lines[1]["prediction"] == {"boxes": [[0, 0, 500, 500]]} and lines[0]["prediction"] == {"boxes": []}
    assert lines[13]["prediction"]["count"] == records[13]["count"] and lines[2]["figures"]["IoU"] == pytest.approx(1)


def test_pooled_detection_figures_have_intervals_and_equal_the_metric(tmp_path):
    rng = np.random.default_rng(0)
    records = detection_records(10)
    texts = {r["id"]: detection.answer({**r, **noisy_boxes(r, rng)}) for r in records} | {"d3": "none"}
    got = evaluate(lambda batch: [texts[r["id"]] for r in batch], records, out_dir=tmp_path, n_resamples=100)
    expected = detection.Detection().metric(list(texts.values()), records)
    figures = got.sources["detection"].figures
    assert {name: figures[name].value for name in expected} == pytest.approx(expected)
    assert all(figures[name].low < figures[name].value < figures[name].high for name in ("precision", "recall", "AP"))
    truth = json.loads((tmp_path / "detection" / "ground_truth.json").read_text())
    results = json.loads((tmp_path / "detection" / "coco_results.json").read_text())
    assert figures["AP"].value == pytest.approx(scorer(truth, results).stats[0], abs=1e-12)


class Stopped(Exception):
    pass


def failing(after):
    asked = []

    def generate(batch):
        if len(asked) >= after:
            raise Stopped
        asked.extend(r["id"] for r in batch)
        return gold(batch)

    return generate, asked


def test_a_stopped_evaluation_goes_on_and_ends_the_same(tmp_path):
    records = grounding_records(11) + counting_records(6)
    whole = evaluate(gold, records, out_dir=tmp_path / "whole", batch_size=3, n_resamples=50)
    out = tmp_path / "stopped"
    first, asked = failing(6)
    with pytest.raises(Stopped):
        evaluate(first, records, out_dir=out, batch_size=3, n_resamples=50)
    with (out / "predictions.jsonl").open("ab") as file:
        file.write(b'{"source": "grounding", "id": "g6", "te')  # killed while writing
    second, again = failing(99)
    progress = []
    got = evaluate(
        second, records, out_dir=out, batch_size=4, n_resamples=50, on_batch=lambda *done: progress.append(done)
    )
    assert asked + again == [r["id"] for r in records] and len(asked) == 6
    assert got == whole and progress[-1] == (17, 17) and all(a[0] < b[0] for a, b in pairwise(progress))
    for name in ("predictions.jsonl", "metrics.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    third, nothing = failing(99)
    assert evaluate(third, records, out_dir=out, n_resamples=50) == whole and nothing == []


def test_another_config_or_other_data_is_refused(tmp_path):
    records = grounding_records(4)
    evaluate(gold, records, out_dir=tmp_path, options={"style": "qwen2_5_vl"}, config={"model": "a"}, n_resamples=5)
    with pytest.raises(InputError) as error:
        evaluate(gold, records, out_dir=tmp_path, options={"style": "qwen2_vl"}, config={"model": "b"})
    assert "config.model: 'a' -> 'b'" in str(error.value)
    assert "options.style: 'qwen2_5_vl' -> 'qwen2_vl'" in str(error.value)
    same = {"options": {"style": "qwen2_5_vl"}, "config": {"model": "a"}, "out_dir": tmp_path}
    with pytest.raises(InputError, match="id 'g2'.*the data changed"):
        evaluate(gold, [{**r, "box": [1, 2, 3, 4]} if r["id"] == "g2" else r for r in records], **same)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": []}, "no records"),
        ({"source": grounding_records(2) + grounding_records(1)}, "records 0 and 2 both have the id 'g0'"),
        ({"generate": lambda batch: ["x"] * (len(batch) + 1)}, "generate returned 4 of"),
        ({"generate": lambda batch: [1] * len(batch)}, "'int'"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"options": {"stile": "a"}}, "option 'stile'"),
        ({"source": [{"id": 1, "size": [2, 2]}], "task": None}, "record 0: task: None is unknown"),
    ],
)
def test_bad_input_gives_one_clear_error(tmp_path, change, message):
    call = {"generate": gold, "source": grounding_records(3), "task": "grounding", "out_dir": tmp_path} | change
    if call["task"] is None:
        call.pop("options", None)
    with pytest.raises(InputError, match=message):
        evaluate(**call)


def test_named_sources_pictures_and_groups(tmp_path, caplog):
    picture = Image.new("RGB", (640, 480), "red")
    records = grounding_records(20, images=[picture], depth=1) + grounding_records(20, seed=1, depth=2)
    records = [{**r, "id": i} for i, r in enumerate(records)]
    assert "original size" not in caplog.text
    sources = {"a:b/../c": records, "plain": records[20:]}
    got = evaluate(gold, sources, out_dir=tmp_path, save_pictures=2, by="depth", n_resamples=20)
    assert set(got.sources) == {"a:b/../c", "plain"}
    assert got.sources["a:b/../c"].figures["Acc@0.5/2"].value == 1
    kept = [line["picture"] for line in read_lines(tmp_path / "predictions.jsonl")]
    assert [path is not None for path in kept] == [True, True] + [False] * 58
    assert all(Path(path).parent == Path("pictures") for path in kept[:2])
    with Image.open(tmp_path / kept[0]) as small:
        assert max(small.size) == 320
    assert caplog.text.count("original size") == 1
    few = evaluate(gold, records[1:], out_dir=tmp_path / "few", by="depth", n_resamples=20)
    assert "Acc@0.5/2" not in few.sources["grounding"].figures  # 19.5 records a group


def test_a_chat_is_asked_without_its_last_answer_and_compared_with_it(tmp_path):
    user = {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Read it."}]}
    record = {"id": 1, "messages": [user, {"role": "assistant", "content": "hello world"}]}
    seen = []
    got = evaluate(lambda b: seen.extend(b) or ["hello there"], [record], out_dir=tmp_path, n_resamples=5)
    assert seen[0]["messages"] == [user]
    assert got.sources["chat"].figures["f1"].value == 0.5
    assert read_lines(tmp_path / "predictions.jsonl")[0]["question"] == "Read it."


def test_huge_and_hostile_answers_are_kept_as_text(tmp_path):
    records = grounding_records(5) + detection_records(3) + counting_records(2)
    hostile = ['[{"bbox_2d": [0, 0, 1e308, 1e308], "label": "cat"}]', "\ud800\x00\n", "[" * 5000, "NaN", ""]
    answers = iter(hostile * 2)
    out = tmp_path / "out"
    records = [{**r, "resized": [10, 10]} for r in records]
    evaluate(lambda b: [next(answers) for _ in b], records, out_dir=out, n_resamples=9)
    assert [line["text"] for line in read_lines(out / "predictions.jsonl")] == hostile * 2
    assert all(np.isfinite(v) for v in measure.load(out).flat().values())


def test_change_between_two_evaluations_is_paired(tmp_path):
    records = grounding_records(40) + detection_records(12)
    rng = np.random.default_rng(0)
    right = set(rng.choice(40, 16, replace=False).tolist())
    noise = {r["id"]: noisy_boxes(r, rng) for r in records[40:]}

    def answers(batch, known):
        return [
            grounding.answer(r if int(r["id"][1:]) in known else {**r, "box": [0, 0, 9, 9]})
            if r["task"] == "grounding"
            else detection.answer({**r, **noise[r["id"]]} if known is right else r)
            for r in batch
        ]

    evaluate(lambda b: answers(b, right), records, out_dir=tmp_path / "before", n_resamples=100)
    better = right | {i for i in range(40) if i % 3 == 0}
    evaluate(lambda b: answers(b, better), records, out_dir=tmp_path / "after", n_resamples=100)
    changes = measure.compare(tmp_path / "before", tmp_path / "after")
    by_name = {c.name: c for c in changes["grounding"]}
    change = by_name["Acc@0.5"]
    hits = np.array([[i in right, i in better] for i in range(40)], float)
    assert (change.before.value, change.after.value) == tuple(hits.mean(0))
    draws = [(hits[np.repeat(np.arange(40), c)] @ [-1, 1]).mean() for c in np.concatenate(list(intervals.resample(40)))]
    assert [change.difference.low, change.difference.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]))
    assert change.difference.low > 0 and change.verdict == "better" and change.before.high > change.after.low
    ap = {c.name: c for c in changes["detection"]}["AP"]
    assert ap.difference.value == pytest.approx(ap.after.value - ap.before.value) and ap.verdict == "better"
    back = {c.name: c for c in measure.compare(tmp_path / "after", tmp_path / "before")["grounding"]}
    assert back["Acc@0.5"].verdict == "worse" and back["Acc@0.5"].difference.value == -change.difference.value
    same = measure.compare(tmp_path / "after", tmp_path / "after")
    assert {c.verdict for rows in same.values() for c in rows} <= {"unclear", ""}


def test_direction_of_figures():
    def change(task, name, sign):
        way = measure.direction(tasks.get(task), name)
        return measure.Change(name, Interval(1), Interval(1), Interval(sign * 1.0, sign - 0.5, sign + 0.5), way).verdict

    assert (change("counting", "mae", 1), change("counting", "mae/cat", -1)) == ("worse", "better")
    assert (change("grounding", "IoU", 1), change("detection", "boxes", 1)) == ("better", "")
    assert change("ocr", "edit_distance", -1) == "better"
    assert change("foresight", "future_ade", 1) == "worse" and change("foresight", "static_ade", 1) == ""
    assert change("grounding", "perplexity", 1) == "", "an unknown figure is neutral"
    assert change("grounding", "reward", 1) == change("grounding", "reward_short", 1) == "better"
    assert measure.Change("IoU", Interval(1), Interval(2), None, 1).verdict == "unclear"


def test_tables(tmp_path):
    got = evaluate(gold, counting_records(4), out_dir=tmp_path, n_resamples=5)
    text = tables.markdown(tables.evaluation_rows(got))
    assert "| counting | 4 | accuracy | 1.000 [1.000, 1.000] |" in text.splitlines()
    rows = tables.change_rows({"x|y": measure.compare(tmp_path, tmp_path)["counting"]})
    assert "x\\|y" in tables.markdown(rows) and "≈ unclear" in tables.markdown(rows)
    console = Console(file=io.StringIO(), width=120)
    console.print(tables.terminal([["a", "b"], ["[red]evil[/red]", "▲ better"]]))
    assert "[red]evil[/red]" in console.file.getvalue()


@pytest.mark.skipif(not (SHARED / "data/bccd/val.json").exists(), reason="no real photographs here")
def test_real_annotations_score_one_against_their_own_file(tmp_path):
    path = SHARED / "data/bccd/val.json"
    raw = json.loads(path.read_text())
    names = {c["id"]: c["name"] for c in raw["categories"]}
    records = []
    for image in raw["images"]:
        rows = [a for a in raw["annotations"] if a["image_id"] == image["id"]]
        corners = [[a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]] for a in rows]
        labels = [names[a["category_id"]] for a in rows]
        head = {"task": "detection", "size": [image["width"], image["height"]], "categories": list(names.values())}
        head |= {"image_id": image["id"], "id": image["file_name"]}
        records.append(head | {"boxes": corners, "labels": labels})
    got = evaluate(gold, records, out_dir=tmp_path, n_resamples=20)
    results = json.loads((tmp_path / "detection/coco_results.json").read_text())
    run = scorer(raw, results)
    assert run.stats[0] == pytest.approx(1.0, abs=1e-3)  # answers are whole pixels, and so are these boxes
    assert got.sources["detection"].figures["AP"].value == pytest.approx(run.stats[0], abs=1e-12)
