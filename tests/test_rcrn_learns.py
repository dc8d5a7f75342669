"""RCRN and its losses learn from match bits and boxes alone, on scenes whose features are exact attributes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmllm.methods.rcrn import network, propagation
from jaxmllm.tasks import relation_graphs as graphs
from tests.support.relation_scenes import COLOURS, SHAPES, SIDES, scene

RELATIONS = ("left of", "right of", "above", "below")
ATTRIBUTES = (*SIDES, "striped", *COLOURS, *SHAPES)
VOCABULARY = (*ATTRIBUTES, graphs.NOUN, *sorted({word for relation in RELATIONS for word in relation.split()}))
BOXES, NODES, EDGES, LENGTH, WORDS = 10, 3, 2, 10, 24


def samples(count, seed):
    """(objects, graph, wrong edge or -1, referent or 0), twins next to each other."""
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        objects = scene(rng, int(rng.integers(5, BOXES + 1)))
        oracle = graphs.Oracle(objects)
        pair = graphs.sample_pair(oracle, int(rng.integers(1, 3)), "mixed", rng, RELATIONS)
        if pair is not None:
            graph, foil, wrong = pair
            found += [(objects, graph, -1, next(iter(oracle.referents(graph)))), (objects, foil, wrong, 0)]
    return found


def batch(items):
    """`rcrn.Inputs`, match, referent, wrong edge, number of edges."""
    count = len(items)
    regions, boxes = np.zeros((count, BOXES, len(ATTRIBUTES))), np.zeros((count, BOXES, 4))
    words, mask = np.zeros((count, WORDS, len(VOCABULARY))), np.zeros((count, BOXES), bool)
    entities, relations = np.full((count, NODES, LENGTH), -1), np.full((count, EDGES, LENGTH), -1)
    for b, (objects, graph, *_) in enumerate(items):
        for i, thing in enumerate(objects):
            regions[b, i] = [name in thing.values() for name in ATTRIBUTES]
            boxes[b, i], mask[b, i] = np.subtract(thing["box"], [0, 0, 1, 1]), True  # inclusive pixels
        text, spans = [], []
        for phrase in (*graph.nodes, *(relation.split() for relation in graph.relations)):
            spans.append(list(range(len(text), len(text) + len(phrase))))
            text += phrase
        for v in range(len(graph.nodes)):
            entities[b, v, : len(spans[v])] = spans[v]
        for e, (subject, object_) in enumerate(graph.edges):
            span = [*spans[subject], *spans[len(graph.nodes) + e], *spans[object_]]
            relations[b, e, : len(span)] = span
        words[b, np.arange(len(text)), [VOCABULARY.index(word) for word in text]] = 1
    inputs = network.Inputs(
        *(jnp.asarray(x, jnp.float32) for x in (regions, boxes)),
        jnp.asarray(mask),
        jnp.full((count, 2), 448.0),
        jnp.asarray(words, jnp.float32),
        jnp.asarray(entities),
        jnp.asarray(relations),
        propagation.pad_graphs([(len(g.nodes), g.edges, 0) for _, g, *_ in items], NODES, EDGES),
    )
    wrong = np.array([w for *_, w, _ in items])
    return (
        inputs,
        jnp.asarray(wrong < 0),
        jnp.asarray([r for *_, r in items]),
        wrong,
        np.array([len(g.edges) for _, g, *_ in items]),
    )


@pytest.mark.slow
def test_grounding_matching_and_blame_are_learnt_without_a_label_of_the_wrong_edge(steps=900, size=64):
    cfg = network.RCRNConfig(
        len(ATTRIBUTES),
        len(VOCABULARY),
        width=64,
        joint=64,
        difference=32,
        pair_location=32,
        phrase_encoder="linear",
        dropout=0.0,
    )
    params = network.init(jax.random.key(0), cfg)
    optimiser = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(optax.cosine_decay_schedule(2e-3, steps)))
    state = optimiser.init(params)

    @jax.jit
    def step(params, state, inputs, match, referent, weight):
        def loss(params):
            out = network.apply(params, cfg, inputs)
            gold = jnp.take_along_axis(inputs.boxes, referent[:, None, None], 1)[:, 0]
            parts = loss.matching_losses(
                out["b_root"],
                inputs.box_mask,
                referent,
                params["temperature"],
                out["match_logit"],
                match,
                out["proposal"],
                gold,
                out["pred_delta"],
            )
            return parts["L_grd"] + weight * parts["L_match"] + parts["L_reg"]

        updates, state_ = optimiser.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state_

    train, (inputs, match, referent, wrong, edges) = batch(samples(12_000, 1)), batch(samples(600, 2))
    rng = np.random.default_rng(0)
    for n in range(steps):
        pick = rng.integers(0, len(train[1]), size)
        weight = jnp.float32(0.0 if n < steps // 6 else 3.0)  # the curriculum: grounding first
        params, state = step(params, state, *jax.tree.map(lambda x: x[pick], train[:3]), weight)  # noqa: B023

    out = {
        name: jax.jit(network.apply, static_argnames=("cfg", "readout"))(params, cfg, inputs, readout=name)
        for name in ("released", "counterfactual")
    }
    match, two = np.asarray(match), (wrong >= 0) & (edges == 2)
    said = np.asarray(out["released"]["match_logit"]) > 0
    grounded = (np.asarray(out["released"]["pred_index"]) == np.asarray(referent))[match].mean()
    blamed = {name: (np.asarray(o["mrr_edge"]) == wrong)[two].mean() for name, o in out.items()}
    print(f"matching {np.mean(said == match):.1%}, grounding {grounded:.1%}, wrong edge of two {blamed}")
    assert np.mean(said == match) > 0.62 and grounded > 0.9 and min(blamed.values()) > 0.58
