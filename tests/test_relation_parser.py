"""Free text into language graphs, against the exact graphs of the world and by hand."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmllm.tasks import relation_graphs as graphs
from jaxmllm.tasks.relation_parser import parse_expression
from tests.support.relation_scenes import scene


def test_expressions_of_the_world_are_read_back():
    """Exactly up to four relations, at every wordiness; 95 % with five, where one text can have two graphs."""
    rng, right, asked = np.random.default_rng(0), Counter(), Counter()
    while sum(asked.values()) < 600:
        oracle = graphs.Oracle(scene(rng, 10))
        edges, verbosity = int(rng.integers(1, 6)), int(rng.integers(0, 3))
        pair = graphs.sample_pair(oracle, edges, graphs.SHAPES[rng.integers(3)], rng, tries=5)
        for graph in pair[:2] if pair else ():
            record = graphs.relation_record(oracle, graph, 0, verbosity=verbosity)
            got = parse_expression(record["expression"])
            spoken = [graphs.SPOKEN[relation][verbosity > 1] for relation in graph.relations]
            asked[edges] += 1
            right[edges] += (got["entities"], got["edges"], got["relations"], got["spans"]) == (
                record["entities"],
                record["edges"],
                spoken,
                record["spans"],
            )
    assert all(right[e] == asked[e] for e in (1, 2, 3, 4)) and right[5] >= 0.95 * asked[5]


@pytest.mark.parametrize(
    ("text", "entities", "edges"),
    [
        (
            "There is a guy wearing the black shirt and to the right of the boy that is holding a cell phone .",
            ["guy", "black shirt", "boy", "cell phone"],
            [(0, "wearing", 1), (0, "to the right of", 2), (2, "holding", 3)],
        ),
        ("woman in red sitting on a bench", ["woman", "red", "bench"], [(0, "in", 1), (0, "sitting on", 2)]),
        ("the cup on the table near the door", ["cup", "table", "door"], [(0, "on", 1), (1, "near", 2)]),
        ("man on the left", ["man", "left"], [(0, "on", 1)]),
        ("second zebra", ["second zebra"], []),
    ],
)
def test_sentences(text, entities, edges):
    got = parse_expression(text)
    assert got["entities"] == entities
    assert [(s, r, o) for (s, o), r in zip(got["edges"], got["relations"], strict=True)] == edges
    assert [" ".join(text[a:b].lower().split()) for a, b in got["spans"]] == got["relations"]


@given(
    st.text(max_size=80)
    | st.lists(st.sampled_from(["the", "cup", "on", "left of", "and", ",", "is", "that"])).map(" ".join)
)
def test_any_text_gives_a_tree(text):
    got = parse_expression(text)
    assert len(got["entities"]) == len(got["edges"]) + 1 and len(got["edges"]) == len(got["relations"]) == len(
        got["spans"]
    )
    assert [o for _, o in got["edges"]] == list(range(1, len(got["entities"]))) and all(s < o for s, o in got["edges"])
