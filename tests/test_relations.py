"""Mismatched relations: answers, the reward, the cascade of measures."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmllm.eval.harness import evaluate
from jaxmllm.tasks import relation_graphs as graphs
from jaxmllm.tasks import relations
from tests.test_relation_graphs import record_pair

# ---- answers

MATCH, FOIL = record_pair()


@pytest.mark.parametrize("style", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("thinking", [False, True])
def test_gold_answers_earn_everything(style, thinking):
    for record in (MATCH, FOIL):
        record = record | {"resized": [560, 280]}
        text = relations.answer(record, style, thinking, "first, the circle {hm}")
        got = relations.reward(text, record, style, thinking)
        assert got["format"] == got["match"] == 1 and got["reward"] > 0.98  # whole numbers
        assert relations.parse(relations.answer(record, style), 3)["match"] == record["match"]
    prompt = relations.prompt(FOIL, style, thinking)
    for n, ((s, o), phrase) in enumerate(zip(FOIL["edges"], FOIL["relations"], strict=True), 1):
        assert f"R{n}: {FOIL['entities'][s]} — {phrase} — {FOIL['entities'][o]}" in prompt
    assert FOIL["expression"] in prompt and ("<think>" in prompt) == thinking
    assert "verdicts" in relations.prompt(FOIL, trace=True) and "verdicts" not in prompt


READ = {
    '{"match": true, "bbox_2d": [1, 2, 3, 4]}': (True, [1, 2, 3, 4], None),
    'I think {so}. ```json\n{"match": false, "relation": "R3"}\n```': (False, None, 2),
    '{"match": false, "relation": "r1"} Done.': (False, None, 0),
    '{"match": false, "relation": "R1"} {"match": true, "bbox_2d": [1, 2, 3, 4.5]}': (True, [1, 2, 3, 4.5], None),
    '{"match": true, "bbox_2d": [4, 3, 2, 1]}': (True, [4, 3, 2, 1], None),
    '{"match": false, "relation": "R4"}': None,
    '{"match": false, "relation": "R0"}': None,
    '{"match": false, "relation": 2}': None,
    '{"match": false}': None,
    '{"match": false, "relation": "R2", "bbox_2d": [1, 2, 3, 4]}': None,
    '{"match": true, "relation": "R2", "bbox_2d": [1, 2, 3, 4]}': None,
    '{"match": true}': None,
    '{"match": true, "bbox_2d": [1, 2, 3]}': None,
    '{"match": true, "bbox_2d": [1, 2, 3, NaN]}': None,
    '{"match": true, "bbox_2d": [1, 2, 3, 1e999]}': None,
    '{"match": true, "bbox_2d": [1, 2, 3, "4"]}': None,
    '{"match": "true", "bbox_2d": [1, 2, 3, 4]}': None,
    '{"match": 1, "bbox_2d": [1, 2, 3, 4]}': None,
    '{"match": true, "bbox_2d": [1, 2, 3, 4], "mood": "good"}': None,
    '[{"match": true, "bbox_2d": [1, 2, 3, 4]}': (True, [1, 2, 3, 4], None),
    '{"match": true, "bbox_2d": [1, 2, 3, 4]': None,
    "": None,
    "}{": None,
    '{"match": false, "relation": "R²"}': None,
}


@pytest.mark.parametrize("text", READ)
def test_reading_answers(text):
    got = relations.parse(text, 3)
    assert (None if got is None else (got["match"], got["box"], got["relation"])) == READ[text]


def test_expressions_without_relations_can_be_denied():
    record = {"edges": [], "relations": [], "entities": ["cow"], "expression": "cow", "match": False, "foil_pos": -1}
    assert relations.answer(record) == '{"match": false}'
    assert relations.reward('{"match": false}', record)["reward"] == 1
    assert '{"match": false}' in relations.prompt(record)


# ---- reward


def boxed(iou, box=(0.0, 0.0, 100.0, 100.0)):
    """An answer whose box has this IoU with a 100 x 100 one."""
    return json.dumps({"match": True, "bbox_2d": [box[0], box[1], box[2] * iou, box[3]]})


GRADED = {"size": [448, 448], "edges": [[0, 1], [1, 2], [1, 3]], "relations": ["a", "b", "c"], "entities": ["w"] * 4,
          "expression": "x", "root": 0}  # fmt: skip
YES = GRADED | {"match": True, "box": [0, 0, 100, 100], "foil_pos": -1}
NO = GRADED | {"match": False, "foil_pos": 1}


def test_worked_rewards():
    def value(text, record):
        return relations.reward(text, record)["reward"]

    assert value(boxed(0.6), YES) == pytest.approx(0.9)
    assert value(boxed(0.4), YES) == pytest.approx(0.6)
    assert value(boxed(0.5), YES) == pytest.approx(0.625)  # exactly 0.5 is no hit
    assert value('{"match": false, "relation": "R1"}', NO) == pytest.approx(0.5)
    assert value('{"match": false, "relation": "R2"}', NO) == pytest.approx(1.0)
    assert value('{"match": false, "relation": "R2"}', YES) == pytest.approx(0.1)
    assert value(boxed(1), NO) == pytest.approx(0.1)
    assert value("no idea", YES) == 0
    for q in (0.0, 0.3, 0.45):  # always "match" with box quality 0.5 IoU: 0.3 + 0.25 Q at an even prior
        assert (value(boxed(q or 1e-9), YES) + value(boxed(q or 1e-9), NO)) / 2 == pytest.approx(0.3 + 0.25 * q / 2)
    random_edge = np.mean([value(f'{{"match": false, "relation": "R{n}"}}', NO) for n in (1, 2, 3)])
    assert (random_edge + 0.1) / 2 == pytest.approx(0.3 + 0.25 / 3)


def test_trace_is_paid_out_of_the_last_half():
    scene_ = FOIL["scene"]
    oracle = graphs.Oracle(scene_["objects"])
    said = json.loads(relations.answer(FOIL))
    # stand every node on some object that fits it
    nodes = [oracle.candidates(entity.split())[0] for entity in FOIL["entities"]]
    truth = [
        int(oracle.table(r)[nodes[s], nodes[o]]) for (s, o), r in zip(FOIL["edges"], scene_["relations"], strict=True)
    ]
    boxes = [scene_["objects"][i]["box"] for i in nodes]
    full = said | {"nodes": boxes, "verdicts": [t == 1 for t in truth]}
    assert relations.reward(json.dumps(full), FOIL, trace_weight=0.2) == {
        "reward": pytest.approx(1.0),
        "format": 1,
        "match": 1,
        "quality": 1,
        "trace": 1,
    }
    decided = [t for t in truth if t != -1]
    wrong = full | {"verdicts": [t != 1 for t in truth]}
    assert decided and relations.reward(json.dumps(wrong), FOIL, trace_weight=0.2)["reward"] == pytest.approx(0.8)
    for broken in ({"nodes": boxes[1:]}, {"verdicts": [1, 0, 1]}, {"nodes": "x"}, {"nodes": [[0, 0, 1, 1]] * 4}, {}):
        answer = said | ({**full, **broken} if broken else {})
        assert relations.reward(json.dumps(answer), FOIL, trace_weight=0.1)["reward"] == pytest.approx(0.9)
    assert relations.reward(json.dumps(full), FOIL)["reward"] == 1
    with pytest.raises(ValueError, match="trace_weight"):
        relations.reward("", FOIL, trace_weight=0.3)


# ---- measures


@st.composite
def outcomes(draw):
    n = draw(st.integers(1, 12))

    def column(values):
        return draw(st.lists(values, min_size=n, max_size=n))

    match = column(st.booleans())
    edge = st.integers(0, 2)
    return {
        "match_gt": match,
        "match_pred": column(st.booleans()),
        "iou": column(st.sampled_from([0, 0.4, 0.5, 0.6, 1])),
        "foil_gt": [-1 if m else draw(edge) for m in match],
        "foil_pred": column(edge),
        "length": column(st.integers(8, 14)),
        "max_train_len": 11,
    }


@given(outcomes())
def test_cascade_equals_counting(o):
    rows = list(zip(*(o[k] for k in ("match_gt", "match_pred", "iou", "foil_gt", "foil_pred", "length")), strict=True))

    def share(rows, right, among=lambda *r: True):
        chosen = [r for r in rows if among(*r)]
        return 100 * sum(map(bool, (right(*r) for r in chosen))) / len(chosen) if chosen else math.nan

    def figures(rows):
        return {
            "match_acc": share(rows, lambda m, p, *_: m == p),
            "grd_acc": share(rows, lambda m, p, i, *_: p and i > 0.5, lambda m, *_: m),
            "grd_acc_oracle": share(rows, lambda m, p, i, *_: i > 0.5, lambda m, *_: m),
            "mrr_acc": share(rows, lambda m, p, i, g, f, _: not p and g == f, lambda m, *_: not m),
            "mrr_acc_oracle": share(rows, lambda m, p, i, g, f, _: g == f, lambda m, *_: not m),
        }

    got = relations.cascade_metrics(**o)
    parts = {"all": rows, "id": [r for r in rows if r[5] <= 11], "ood": [r for r in rows if r[5] > 11]}
    for name, some in parts.items():
        assert got[name] == pytest.approx(figures(some), nan_ok=True)
    assert got["overall_acc"] == pytest.approx(share(rows, lambda m, p, i, *_: p and i > 0.5 if m else not p))
    assert got["joint_acc"] == pytest.approx(
        share(rows, lambda m, p, i, g, f, _: p and i > 0.5 if m else not p and g == f)
    )
    assert got["all"]["grd_acc"] <= got["all"]["grd_acc_oracle"] or not any(o["match_gt"])


def test_sanity_levels():
    n_edges = [1, 2, 4, 2]
    base = {
        "match_gt": [1, 0] * 4,
        "foil_gt": [-1, 0, -1, 1, -1, 3, -1, 0],
        "iou": [0.9, 0] * 4,
        "n_edges": [e for e in n_edges for _ in (0, 1)],
        "pair": [p for p in range(4) for _ in (0, 1)],
    }
    always = relations.cascade_metrics(match_pred=[1] * 8, foil_pred=[0] * 8, **base)
    assert always["all"] == {"match_acc": 50, "grd_acc": 100, "grd_acc_oracle": 100, "mrr_acc": 0, "mrr_acc_oracle": 50}
    never = relations.cascade_metrics(match_pred=[0] * 8, foil_pred=[0] * 8, **base)
    assert never["all"]["match_acc"] == 50 and never["all"]["grd_acc"] == 0
    assert never["mrr_chance"] == pytest.approx(100 * np.mean([1 / e for e in n_edges]))
    perfect = relations.cascade_metrics(match_pred=base["match_gt"], foil_pred=base["foil_gt"], **base)
    assert perfect["pair_acc"] == perfect["joint_acc"] == 100 and always["pair_acc"] == 0


def test_measures_of_completions():
    records = [r | {"id": r["twin"]} for seed in range(3) for r in record_pair(seed, 2)]
    gold = [relations.answer(r) for r in records]
    got = relations.Relations().metric(gold, records)
    assert got["joint_acc"] == got["format"] == 1
    assert got["said_match"] == 0.5 and got["mrr_chance"] == 0.5
    broken = relations.Relations().metric(["?"] * 6, records)
    assert {broken[k] for k in ("match_acc", "grd_acc", "mrr_acc", "overall_acc", "format")} == {0}
    assert "said_match" not in broken, "what cannot be read says neither"
    alone = relations.Relations().metric(gold[:1], records[:1])
    assert "mrr_acc" not in alone and alone["grd_acc"] == 1
    assert relations.Relations().metric([], []) == {}


def test_an_oracle_asks_the_trace_whatever_the_verdict():
    """A model that calls everything a mismatch, but knows the place and the wrong relation."""
    nodes = [[0, 0, 10, 10]] * len(MATCH["entities"])
    nodes[MATCH["root"]] = MATCH["box"]
    denied = MATCH | {"match": False, "foil_pos": 0, "trace": {"nodes": nodes, "verdicts": [False, True, True]}}
    wrong = [k != FOIL["foil_pos"] for k in range(3)]
    granted = FOIL | {"match": True, "box": [0, 0, 9, 9], "trace": {"nodes": nodes, "verdicts": wrong}}
    row = relations.Relations().row
    got = row(relations.answer(denied), MATCH)
    assert got["grd_acc"] == 0 and got["grd_acc_oracle"] == 1
    got = row(relations.answer(granted), FOIL)
    assert got["mrr_acc"] == 0 and got["mrr_acc_oracle"] == 1
    undecided = granted | {"trace": {"nodes": nodes, "verdicts": [False] * 3}}
    assert row(relations.answer(undecided), FOIL)["mrr_acc_oracle"] == 0
    for record in (MATCH, FOIL):  # a verdict alone does not say what would have been answered under the other one
        assert not any("oracle" in name for name in row(relations.answer(record), record))


def test_figures_that_chance_or_words_alone_can_reach_are_told_apart():
    one = [r | {"twin": seed} for seed in range(4) for r in record_pair(seed, 1)]
    got = relations.Relations().metric([relations.answer(r) for r in one], one)
    assert got["mrr_chance"] == 1 and "mrr_acc_choice" not in got
    two = [r for seed in range(4) for r in record_pair(seed, 2)]
    first = [relations.answer(r | {"match": False, "foil_pos": 0}) for r in two]
    got = relations.Relations().metric(first, two)
    assert got["mrr_chance"] == 0.5 and got["mrr_acc_choice"] == np.mean(
        [r["foil_pos"] == 0 for r in two if not r["match"]]
    )
    for rivals, chance in ((0, 1), (3, 0.25)):
        record = MATCH | {"rivals": rivals}
        got = relations.Relations().row(relations.answer(record), record)
        assert got["grd_chance"] == chance and got.get("grd_acc_rivals") == (1 if rivals else None)


def test_half_a_pair_is_no_pair():
    twins = {
        "match_gt": [1, 0, 1],
        "match_pred": [1, 0, 1],
        "iou": [1, 0, 1],
        "foil_gt": [-1, 0, -1],
        "foil_pred": [0, 1, 0],
    }
    assert relations.cascade_metrics(**twins, pair=[0, 0, 1])["pair_acc"] == 0, "the lonely third would make it 50"


def test_a_pair_is_right_where_both_twins_are(tmp_path):
    records = [
        r | {"id": f"{r['twin']}-{k}", "task": "relations"}
        for seed in range(4)
        for k, r in enumerate(record_pair(seed, 2))
    ]
    answers = {r["id"]: relations.answer(r) for r in records}
    answers[records[0]["id"]] = answers[records[3]["id"]] = "?"  # one twin of the first two pairs
    got = evaluate(lambda rows: [answers[r["id"]] for r in rows], records, out_dir=tmp_path, n_resamples=50)
    figures = got.sources["relations"].figures
    assert figures["pair_acc"].value == 0.5 and figures["joint_acc"].value == 0.75
    lonely = evaluate(
        lambda rows: [answers[r["id"]] for r in rows], records[:1], out_dir=tmp_path / "one", n_resamples=5
    )
    assert "pair_acc" not in lonely.sources["relations"].figures


# ---- backbones without generation


def test_triples_and_threshold():
    questions = relations.triple_questions(FOIL)
    assert len(questions) == 3 and all(q.endswith("Answer yes or no.") for q in questions)
    assert relations.triple_readout([2.0, -1.0, 0.5]) == (False, 1)
    assert relations.triple_readout([2.0, -1.0, 0.5], -2) == (True, 1) and relations.triple_readout([]) == (True, 0)
    scores, match = [-3.0, -1.0, 0.2, 0.4, 2.0], [False, False, True, False, True]
    cut = relations.fit_threshold(scores, match)
    accuracy = np.mean((np.array(scores) > cut) == match)
    assert accuracy == max(np.mean((np.array(scores) > c) == match) for c in np.linspace(-4, 3, 200))
    assert relations.fit_threshold([1.0], [True]) < 1 <= relations.fit_threshold([1.0], [False])
    with pytest.raises(ValueError, match="finite"):
        relations.fit_threshold([math.nan], [True])
