"""Names and fields of the gitm_mr vectors mapped to the library, in float64. One graph becomes a batch of one."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.methods.rcrn import loss, network, propagation
from jaxmllm.tasks import relations


def _array(values):
    return jnp.asarray(values, float)


def _locations(i):
    loc = network.loc_feat(_array(i["boxes"]), _array([i["W"], i["H"]]))
    out = {"loc": loc}
    if "subj" in i:
        out["rel"] = network.rel_loc(loc[i["subj"]], loc[i["obj"]])
    return out


def _rel_loc(i):
    return network.rel_loc(_array(i["subj_loc"]), _array(i["obj_loc"]))


def _sub_score(i):
    return network.sub_score(
        _array(i["V_unit"]),
        _array(i["l_unit"]),
        _array(i["W1"]).T,
        _array(i["b1"]),
        _array(i["w2"]).reshape(-1),
        _array(i["b2"]).reshape(()),
    )


def _unary_belief(i):
    s_app = _array(i["s_app"])
    valid = jnp.asarray(np.ones(s_app.shape[-1]) if i.get("valid") is None else i["valid"], bool)
    return network.unary_belief(s_app, _array(i["s_loc"]), _array(i["w_app"]), _array(i["w_loc"]), valid)


def _scored_belief(i):
    s_app = _sub_score(i)
    return {"s_app": s_app, "belief": _unary_belief({**i, "s_app": s_app})}


def _graph(i, nodes):
    root = propagation.referent(nodes, i["edges"]) if i.get("root") is None else i["root"]
    return propagation.pad_graphs([(nodes, i["edges"], root)])


def _propagate(run):
    run = jax.jit(run)

    def evaluate(i):
        b_loc = _array(i["b_loc"])[None]
        graphs = _graph(i, b_loc.shape[1])
        k, mode = i.get("K", 5), i.get("mode") or "grd"
        # Matching makes its own masks; only grounding takes one.
        real = jnp.asarray(i["valid"], bool)[None] if mode == "grd" and i.get("valid") is not None else None
        ctx = propagation.contexts(b_loc, graphs, k)
        valid, rows = propagation.candidate_masks(b_loc, graphs, k, mode, real)
        A = (
            _array(i["A"]).reshape(1, len(i["edges"]) or 1, b_loc.shape[2], -1)
            if i["edges"]
            else jnp.zeros((1, 1, *rows.shape[2:], ctx.shape[2]))
        )
        b = run(b_loc, A, ctx, graphs, _array(i["gate"])[None], valid, rows)
        n = len(i["edges"])
        return {"ctx": ctx[0, :n], "b_out": b[0], "cand_valid": valid[0], "rows": rows[0, :n]}

    return evaluate


def _node_logit(i):
    return network.node_logit(
        _array(i["b"]),
        i.get("top", 5),
        _array(i["W1"]).T,
        _array(i["b1"]),
        _array(i["w2"]).reshape(-1),
        _array(i["b2"]).reshape(()),
    )


def _readout(i):
    score = _array(i["score_bp"])[None]
    graphs = _graph(i, score.shape[1])
    itm, d, edge = propagation.readout(score, _array(i["score_td"])[None], graphs, i.get("mrr_on", "logit"))
    return {"itm": itm[0], "d": d[0, : len(i["edges"])], "mrr_edge": edge[0]}


def _losses(i):
    b_root, proposal, gt_box = _array(i["b_root"]), _array(i["proposal"]), _array(i["gt_box"])
    valid = jnp.asarray(np.ones(b_root.shape) if i.get("valid") is None else i["valid"], bool)
    out = jax.jit(loss.matching_losses)(
        b_root,
        valid,
        jnp.asarray(i["gt_idx"]),
        i.get("scale", 1.0),
        _array(i["match_logit"]),
        jnp.asarray(i["match"], bool),
        proposal,
        gt_box,
        _array(i["pred_delta"]),
        i.get("weights"),
    )
    return out | {
        "target_delta": loss.encode_deltas(proposal, gt_box),
        "iou": loss.inclusive_iou(proposal, gt_box),
    }


def _each(function):
    """A list of argument objects gives a list of results."""

    def evaluate(inputs):
        if isinstance(inputs, list):
            return [evaluate(item) for item in inputs]
        with jax.enable_x64(True):
            return function(inputs)

    return evaluate


_BY_NAME = {
    "loc_feat+rel_loc": _locations,
    "loc_feat": lambda i: _locations(i)["loc"],
    "rel_loc": _rel_loc,
    "sub_score->unary_belief": _scored_belief,
    "sub_score": _sub_score,
    "unary_belief": _unary_belief,
    "bottom_up": _propagate(propagation.bottom_up),
    "top_down": _propagate(propagation.top_down),
    "node_logit": _node_logit,
    "readout": _readout,
    "losses": _losses,
    "metrics": lambda i: relations.cascade_metrics(**i),
}
FUNCTIONS = {name: _each(function) for name, function in _BY_NAME.items()}
