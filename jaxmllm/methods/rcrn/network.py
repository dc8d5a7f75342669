"""RCRN, the relation-sensitive correspondence reasoning network (GITM-MR, arXiv 2308.01236; gitm_mr.md 2).

It takes region features of the candidate boxes and word features of the expression from any backbone, and a language
graph, and answers three questions with one set of beliefs: does the expression match the image, where is the referred
object, and which relation is wrong. Parameters are a plain dict made by `init`; everything else is a pure function.
Axis letters are those of `propagation.py`; R, D are the widths of region and word features, L words of a phrase.

Differences from the released program (gitm_mr.md 2.9, 5): LayerNorm instead of BatchNorm, so that padding and the other
rows of the batch never matter; padding boxes are excluded from every top-k and every divisor and start at EPS; both
streams are projected to `width` first, since a Qwen backbone is wider than UNITER. Weights are stored [in, out].
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmllm.methods.rcrn import propagation
from jaxmllm.methods.rcrn.propagation import EPS, Graphs

Params = dict[str, Any]
MAX_LOG_SCALE = 4.135166556742356  # ln(1000 / 16): clamp of predicted log size changes


@dataclass(frozen=True)
class RCRNConfig:
    """Sizes are numbers of features; the defaults are the released model's."""

    region_dim: int  # R: width of the region features, the decoder's hidden size for `roi_features`
    word_dim: int  # D: width of the word features
    width: int = 768  # both streams after projection
    joint: int = 1024  # joint space of boxes and phrases, twice the LSTM's hidden size
    difference: int = 256  # hidden width of the difference similarity
    pair_location: int = 64  # width of the embedded relative location
    context: int = 5  # K: context boxes of an edge, and boxes that gates and node scores look at
    node_hidden: int = 64  # hidden width of the node score
    dropout: float = 0.2
    norm_scale: float = 20.0  # initial scale of NormScale
    temperature: float = 10.0  # initial factor on root beliefs in the grounding loss (released: 1, almost flat)
    phrase_encoder: str = "bilstm"  # or "linear": words projected one by one, phrases by their mean
    own_matching_gates: bool = False  # True: the matching branch mixes with its own gates, not the grounding branch's
    mrr_on: str = "logit"  # or "prob": what the released readout takes differences of
    scores: str = "calibrated"  # or "published", whose beliefs saturate: see `calibrated`

    def __post_init__(self):
        if self.phrase_encoder not in ("bilstm", "linear"):
            raise ValueError(f"phrase_encoder must be 'bilstm' or 'linear', got {self.phrase_encoder!r}")
        if self.scores not in ("calibrated", "published"):
            raise ValueError(f"scores must be 'calibrated' or 'published', got {self.scores!r}")
        if self.joint % 2:
            raise ValueError(f"joint must be even, got {self.joint}")


@struct.dataclass
class Inputs:
    """A padded batch. Whatever stands at padding never reaches an output."""

    regions: Float[Array, "B N R"]
    boxes: Float[Array, "B N 4"]  # [x1, y1, x2, y2], inclusive pixels
    box_mask: Bool[Array, "B N"]
    size: Float[Array, "B 2"]  # image width and height, pixels
    words: Float[Array, "B S D"]
    entity_words: Int[Array, "B M L"]  # word indices of each entity phrase, -1 on padding
    relation_words: Int[Array, "B E L"]  # of subject, predicate and object together
    graphs: Graphs


# ---- geometry and scores as functions of plain arrays


def loc_feat(boxes: Float[Array, "*#B 4"], size: Float[Array, "*#B 2"]) -> Float[Array, "*B 5"]:
    """[x/W, y/H, w/W, h/H, wh/(WH)] of inclusive boxes, w = x2 - x1 + 1."""
    low = boxes[..., :2] / size
    sides = (boxes[..., 2:] - boxes[..., :2] + 1) / size
    return jnp.concatenate([low, sides, sides.prod(-1, keepdims=True)], -1)


def rel_loc(subject: Float[Array, "*#B 5"], object_: Float[Array, "*#B 5"]) -> Float[Array, "*B 5"]:
    """Object box relative to the subject's centre and size, both as `loc_feat`; 0 where the subject has no area."""
    subject, object_ = jnp.broadcast_arrays(subject, object_)
    good = subject[..., 4:] > 0
    sides, area = jnp.where(good, subject[..., 2:4], 1), jnp.where(good, subject[..., 4:], 1)
    centre = subject[..., :2] + subject[..., 2:4] / 2
    low, high = object_[..., :2] - centre, object_[..., :2] + object_[..., 2:4] - centre
    return jnp.where(good, jnp.concatenate([low / sides, high / sides, object_[..., 4:] / area], -1), 0)


def sub_score(
    v: Float[Array, "*#B J"],
    l: Float[Array, "*#B J"],
    W1: Float[Array, "J H"],
    b1: Float[Array, "H"],
    w2: Float[Array, "H"],
    b2: Float[Array, ""],
) -> Float[Array, "*B"]:
    """Difference similarity in (-1, 1) of unit vectors: tanh(w2 . relu(unit(W1 (v - l)^2 + b1)) + b2)."""
    z = (v - l) ** 2 @ W1 + b1
    z = z / (jnp.sqrt((z**2).sum(-1, keepdims=True) + 1e-8) + 1e-8)
    return jnp.tanh(jax.nn.relu(z) @ w2 + b2)


def unary_belief(
    s_app: Float[Array, "*B N"],
    s_loc: Float[Array, "*B N"],
    w_app: Float[Array, "*B"],
    w_loc: Float[Array, "*B"],
    valid: Bool[Array, "*#B N"],
) -> Float[Array, "*B N"]:
    """Local belief (Norm(w_app s_app + w_loc s_loc) + 1) / 2 + EPS; EPS on padding, which the divisor ignores too."""
    mixed = jnp.where(valid, w_app[..., None] * s_app + w_loc[..., None] * s_loc, 0)
    largest = jax.lax.stop_gradient(jnp.maximum(1, jnp.abs(mixed).max(-1, keepdims=True)))
    return jnp.where(valid, (mixed / largest + 1) / 2 + EPS, EPS)


def calibrated(p: Params, cosine: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """sigmoid(scale cosine + bias): a belief or relation score whose level means something, both learnt.

    The published forms, (Norm(x) + 1) / 2 of a tanh and ReLU of a cosine, order boxes well and saturate: on exact features
    the largest root belief is 1.00 for matches and mismatches alike, and matching ends at .72 where this form reaches .99
    (`tests/test_rcrn_learns.py`). Theirs needs a cosine near -1 for a small belief, and a ReLU can die everywhere.
    """
    return jax.nn.sigmoid(p["scale"] * cosine + p["bias"])


def node_logit(
    b: Float[Array, "*B N"],
    top: int,
    W1: Float[Array, "top H"],
    b1: Float[Array, "H"],
    w2: Float[Array, "H"],
    b2: Float[Array, ""],
    real: Bool[Array, "*#B N"] | None = None,
    pad: Float[Array, ""] | float = 0.0,
    hidden: Callable[[Float[Array, "*B H"]], Float[Array, "*B H"]] = lambda h: h,
) -> Float[Array, "*B"]:
    """Score of a node from its `top` largest beliefs: w2 . relu(hidden(W1 top(b) + b1)) + b2.

    `pad` stands in for missing boxes; `hidden` is the normalisation between the first product and the ReLU.
    """
    if b.shape[-1] < top:
        real = jnp.ones(b.shape[-1], bool) if real is None else real
        missing = [(0, 0)] * (b.ndim - 1) + [(0, top - b.shape[-1])]
        b, real = jnp.pad(b, missing), jnp.pad(real, missing[-real.ndim :])
    if real is None:
        best = jax.lax.top_k(b, top)[0]
    else:
        best = jax.lax.top_k(jnp.where(real, b, -jnp.inf), top)[0]
        best = jnp.where(jnp.isfinite(best), best, pad)
    return jax.nn.relu(hidden(best @ W1 + b1)) @ w2 + b2


def decode_deltas(boxes: Float[Array, "*B 4"], deltas: Float[Array, "*B 4"]) -> Float[Array, "*B 4"]:
    """Boxes moved by (dx, dy, dw, dh) in R-CNN coding, widths x2 - x1; inverse of `losses.matching.encode_deltas`."""
    sides = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + sides / 2 + deltas[..., :2] * sides
    sides = sides * jnp.exp(jnp.minimum(deltas[..., 2:], MAX_LOG_SCALE))
    return jnp.concatenate([centre - sides / 2, centre + sides / 2], -1)


# ---- features from a vision-language backbone


def word_features(hidden: Float[Array, "B T D"], word: Int[Array, "B T"], n_words: int) -> Float[Array, "B S D"]:
    """Mean of the hidden states of each word's tokens; `word` is the token's word, -1 outside the expression."""
    member = (word[:, None] == jnp.arange(n_words)[:, None]).astype(hidden.dtype)  # [B, S, T]
    hidden = jnp.where((word >= 0)[..., None], hidden, 0)
    return jnp.einsum("bst,btd->bsd", member, hidden) / jnp.maximum(member.sum(-1), 1)[..., None]


def roi_features(
    grid: Float[Array, "B Y X D"], grid_size: Int[Array, "B 2"], boxes: Float[Array, "B N 4"], cell: float = 28.0
) -> Float[Array, "B N D"]:
    """Mean of 7 x 7 bilinear samples of a feature grid inside each box (RoI-align).

    `grid_size` holds the real (rows, columns), `boxes` continuous pixels of the resized image, `cell` pixels a side.
    The bilinear kernel is separable, so the mean over samples is one product per axis and needs no gather.
    """

    def weights(low, high, real, length):  # [B, N, length]: mean hat function over the seven samples of an axis
        at = low[..., None] + (high - low)[..., None] * (jnp.arange(7) + 0.5) / 7
        at = jnp.clip(at / cell - 0.5, 0, jnp.maximum(real - 1, 0)[:, None, None])
        return jnp.maximum(0, 1 - jnp.abs(at[..., None] - jnp.arange(length))).mean(-2)

    rows, columns = grid_size[:, 0], grid_size[:, 1]
    real_rows, real_columns = jnp.arange(grid.shape[1]) < rows[:, None], jnp.arange(grid.shape[2]) < columns[:, None]
    inside = real_rows[:, :, None] & real_columns[:, None]
    y = weights(boxes[..., 1], boxes[..., 3], rows, grid.shape[1])
    x = weights(boxes[..., 0], boxes[..., 2], columns, grid.shape[2])
    return jnp.einsum("bny,bnx,byxd->bnd", y, x, jnp.where(inside[..., None], grid, 0))


# ---- parameters


def init(key: Key[Array, ""], cfg: RCRNConfig) -> Params:
    """Parameters in float32, a nested dict; see gitm_mr.md 2.10 for the released shapes."""
    keys = iter(jax.random.split(key, 64))

    def linear(n_in, n_out):
        return {"w": jax.nn.initializers.glorot_normal()(next(keys), (n_in, n_out)), "b": jnp.zeros(n_out)}

    def norm(n):
        return {"scale": jnp.ones(n), "bias": jnp.zeros(n)}

    def mlp(n_in):
        return {
            "in": linear(n_in, cfg.joint),
            "norm_in": norm(cfg.joint),
            "out": linear(cfg.joint, cfg.joint),
            "norm_out": norm(cfg.joint),
        }

    def pair(n_v):
        return {"v": mlp(n_v), "l": mlp(cfg.width)}

    def difference():
        return {"in": linear(cfg.joint, cfg.difference), "out": linear(cfg.difference, 1)}

    def scale(n):
        return jnp.full(n, cfg.norm_scale)

    half = cfg.joint // 2
    if cfg.phrase_encoder == "bilstm":
        phrase = {
            side: {"x": linear(cfg.width, 4 * half), "h": linear(half, 4 * half)} for side in ("forward", "backward")
        }
    else:
        phrase = {"word": linear(cfg.width, cfg.joint), "whole": linear(cfg.width, cfg.joint)}
    return {
        "regions": linear(cfg.region_dim, cfg.width) | {"norm": norm(cfg.width)},
        "words": linear(cfg.word_dim, cfg.width) | {"norm": norm(cfg.width)},
        "phrase": phrase,
        "attention": {name: linear(cfg.joint, 1) for name in ("app", "loc", "rel")},
        "app": pair(cfg.width) | {"scale": scale(cfg.width), "difference": difference()},
        "loc": pair(cfg.joint) | {"scale": scale(5), "box": linear(5, cfg.joint), "difference": difference()},
        "rel": pair(cfg.joint)
        | {
            "subject": linear(cfg.width, cfg.width),
            "object": linear(cfg.width, cfg.width),
            "scale": scale(cfg.width),
            "location": linear(5, cfg.pair_location),
            "location_scale": scale(cfg.pair_location),
            "joint": linear(cfg.width + cfg.pair_location, cfg.joint),
        },
        "gates": {name: linear(cfg.joint + 2 * cfg.context, 4) for name in ("grounding", "matching")},
        "node": {
            "in": linear(cfg.context, cfg.node_hidden),
            "norm": norm(cfg.node_hidden),
            "out": linear(cfg.node_hidden, 1),
            "pad": jnp.zeros(()),
        },
        "box": pair(cfg.width) | {"scale": scale(cfg.width), "out": linear(2 * cfg.joint + 5, 4)},
        "temperature": jnp.asarray(cfg.temperature),
    } | ({} if cfg.scores == "published" else {name: _calibration() for name in ("belief", "relation")})


def _calibration() -> Params:
    """Start of `calibrated`; learnt values stay near it (8.8 and -.1, 8.4 and -.2)."""
    return {"scale": jnp.asarray(8.0), "bias": jnp.zeros(())}


# ---- layers


def _linear(p: Params, x: Array) -> Array:
    return x @ p["w"] + p["b"]


def _layer_norm(p: Params, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def _unit(x: Array) -> Array:
    # The maximum keeps the gradient of an all-zero (padding) row at 0 instead of NaN.
    return x * jax.lax.rsqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-24))


class _Dropout:
    """Inverted dropout with a fresh key per call; the identity without a key."""

    def __init__(self, key: Key[Array, ""] | None, rate: float):
        self.key, self.rate = key, rate

    def __call__(self, x: Array) -> Array:
        if self.key is None or self.rate == 0:
            return x
        self.key, key = jax.random.split(self.key)
        return jnp.where(jax.random.bernoulli(key, 1 - self.rate, x.shape), x / (1 - self.rate), 0)


def _mlp(p: Params, x: Array, drop: _Dropout) -> Array:
    """Linear, norm, ReLU, dropout, linear, norm, then unit length."""
    x = drop(jax.nn.relu(_layer_norm(p["norm_in"], _linear(p["in"], x))))
    return _unit(_layer_norm(p["norm_out"], _linear(p["out"], x)))


def _lstm(p: Params, x: Float[Array, "P L D"], mask: Bool[Array, "P L"], reverse: bool) -> tuple[Array, Array]:
    """(outputs [P, L, H], final state [P, H]) of one direction; padding keeps the state."""
    wide = _linear(p["x"], x)

    def step(state, at):
        x, keep = at
        h, c = state
        i, f, g, o = jnp.split(x + _linear(p["h"], h), 4, -1)
        c_new = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h_new = jax.nn.sigmoid(o) * jnp.tanh(c_new)
        h, c = jnp.where(keep[:, None], h_new, h), jnp.where(keep[:, None], c_new, c)
        return (h, c), h

    zero = jnp.zeros((x.shape[0], p["h"]["w"].shape[0]), wide.dtype)
    (h, _), outputs = jax.lax.scan(step, (zero, zero), (wide.swapaxes(0, 1), mask.T), reverse=reverse)
    return outputs.swapaxes(0, 1), h


def _encode_phrases(
    params: Params, cfg: RCRNConfig, words: Float[Array, "B S D"], index: Int[Array, "B P L"], drop: _Dropout
) -> tuple[dict[str, Float[Array, "B P D"]], Float[Array, "B P J"]]:
    """(attended phrase features by head, whole-phrase vector) of the phrases that `index` picks out of the words."""
    batch, phrases, length = index.shape
    mask = (index >= 0).reshape(-1, length)
    flat = jnp.maximum(index, 0).reshape(batch, -1)
    x = jnp.take_along_axis(words, flat[..., None], 1).reshape(-1, length, words.shape[-1])
    x = jnp.where(mask[..., None], x, 0)
    p, fed = params["phrase"], drop(x)
    if cfg.phrase_encoder == "bilstm":
        forward, h_forward = _lstm(p["forward"], fed, mask, False)
        backward, h_backward = _lstm(p["backward"], fed, mask, True)
        c, h = jnp.concatenate([forward, backward], -1), jnp.concatenate([h_forward, h_backward], -1)
    else:
        c = _linear(p["word"], fed)
        h = _linear(p["whole"], fed.sum(1) / jnp.maximum(mask.sum(1), 1)[:, None])
    heads = {}
    for name, head in params["attention"].items():
        # Softmax over all positions, then masked and renormalised, is a masked softmax.
        score = jnp.where(mask, _linear(head, c)[..., 0], -1e30)
        weight = jnp.where(mask, jax.nn.softmax(score, -1), 0)
        heads[name] = jnp.einsum("pl,pld->pd", weight, x).reshape(batch, phrases, -1)
    return heads, h.reshape(batch, phrases, -1)


def _relation_scores(
    p: Params,
    regions: Float[Array, "B N D"],
    g: Float[Array, "B N 5"],
    f_rel: Float[Array, "B E D"],
    ctx: Int[Array, "B E K"],
    real: Bool[Array, "B N"],
    drop: _Dropout,
    squash: Callable[[Array], Array] = jax.nn.relu,
) -> Float[Array, "B E N K"]:
    """A: `squash` of the cosine between a (subject box, context box) pair and the relation phrase; 0 on padding."""

    def of_context(x):  # [B, N, W] -> [B, E, 1, K, W]
        return jnp.take_along_axis(x[:, None], ctx.reshape(*ctx.shape[:1], 1, -1, 1), 2).reshape(
            ctx.shape[0], ctx.shape[1], 1, ctx.shape[2], -1
        )

    # A linear layer on [subject; object] is the sum of two linear layers: no N x K x 2D array is built before it.
    u = _linear(p["subject"], regions)[:, None, :, None] + of_context(_linear(p["object"], regions))
    rho = rel_loc(g[:, None, :, None], of_context(g))
    q = _unit(_linear(p["location"], rho)) * p["location_scale"]
    joint = _linear(p["joint"], jnp.concatenate([_unit(u) * p["scale"], q], -1))
    cosine = jnp.einsum("benkj,bej->benk", _mlp(p["v"], joint, drop), _mlp(p["l"], f_rel, drop))
    chosen = jnp.take_along_axis(jnp.broadcast_to(real[:, None], (*ctx.shape[:2], real.shape[1])), ctx, -1)
    keep = real[:, None, :, None] & chosen[:, :, None] & (rho != 0).any(-1)
    return jnp.where(keep, squash(cosine), 0)


def apply(
    params: Params, cfg: RCRNConfig, inputs: Inputs, key: Key[Array, ""] | None = None, readout: str = "released"
) -> dict[str, Array]:  # long: the sheet's equations in their order, each used by the next
    """Run RCRN on a batch. With a `key`, dropout is on.

    Returns a dict: `b_root` [B, N] (grounding belief of the referred object), `match_logit` [B] (match iff > 0),
    `node_index` [B, M] (box of largest grounding belief of each node), `score_bp`, `score_td` [B, M] node scores, `d`
    [B, E] and `mrr_edge` [B] of the released readout; for grounding, `pred_index` [B] of the chosen candidate, its box
    `proposal`, `pred_delta` and the refined `pred_box` [B, 4]. `readout="counterfactual"` makes `mrr_edge` the corrected
    readout's answer and adds its `score_without` [B, E]; it costs one bottom-up run more per edge. See
    `propagation.readout` and `propagation.counterfactual_readout`.

    Raises:
        ValueError: unknown readout.
    """
    if readout not in ("released", "counterfactual"):
        raise ValueError(f"readout must be 'released' or 'counterfactual', got {readout!r}")
    drop, graphs, real = _Dropout(key, cfg.dropout), inputs.graphs, inputs.box_mask
    regions = jnp.where(real[..., None], inputs.regions, 0)
    regions = _layer_norm(params["regions"]["norm"], _linear(params["regions"], regions))
    boxes = jnp.where(real[..., None], inputs.boxes, jnp.array([0.0, 0.0, -1.0, -1.0]))  # loc_feat 0
    g = loc_feat(boxes, inputs.size[:, None])

    n_entities = inputs.entity_words.shape[1]
    index = jnp.concatenate([inputs.entity_words, inputs.relation_words], 1)
    used = (index.reshape(len(index), -1, 1) == jnp.arange(inputs.words.shape[1])).any(1)
    words = jnp.where(used[..., None], inputs.words, 0)
    words = _layer_norm(params["words"]["norm"], _linear(params["words"], words))
    phrase, whole = _encode_phrases(params, cfg, words, index, drop)
    entity = {name: phrase[name][:, :n_entities] for name in ("app", "loc")}

    def score(p, box_features, f):  # [B, M, N], -1 on padding boxes
        v, l = _mlp(p["v"], box_features, drop)[:, None], _mlp(p["l"], f, drop)[:, :, None]
        d = p["difference"]
        if cfg.scores == "published":
            s = sub_score(v, l, d["in"]["w"], d["in"]["b"], d["out"]["w"][:, 0], d["out"]["b"][0])
        else:
            s = (v * l).sum(-1)
        return jnp.where(real[:, None], s, -1)

    s_app = score(params["app"], _unit(regions) * params["app"]["scale"], entity["app"])
    placed = _linear(params["loc"]["box"], _unit(g) * params["loc"]["scale"])
    s_loc = score(params["loc"], placed, entity["loc"])

    def strongest(s):  # top-k of the scores, -1 for missing boxes
        k = min(cfg.context, s.shape[-1])
        return jnp.pad(jax.lax.top_k(s, k)[0], ((0, 0), (0, 0), (0, cfg.context - k)), constant_values=-1)

    seen = jax.lax.stop_gradient(jnp.concatenate([whole[:, :n_entities], strongest(s_app), strongest(s_loc)], -1))
    gate_grd = jax.nn.sigmoid(_linear(params["gates"]["grounding"], seen))
    gate_match = jax.nn.sigmoid(_linear(params["gates"]["matching"], seen))

    def local_belief(gate):
        if cfg.scores == "published":
            return unary_belief(s_app, s_loc, gate[..., 0], gate[..., 1], real[:, None])
        mixed = gate[..., :1] * s_app + gate[..., 1:2] * s_loc
        return jnp.where(real[:, None], calibrated(params["belief"], mixed), 0) + EPS

    b_loc = local_belief(gate_grd)
    b_match = local_belief(gate_match if cfg.own_matching_gates else gate_grd)
    squash = jax.nn.relu if cfg.scores == "published" else functools.partial(calibrated, params["relation"])

    def relations(b):
        ctx = propagation.contexts(b, graphs, cfg.context, real)
        return _relation_scores(params["rel"], regions, g, phrase["rel"][:, n_entities:], ctx, real, drop, squash), ctx

    A, ctx = relations(b_loc)
    A_match, ctx_match = relations(b_match) if cfg.own_matching_gates else (A, ctx)
    valid, rows = propagation.candidate_masks(b_loc, graphs, cfg.context, "grd", real)
    b_grd = propagation.bottom_up(b_loc, A, ctx, graphs, gate_grd[..., 2], valid, rows)
    b_root = jnp.take_along_axis(b_grd, graphs.root[:, None, None], 1)[:, 0]

    valid, rows = propagation.candidate_masks(b_match, graphs, cfg.context, "match", real)
    run = (b_match, A_match, ctx_match, graphs)
    b_bp = propagation.bottom_up(*run, gate_match[..., 2], valid, rows)
    b_td = propagation.top_down(*run, gate_match[..., 3], valid, rows)

    def node_score(b):
        p = params["node"]
        return node_logit(
            b,
            cfg.context,
            p["in"]["w"],
            p["in"]["b"],
            p["out"]["w"][:, 0],
            p["out"]["b"][0],
            real[:, None],
            p["pad"],
            lambda h: _layer_norm(p["norm"], h),
        )

    score_bp, score_td = node_score(b_bp), node_score(b_td)
    match_logit, d, edge = propagation.readout(score_bp, score_td, graphs, cfg.mrr_on)
    out = {
        "b_root": b_root,
        "node_index": jnp.argmax(jnp.where(real[:, None], b_grd, -jnp.inf), -1),
        "match_logit": match_logit,
        "score_bp": score_bp,
        "score_td": score_td,
        "d": d,
        "mrr_edge": edge,
    }
    if readout == "counterfactual":
        out["score_without"], out["mrr_edge"] = propagation.counterfactual_readout(
            *run, gate_match[..., 2], valid, rows, node_score
        )
    f_app = entity["app"]
    if cfg.scores == "calibrated":  # the box's loss does not move what the beliefs read
        regions, f_app = jax.lax.stop_gradient((regions, f_app))
    return out | _refine(params["box"], regions, boxes, g, f_app, graphs.node_mask, b_root, real, drop)


def _refine(p, regions, boxes, g, f_app, node_mask, b_root, real, drop) -> dict[str, Array]:
    """The chosen candidate and its regression, conditioned on the mean phrase of the entities."""
    index = jnp.argmax(jnp.where(real, jax.lax.stop_gradient(b_root), -jnp.inf), -1)

    def chosen(x):
        return jnp.take_along_axis(x, index[:, None, None], 1)[:, 0]

    count = jnp.maximum(node_mask.sum(-1, keepdims=True), 1)
    mean_phrase = jnp.where(node_mask[..., None], f_app, 0).sum(1) / count
    v, l = _mlp(p["v"], _unit(chosen(regions)) * p["scale"], drop), _mlp(p["l"], mean_phrase, drop)
    delta = _linear(p["out"], jnp.concatenate([v, chosen(g), l], -1))
    proposal = chosen(boxes)
    return {"pred_index": index, "pred_delta": delta, "proposal": proposal, "pred_box": decode_deltas(proposal, delta)}
