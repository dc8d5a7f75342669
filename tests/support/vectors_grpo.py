"""Maps the function and field names of the GRPO sheet to the library; evaluated in float64."""

import functools

import jax
import jax.numpy as jnp

from jaxmllm.methods.grpo import advantages, correction, schedules, terms
from jaxmllm.methods.grpo import loss as policy
from jaxmllm.methods.masked import masked_count, masked_mean

TOKENS = (
    "logps",
    "old_logps",
    "ref_logps",
    "sampling_logps",
    "entropies",
    "advantages",
    "mask",
    "tool_mask",
    "rollout_is_weights",
)
NONE_IS_A_VALUE = ("is_clip_min", "is_clip_max", "clip_min", "clip_max")  # no bound; their default is not None
WEIGHT_OPTIONS = {
    "is_mode": "importance_sampling_mode",
    "is_clip_min": "importance_sampling_clip_min",
    "is_clip_max": "importance_sampling_clip_max",
}


def in_float64(function):
    """Takes the fields of one case, or a list of such; a field of None is an absent one."""

    @functools.wraps(function)
    def run(inputs):
        if isinstance(inputs, list):
            return [run(case) for case in inputs]
        given = {name: v for name, v in inputs.items() if v is not None or name in NONE_IS_A_VALUE}
        with jax.enable_x64(True):
            return jax.tree.map(lambda x: x.tolist() if hasattr(x, "tolist") else x, function(**given))

    return run


def array(values):
    return jnp.asarray(values, float)


def floats(tree):
    """Lists become arrays, numbers floats, at any depth of dicts."""
    if isinstance(tree, dict):
        return {name: floats(x) for name, x in tree.items()}
    return array(tree)


def per_item(function, field, is_one):
    """`function` of a list in `field`; one item of it gives one result."""

    def run(**fields):
        if is_one(fields[field]):
            return function(**fields | {field: [fields[field]]})[0]
        return function(**fields)

    return run


def with_gradient(loss_fn, logps):
    (loss, metrics), grad = jax.value_and_grad(loss_fn, has_aux=True)(logps)
    return {"loss": loss, "grad_logps": grad, **metrics}


def split_fields(fields):
    """Arrays of `grpo_loss`, its other arguments, and its options, from a vector's fields."""
    arrays = {name: array(fields[name]) for name in TOKENS if name in fields}
    call = {name: fields[name] for name in ("num_items_in_batch", "num_processes") if name in fields}
    options = {name: v for name, v in fields.items() if name not in (*TOKENS, "num_items_in_batch", "num_processes")}
    weights = {field: options.pop(name) for name, field in WEIGHT_OPTIONS.items() if name in options}
    # sampling_logps alone serve the off-policy mask; weights are asked for by is_mode
    options["importance_sampling_correction"] = weights.get("importance_sampling_mode") is not None
    options |= weights if options["importance_sampling_correction"] else {}
    return arrays, call, policy.GRPOOptions(**{"max_completion_length": None, **options})


def policy_loss(**fields):
    arrays, call, options = split_fields(fields)
    logps = arrays.pop("logps")
    return with_gradient(lambda lp: policy.grpo_loss(lp, options=options, **arrays, **call), logps)


def accumulated_policy_loss(micro_batch_size, **fields):
    arrays, call, options = split_fields(fields)
    logps = arrays.pop("logps")
    rows = logps.shape[0]
    steps = rows // micro_batch_size
    counted = arrays["mask"] * arrays.get("tool_mask", jnp.ones_like(logps))
    call.setdefault("num_items_in_batch", masked_count(counted))

    def accumulated(lp):
        losses, metrics = [], []
        for start in range(0, rows, micro_batch_size):
            cut = slice(start, start + micro_batch_size)
            part = {name: x[cut] for name, x in arrays.items()}
            loss, seen = policy.grpo_loss(lp[cut], options=options, accumulation_steps=steps, **part, **call)
            losses.append(loss)
            metrics.append(seen)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *metrics)
        tokens = masked_count(counted, axis=1).reshape(steps, -1).sum(1)
        return sum(losses), policy.pool_metrics(stacked, tokens, options, arrays["advantages"].ndim == 2)

    full, _ = policy.grpo_loss(logps, options=options, **arrays, **call)
    return {**with_gradient(accumulated, logps), "full_batch_loss": full}


def gmpo_loss(logps, old_logps, advantages, mask, epsilon=0.4, epsilon_high=None):
    options = policy.GRPOOptions(loss_type="gmpo", epsilon=epsilon, epsilon_high=epsilon_high)
    lp, old, adv, m = map(array, (logps, old_logps, advantages, mask))
    result = with_gradient(lambda x: policy.grpo_loss(x, old_logps=old, advantages=adv, mask=m, options=options), lp)
    coef = terms.gmpo_coefficients(lp - old, terms.clean_advantages(adv, m), m, options.clip_range)
    return {**result, "coef": coef[:, 0]}


def dual_clip_policy_loss(logps, old_logps, advantages, mask, **options):
    old, adv, m = map(array, (old_logps, advantages, mask))
    return with_gradient(lambda lp: terms.dual_clip_policy_loss(lp, old, adv, m, **options), array(logps))


def kl_estimate(logps, ref_logps, mask, kind="k3"):
    per_token = terms.kl_estimate(array(logps), array(ref_logps), array(mask), kind)
    return {"per_token": per_token, "masked_mean": masked_mean(per_token, array(mask))}


def group_advantages(rewards_per_func, **options):
    values, metrics = advantages.group_advantages(jnp.asarray(advantages.reward_table(rewards_per_func)), **options)
    return {"advantages": values, **metrics}


REWARD_OPTIONS = ("num_generations", "reward_weights", "scale_rewards", "multi_objective_aggregation")


def end_to_end(rewards_per_func, **fields):
    scored = group_advantages(rewards_per_func, **{k: fields.pop(k) for k in REWARD_OPTIONS if k in fields})
    return {**policy_loss(advantages=scored["advantages"], **fields), **scored}


def on_rewards(function):
    return lambda rewards, **options: function(jnp.asarray(advantages.reward_table(rewards))[:, 0], **options)


def on_arrays(function):
    """Lists become arrays, the rest is passed on."""
    return lambda **fields: function(**{k: array(v) if isinstance(v, list) else v for k, v in fields.items()})


def sync_reference(policy, ref, alpha):
    return schedules.sync_reference(floats(policy), floats(ref), alpha)


soft_overlong_punishment = per_item(advantages.soft_overlong_punishment, "lengths", lambda x: not isinstance(x, list))
repetition_penalty = per_item(
    advantages.repetition_penalty, "completion_ids", lambda ids: bool(ids) and not isinstance(ids[0], list)
)


FUNCTIONS = {
    "group_advantages": in_float64(group_advantages),
    "rloo_advantages": in_float64(on_rewards(advantages.rloo_advantages)),
    "dynamic_sampling_keep": in_float64(on_rewards(advantages.dynamic_sampling_keep)),
    "policy_loss": in_float64(policy_loss),
    "accumulated_policy_loss": in_float64(accumulated_policy_loss),
    "gmpo_loss": in_float64(gmpo_loss),
    "dual_clip_policy_loss": in_float64(dual_clip_policy_loss),
    "aggregate_loss": in_float64(on_arrays(terms.aggregate_loss)),
    "kl_estimate": in_float64(kl_estimate),
    "importance_sampling_weights": in_float64(on_arrays(correction.importance_sampling_weights)),
    "off_policy_sequence_mask": in_float64(on_arrays(correction.off_policy_sequence_mask)),
    "high_entropy_mask": in_float64(on_arrays(correction.high_entropy_mask)),
    "rollout_diagnostics": in_float64(on_arrays(correction.rollout_diagnostics)),
    "soft_overlong_punishment": in_float64(soft_overlong_punishment),
    "repetition_penalty": in_float64(repetition_penalty),
    "sync_reference": in_float64(sync_reference),
    "adaptive_kl_coef": in_float64(on_arrays(schedules.adaptive_kl_coef)),
    "adaptive_entropy_coef": in_float64(on_arrays(schedules.adaptive_entropy_coef)),
    "end_to_end": in_float64(end_to_end),
}
