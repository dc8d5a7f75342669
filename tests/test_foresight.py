"""Foresight: every format of questions and answers, the reward, records drawn from clips."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.geometry import box_iou
from jaxmllm.tasks import foresight, foresight_records, trajectories
from jaxmllm.tasks.trajectories import parse_trajectories

# ---- questions and answers

SIZE = [200, 100]


def line(start, step, frames):
    x, y = start
    return {
        str(t): [x + step[0] * (t - 1), y + step[1] * (t - 1), x + 20 + step[0] * (t - 1), y + 20 + step[1] * (t - 1)]
        for t in frames
    }


def clip(shown=3, last=5):
    return {
        "id": "c", "images": [f"{t}.png" for t in range(shown)], "size": SIZE, "caption": "Two dogs and a cat.",
        "frames": [{"idx": t + 1} for t in range(shown)],
        "tracks": [
            {"id": 5, "names": ["Rex", "dog"], "boxes": line((100, 10), (5, 0), range(1, last + 1)),
             "appearance": ["brown dog"], "action": [{"span": [1, 3], "text": "walking"},
                                                     {"span": [4, 5], "text": "jumping"}]},
            {"id": 9, "names": ["cat"], "boxes": line((20, 60), (0, -1), range(1, last + 1)),
             "appearance": ["grey cat"], "action": [{"span": [1, last], "text": "sitting"}]},
            {"id": 2, "names": ["dog"], "boxes": line((50, 60), (0, 0), range(2, last + 1)), "appearance": ["pup"]},
        ],
    }  # fmt: skip


def query(**fields):
    return clip() | {"task": "foresight", "query": fields}


MERLIN = foresight.Foresight(coord_space="norm1000")  # the published form


def test_prompt_puts_a_frame_tag_before_every_image_and_names_task_and_format():
    record = query(kind="tracking", ids=[5, 9])
    text = foresight.prompt(record)
    assert text.startswith("frame1:<image>\n,frame2:<image>\n and frame3:<image>\n,")
    # identities are numbered by the left side of the first box: the cat is 1
    assert "cat<Id1>Frame1:[100,600,200,800]</Id1>,dog<Id2>Frame1:[500,100,600,300]</Id2>" in text
    assert "object tracking" in text and "class<Idi>Frame t:[xmin,ymin,xmax,ymax]</Idi>" in text
    bare = foresight.prompt(record, precise=False)
    assert bare.endswith("\n,Track cat<Id1>Frame1:[100,600,200,800]</Id1>,dog<Id2>Frame1:[500,100,600,300]</Id2>.")
    assert foresight.append_newlines("a<image>\nb<image>") == "a<image>\nb<image>"
    parts = foresight.content(record)
    assert [p["type"] for p in parts] == ["text", "image"] * 3 + ["text"]
    assert [p["image"] for p in parts if p["type"] == "image"] == record["images"]
    assert "".join(p.get("text", "<image>") for p in parts) == text
    with pytest.raises(ValueError, match="places for images"):
        foresight.content({**record, "images": ["one"]})


STILL = {"images": ["a.png"], "size": SIZE, "expression": "the brown dog", "box": [100, 10, 120, 30],
         "boxes": [[0, 0, 100, 50], [100, 0, 200, 50], [0, 50, 50, 100]], "labels": ["dog", "cat", "dog"],
         "caption": "A quiet street."}  # fmt: skip
# record -> (part of the prompt, gold answer)
FORMATS = {
    "detection, all": (STILL | {"query": {"kind": "detection"}}, "detect every object",
                       "dog:[000,000,500,500],[000,500,250,1000];cat:[500,000,1000,500]."),
    "detection, listed": (STILL | {"categories": ["dog", "cat"], "query": {"kind": "detection"}}, "detect dog, cat in",
                          "dog:[000,000,500,500],[000,500,250,1000];cat:[500,000,1000,500]."),
    "detection, absent": (STILL | {"query": {"kind": "detection", "absent": "cow"}}, "detect cow in",
                          "There is no cow in the given frames."),
    "rec": (STILL | {"query": {"kind": "rec"}}, "the brown dog", "[500,100,600,300]"),
    "reg": (STILL | {"query": {"kind": "reg"}}, "[500,100,600,300]", "the brown dog"),
    "reasoning": (STILL | {"query": {"kind": "reasoning", "question": "why is {0} near {1}", "text": "{2} {x} is {9}"}},
                  "why is [000,000,500,500] near [500,000,1000,500]", "[000,500,250,1000] {x} is {9}"),
    "caption": (STILL | {"query": {"kind": "caption"}}, "<image>\n", "A quiet street."),
    "referring": (query(kind="referring", ids=[5], cue="the brown dog"), "give the path of the brown dog",
                  "Track1<Id1>Frame1:[500,100,600,300];Frame2:[525,100,625,300];Frame3:[550,100,650,300]</Id1>"),
    "generic": (query(kind="generic", ids=[9]), "the subject <Id1>Frame1:[100,600,200,800]</Id1>",
                "Its path is <Id1>Frame1:[100,600,200,800];Frame2:[100,590,200,790];Frame3:[100,580,200,780]</Id1>."),
    "generic, phrase": (query(kind="generic", ids=[9], cue="the cat"), "path of the cat",
                        "Its path is <Id1>Frame1:[100,600,200,800];Frame2:[100,590,200,790];Frame3:[100,580,200,780]</Id1>."),
    "horizon": (query(kind="referring", ids=[9], cue="the cat", horizon=1), "up to Frame4",
                "Track1<Id1>Frame1:[100,600,200,800];Frame2:[100,590,200,790];Frame3:[100,580,200,780];"
                "Frame4:[100,570,200,770]</Id1>"),
    "leaves the view": (query(kind="referring", ids=[2], cue="the pup"), "the pup",
                        "Track1<Id1>Frame2:[250,600,350,800];Frame3:[250,600,350,800]</Id1>"),
    "video_reg": (query(kind="video_reg", ids=[9], text="It is sitting."),
                  "object<Id1>Frame1:[100,600,200,800];Frame2:[100,590,200,790];Frame3:[100,580,200,780]</Id1>",
                  "It is sitting."),
    "absent": (query(kind="referring", ids=[], absent="a red cow"), "the path of a red cow",
               "There is no a red cow in the given frames."),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_the_table(name):
    record, asked, gold = FORMATS[name]
    text = foresight.prompt(record)
    task, skeleton = foresight.SKELETONS[record["query"]["kind"]]
    assert asked in text and foresight.answer(record) == gold
    assert (task in text.lower() and skeleton in text) or name == "caption"
    assert text == "<image>\n" if name == "caption" else len(text) > len("<image>\n")


def test_carriers_are_enough_and_all_hold_task_question_and_format():
    assert len(set(foresight.CARRIERS)) >= 15 and len(set(foresight.FUTURES)) >= 20
    record = query(kind="referring", ids=[5], cue="the brown dog")
    texts = {foresight.prompt(record | {"query": record["query"] | {"wording": n}}) for n in range(40)}
    assert len(texts) == len(foresight.CARRIERS)
    for text in texts:
        for part in ("referring tracking", "give the path of the brown dog", foresight.SKELETONS["referring"][1]):
            assert part.lower() in text.lower()


def test_coordinates_in_pixels_of_the_resized_image():
    record = query(kind="tracking", ids=[5]) | {"resized": [448, 448]}
    text = foresight.answer(record, "abs")
    assert text.startswith("dog<Id1>Frame1:[224, 44, 268, 134]")
    assert foresight.reward(text, record, "abs")["reward"] == 1
    assert foresight.reward(text, record)["reward"] < 0.5
    assert foresight.Foresight().gold(record) == text  # as the style grounds
    assert foresight.Foresight(style="qwen2_vl").gold(record) == foresight.answer(record)
    with pytest.raises(ValueError, match="coord_space"):
        foresight.answer(record, "pixels")


def test_chat_answers_write_the_path_first_and_then_the_future():
    record = query(
        kind="chat", ids=[5, 9], question="what will {subject} do {now}", future="jump", motions={"9": "sits still"}
    )
    text = foresight.prompt(record)
    assert "what will this dog<Id1>Frame1:[500,100,600,300]</Id1> do {now}" in text and "Id2" not in text
    subject = "<Id1>Frame1:[500,100,600,300];Frame2:[525,100,625,300];Frame3:[550,100,650,300]</Id1>"
    other = "<Id2>Frame1:[100,600,200,800];Frame2:[100,590,200,790];Frame3:[100,580,200,780]</Id2>"
    answer = f"From its path, this dog{subject} is about to jump, because cat{other} sits still."
    assert foresight.answer(record) == answer
    assert foresight.answer(record, trajectory=False) == (
        "From its path, this dog is about to jump, because cat sits still."
    )
    turns = foresight.dialogue(record)
    assert [a for _, a in turns] == ["Two dogs and a cat.", answer, f"The cat{other} sits still."]
    assert turns[0][0].count("<image>") == 3 and not any("<image>" in q for q, _ in turns[1:])
    assert foresight.reward(answer, record) is None  # free text stays supervised
    assert MERLIN.metric([answer], [record])["ao"] == 1


def test_checkable_future_is_half_of_the_reward():
    record = query(
        kind="chat",
        ids=[5],
        question="where is {subject} going",
        future="move right",
        choices=["move left", "move right"],
        correct="B",
    )
    gold = foresight.answer(record)
    assert gold.endswith("is about to move right. Answer: B.")
    assert " A. move left B. move right" in foresight.prompt(record)
    assert foresight.reward(gold, record)["reward"] == 1
    assert foresight.reward(gold.replace("Answer: B", "Answer: A"), record)["reward"] == 0.5
    assert foresight.reward("B", record) == {"format": 0, "iou": 0, "disp": 0, "choice": 1, "reward": 0.5}


def test_reading_the_choice():
    choices = ["move left", "move right"]
    for text, want in {
        "Answer: B": "B", "answer is (b).": "B", "B": "B", "(A)": "A", "A.": "A", "The answer: A, no, answer: B": "B",
        "it will Move Right": "B", "move left or move right": None, "": None, "Answer: C": None, "none": None,
        "A dog moves": None, "An answer I cannot give": None,
    }.items():  # fmt: skip
        assert foresight.parse_choice(text, choices) == want, text


def test_negative_questions_are_rewarded_for_denial_alone():
    record = query(kind="referring", ids=[], absent="a red cow")
    assert foresight.reward(foresight.answer(record), record) == {"reward": 1.0}
    assert foresight.reward("Track1<Id1>Frame1:[0,0,9,9]</Id1>", record) == {"reward": 0.0}
    assert foresight.reward("There is no cow<Id1></Id1>", record) == {"reward": 0.0}


def test_measures_and_baselines():
    record = query(kind="tracking", ids=[5], horizon=2)
    got = MERLIN.metric([foresight.answer(record)], [record])
    assert got["ao"] == got["reward"] == got["future_ao"] == got["velocity_ao"] == 1 and got["ade"] == 0
    gt = foresight.ground_truth(record)[1]
    ious = [float(box_iou(gt[1], gt[t])) for t in range(2, 6)]
    assert got["static_ao"] == pytest.approx(np.mean(ious))
    assert got["static_ade"] == pytest.approx(25 * 2.5) and got["static_fde"] == pytest.approx(100)
    assert got["coverage"] == got["hold_coverage"] == 1 and got["hold_ade"] == pytest.approx(
        1.5 * 25
    )  # of the last two
    silent = MERLIN.metric(["", ""], [record, STILL | {"query": {"kind": "rec"}}])
    assert silent["ao"] == silent["coverage"] == 0 and silent["static_ade"] == got["static_ade"]
    assert silent["ade"] == silent["fde"] == pytest.approx(1000 * math.sqrt(2))  # silence is not worth a still box
    half = foresight.answer(record).split(";Frame4")[0] + "</Id1>"
    assert MERLIN.metric([half], [record])["coverage"] == 0.5
    inverted = foresight.answer(record).replace("Frame5:[", "Frame5:[999,")
    assert MERLIN.metric([inverted], [record])["coverage"] == 0.75
    assert MERLIN.metric([], []) == {}


def test_prompts_that_copying_solves_are_dropped():
    still = clip() | {"tracks": [track for track in clip()["tracks"] if track["id"] == 2]}  # it does not move
    assert foresight_records.make_query(still, np.random.default_rng(0), ["tracking"], max_static=0.85) is None
    for seed in range(20):
        drawn = foresight_records.make_query(clip(), np.random.default_rng(seed), max_static=0.85)
        assert drawn["query"]["kind"] == "video_reg" or foresight.static_reward(drawn) <= 0.85
    static = foresight.static_reward(query(kind="tracking", ids=[9]))
    gt = foresight.ground_truth(query(kind="tracking", ids=[9]))[1]
    iou = np.mean([float(box_iou(gt[1], gt[t])) for t in (2, 3)])
    disp = np.mean([math.exp(-(10 * k) / math.sqrt(100 * 200)) for k in (1, 2)])
    assert static == pytest.approx(0.1 + 0.6 * iou + 0.3 * disp)


# ---- records


def test_clips_have_the_drawn_lengths_and_gaps():
    rng = np.random.default_rng(0)
    drawn = [foresight_records.sample_clip(60, rng) for _ in range(4000)]
    assert all(0 <= c[0] and c[-1] < 60 and len(set(np.diff(c))) == 1 for c in drawn)
    lengths, gaps = (
        np.bincount(v, minlength=6)[1:] / 4000 for v in ([len(c) for c in drawn], [c[1] - c[0] for c in drawn])
    )
    np.testing.assert_allclose(lengths, [0, 0.25, 0.25, 0.25, 0.25], atol=0.03)
    np.testing.assert_allclose(gaps, [0.2, 0, 0.267, 0.267, 0.267], atol=0.03)
    assert foresight_records.sample_clip(2, rng) == [0, 1]
    with pytest.raises(ValueError, match="at least 2"):
        foresight_records.sample_clip(1, rng)


def test_tiny_objects_by_their_longest_side():
    assert foresight_records.is_tiny([0, 0, 6, 3], [200, 100])  # 1/33 of both
    assert not foresight_records.is_tiny([0, 0, 1, 4], [200, 100])  # thin, but 1/25 high
    record = clip()
    record["tracks"][0]["boxes"]["2"] = [0, 0, 2, 1]
    assert [t["id"] for t in foresight_records.clean_tracks(record, 3)] == [9]  # 2 is not there in frame 1
    record["tracks"][1]["boxes"]["3"] = [50, 10, 20, 40]
    with pytest.raises(ValueError, match="track 9, frame 3"):
        foresight_records.clean_tracks(record, 3)


def test_detection_records_drop_tiny_objects_and_limit_categories():
    boxes_ = [[0, 0, 50, 50]] * 20 + [[0, 0, 2, 2]]
    record = {"images": ["a"], "size": SIZE, "labels": [f"c{i}" for i in range(20)] + ["c0"], "boxes": boxes_}
    got = foresight_records.detection_record(record, np.random.default_rng(0), every=False)
    assert len(got["labels"]) == len(got["categories"]) == 15 and len(set(got["labels"])) == 15
    assert trajectories.parse_detection(foresight.answer(got)).keys() == set(got["categories"])


@pytest.mark.parametrize("kind", foresight_records.KINDS)
def test_drawn_queries_have_gold_answers_that_earn_everything(kind):
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(40):
        record = foresight_records.make_query(clip(), rng, [kind])
        text = foresight.answer(record)
        assert foresight.prompt(record).count("<image>") == 3 and record["task"] == "foresight"
        got = foresight.reward(text, record)
        seen.add(None if got is None else got["reward"])
        if kind in foresight.TRACKED:
            ids = {f["id"]: f["frames"] for f in parse_trajectories(text)}
            assert {i: b for i, b in foresight.ground_truth(record).items() if i in ids} == ids
        json.dumps(record)
    assert seen == {"video_reg": {None}, "chat": {None, 1.0}}.get(kind, {1.0})


def test_queries_with_horizon_and_negatives():
    rng = np.random.default_rng(0)
    record = foresight_records.make_query(clip(), rng, ["tracking"], horizon=2)
    assert all(sorted(frames) == [1, 2, 3, 4, 5] for frames in foresight.ground_truth(record).values())
    with pytest.raises(ValueError, match="horizon 3"):
        foresight_records.make_query(clip(), rng, horizon=3)
    assert "no cow" in foresight.answer(foresight_records.make_query(clip(), rng, absent="cow"))
    assert foresight_records.make_query(clip() | {"tracks": []}, rng) is None


@settings(max_examples=60)
@given(st.floats(0, 2 * math.pi), st.floats(0, 3))
def test_displacement_words_equal_sectors_of_45_degrees(angle, distance):
    names = ("right", "down and right", "down", "down and left", "left", "up and left", "up", "up and right")
    sector = angle / (math.pi / 4)
    if abs(sector % 1 - 0.5) < 1e-6 or min(abs(distance - 0.15), abs(distance - 0.75)) < 1e-6:
        return
    x, y = 20 * distance * math.cos(angle), 20 * distance * math.sin(angle)  # y grows downwards
    got = "".join(foresight_records.displacement([100, 100, 120, 120], [100 + x, 100 + y, 120 + x, 120 + y]))
    speed = "slowly" if distance <= 0.75 else "quickly"
    assert got == ("stay where it is" if distance <= 0.15 else f"move {names[round(sector) % 8]} {speed}")


def test_futures_from_later_annotations():
    record = clip()
    dog, cat, _ = record["tracks"]
    assert foresight_records.future_of(dog, record["tracks"], 3)["future"] == "start jumping"
    assert foresight_records.future_of(cat, record["tracks"], 3)["future"] == "stay where it is"
    assert foresight_records.future_of(dog, record["tracks"], 5) is None
    cat["boxes"] = cat["boxes"] | {"5": dog["boxes"]["5"]}
    met = foresight_records.future_of(dog, record["tracks"], 3)
    assert (met["future"], met["ids"], met["motions"]) == ("run into the cat", [9], {"9": "stays where it is"})
