"""Names and fields of the sheet utr.md, mapped to the library."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.eval import perplexity
from jaxmllm.tasks import track_rewards as tr


def _each(function):
    """A list of argument objects gives a list of results; float64, as the sheet's reference."""

    def evaluate(inputs):
        if isinstance(inputs, list):
            return [evaluate(item) for item in inputs]
        with jax.enable_x64(True):
            return function(inputs)

    return evaluate


def _plain(result):
    return {name: np.asarray(value).tolist() for name, value in result.items()}


def _optional(value):
    return None if value is None else jnp.asarray(np.asarray(value, float))


def _tpl_score(i):
    full, frames = (jnp.asarray(np.asarray(i[name], float)) for name in ("logp_full", "logp_frames"))
    return _plain(perplexity.tpl_score(full, frames, _optional(i.get("mask"))))


def _frame_activation(i):
    attn = jnp.asarray(np.asarray(i["attn_LHQK"], float))
    return _plain(perplexity.frame_activation(attn, jnp.asarray(i["spans"]), i.get("rho", 0.5)))


def _leave_one_out(i):
    full, without = (jnp.asarray(np.asarray(i[name], float)) for name in ("logp_full", "logp_without"))
    return np.asarray(perplexity.leave_one_out(full, without, _optional(i.get("mask")))).tolist()


def _trajectory(i):
    pred, gt, exclude = i["pred"], i["gt"], i.get("exclude") or []
    out = {
        "mean": tr.trajectory_iou(pred, gt, exclude),
        "volume": tr.trajectory_iou(pred, gt, exclude, "volume"),
        "mean_power2": tr.trajectory_iou(pred, gt, exclude, power=2),
    }
    box = gt.get(str(i.get("query_frame")))
    if box is not None:
        out["static_baseline"] = tr.static_baseline(box, gt, exclude)
        out["lift"] = tr.lift(out["mean"], out["static_baseline"])
    return out


def _trajectory_iou(i):
    names = {"pred": "P", "gt": "G"}
    return tr.trajectory_iou(**{names.get(name, name): value for name, value in i.items()})


def _identity(i):
    return tr.identity_reward(i["pred"], i["gt"], i.get("iou_thr", i.get("thr", 0.5)), i.get("exclude") or [])


def _attributes_and_times(i):
    return {
        "attr": [tr.attribute_reward(p, golds) for p, golds in i.get("attr", [])],
        "time": [tr.temporal_iou(a, b) for a, b in i.get("time", [])],
    }


FUNCTIONS = {
    "tpl_score": _each(_tpl_score),
    "frame_activation": _each(_frame_activation),
    "leave_one_out": _each(_leave_one_out),
    "trajectory_iou/lift": _each(_trajectory),
    "trajectory_iou": _each(_trajectory_iou),
    "static_baseline": _each(lambda i: tr.static_baseline(**i)),
    "lift": _each(lambda i: tr.lift(**i)),
    "identity_reward": _each(_identity),
    "attribute_reward / temporal_iou": _each(_attributes_and_times),
    "attribute_reward": _each(lambda i: tr.attribute_reward(**i)),
    "temporal_iou": _each(lambda i: tr.temporal_iou(**i)),
    "format_reward": _each(lambda i: tr.format_reward(**i)),
    "utr_reward": _each(lambda i: tr.utr_reward(**i)),
    "contrast_bonus": _each(lambda i: tr.contrast_bonus(**i).tolist()),
}
