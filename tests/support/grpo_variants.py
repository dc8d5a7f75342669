"""Ways to call `grpo_loss`, each loss type and option at least once, and their comparison with the sheet in loops."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings

from jaxmllm.methods.grpo import terms
from jaxmllm.methods.grpo.loss import LOSS_TYPES, GRPOOptions, grpo_loss
from tests.support.grpo_reference import Case

LEVELS = list(terms.RATIO_LEVELS)


def options_for(loss_type, **changes):
    high = 1.1 if loss_type == "cispo" else None
    base = {"loss_type": loss_type, "max_completion_length": 8, "epsilon_high": high}
    return GRPOOptions(**base | changes)


class Variant(typing.NamedTuple):
    """One way to call `grpo_loss`: its options, which arrays of `draw` it gets, and its plain arguments."""

    options: GRPOOptions
    uses: tuple[str, ...]
    call: dict

    def arrays(self, drawn):
        names = {"token_advantages": "advantages", "row_weights": "rollout_is_weights"}
        names["token_weights"] = "rollout_is_weights"
        return {names.get(name, name): drawn[name] for name in self.uses}


def variant(loss_type, uses="", call=None, **changes):
    uses = tuple(uses.split())
    advantages = () if "token_advantages" in uses else ("advantages",)
    return Variant(options_for(loss_type, **changes), ("logps", "mask", *advantages, *uses), call or {})


SCOPE = {"num_items_in_batch": 23, "num_processes": 2, "accumulation_steps": 3}
# small programs, run a few times: compiling them well costs more than it saves
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Every loss type, and every option with each of its values, at least once.
VARIANTS = {
    "grpo": variant("grpo", "old_logps ref_logps", delta=1.25, beta=0.3),
    "grpo_sequence": variant(
        "grpo",
        "old_logps ref_logps row_weights",
        importance_sampling_level="sequence",
        epsilon=0.02,
        beta=0.2,
        kl_loss_type="abs",
    ),
    "bnpo": variant(
        "bnpo",
        "old_logps entropies",
        importance_sampling_level="sequence_token",
        epsilon=0.02,
        top_entropy_quantile=0.4,
    ),
    "dr_grpo": variant(
        "dr_grpo",
        "old_logps sampling_logps",
        importance_sampling_level="sequence",
        off_policy_mask_threshold=0.0,
        importance_sampling_clip_max=1.1,
    ),
    "dr_grpo_scope": variant("dr_grpo", "old_logps", SCOPE),
    "dapo": variant(
        "dapo",
        "old_logps ref_logps sampling_logps tool_mask",
        epsilon_high=0.28,
        beta=0.3,
        kl_loss_type="k3+",
        importance_sampling_mode="token_truncate",
        importance_sampling_clip_min=0.9,
        importance_sampling_clip_max=1.1,
    ),
    "dapo_scope": variant("dapo", "old_logps", SCOPE),
    "dapo_on_policy": variant(
        "dapo",
        "ref_logps sampling_logps entropies",
        beta=0.1,
        kl_loss_type="low_var_kl",
        kl_clip=True,
        entropy_coef=0.01,
        off_policy_mask_threshold=0.05,
        importance_sampling_mode="sequence_truncate",
    ),
    "luspo": variant(
        "luspo",
        "old_logps ref_logps entropies",
        importance_sampling_level="sequence",
        epsilon=0.01,
        beta=0.2,
        use_bias_correction_kl=True,
        top_entropy_quantile=0.0,
    ),
    "cispo": variant(
        "cispo",
        "old_logps sampling_logps",
        importance_sampling_mode="token_mask",
        importance_sampling_clip_min=0.9,
        importance_sampling_clip_max=1.1,
        off_policy_mask_threshold=0.0,
    ),
    "cispo_sequence": variant(
        "cispo",
        "old_logps ref_logps token_advantages",
        importance_sampling_level="sequence",
        epsilon_high=1.02,
        beta=0.2,
        use_bias_correction_kl=True,
        kl_loss_type="k1",
    ),
    "sapo": variant(
        "sapo",
        "old_logps ref_logps token_advantages token_weights",
        beta=0.1,
        kl_loss_type="k1+",
        use_bias_correction_kl=True,
    ),
    "vespo": variant("vespo", "old_logps sampling_logps", importance_sampling_mode="token_truncate"),
    "vespo_sequence": variant("vespo", "old_logps sampling_logps token_advantages"),
    "gmpo": variant(
        "gmpo",
        "old_logps ref_logps entropies token_weights",
        epsilon_high=0.1,
        beta=0.1,
        kl_loss_type="k2",
        top_entropy_quantile=0.5,
    ),
}
ON_POLICY = {
    f"on_policy_{name}_{level}": variant(name, importance_sampling_level=level)
    for name, level in [*zip(LOSS_TYPES, LEVELS * 3, strict=True), *(("grpo", level) for level in LEVELS)]
}


def run_all(variants, step=None):
    """One compiled program for all variants: `drawn -> {name: (loss, metrics, gradient)}` in numpy.

    `step` names the variants' arguments that describe the whole optimizer step and change from call to call.
    """

    def one(name, v, drawn):
        arrays = v.arrays(drawn) | v.call
        for field in (step or {}).get(name, ()):
            if field == "step_tokens":
                arrays["num_items_in_batch"] = drawn[field]
            else:
                arrays["entropy_threshold"] = drawn[field][name]
        loss_fn = lambda lp: grpo_loss(lp, options=v.options, **arrays)  # noqa: E731
        (loss, metrics), grad = jax.value_and_grad(loss_fn, has_aux=True)(arrays.pop("logps"))
        return loss, metrics, grad

    @jit
    def evaluate(drawn):
        return {name: one(name, v, drawn) for name, v in variants.items()}

    return lambda drawn: jax.tree.map(lambda x: np.asarray(x, float), evaluate(jax.tree.map(jnp.asarray, drawn)))


def assert_same(got, want, tolerance=1e-12):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=str(path))


def assert_equal_to_the_loops(result, variant, drawn):
    """Loss, metrics, and the gradient against central finite differences in float64 with stop-gradients held."""
    loss, metrics, grad = result
    reference = Case(variant.arrays(drawn), variant.options, variant.call)
    bonus = variant.options.entropy_coef * metrics.get("entropy_kept", 0)
    np.testing.assert_allclose(loss + bonus, reference.loss(reference.frozen), rtol=1e-10, atol=1e-12)
    want = reference.gradient()
    if not np.allclose(grad, want, rtol=1e-6, atol=1e-8):  # a ratio within the step of a clip border? a finer one tells
        np.testing.assert_allclose(grad, reference.gradient(1e-8), rtol=1e-5, atol=1e-6)
    for name, value in reference.metrics().items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, atol=1e-12, err_msg=name)


def examples(count, derandomize=True):
    """The same examples in every run, but for the longer proofs."""
    return settings(max_examples=count, deadline=None, derandomize=derandomize, database=None)
