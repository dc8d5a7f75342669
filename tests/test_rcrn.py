"""RCRN: padding, order and batches change nothing; gradients, options, features."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.methods.rcrn import network, propagation
from jaxmllm.methods.rcrn.propagation import EPS

# ---- the whole network

CFG = network.RCRNConfig(
    region_dim=12, word_dim=10, width=16, joint=16, difference=8, pair_location=4, context=3, node_hidden=8
)


def network_inputs(rng, nodes, edges, n, S=9, L=4, N=None, M=None, E=None, garbage=0.0):
    """One sample, padded to N boxes, M nodes and E edges with `garbage` at padding."""
    N, M, E = N or n, M or nodes, E or max(1, len(edges))
    low = rng.uniform(0, 60, (n, 2))
    boxes = np.concatenate([low, low + rng.uniform(5, 40, (n, 2))], 1)
    words = rng.normal(size=(S, CFG.word_dim))

    def phrases(count, total):
        index = np.full((total, L), -1)
        for row in index[:count]:
            length = int(rng.integers(1, L + 1))
            row[:length] = rng.integers(0, S, length)
        return index

    def padded(x, total):
        return np.concatenate([x, np.full((total - len(x), *x.shape[1:]), garbage)])

    graphs = propagation.pad_graphs([(nodes, edges, 0)], M, E)
    entity, relation = phrases(nodes, M), phrases(len(edges), E)
    arrays = dict(
        regions=padded(rng.normal(size=(n, CFG.region_dim)), N),
        boxes=padded(boxes, N),
        box_mask=np.arange(N) < n,
        size=np.array([100.0, 80.0]),
        words=padded(words, S + 2),
    )
    inputs = {name: jnp.asarray(x, jnp.float32 if x.dtype == float else None)[None] for name, x in arrays.items()}
    return network.Inputs(
        **inputs, entity_words=jnp.asarray(entity)[None], relation_words=jnp.asarray(relation)[None], graphs=graphs
    )


@cache
def small(encoder="bilstm"):
    cfg = dataclasses.replace(CFG, phrase_encoder=encoder)
    return cfg, network.init(jax.random.key(0), cfg)


run = jax.jit(network.apply, static_argnames=("cfg", "readout"))
SAMPLES = [(3, [(0, 1), (1, 2)], 5), (4, [(0, 1), (0, 2), (2, 3)], 6), (1, [], 2)]


def compare(got, want, nodes, edges, n):
    cut = {
        "b_root": n,
        "node_index": nodes,
        "score_bp": nodes,
        "score_td": nodes,
        "d": len(edges),
        "score_without": len(edges),
    }
    for name, w in want.items():
        size = (..., slice(cut.get(name)))  # without padding
        g, w = (np.atleast_1d(x)[size] for x in (got[name], w))
        np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-5, err_msg=name)


def stacked(inputs):
    return jax.tree.map(lambda *x: jnp.concatenate(x), *inputs)


def test_batch_of_padded_samples_equals_each_alone():
    """Covers padding boxes, nodes, edges and words (holding NaN), different graphs in one batch, and no-edge graphs."""
    cfg, params = small()
    batch = stacked(
        [
            network_inputs(np.random.default_rng(i), *sample, N=7, M=5, E=4, garbage=np.nan)
            for i, sample in enumerate(SAMPLES)
        ]
    )
    got = run(params, cfg, batch, readout="counterfactual")
    for i in (0, 2):  # a chain, and a single node with fewer boxes than the context
        alone = network_inputs(np.random.default_rng(i), *SAMPLES[i])
        compare(
            {k: v[i : i + 1] for k, v in got.items()}, run(params, cfg, alone, readout="counterfactual"), *SAMPLES[i]
        )
    reached = batch.graphs.node_mask
    for name in ("score_bp", "score_td"):
        assert (np.where(reached, got[name], np.inf).min(1) >= got["match_logit"] - 1e-6).all()


def test_box_order_does_not_matter_and_unreachable_nodes_change_nothing():
    cfg, params = small()
    sample = SAMPLES[1]
    inputs = network_inputs(np.random.default_rng(5), *sample, N=7, M=5, E=4)
    want = run(params, cfg, inputs)
    order = np.random.default_rng(0).permutation(7)
    shuffled = inputs.replace(**{name: getattr(inputs, name)[:, order] for name in ("regions", "boxes", "box_mask")})
    got = run(params, cfg, shuffled)
    for name in ("match_logit", "score_bp", "score_td", "d", "mrr_edge", "pred_box"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(got["b_root"], want["b_root"][:, order], rtol=1e-4, atol=1e-6)
    extra = propagation.pad_graphs([(5, sample[1], 0)], 5, 4)  # node 4 is real but no edge leads to it
    got = run(params, cfg, inputs.replace(graphs=extra, entity_words=inputs.entity_words.at[:, 4].set(jnp.arange(4))))
    for name in ("b_root", "match_logit", "d", "mrr_edge"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow  # compiles for half a minute; the parts that need care are checked one by one above
@pytest.mark.parametrize("encoder", ["bilstm", "linear"])
def test_network_gradients(encoder):
    """Finite, with NaN at padding; equal to finite differences where no value on the way is detached."""
    cfg, params = small(encoder)
    batch = stacked(
        [network_inputs(np.random.default_rng(i), *s, N=7, M=5, E=4, garbage=np.nan) for i, s in enumerate(SAMPLES)]
    )

    def loss(params, inputs):
        out = network.apply(params, cfg, inputs)
        parts = out["match_logit"], jnp.log(out["b_root"][:, 0]) * 0.1, out["pred_delta"].sum(-1), out["d"].sum(-1)
        return sum(parts).sum()

    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        batch = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, batch)
        both = jax.jit(jax.value_and_grad(loss))
        gradients = both(params, batch)[1]
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))
        rng = np.random.default_rng(4)
        for part in ("rel", "gates", "node", "box"):
            direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params[part])
            ends = [
                both(params | {part: jax.tree.map(lambda x, d, s=s: x + s * 1e-6 * d, params[part], direction)}, batch)[
                    0
                ]
                for s in (1, -1)
            ]
            slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradients[part], direction)))
            np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-4, err_msg=part)
        assert any(jnp.abs(g).max() > 0 for g in jax.tree.leaves(gradients["phrase"]))


def test_dropout_and_options():
    cfg, params = small()
    inputs = network_inputs(np.random.default_rng(5), *SAMPLES[1], N=7, M=5, E=4)
    want = run(params, cfg, inputs)
    noisy = [run(params, cfg, inputs, jax.random.key(i))["b_root"] for i in (1, 1, 2)]
    assert (noisy[0] == noisy[1]).all() and (noisy[0] != noisy[2]).any()
    own = run(params, dataclasses.replace(cfg, own_matching_gates=True), inputs)
    np.testing.assert_allclose(own["b_root"], want["b_root"], rtol=1e-4)
    assert np.abs(own["score_bp"] - want["score_bp"]).max() > 1e-5
    with pytest.raises(ValueError, match="readout"):
        network.apply(params, cfg, inputs, readout="exact")
    for bad in ({"phrase_encoder": "gru"}, {"joint": 15}):
        with pytest.raises(ValueError):
            dataclasses.replace(cfg, **bad)


# ---- features and small functions


def test_lstm_reads_each_phrase_as_if_alone():
    rng = np.random.default_rng(0)
    p = {
        name: {"w": jnp.asarray(rng.normal(size=(n, 12))), "b": jnp.asarray(rng.normal(size=12))}
        for name, n in (("x", 5), ("h", 3))
    }
    x = rng.normal(size=(2, 4, 5)).astype(np.float32)
    mask = jnp.asarray([[True, True, False, False], [True] * 4])

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    for reverse in (False, True):
        outputs, last = network._lstm(p, jnp.asarray(x), mask, reverse)
        for row, length in enumerate((2, 4)):
            h = c = np.zeros(3)
            for t in range(length)[::-1] if reverse else range(length):
                i, f, g, o = np.split(x[row, t] @ p["x"]["w"] + p["x"]["b"] + h @ p["h"]["w"] + p["h"]["b"], 4)
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
                np.testing.assert_allclose(outputs[row, t], h, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(last[row], h, rtol=1e-4, atol=1e-5)


def test_roi_features_equal_49_bilinear_samples():
    rng = np.random.default_rng(0)
    rows, columns = 5, 6
    grid = np.full((1, 7, 8, 3), np.nan)
    grid[0, :rows, :columns] = rng.normal(size=(rows, columns, 3))
    boxes = np.array([[[0, 0, 168, 140], [30, 40, 100, 90], [5, 5, 9, 12], [150, 120, 400, 300]]], float)
    got = network.roi_features(jnp.asarray(grid), jnp.asarray([[rows, columns]]), jnp.asarray(boxes))

    def sample(x, y):  # bilinear between cell centres, clamped to the real cells
        x, y = np.clip(x / 28 - 0.5, 0, columns - 1), np.clip(y / 28 - 0.5, 0, rows - 1)
        x0, y0 = min(int(x), columns - 2), min(int(y), rows - 2)
        fx, fy = x - x0, y - y0
        g = grid[0]
        return (1 - fy) * ((1 - fx) * g[y0, x0] + fx * g[y0, x0 + 1]) + fy * (
            (1 - fx) * g[y0 + 1, x0] + fx * g[y0 + 1, x0 + 1]
        )

    for n, (x1, y1, x2, y2) in enumerate(boxes[0]):
        want = np.mean(
            [
                sample(x1 + (x2 - x1) * (i + 0.5) / 7, y1 + (y2 - y1) * (j + 0.5) / 7)
                for i in range(7)
                for j in range(7)
            ],
            axis=0,
        )
        np.testing.assert_allclose(got[0, n], want, rtol=1e-4, atol=1e-5)


def test_word_features_average_the_tokens_of_a_word():
    hidden = jnp.asarray([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [jnp.nan, 0.0]]])
    got = network.word_features(hidden, jnp.asarray([[1, 0, 1, -1]]), 3)
    np.testing.assert_allclose(got, [[[3, 4], [3, 4], [0, 0]]])


def test_node_logit_pads_missing_boxes():
    rng = np.random.default_rng(0)
    W1, b1, w2 = rng.normal(size=(5, 4)), rng.normal(size=4), rng.normal(size=4)
    args = (5, *map(jnp.asarray, (W1, b1, w2)), jnp.asarray(0.3))
    b = np.array([0.2, 0.9, 0.5])
    want = np.maximum(np.array([0.9, 0.5, 0.2, 0.7, 0.7]) @ W1 + b1, 0) @ w2 + 0.3
    np.testing.assert_allclose(network.node_logit(jnp.asarray(b), *args, pad=0.7), want, rtol=1e-5)
    wide = jnp.asarray([0.2, 0.95, 0.9, 0.5, 0.99, 0.8])
    real = jnp.asarray([True, False, True, True, False, False])
    np.testing.assert_allclose(network.node_logit(wide, *args, real=real, pad=0.7), want, rtol=1e-5)


def test_location_features_of_degenerate_boxes_are_finite():
    g = network.loc_feat(jnp.asarray([[0.0, 0, -1, -1], [0, 0, 9, 19]]), jnp.asarray([100.0, 100.0]))
    np.testing.assert_allclose(g, [[0, 0, 0, 0, 0], [0, 0, 0.1, 0.2, 0.02]], atol=1e-7)
    np.testing.assert_allclose(network.rel_loc(g[0], g[1]), np.zeros(5))
    np.testing.assert_allclose(network.rel_loc(g[1], g[1]), [-0.5, -0.5, 0.5, 0.5, 1], rtol=1e-5)


def test_unary_belief_renormalises_over_real_boxes_only():
    s_app, s_loc = jnp.asarray([0.9, -0.4, -1.0]), jnp.asarray([0.8, 0.1, -1.0])
    got = network.unary_belief(s_app, s_loc, jnp.asarray(0.9), jnp.asarray(0.7), jnp.asarray([True, True, False]))
    np.testing.assert_allclose(got, [1 + EPS, ((-0.36 + 0.07) / 1.37 + 1) / 2 + EPS, EPS], rtol=1e-5)
