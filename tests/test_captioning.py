"""Captions: scene-graph parser on written examples, matching against brute force, judge and critic scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.tasks import captioning as c

relaxed = settings(max_examples=60, deadline=None)


# --- scene graph ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,objects,attributes,relations",
    [
        ("", "", "", ""),
        ("A dog.", "dog", "", ""),
        ("A small red square.", "square", "square small|square red", ""),
        ("a small, red square", "square", "square small|square red", ""),
        ("a red and white flag", "flag", "flag red|flag white", ""),
        ("A cat and a dog", "cat|dog", "", ""),
        ("The circle is red and very large.", "circle", "circle red|circle large", ""),
        ("The circle is red and the square is blue.", "circle|square", "circle red|square blue", ""),
        ("A red square is to the left of two blue dogs.", "square|dog", "square red|dog blue", "square,left of,dog"),
        ("The circle, which is striped, is above the star.", "circle|star", "circle striped", "circle,above,star"),
        ("A man in a hat is holding a cup.", "man|hat|cup", "", "man,in,hat|man,holding,cup"),
        ("A man wears a hat.", "man|hat", "", "man,wears,hat"),
        ("A smiling woman riding a horse", "woman|horse", "woman smiling", "woman,riding,horse"),
        ("A dog is sitting on a mat.", "dog|mat", "", "dog,sitting on,mat"),
        ("A dog is running.", "dog", "dog running", ""),
        ("In the background, people stand.", "person", "person stand", ""),
        ("The image shows a tall building.", "building", "building tall", ""),
        ("Three women. Two boxes; five butterflies!", "woman|box|butterfly", "", ""),
        ("A bus. The bus is red. A red bus.", "bus", "bus red", ""),
        ("a cup on a table. a lamp", "cup|table|lamp", "", "cup,on,table"),  # no relation across sentences
        ("A circle larger than a square", "circle|square", "", "circle,larger than,square"),
        ("A triangle with the same color as the star", "triangle|star", "", "triangle,with same colour as,star"),
    ],
)
def test_parse(text, objects, attributes, relations):
    graph = c.parse(text)
    assert list(graph.objects) == [o for o in objects.split("|") if o]
    assert [" ".join(a) for a in graph.attributes] == [a for a in attributes.split("|") if a]
    assert [",".join(r) for r in graph.relations] == [r for r in relations.split("|") if r]


@pytest.mark.parametrize(
    "word,want",
    [("dogs", "dog"), ("boxes", "box"), ("benches", "bench"), ("cities", "city"), ("men", "man"), ("glass", "glass"),
     ("bus", "bus"), ("buses", "bus"), ("houses", "house"), ("gas", "gas"), ("tie", "tie"), ("ties", "tie"),
     ("is", "is"), ("cactus", "cactus"), ("children", "child")],
)  # fmt: skip
def test_singular(word, want):
    assert c.singular(word) == want


SHAPES, COLOURS = ("square", "circle", "star"), ("red", "green", "blue")
PLACES = ("left of", "right of", "above", "below", "next to")


@relaxed
@given(st.lists(st.tuples(*map(st.sampled_from, (COLOURS, SHAPES, PLACES, COLOURS, SHAPES))), min_size=1, max_size=4))
def test_template_captions_are_read_exactly(facts):
    text = " ".join(f"A {a} {x} is {place} a {b} {y}." for a, x, place, b, y in facts)
    graph = c.parse(text)
    assert set(graph.objects) == {w for f in facts for w in (f[1], f[4])}
    assert set(graph.attributes) == {w for f in facts for w in ((f[1], f[0]), (f[4], f[3]))}
    assert set(graph.relations) == {(f[1], f[2], f[4]) for f in facts}
    assert c.reward(text, {"caption": text})["reward"] == pytest.approx(1)


# --- matching -------------------------------------------------------------------------------------------------------


def never(a, b):
    return False


def test_the_three_stages():
    cand, ref = [("dog",), ("light",), ("trees",)], [("traffic light",), ("dog",), ("tree",)]
    assert c.match_elements(cand, ref, never, None) == (1, 1)
    assert c.match_elements(cand, ref, similarity=None) == (2, 2)
    on_cand, on_ref = c.match_elements(cand, ref)
    trigrams = {"  t", " tr", "tre", "ree"}  # shared by trees (6 trigrams) and tree (5)
    assert on_cand == on_ref == pytest.approx(2 + len(trigrams) / np.sqrt(6 * 5))
    # The leftover of either side takes its best partner, so the two sums differ when the sides do.
    table = {("a", "x"): 0.2, ("a", "y"): 0.9, ("b", "x"): 0.4, ("b", "y"): 0.8, ("c", "x"): 0.1, ("c", "y"): 0.0}

    def similarity(left, right):
        return np.array([[table[a, b] for b in right] for a in left])

    got = c.match_elements([("a",), ("b",), ("c",)], [("x",), ("y",)], never, similarity)
    assert got == pytest.approx((0.9 + 0.8 + 0.1, 0.4 + 0.9))


def test_an_element_is_used_once_and_pairs_are_as_similar_as_their_least_part():
    assert c.match_elements([("dog",), ("dog",)], [("dog",)], never, None) == (1, 1)
    assert c.match_elements([("square", "red")], [("square", "blue")]) == (0, 0)
    half = c.match_elements([("square", "red")], [("squares", "red")])[0]
    assert 0.5 < half < 1


def test_weights_types_and_references():
    cand = c.SceneGraph(("dog", "cat"), (("dog", "red"),), ())
    ref = c.SceneGraph(("dog",), (("dog", "red"), ("dog", "small")), (("dog", "on", "mat"),))
    out = c.capture(cand, ref, similarity=None)
    assert out["object"] == pytest.approx(2 / 3) and out["attribute"] == pytest.approx(2 / 3) and out["relation"] == 0
    assert out["f1"] == pytest.approx((5 * 2 / 3 + 2 * 2 / 3) / 9)
    assert out["precision"] == pytest.approx((5 * 0.5 + 2 * 1) / 9) and out["recall"] == pytest.approx(
        (5 + 2 * 0.5) / 9
    )
    five_five_two = c.capture(cand, ref, c.BENCHMARK_WEIGHTS, similarity=None)
    assert five_five_two["f1"] == pytest.approx((5 + 5) * 2 / 3 / 12)
    no_relations = c.SceneGraph(ref.objects, ref.attributes, ())
    assert c.capture(cand, no_relations, similarity=None)["f1"] == pytest.approx(2 / 3)  # over 7, not 9
    assert c.capture(c.SceneGraph(), c.SceneGraph())["f1"] == 0
    record = {"captions": ["A red dog.", "A cat."]}
    one, two = (c.reward("A red dog.", {"caption": r})["reward"] for r in record["captions"])
    assert c.reward("A red dog.", record)["reward"] == pytest.approx((one + two) / 2) and one == 1
    assert c.reward("A dog.", {"id": 3}) is None


def test_binding_sees_swapped_colours():
    record = {"caption": "A red square and a blue circle."}
    swapped = "A blue square and a red circle."
    assert c.reward(swapped, record)["attribute"] == 0
    assert c.reward(swapped, record, bind=False)["reward"] == 1


@relaxed
@given(st.lists(st.sampled_from(["dog", "cat", "mat", "red car", "car"]), max_size=6),
       st.lists(st.sampled_from(["dog", "cat", "hat", "car"]), max_size=6))  # fmt: skip
def test_match_bounds_and_symmetry(a, b):
    a, b = [(x,) for x in dict.fromkeys(a)], [(x,) for x in dict.fromkeys(b)]
    on_a, on_b = c.match_elements(a, b)
    assert 0 <= on_a <= len(a) and 0 <= on_b <= len(b)
    exact = len(set(a) & set(b))
    assert c.match_elements(a, b, never, None) == (exact, exact)
    assert c.match_elements(b, a, never) == pytest.approx(c.match_elements(a, b, never)[::-1])


def test_injected_models_are_used():
    def graph(text):
        return c.SceneGraph((text.strip(),))

    def encoder(left, right):
        return np.full((len(left), len(right)), 0.25)

    got = c.reward("x", {"caption": "y"}, graph=graph, synonyms=never, similarity=encoder)
    assert got == {"reward": 0.25, "object": 0.25}
    assert c.reward("x", {"caption": "y"}, graph=graph, synonyms=lambda a, b: True)["reward"] == 1


# --- judge and critic -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,want",
    [
        ("Score: 85", 85), ("SCORES :  7.5 of ten", 7.5), ("Score: 20\nbetter.\nScore: 60", 60), ("score:0", 0),
        ("Score 85", None), ("", None), ("Score: x", None), ("Score: 101", None), ("Score: " + "9" * 400, None),
        ("Score: ٣", None), ("Score: -5", None), ("Score: 100.", 100), ("Score: nan", None),
    ],
)  # fmt: skip
def test_parse_score(text, want):
    assert c.parse_score(text) == want


def test_rationale_drops_the_scores_and_keeps_the_reasons():
    text = "The cup is right.\n\nOverall Score: 85\nReasons:\n1. No bottle is there.\n**Scores: 60/100**\n"
    assert c.rationale(text) == "The cup is right.\nReasons:\n1. No bottle is there."
    assert c.rationale("Score: 3") == ""


WORKED = {"Authenticity": 3, "Correctness": 1, "Detail": 1, "Coherence": 1, "Completeness": 1}  # sheet reper.md 3.2


@pytest.mark.parametrize(
    "text",
    [
        '{"Authenticity": 3, "Correctness": 1, "Detail": 1, "Coherence": 1, "Completeness": 1, "Total": 9, '
        '"Reason": "Bottles and clock are wrong."}',
        "```json\n{'authenticity': 3.0, 'correctness': 1, 'detail': 1, 'coherence': 1, 'completeness': 1,"
        " 'reason': 'Bottles and clock are wrong.'}\n```",
        "Authenticity: 3\nCorrectness: 1\nDetail: 1\nCoherence: 1\nCompleteness: 1\nReason: Bottles and clock are wrong.",
    ],
)
def test_parse_judgement(text):
    got = c.parse_judgement(text)
    assert got["total"] == 7  # the sum, whatever total is claimed
    assert got["scores"] == {name.lower(): value for name, value in WORKED.items()}
    assert got["reason"] == "Bottles and clock are wrong."


def test_a_judgement_must_keep_the_rubric():
    assert c.JUDGE_SCALE == 10 and [most for most, _ in c.RUBRIC.values()] == [4, 2, 2, 1, 1]
    complete = "; ".join(f"{name}: {value}" for name, value in WORKED.items())
    assert c.parse_judgement(complete)["reason"] == ""
    assert c.parse_judgement(complete.replace("Detail: 1", "Detail: 3")) is None
    assert c.parse_judgement(complete.replace("Detail: 1", "Detail: good")) is None
    assert c.parse_judgement("") is None
    for name, (most, what) in c.RUBRIC.items():
        assert f"{name.capitalize()} (0 to {most})" in c.judge_prompt("a dog") and what in c.judge_prompt("a dog")
    assert "a dog" in c.judge_prompt("a dog")


# --- the task -------------------------------------------------------------------------------------------------------


def test_prompts_are_fixed_by_the_id_and_all_used():
    assert c.prompt({"id": 5}) == c.prompt({"id": 5, "caption": "x"})
    assert {c.prompt({"id": k}) for k in range(100)} == set(c.PROMPTS)
    assert c.answer({"captions": ["a", "b"]}) == "a" and c.answer({"caption": "z"}) == "z"


def test_thinking_answers():
    record = {"caption": "A red dog."}
    assert c.reward("<think>a cat</think><answer>A red dog.</answer>", record, thinking=True)["reward"] == 1
    assert c.reward("A red dog.", record, thinking=True)["reward"] == 0


def test_metric():
    record = {"caption": "A red dog on a mat."}
    out = c.Captioning().metric([record["caption"], "A red dog."], [record, record])
    single = c.Captioning().metric(["A red dog."], [record])
    assert out["capture"] == pytest.approx((1 + single["capture"]) / 2)
    assert single["precision"] == pytest.approx(10 / 12)  # claiming no relation is no precise relation
    assert single["recall"] == pytest.approx((5 * 0.5 + 5 * 1 + 2 * 0) / 12)
    loose = c.Captioning().metric(["A blue dog and a red mat."], [record])  # CAPTURE's attributes are loose words
    assert loose["recall"] == pytest.approx((5 * 1 + 5 * 1 + 0) / 12)
    text = "one two three four one two three four"
    rows = c.Captioning().metric([text, "a b c d"], [{}, {}])
    assert "capture" not in rows and rows["words"] == 6
    assert rows["repeat_4"] == pytest.approx((1 / 5 + 0) / 2) and c.distinct_4([text, "a b c d"]) == pytest.approx(
        5 / 6
    )
    assert c.Captioning().metric([], []) == {}


SENTENCES = ("A red dog on a mat.", "A small cat\nis next to the dog.", "The mat is green.", "A lamp.", "")


@relaxed
@given(st.lists(st.sampled_from(SENTENCES), max_size=4), st.lists(st.sampled_from(SENTENCES), max_size=4))
def test_words_added_at_the_end_win_nothing_at_equal_length(said, added):
    record = {"caption": " ".join(SENTENCES[:3])}
    short, long = " ".join(said), " ".join([*said, *added])
    one, two = c.length_matched([long, "A dog."], [short, "A dog."], [record, record])
    assert one == two
    assert one["words"] == pytest.approx((len(short.split()) + 2) / 2)
    assert one["recall"] == pytest.approx(c.Captioning().metric([short, "A dog."], [record, record])["recall"])
    assert c.length_matched([short], [long], [record])[1] == c.length_matched([long], [short], [record])[0]


def test_length_matching_cuts_both_ways_and_reads_answers():
    record = {"caption": "A red dog on a mat."}
    first, second = (f"<think>a cat</think><answer>{text}</answer>" for text in ("A red dog.", "A dog on a mat."))
    one, two = c.length_matched([first, first], [second, "A mat."], [record] * 2, thinking=True)
    assert one["words"] == two["words"] == 3 / 2  # without tags the last is no answer at all
    one, two = c.length_matched(["A red dog on a mat."], ["Mat."], [record])
    assert one["words"] == two["words"] == 1 and one["capture"] == 0 < two["capture"]
