"""Maps the function and field names of the Perception-R1 sheet to the library (released rules); losses in float64."""

import json

import jax
import jax.numpy as jnp

from jaxmllm.methods.grpo import advantages, terms
from jaxmllm.methods.grpo import loss as policy
from jaxmllm.tasks import counting, detection, grounding, ocr

WEIGHT_FIELDS = {  # names of the released switches -> fields of detection.Weights
    "f1_scale": "f1",
    "cls_coe": "label",
    "iou_coe": "iou",
    "coverage_scale": "coverage",
    "is_size_weight": "size",
}
PENALTY_FIELDS = ("do_penailty", "do_penalty", "penalty")  # both values are reported whatever the switch says


def each(function):
    """A vector holds one item or a list of items; an item is an object of arguments or a bare text."""

    def run(inputs):
        if isinstance(inputs, list):
            return [run(item) for item in inputs]
        return function(**inputs) if isinstance(inputs, dict) else function(inputs)

    return run


def grounding_reward(completion, solution):
    return grounding.released_reward(completion, solution)


def grounding_format_reward(completion):
    return grounding.released_format(completion)


def counting_reward(completion, clicks=None, solution=None, **options):
    return counting.released_reward(completion, solution if clicks is None else clicks, **options)


def detection_reward(completion, solution, matching="hungarian", **switches):
    chosen = {
        WEIGHT_FIELDS[name.lower()]: json.loads(value.lower()) if isinstance(value, str) else value
        for name, value in switches.items()
        if name.lower() not in PENALTY_FIELDS
    }
    ids, boxes = solution["target_id"], solution["target_box"]
    return {
        f"penalty_{name}": detection.released_reward(
            completion, ids, boxes, detection.Weights(penalty=penalty, **chosen), matching
        )
        for name, penalty in (("off", False), ("on", True))
    }


def ocr_reward(completion, solution):
    return ocr.edit_similarity(completion, solution, rules="released")


def ocr_metrics(completion, solution):
    return ocr.page_metrics(completion, solution, rules="released")


def group_advantages(rewards, num_generations):
    with jax.enable_x64(True):
        table = jnp.asarray(advantages.reward_table(rewards))
        return advantages.group_advantages(table, num_generations)[0].tolist()


def policy_loss(logp, mask, advantages, ref_logp=None, beta=0.04):
    with jax.enable_x64(True):
        ref_logp, beta = (logp, 0.0) if ref_logp is None else (ref_logp, beta)  # no reference, no distance to it
        lp, ref, m, adv = (jnp.asarray(x, float) for x in (logp, ref_logp, mask, advantages))
        options = policy.GRPOOptions(loss_type="grpo", beta=beta)

        def loss(x):
            return policy.grpo_loss(x, advantages=adv, mask=m, ref_logps=ref, options=options)[0]

        value, gradient = jax.value_and_grad(loss)(lp)
        k3 = terms.aggregate_loss(terms.kl_estimate(lp, ref, m, "k3"), m, "seq-mean-token-mean")
        return {"loss": value.item(), "mean_k3": k3.item(), "grad_logp": gradient.tolist()}


FUNCTIONS = {
    "pr1_grounding_reward": each(grounding_reward),
    "pr1_grounding_format_reward": each(grounding_format_reward),
    "pr1_counting_reward": each(counting_reward),
    "pr1_detection_reward": each(detection_reward),
    "pr1_ocr_reward": each(ocr_reward),
    "pr1_ocr_metrics": each(ocr_metrics),
    "pr1_group_advantages": each(group_advantages),
    "pr1_policy_loss": each(policy_loss),
}
