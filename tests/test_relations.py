"""Relation graphs against brute force, balanced foils, answers, the reward and the cascade of measures."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.tasks import relation_graphs as graphs
from jaxmllm.tasks import relation_phrases, relations
from tests.relation_scenes import COLOURS, SHAPES, scene

seeds = st.integers(0, 2**32 - 1)

# ---- truth of relations


def holds(relation, a, b, tau=12, near=24):
    """A second writing, pair by pair: True, False, or None in the dead zone."""
    (ax, ay, aX, aY), (bx, by, bX, bY) = a["box"], b["box"]
    dx, dy = (bx + bX - ax - aX) / 2, (by + bY - ay - aY) / 2
    ahead = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}
    if relation in ahead:
        along, across = ahead[relation]
        if along > tau and along > abs(across):
            return True
        return False if along <= 0 or along <= abs(across) - tau else None
    if relation == "next to":
        gap = math.hypot(max(bx - aX, ax - bX, 0), max(by - aY, ay - bY, 0))
        inside = (ax >= bx and ay >= by and aX <= bX and aY <= bY) or (bx >= ax and by >= ay and bX <= aX and bY <= aY)
        return False if inside else True if gap < near else None if gap < near + tau else False
    if relation in ("larger than", "smaller than"):
        more = math.sqrt((aX - ax) * (aY - ay)) - math.sqrt((bX - bx) * (bY - by))
        more = more if relation == "larger than" else -more
        return True if more > tau else None if more > 0 else False
    return a["colour"] == b["colour"] if relation == "same colour as" else a["shape"] == b["shape"]


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_relation_tables(seed):
    rng = np.random.default_rng(seed)
    objects = scene(rng)
    for relation in graphs.COMMON:
        table = graphs.relation_table(objects, relation)
        for i, j in itertools.permutations(range(len(objects)), 2):
            want = {True: 1, False: 0, None: -1}[holds(relation, objects[i], objects[j])]
            assert table[i, j] == want, (relation, objects[i], objects[j])
    opposite = {"left of": "right of", "above": "below", "larger than": "smaller than"}
    for one, other in opposite.items():
        a, b = graphs.relation_table(objects, one), graphs.relation_table(objects, other)
        assert (a == b.T).all() and not ((a == 1) & (b == 1)).any()
    sides = [graphs.relation_table(objects, r) == 1 for r in ("left of", "right of", "above", "below")]
    assert (np.sum(sides, 0) <= 1).all()  # never two directions at once


def test_containers_links_and_unknown_relations():
    objects = [{"box": b} for b in ([0, 0, 100, 100], [20, 20, 60, 60], [80, 80, 140, 140], [300, 300, 320, 320])]
    assert graphs.relation_table(objects, "inside").tolist() == [
        [0, 0, -1, 0], [1, 0, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 0]]
    near = graphs.relation_table(objects, "next to")
    assert near[0, 1] == near[1, 0] == 0 and near[1, 2] == -1 and near[0, 2] == 1 and near[2, 3] == 0
    assert graphs.relation_table(objects, "linked to", links=[[0, 3]]).tolist() == [
        [0, 0, 0, 1], [0] * 4, [0] * 4, [1, 0, 0, 0]]
    with pytest.raises(ValueError, match="relation"):
        graphs.relation_table(objects, "behind")


def brute_referents(objects, graph, wildcard=None, injective=True):
    tables = [graphs.relation_table(objects, r) for r in graph.relations]
    words = [set(node) - {"object"} for node in graph.nodes]
    found = set()
    for chosen in itertools.product(range(len(objects)), repeat=len(words)):
        if injective and len(set(chosen)) < len(chosen):
            continue
        if all(w <= {o for k, o in objects[i].items() if k != "box"} for w, i in zip(words, chosen, strict=True)):
            if all(e == wildcard or tables[e][chosen[s], chosen[o]] == 1 for e, (s, o) in enumerate(graph.edges)):
                found.add(chosen[graph.root])
    return found


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from(graphs.SHAPES), st.booleans())
def test_search_equals_trying_every_assignment(seed, shape, injective):
    rng = np.random.default_rng(seed)
    objects = [o | {"colour": COLOURS[rng.integers(2)], "shape": SHAPES[rng.integers(2)]} for o in scene(rng, 6)]
    edges = graphs.sample_tree(3, shape, rng)
    nodes = tuple(graphs.describe(objects[rng.integers(len(objects))], rng) for _ in range(4))
    graph = graphs.Graph(nodes, tuple(edges), tuple(rng.choice(graphs.COMMON, 3).tolist()))
    oracle = graphs.Oracle(objects)
    for wildcard in (None, 0, 1, 2):
        assert oracle.referents(graph, wildcard, injective) == brute_referents(objects, graph, wildcard, injective)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 4), st.sampled_from(graphs.SHAPES))
def test_pairs_have_one_referent_no_referent_and_one_edge_to_blame(seed, n_edges, shape):
    rng = np.random.default_rng(seed)
    objects = scene(rng, 7)
    oracle = graphs.Oracle(objects)
    pair = graphs.sample_pair(oracle, n_edges, shape, rng)
    if pair is None:
        return
    graph, foil, wrong = pair
    assert len(brute_referents(objects, graph)) == 1 and not brute_referents(objects, foil)
    assert [e for e in range(n_edges) if brute_referents(objects, foil, e)] == [wrong]
    assert foil == graph.replaced(wrong, foil.relations[wrong]) != graph
    for (s, o), relation in itertools.chain(zip(graph.edges, graph.relations, strict=True),
                                            zip(foil.edges, foil.relations, strict=True)):
        fits = [[i for i, obj in enumerate(objects) if set(graph.nodes[v]) - {"object"} <= set(map(str, obj.values()))]
                for v in (s, o)]
        assert all(i == j or holds(relation, objects[i], objects[j]) is not None for i in fits[0] for j in fits[1])


def test_trees_have_their_shape_and_are_numbered_as_mentioned():
    rng = np.random.default_rng(0)
    assert graphs.sample_tree(3, "chain", rng) == [(0, 1), (1, 2), (2, 3)]
    assert graphs.sample_tree(3, "star", rng) == [(0, 1), (0, 2), (0, 3)]
    for _ in range(50):
        edges = graphs.sample_tree(6, "mixed", rng)
        assert [c for _, c in edges] == [1, 2, 3, 4, 5, 6] and all(p < c for p, c in edges)
    assert graphs.edge_depths([(0, 1), (1, 2), (0, 3), (3, 4)]) == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="shape"):
        graphs.sample_tree(2, "ring", rng)


def test_the_wrong_edge_is_as_often_deep_as_shallow():
    rng = np.random.default_rng(5)
    wrong = Counter()
    while sum(wrong.values()) < 240:
        pair = graphs.sample_pair(graphs.Oracle(scene(rng)), 3, "chain", rng)
        wrong.update([] if pair is None else [pair[2]])
    # Acceptance differs a little with depth; a rule that always edits near the root or the leaves would show.
    assert all(0.2 < wrong[edge] / 240 < 0.47 for edge in range(3)), wrong


# ---- bias


@given(st.dictionaries(st.sampled_from(graphs.RELATIONS), st.floats(0.01, 1), min_size=1))
def test_kernel_is_balanced(frequency):
    kernel = graphs.balanced_kernel(frequency)
    assert kernel.keys() == frequency.keys()
    for r, row in kernel.items():
        assert sum(row.values()) <= 1 + 1e-9 and r not in row
        for s, q in row.items():
            assert s in graphs.SCENE_SUBSTITUTES[r]
            assert frequency[r] * q == pytest.approx(frequency[s] * kernel[s][r]) and q > 0


def pairs_of(count, seed, kernel=None):
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        pair = graphs.sample_pair(graphs.Oracle(scene(rng)), 2, "mixed", rng, kernel=kernel)
        found += [] if pair is None else [pair]
    return found


def balanced_texts(count, seed):
    """Expressions of both classes after the kernel and exact balancing."""
    first = Counter(r for graph, *_ in pairs_of(200, seed + 1) for r in graph.relations)
    pairs = pairs_of(count, seed, graphs.balanced_kernel(first))
    return [[graphs.verbalise(g) for g in pairs[i][:2]] for i in graphs.balance(pairs)]


def test_balancing_makes_word_frequencies_equal():
    texts = balanced_texts(150, 0)
    assert len(texts) > 60
    counts = [Counter(" ".join(column).split()) for column in zip(*texts, strict=True)]
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_a_language_only_classifier_stays_at_chance():
    """Bigram logistic regression on 4,000 pairs, tested on 1,000 whose twins are both held out."""
    texts = balanced_texts(8_000, 7)[:5_000]
    rows = [text for pair in texts for text in pair]
    labels = np.tile([1.0, 0.0], len(texts))
    bags = [{*words, *zip(words, words[1:], strict=False)} for words in map(str.split, rows)]
    index = {term: i for i, term in enumerate(sorted({t for bag in bags for t in bag}, key=str))}
    features = np.zeros((len(rows), len(index)), np.float32)
    for row, bag in zip(features, bags, strict=True):
        row[[index[term] for term in bag]] = 1
    cut = int(0.8 * len(texts)) * 2
    weights, bias = np.zeros(len(index)), 0.0
    for _ in range(300):
        error = 1 / (1 + np.exp(-(features[:cut] @ weights + bias))) - labels[:cut]
        weights -= 0.5 * (features[:cut].T @ error / cut + 1e-3 * weights)
        bias -= 0.5 * error.mean()
    accuracy = np.mean((features[cut:] @ weights + bias > 0) == (labels[cut:] > 0.5))
    print(f"language only: {accuracy:.1%} on {len(rows) - cut} expressions of {len(texts)} pairs")
    assert accuracy <= 0.54


def test_compared_attributes_are_not_named():
    rng = np.random.default_rng(3)
    for graph, *_ in pairs_of(60, 4):
        for (s, o), relation in zip(graph.edges, graph.relations, strict=True):
            if relation in ("larger than", "smaller than"):
                assert not {"small", "medium", "large"} & {*graph.nodes[s], *graph.nodes[o]}
            if relation.startswith("same"):
                assert not {*COLOURS, *SHAPES} & set(graph.nodes[o])
    assert graphs.describe({"shape": "star", "texture": "solid", "box": []}, rng) == ("star",)


# ---- words and records

TREE = graphs.Graph((("red", "circle"), ("small", "square"), ("object",), ("star",)), ((0, 1), (1, 2), (0, 3)),
                    ("left of", "same colour as", "above"))


def test_verbalisation():
    assert graphs.verbalise(TREE, 0) == "red circle left of small square the same colour as object , and above star"
    assert graphs.verbalise(TREE, 1) == (
        "the red circle that is left of the small square that is the same colour as the object , and above the star")
    assert graphs.verbalise(TREE, 2).startswith("there is a red circle that is to the left of the small square that is of")
    alone = graphs.Graph((("orange", "star"),), (), ())
    assert graphs.verbalise(alone, 2) == "there is an orange star"


def record_pair(seed=0, n_edges=3):
    rng = np.random.default_rng(seed)
    oracle = graphs.Oracle(scene(rng))
    graph, foil, wrong = graphs.sample_pair(oracle, n_edges, "mixed", rng)
    base = {"size": [448, 448], "twin": seed}
    return [base | graphs.relation_record(oracle, graph),
            base | graphs.relation_record(oracle, foil, wrong, graph.relations[wrong])]


def test_records_of_twins():
    match, foil = record_pair()
    json.dumps([match, foil])
    assert match["match"] and match["foil_pos"] == -1 and match["foil_phrase"] == match["target_phrase"] == "none"
    e = foil["foil_pos"]
    assert not foil["match"] and "box" not in foil
    assert (foil["foil_phrase"], foil["target_phrase"]) == (foil["relations"][e], match["relations"][e])
    assert match["entities"] == foil["entities"] and match["length"] == len(match["expression"].split())
    root = [o for o in match["scene"]["objects"] if o["box"] == match["box"]]
    assert len(root) == 1 and set(match["entities"][0].split()) - {"object"} <= set(map(str, root[0].values()))


def test_cells():
    def cells(edges, words):
        return {name for name in graphs.CELLS if graphs.in_cell({"edges": edges, "length": words}, name)}

    assert cells([[0, 1]], 11) == {"S11", "S16"} and cells([[0, 1], [0, 2]], 12) == {"S16"}
    assert cells([[0, 1]], 17) == {"ood_words"} and cells([[0, 1]], 31) == set()
    assert cells([[0, 1], [1, 2], [2, 3]], 20) == {"ood_edges", "ood_depth"}
    assert cells([[0, 1], [1, 2], [0, 3]], 20) == {"ood_edges"}
    assert cells([[i, i + 1] for i in range(6)], 40) == {"ood_edges"}


# ---- annotated expressions

PHOTO = {"id": 1, "expression": "There is a guy wearing the shirt and to the left of the boy .",
         "relations": ["wearing", "to the left of"], "spans": [[15, 22], [37, 51]], "edges": [[0, 1], [0, 2]],
         "entities": ["guy", "shirt", "boy"], "root": 0, "match": True, "box": [1, 2, 3, 4], "foil_pos": -1}  # fmt: skip


def test_published_substitutes():
    assert len(relation_phrases.SUBSTITUTES) == 27
    assert all(r not in options and len(set(options)) == len(options) for r, options in relation_phrases.SUBSTITUTES.items())
    rng, seen = np.random.default_rng(0), set()
    for _ in range(80):
        twin = relation_phrases.phrase_foil(PHOTO, rng)
        e = twin["foil_pos"]
        seen.add((e, twin["foil_phrase"]))
        assert not twin["match"] and "box" not in twin and twin["target_phrase"] == PHOTO["relations"][e]
        for (a, b), relation in zip(twin["spans"], twin["relations"], strict=True):
            assert twin["expression"][a:b] == relation
        assert twin["relations"][1 - e] == PHOTO["relations"][1 - e]
        assert twin["expression"].replace(twin["foil_phrase"], twin["target_phrase"]) == PHOTO["expression"]
    assert seen == {(0, "holding"), (0, "carrying"), (0, "looking at"),
                    (1, "to the right of"), (1, "in front of"), (1, "behind")}
    assert relation_phrases.phrase_foil(PHOTO | {"relations": ["near", "at"]}, rng) is None


def test_edge_of_a_replaced_span():
    spans = [[3, 10], [12, 20]]
    assert [relation_phrases.edge_of_span(spans, s) for s in ([4, 8], [9, 19], [10, 12], [30, 40])] == [0, 1, -1, -1]
    assert relation_phrases.edge_of_span([], [0, 5]) == -1


def test_graphs_written_by_a_model_are_checked():
    said = "The red circle left of the small square"
    good = {"nodes": ["red circle", "small square"], "edges": [[0, "left of", 1]]}
    assert relation_phrases.parse_graph(f"Sure: ```json {json.dumps(good)}```", said) == {
        "entities": good["nodes"], "edges": [[0, 1]], "relations": ["left of"], "root": 0}
    alone = {"entities": [said], "edges": [], "relations": [], "root": 0}
    for bad in (
        good | {"nodes": ["red circle", "blue square"]}, good | {"edges": [[0, "above", 1]]}, good | {"nodes": []},
        good | {"edges": [[0, "left of", 2]]}, good | {"edges": []}, good | {"edges": [[0, "left of", 0]]},
        good | {"edges": [[0, "left of", 1], [1, "left of", 0]]}, good | {"edges": [[0, "left of"]]},
        good | {"edges": [[False, "left of", True]]}, good | {"nodes": [1, 2]}, {}, [], 3,
    ):  # fmt: skip
        assert relation_phrases.parse_graph(json.dumps(bad), said) == alone, bad
    loop = {"nodes": ["red", "circle", "small"], "edges": [[1, "of", 2], [2, "of", 1]]}
    assert relation_phrases.parse_graph(json.dumps(loop), said) == alone


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
    truth = [int(oracle.table(r)[nodes[s], nodes[o]]) for (s, o), r in zip(FOIL["edges"], scene_["relations"], strict=True)]
    boxes = [scene_["objects"][i]["box"] for i in nodes]
    full = said | {"nodes": boxes, "verdicts": [t == 1 for t in truth]}
    assert relations.reward(json.dumps(full), FOIL, trace_weight=0.2) == {
        "reward": pytest.approx(1.0), "format": 1, "match": 1, "quality": 1, "trace": 1}
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
    return {"match_gt": match, "match_pred": column(st.booleans()), "iou": column(st.sampled_from([0, 0.4, 0.5, 0.6, 1])),
            "foil_gt": [-1 if m else draw(edge) for m in match], "foil_pred": column(edge),
            "length": column(st.integers(8, 14)), "max_train_len": 11}


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
        share(rows, lambda m, p, i, g, f, _: p and i > 0.5 if m else not p and g == f))
    assert got["all"]["grd_acc"] <= got["all"]["grd_acc_oracle"] or not any(o["match_gt"])


def test_sanity_levels():
    n_edges = [1, 2, 4, 2]
    base = {"match_gt": [1, 0] * 4, "foil_gt": [-1, 0, -1, 1, -1, 3, -1, 0], "iou": [0.9, 0] * 4,
            "n_edges": [e for e in n_edges for _ in (0, 1)], "pair": [p for p in range(4) for _ in (0, 1)]}
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
    got = relations.metric(gold, records, max_train_len=11)
    assert got["joint_acc"] == got["pair_acc"] == got["joint_acc/edges=2"] == got["format"] == 1
    assert got["said_match"] == 0.5 and got["mrr_chance"] == 0.5
    broken = relations.metric(["?"] * 6, records)
    assert {broken[k] for k in ("match_acc", "grd_acc", "mrr_acc", "mrr_acc_oracle", "overall_acc", "format")} == {0}
    alone = relations.metric(gold[:1], records[:1])
    assert "mrr_acc" not in alone and "pair_acc" not in alone and alone["grd_acc"] == 1
    assert relations.metric([], []) == {}


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
