"""Cheap strategies against the reward of mismatched relations. Verdicts are worth 0.5 blind, so the table compares
mixtures: what a strategy earns on a matched and a mismatched twin together."""

from jaxmllm.tasks import relations
from tests.support.reward_hacks import Hack

EXPRESSION = {
    "size": [448, 448], "expression": "the red circle that is left of the small square and above the star",
    "entities": ["red circle", "small square", "star"], "edges": [[0, 1], [0, 2]], "relations": ["left of", "above"],
    "root": 0,
}  # fmt: skip
MATCH = EXPRESSION | {"match": True, "box": [40, 60, 120, 140], "foil_pos": -1}
MISMATCH = EXPRESSION | {"relations": ["left of", "below"], "match": False, "foil_pos": 1}
WHOLE = '{"match": true, "bbox_2d": [0, 0, 448, 448]}'
CENTRE = '{"match": true, "bbox_2d": [150, 150, 300, 300]}'


def twins(texts):
    """Mean reward of `matched ## mismatched` answers to the two twins."""
    first, _, second = texts.partition("##")
    right, wrong = relations.reward(first, MATCH), relations.reward(second or first, MISMATCH)
    return (right["reward"] + wrong["reward"]) / 2


ONE = EXPRESSION | {"expression": "the red circle left of the small square", "entities": EXPRESSION["entities"][:2],
                    "edges": [[0, 1]]}  # fmt: skip
ONE_MATCH = ONE | {"relations": ["left of"], "match": True, "box": MATCH["box"], "foil_pos": -1}
ONE_MISMATCH = ONE | {"relations": ["above"], "match": False, "foil_pos": 0}


def one_relation_twins(texts):
    first, _, second = texts.partition("##")
    right, wrong = relations.reward(first, ONE_MATCH), relations.reward(second or first, ONE_MISMATCH)
    return (right["reward"] + wrong["reward"]) / 2


HACKS = [
    Hack(
        "relations, twins with one relation",
        one_relation_twins,
        honest='{"match": true, "bbox_2d": [48, 66, 126, 150]}##{"match": false, "relation": "R1"}',
        cheap={
            "always match, whole image": WHOLE,
            "always match, right box": '{"match": true, "bbox_2d": [40, 60, 120, 140]}',
            "always mismatch": '{"match": false, "relation": "R1"}',
        },
    ),
    Hack(
        "relations, twins",
        twins,
        honest='{"match": true, "bbox_2d": [48, 66, 126, 150]}##{"match": false, "relation": "R2"}',
        cheap={
            "empty answer": "",
            "always match, whole image": WHOLE,
            "always match, centre box": CENTRE,
            "always match, right box": '{"match": true, "bbox_2d": [40, 60, 120, 140]}',
            "always mismatch, first relation": '{"match": false, "relation": "R1"}',
            "always mismatch, right relation": '{"match": false, "relation": "R2"}',
            "right verdict, no place": f'{WHOLE}##{{"match": false, "relation": "R1"}}',
            "both answers at once": '{"match": true, "bbox_2d": [40, 60, 120, 140], "relation": "R2"}',
            "both answers one after the other": f'{CENTRE} {{"match": false, "relation": "R2"}}',
            "verdict without box or relation": '{"match": true}##{"match": false}',
            "every relation": '{"match": false, "relation": "R1, R2"}',
            "relation out of range": '{"match": false, "relation": "R9"}',
            "inverted box": '{"match": true, "bbox_2d": [120, 140, 40, 60]}',
        },
    ),
]
