"""Questions about clips do not give their answers away: a learned solver that reads them alone stays at chance."""

import random

import numpy as np
import pytest

from jaxmllm.errors import InputError
from jaxmllm.tasks import foresight, foresight_records
from jaxmllm.tasks import tracks as task_tracks
from jaxmllm.world import questions
from jaxmllm.world.clips import ClipSpec, make_clip
from jaxmllm.world.scenes import SceneSpec
from jaxmllm.world.streams import QUESTIONS, Stream
from tests.support.blind_solver import choice_accuracy, label_accuracy

SCENE = SceneSpec(size=(84, 84), objects=(1, 3), gap=2)


def ask(spec, count, draw=questions.foresight, seed=0):
    """Records of questions, without the pictures, which the solver would not see."""
    for index in range(count):
        clip = make_clip(spec, seed, "train", index)
        record = {"id": str(index), "images": [None] * spec.frames, "size": list(clip.size)}
        try:
            yield draw(clip, record, Stream(*clip.address, QUESTIONS))
        except InputError:  # the clip allows no question of the kind
            continue


def choices_of(records):
    asked = [r for r in records if "choices" in r["query"]]
    texts = [foresight.prompt(r) for r in asked]
    return texts, [r["query"]["choices"] for r in asked], [ord(r["query"]["correct"]) - 65 for r in asked]


def test_the_solver_finds_planted_leaks():
    rng = random.Random(0)
    moves = ["move right", "move left", "move up", "move down"]
    questions_, choices, right = [], [], []
    for _ in range(1200):
        options = rng.sample(moves, 4)
        k = rng.randrange(4)
        options[k] += " quickly"  # only what is true has a speed
        questions_.append(f"the {rng.choice(['red', 'blue'])} circle at {rng.randrange(99)}")
        choices.append(options)
        right.append(k)
    assert choice_accuracy(questions_, choices, right) >= 0.9
    texts = [f"{'the ' if k % 3 else ''}{rng.choice(['red', 'blue', 'green'])} star" for k in range(1200)]
    assert label_accuracy(texts, ["yes" if k % 3 else "no" for k in range(1200)])[0] >= 0.9
    border = [f"Frame1:[{x},10]" for x in (rng.randrange(100) for _ in range(2400))]  # a place tells the direction
    heading = ["right" if int(b[8:].split(",")[0]) < 50 else "left" for b in border]
    assert label_accuracy(border, heading)[0] >= 0.9


def test_multiple_choice_is_not_solved_without_the_clip():
    spec = ClipSpec(scene=SCENE, frames=3, horizon=2, kinds=("chat",))
    texts, choices, right = choices_of(ask(spec, 5000))
    assert len(right) > 1500
    assert {len({c.split()[-1] for c in options}) for options in choices} <= {1, 4}  # one speed for all options
    assert abs(choice_accuracy(texts, choices, right) - 0.25) <= 0.03


def test_negatives_are_asked_in_the_words_of_positives(monkeypatch):
    monkeypatch.setattr(foresight_records, "NEGATIVE_SHARE", 0.5)
    spec = ClipSpec(scene=SCENE, frames=3, horizon=2, kinds=("referring",))
    records = list(ask(spec, 2600))
    absent = [r for r in records if r["query"].get("absent")]
    present = [r for r in records if not r["query"].get("absent")]
    mixed = [r for pair in zip(absent, present, strict=False) for r in pair]
    assert len(absent) > 800 and all(r["query"]["absent"].startswith("the ") for r in absent)
    accuracy, chance = label_accuracy(
        [foresight.prompt(r) for r in mixed], ["absent" if r["query"].get("absent") else "there" for r in mixed]
    )
    assert chance == pytest.approx(0.5, abs=0.03) and accuracy <= chance + 0.03


@pytest.mark.parametrize("kind", ["box", "phrase"])
def test_what_is_done_is_not_told_by_the_question(kind):
    spec = ClipSpec(scene=SCENE, frames=4, kinds=(kind,))
    records = [r for r in ask(spec, 2000, questions.tracks) if task_tracks.ground_truth(r)["attrs"].get("action")]
    actions = [task_tracks.ground_truth(r)["attrs"]["action"][0] for r in records]
    accuracy, chance = label_accuracy([task_tracks.prompt(r) for r in records], actions)
    assert accuracy <= chance + 0.03 and np.unique(actions).size == 5
