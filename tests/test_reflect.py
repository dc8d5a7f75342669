"""The policy-critic loop and the reflection dialogues, with scripted policies and critics."""

import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.methods.unlikelihood import dialogue_sigma
from jaxmllm.rollout import reflect as r
from jaxmllm.tasks import captioning

RECORDS = [{"id": k, "images": [f"{k}.jpg"], "caption": "A red dog on a mat."} for k in range(3)]


def texts(conversation):
    return [(m["role"], m["content"][-1]["text"]) for m in conversation]


class Scripted:
    """Answers `name/call/row` and keeps what it was asked."""

    def __init__(self, name, reply=None):
        self.name, self.calls, self.reply = name, [], reply

    def __call__(self, conversations, **options):
        self.calls.append((conversations, options))
        n = len(self.calls) - 1
        return [self.reply(n, k) if self.reply else f"{self.name} {n}/{k}" for k in range(len(conversations))]


def test_the_policy_sees_everything_said_before():
    policy = Scripted("answer")
    judge = Scripted("critic", lambda n, k: f"The dog {n}/{k} is missing.\nScore: {[60, 90, 40][n] + k}")
    out = r.reflect(policy, r.model_critic(judge), RECORDS)
    assert len(policy.calls) == 3 and len(judge.calls) == 3
    for k, record in enumerate(RECORDS):
        first, second, third = (call[0][k] for call in policy.calls)
        assert texts(first) == [("user", captioning.prompt(record))]
        assert [role for role, _ in texts(third)] == ["user", "assistant"] * 2 + ["user"]
        assert texts(third)[:3] == texts(second)  # the history only grows
        pictures = [c for m in third for c in m["content"] if c["type"] == "image"]
        assert pictures == [{"type": "image", "image": f"{k}.jpg"}] and third[0]["content"][0] == pictures[0]
        row = out[k]
        assert row["id"] == k and row["final"] == f"answer 2/{k}" and row["best_turn"] == 1
        assert [t["score"] for t in row["turns"]] == [6 + k / 10, 9 + k / 10, 4 + k / 10]  # 0..100 becomes 0..10
        assert row["turns"][2]["feedback"] is None
        said = texts(third)[2][1]
        assert said == row["turns"][0]["feedback"]
        clause = next(s for s in r.CAPTION_WORDING.scores if said.startswith(s.format(s=f"{6 + k / 10:.3g}")))
        request = next(q for q in r.CAPTION_WORDING.requests if said.endswith(q))
        assert said == f"{clause.format(s=f'{6 + k / 10:.3g}')} The dog 0/{k} is missing. {request}"


def test_the_critic_sees_full_or_current_history():
    for history, seen in (("full", True), ("current", False)):
        judge = Scripted("critic", lambda n, k: "Score: 50")
        r.reflect(Scripted("answer"), r.model_critic(judge, history=history), RECORDS[:1])
        ((conversation,), _) = judge.calls[-1]
        ((role, text),) = texts(conversation)
        assert role == "user" and conversation[0]["content"][0]["image"] == "0.jpg"
        assert "Answer to assess: answer 2/0" in text and captioning.prompt(RECORDS[0]) in text
        assert ("answer 0/0" in text) is seen and ("answer 1/0" in text) is seen
        assert all(name.capitalize() in text for name in captioning.RUBRIC)
    with pytest.raises(ValueError, match="current"):
        r.critic_conversation(RECORDS[0], "q", [{"response": "a"}], "none")


def test_an_unreadable_score_leaves_the_rationale():
    critic = r.model_critic(Scripted("critic", lambda n, k: "The dog is a cat."))
    (row,) = r.reflect(Scripted("answer"), critic, RECORDS[:1], turns=2)
    said = row["turns"][0]["feedback"]
    assert (
        said.startswith("The dog is a cat. ") and said.removeprefix("The dog is a cat. ") in r.CAPTION_WORDING.requests
    )
    assert row["best_turn"] is None and row["turns"][0]["score"] is None


def test_a_rule_critic_scores_silently():
    policy = Scripted("answer", lambda n, k: ["A cat.", "A red dog on a mat.", "A dog."][n])
    (row,) = r.reflect(policy, r.reward_critic(captioning.reward), RECORDS[:1])
    assert row["turns"][0]["feedback"] in r.CAPTION_WORDING.bare_requests and row["turns"][1]["score"] == pytest.approx(
        10
    )
    assert row["best_turn"] == 1 and row["final"] == "A dog."  # the last answer is reported, not the best


@pytest.mark.parametrize("turns,score_last", list(itertools.product((1, 2, 4), (True, False))))
def test_the_number_of_calls_is_fixed(turns, score_last):
    policy, judge = Scripted("answer"), Scripted("critic", lambda n, k: "Perfect. Score: 100")
    out = r.reflect(policy, r.model_critic(judge), RECORDS, turns, score_last=score_last)
    assert (len(policy.calls), len(judge.calls)) == (turns, turns - (not score_last))  # a perfect score stops nothing
    assert all(len(row["turns"]) == turns for row in out)


def test_system_message_bad_input_and_no_records():
    policy = Scripted("answer")
    r.reflect(
        policy, r.reward_critic(lambda t, rec: 1.0), RECORDS[:1], 1, question=lambda rec: "What?", system="Be exact."
    )
    assert texts(policy.calls[0][0][0]) == [("system", "Be exact."), ("user", "What?")]
    assert r.reflect(policy, r.reward_critic(captioning.reward), []) == []
    with pytest.raises(ValueError, match="turns"):
        r.reflect(policy, r.reward_critic(captioning.reward), RECORDS, 0)
    with pytest.raises(ValueError, match="policy returned 1 texts for 3"):
        r.reflect(lambda conversations: ["a"], r.reward_critic(captioning.reward), RECORDS)
    with pytest.raises(ValueError, match="critic returned 0 texts for 3"):
        r.reflect(Scripted("a"), r.model_critic(lambda conversations: []), RECORDS)


# --- the data set ---------------------------------------------------------------------------------------------------


def item(rewards, key=0, reason="bottles are wrong"):
    candidates = [
        {"response": f"caption {k}", "temperature": 0.2 * k, "reward": float(v), "reason": reason}
        for k, v in enumerate(rewards)
    ]
    return {"id": key, "image": f"{key}.jpg", "question": "Describe.", "candidates": candidates}


def of_length(rewards, length, source="vlm"):
    """The dialogue of the first id whose draw asks for this many answers."""
    for key in range(200):
        dialogue = r.build_dialogue(item(rewards, key), source)
        drawn = r.build_dialogue(item([0, 5, 10] if source == "vlm" else [0, 0.5, 1], key), source)
        if len(drawn["turns"]) == length:
            return dialogue
    raise AssertionError("no such draw")


@pytest.mark.parametrize(
    "source,rewards,kept",
    [
        ("vlm", [5, 9], True), ("vlm", [5, 8.9], False), ("vlm", [5.1, 9], False), ("vlm", [6, 10], True),
        ("vlm", [9], False), ("vlm", [], False),
        ("rule", [0.3, 0.56], True), ("rule", [0.3, 0.55], False), ("rule", [0.36, 0.56], False),
        ("rule", [0.35, 0.56], True),
    ],
)  # fmt: skip
def test_filter_thresholds(source, rewards, kept):
    assert (r.build_dialogue(item(rewards), source) is not None) is kept


def test_worst_first_best_last_middle_between():
    rewards = [7, 3, 10, 6, 9.5, 3, 10, 8]
    three = of_length(rewards, 3)
    assert [t["reward"] for t in three["turns"]] == [3, 7, 10]  # 6 and 7 are equally near 6.5; 7 is colder
    assert [t["response"] for t in of_length(rewards, 2)["turns"]] == ["caption 1", "caption 2"]
    assert [t["response"] for t in of_length(rewards, 1)["turns"]] == ["caption 2"]


def test_without_a_middle_there_are_two_answers():
    assert [t["reward"] for t in of_length([3, 3.9, 9.1, 10], 3)["turns"]] == [3, 10]
    assert [t["reward"] for t in of_length([3, 4, 10], 3)["turns"]] == [3, 4, 10]
    assert len(of_length([0.3, 0.34, 0.6], 3, "rule")["turns"]) == 2
    assert len(of_length([0.3, 0.35, 0.6], 3, "rule")["turns"]) == 3


def test_feedback_of_both_sources():
    vlm = of_length([3, 6.5, 10], 3)
    first, second, last = (t["feedback"] for t in vlm["turns"])
    words = r.CAPTION_WORDING
    asked = [f"{clause.format(s='3')} bottles are wrong {ask}" for clause in words.scores for ask in words.requests]
    assert first in asked
    assert "6.5" in second and last is None
    rule = of_length([0.2, 0.5, 0.8], 3, "rule")
    assert all(t["feedback"] in words.bare_requests for t in rule["turns"][:2]) and rule["turns"][2]["feedback"] is None
    about = {"record": {"task": "grounding"}}  # not a caption: feedback does not call it one
    boxed = next(d for k in range(99) if len((d := r.build_dialogue(item([3, 10], k) | about, "vlm"))["turns"]) == 2)
    assert any(boxed["turns"][0]["feedback"].endswith(ask) for ask in r.ANSWER_WORDING.requests)
    assert json.loads(json.dumps(vlm)) == vlm and set(vlm) == {"id", "image", "source", "question", "turns"}
    assert set(vlm["turns"][0]) == {"response", "temperature", "reward", "feedback"}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 20).map(lambda v: v / 2), min_size=1, max_size=8), st.integers(0, 500), st.integers(0, 3)
)
def test_every_dialogue_rises_and_is_repeatable(rewards, key, seed):
    dialogue = r.build_dialogue(item(rewards, key), "vlm", seed)
    shuffled = item(rewards, key)
    random.Random(seed).shuffle(shuffled["candidates"])
    assert r.build_dialogue(shuffled, "vlm", seed) == dialogue
    if max(rewards) < 9 or max(rewards) - min(rewards) < 4:
        assert dialogue is None
        return
    chosen = [t["reward"] for t in dialogue["turns"]]
    assert chosen == sorted(set(chosen)) and chosen[-1] == max(rewards) and 1 <= len(chosen) <= 3
    if len(chosen) > 1:
        assert chosen[0] == min(rewards)
    if len(chosen) == 3:
        half = (chosen[0] + chosen[2]) / 2
        allowed = [v for v in rewards if chosen[0] + 1 <= v <= chosen[2] - 1]
        assert abs(chosen[1] - half) == min(abs(v - half) for v in allowed)
    assert all(t["feedback"] for t in dialogue["turns"][:-1]) and dialogue["turns"][-1]["feedback"] is None


def test_lengths_follow_the_shares_and_statistics_are_logged():
    items = [item([2, 6, 10], k) for k in range(1500)] + [item([5, 6], k) for k in range(1500, 1600)]
    made, stats = r.build_dialogues(items, "vlm")
    np.testing.assert_allclose([stats[f"turns_{n}"] / 1500 for n in (1, 2, 3)], r.TURN_SHARES, atol=0.04)
    assert stats["images"] == 1600 and stats["kept"] == len(made) == 1500 and stats["yield"] == 1500 / 1600
    other, _ = r.build_dialogues(items, "vlm", seed=1)
    assert [len(d["turns"]) for d in made] != [len(d["turns"]) for d in other]


def test_gap_quantile_keeps_the_widest_of_a_narrow_policy():
    items = [item([9.5 - gap, 9.5], k) for k, gap in enumerate((0.5, 1, 1.5, 2))]
    assert r.build_dialogues(items, "vlm")[1]["kept"] == 0
    made, stats = r.build_dialogues(items, "vlm", gap_quantile=0.5)
    assert stats["gap"] == pytest.approx(1.25) and [d["id"] for d in made] == [2, 3]
    assert r.build_dialogues([item([9.5, 9.5])], "vlm", gap_quantile=0.5)[1]["kept"] == 0  # equal answers teach nothing


def test_from_images_to_dialogues():
    policy = Scripted("caption", lambda n, k: ["A cat.", "A cat.", "A red dog on a mat."][n % 3])
    items = r.sample_candidates(policy, RECORDS, temperatures=(0.8, 0.0, 0.4))
    assert [options["temperature"] for _, options in policy.calls] == [0.0, 0.4, 0.8]
    assert texts(policy.calls[0][0][0])[0] == ("system", r.EXPERT_SYSTEM)
    assert items[0]["candidates"] == [
        {"response": "A cat.", "temperature": 0.0}, {"response": "A red dog on a mat.", "temperature": 0.8}
    ]  # fmt: skip
    rated = r.rate_candidates(items, r.rule())
    assert [round(c["reward"], 3) for c in rated[0]["candidates"]][1] == 1
    made, _ = r.build_dialogues(rated, "rule")
    assert len(made) == 3 and all(d["turns"][-1]["response"] == "A red dog on a mat." for d in made)
    assert r.TEMPERATURES == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4)


def test_judged_candidates_drop_what_cannot_be_read():
    scores = "Authenticity: 4, Correctness: 2, Detail: 2, Coherence: 1, Completeness: {}. Reason: fine"
    judge = Scripted("judge", lambda n, k: "no idea" if k == 1 else scores.format(1 - k % 2))
    items = [item([0, 0, 0], key) | {"record": RECORDS[key]} for key in (0, 1)]
    rated = r.rate_candidates(items, r.judge(judge))
    assert [[c["reward"] for c in i["candidates"]] for i in rated] == [[10, 10], [9, 10, 9]]
    assert rated[0]["candidates"][0]["reason"] == "fine" and len(judge.calls) == 1
    assert (
        "caption 2" in texts(judge.calls[0][0][5])[0][1] and judge.calls[0][0][5][0]["content"][0]["image"] == "1.jpg"
    )


def test_sigma_and_training_conversation():
    vlm, rule = of_length([3, 6.5, 10], 3), of_length([0.3, 0.45, 0.6], 3, "rule")
    np.testing.assert_allclose(dialogue_sigma(vlm), [0.3, 0.65, 1.0], rtol=1e-6)
    np.testing.assert_allclose(dialogue_sigma(rule), [0.5, 0.75, 1.0], rtol=1e-6)  # the best answer is fully imitated
    np.testing.assert_allclose(dialogue_sigma(rule, "source_max"), [0.3, 0.45, 0.6], rtol=1e-6)
    np.testing.assert_allclose(dialogue_sigma(rule, "source_max", 0.5), [0.6, 0.9, 1.0], rtol=1e-6)
    np.testing.assert_allclose(dialogue_sigma(vlm, "dialogue_max"), [0.3, 0.65, 1.0], rtol=1e-6)
    messages = r.conversation(vlm, vlm["question"], vlm["turns"])
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3
    assert [text for role, text in texts(messages) if role == "assistant"] == [t["response"] for t in vlm["turns"]]
    assert messages[0]["content"][0]["image"] == vlm["image"]
