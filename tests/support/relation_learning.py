"""RCRN trained on scenes whose features are exact attributes: samples, training, figures, and faults of a detector or parser.

Nothing but match bits and boxes is taught. `tests/test_rcrn_learns.py` proves the bars, `tests/benchmarks/rcrn_exact.py` draws
the curves.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmllm.methods.rcrn import loss, network, propagation
from jaxmllm.tasks import relation_graphs as graphs
from tests.support.relation_scenes import COLOURS, SHAPES, SIDES, scene

RELATIONS = ("left of", "right of", "above", "below")
ATTRIBUTES = (*SIDES, "striped", *COLOURS, *SHAPES)
VOCABULARY = (*ATTRIBUTES, graphs.NOUN, *sorted({word for relation in RELATIONS for word in relation.split()}))
LENGTH = 10  # words of a relation's phrase
CONFIG = network.RCRNConfig(
    len(ATTRIBUTES),
    len(VOCABULARY),
    width=64,
    joint=64,
    difference=32,
    pair_location=32,
    phrase_encoder="linear",
    dropout=0.0,
)


def samples(count, seed, edges=(1, 2), shape="mixed", objects=(5, 10)):
    """(objects, graph, wrong edge or -1, referent or 0), twins next to each other; `edges`, `objects`: fewest and most."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        things = scene(rng, int(rng.integers(objects[0], objects[1] + 1)))
        oracle = graphs.Oracle(things)
        pair = graphs.sample_pair(oracle, int(rng.integers(edges[0], edges[1] + 1)), shape, rng, RELATIONS)
        if pair is not None:
            graph, foil, wrong = pair
            found += [(things, graph, -1, next(iter(oracle.referents(graph)))), (things, foil, wrong, 0)]
    return found


def batch(items, boxes=10):
    """(`network.Inputs` of numpy arrays, match, referent, wrong edge, number of edges) of samples, padded to `boxes`."""
    count, most = len(items), max(len(graph.edges) for _, graph, *_ in items)
    n_words = 6 * (most + 1)
    regions, places = np.zeros((count, boxes, len(ATTRIBUTES)), np.float32), np.zeros((count, boxes, 4), np.float32)
    words, mask = np.zeros((count, n_words, len(VOCABULARY)), np.float32), np.zeros((count, boxes), bool)
    entities, relations = np.full((count, most + 1, LENGTH), -1), np.full((count, most, LENGTH), -1)
    for b, (objects, graph, *_) in enumerate(items):
        for i, thing in enumerate(objects):
            regions[b, i] = [name in thing.values() for name in ATTRIBUTES]
            places[b, i], mask[b, i] = np.subtract(thing["box"], [0, 0, 1, 1]), True  # inclusive pixels
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
    padded = propagation.pad_graphs([(len(g.nodes), g.edges, 0) for _, g, *_ in items], most + 1, most)
    inputs = network.Inputs(
        regions,
        places,
        mask,
        np.full((count, 2), 448, np.float32),
        words,
        entities,
        relations,
        jax.tree.map(np.asarray, padded),
    )
    wrong = np.array([w for *_, w, _ in items])
    return inputs, wrong < 0, np.array([r for *_, r in items]), wrong, np.array([len(g.edges) for _, g, *_ in items])


def train(made, seed, steps, size=64, cfg=CONFIG):
    """Parameters after `steps` updates; matching counts after a sixth of them."""
    params = network.init(jax.random.key(seed), cfg)
    # without a warm-up one seed of five ended at .89 of matching
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, steps // 10, steps)
    optimiser = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(schedule))

    def objective(params, inputs, match, referent, weight):
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

    @jax.jit
    def some_steps(params, state, picks, weights, made):
        def step(carry, at):
            params, state = carry
            gradient = jax.grad(objective)(params, *jax.tree.map(lambda x: x[at[0]], made), at[1])
            updates, state = optimiser.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), (picks, weights))[0]

    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(made[1]), (steps, size))
    weights = np.where(np.arange(steps) < steps // 6, 0.0, 3.0).astype(np.float32)  # the curriculum: grounding first
    return some_steps(params, optimiser.init(params), picks, weights, jax.tree.map(jnp.asarray, made[:3]))[0]


@functools.partial(jax.jit, static_argnames=("cfg", "readout"))
def _forward(params, inputs, cfg, readout):
    out = network.apply(params, cfg, inputs, readout=readout)
    return {name: out[name] for name in ("match_logit", "pred_index", "mrr_edge")}


def figures(params, test, cfg=CONFIG, slack=None):
    """Shares: matching, grounding, wrong edge where there are two or more, by both readouts. `slack`: see `jittered`."""
    inputs, match, referent, wrong, edges = test
    out = {}
    for readout in ("released", "counterfactual"):
        parts = [
            _forward(params, jax.tree.map(lambda x: jnp.asarray(x[i : i + 500]), inputs), cfg, readout)  # noqa: B023
            for i in range(0, len(match), 500)
        ]
        out[readout] = {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}
    first, several = out["released"], ~match & (edges >= 2)
    chosen = first["pred_index"] if slack is None else slack[np.arange(len(match)), first["pred_index"]]
    shares = {
        "matching": (first["match_logit"] > 0) == match,
        "grounding": (chosen == referent)[match],
        "released": (first["mrr_edge"] == wrong)[several],
        "counterfactual": (out["counterfactual"]["mrr_edge"] == wrong)[several],
    }
    return {name: round(float(x.mean()), 4) if len(x) else None for name, x in shares.items()}


# ---- what a detector and a parser do to exact samples


def _with(test, **changes):
    return dataclasses.replace(test[0], **changes), *test[1:]


def noisy(test, rng, share):
    """Each attribute of an object is read as another of its kind with this chance."""
    regions = test[0].regions.copy()
    kinds = np.split(np.arange(len(ATTRIBUTES)), [3, 4, 12])
    for kind in kinds:
        wrong = rng.random(regions.shape[:2]) < share
        if len(kind) == 1:
            flipped = 1 - regions[..., kind]
        else:
            flipped = np.take_along_axis(
                regions[..., kind],
                (np.arange(len(kind)) + rng.integers(1, len(kind), wrong.shape)[..., None]) % len(kind),
                -1,
            )
        regions[..., kind] = np.where(wrong[..., None], flipped, regions[..., kind])
    return _with(test, regions=regions * test[0].box_mask[..., None])


def jittered(test, rng, share):
    """Each side of a box is moved by up to this share of the box."""
    boxes = test[0].boxes
    side = np.repeat(boxes[..., 2:] - boxes[..., :2], 2, -1)[..., [0, 2, 1, 3]]
    return _with(test, boxes=(boxes + rng.uniform(-share, share, boxes.shape) * side).astype(np.float32))


def missed(test, rng, share):
    """Each box but the referred one is not detected with this chance."""
    inputs, match, referent = test[:3]
    keep = rng.random(inputs.box_mask.shape) >= share
    keep[np.arange(len(match)), referent] |= match
    keep[:, 0] |= ~keep.any(1)
    return _with(test, box_mask=inputs.box_mask & keep)


def doubled(test, rng, share):
    """(samples, whose box each is): each box has a slightly moved double with this chance, after the others."""
    inputs = test[0]
    n = inputs.box_mask.shape[1]
    twin = jittered(test, rng, 0.1)[0].boxes

    def both(a, b):
        return np.concatenate([a, b], 1)

    second = inputs.box_mask & (rng.random(inputs.box_mask.shape) < share)
    whose = np.tile(np.arange(n), (len(test[1]), 2))
    moved = dict(
        regions=both(inputs.regions, inputs.regions),
        boxes=both(inputs.boxes, twin),
        box_mask=both(inputs.box_mask, second),
    )
    return _with(test, **moved), whose


def misparsed(items, rng, share):
    """Samples whose graph lost a word of a phrase or has an edge at another subject, each with half this chance.

    The numbering and the wrong edge stay, as when a parser attaches a phrase to the wrong noun.
    """
    found = []
    for objects, graph, wrong, referent in items:
        drawn = rng.random()
        if drawn < share / 2:
            node = int(rng.integers(len(graph.nodes)))
            words = graph.nodes[node]
            kept = words[1:] or (graphs.NOUN,)
            graph = dataclasses.replace(graph, nodes=(*graph.nodes[:node], kept, *graph.nodes[node + 1 :]))
        elif drawn < share and len(graph.edges) > 1:
            edge = int(rng.integers(1, len(graph.edges)))
            others = [v for v in range(edge + 1) if v != graph.edges[edge][0]]  # mentioned before: no cycle
            moved = (others[rng.integers(len(others))], graph.edges[edge][1])
            graph = dataclasses.replace(graph, edges=(*graph.edges[:edge], moved, *graph.edges[edge + 1 :]))
        found.append((objects, graph, wrong, referent))
    return found
