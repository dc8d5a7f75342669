"""Every objective of the GRPO family is a matter of flags; combinations that cannot be meant are refused by field."""

import functools

import jax
import jax.numpy as jnp
import pytest
import tyro

from jaxmllm import api
from jaxmllm.errors import InputError
from jaxmllm.train.config import TrainConfig
from jaxmllm.train.optim import make_optimizer, split
from jaxmllm.train.step import Rollout, Update, grpo_step
from jaxmllm.types import Completions, Prompts, TrainState
from tests import training

B, G, S, T = 4, 2, 8, 4
CLIP = {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
BASE = {"loss", "policy_loss", "entropy", "grad_norm", "nonfinite"}
FLAGS = {  # flags: metrics that show the objective at work
    "--grpo.loss_type grpo": CLIP,
    "--grpo.loss_type bnpo": CLIP,
    "--grpo.loss_type dr_grpo --grpo.scale_rewards none": CLIP,
    "--grpo.loss_type dapo --grpo.epsilon_high 0.28 --rollout.filter_groups": CLIP,
    "--grpo.loss_type luspo --grpo.importance_sampling_level sequence --grpo.epsilon 2e-3": CLIP,
    "--grpo.loss_type grpo --grpo.importance_sampling_level sequence --grpo.epsilon 3e-4 --grpo.epsilon_high 4e-4": CLIP,
    "--grpo.importance_sampling_level sequence_token": CLIP,
    "--grpo.loss_type cispo --grpo.epsilon_high 5": {"cispo_clip_ratio"},
    "--grpo.loss_type sapo --grpo.sapo_temperature_neg 1.1": set(),
    "--grpo.loss_type vespo": {"vespo/phi_seq_mean"},
    "--grpo.loss_type gmpo --grpo.epsilon 0.4": CLIP,
    "--grpo.delta 3 --grpo.epsilon_high 0.3": CLIP | {"pg_clipfrac_lower"},  # dual clip
    "--grpo.beta 0.04 --grpo.kl_loss_type k2": {"kl"},
    "--grpo.beta 0.04 --grpo.use_bias_correction_kl": {"kl"},
    "--grpo.beta 0.01 --grpo.kl_loss_type low_var_kl --grpo.kl_clip": {"kl"},
    "--grpo.beta 0.001 --grpo.kl_ctrl adaptive --grpo.target_kl 0.1 --grpo.horizon 10000": {"kl", "kl_coef"},
    "--grpo.beta 0.04 --grpo.sync_ref_model --grpo.ref_model_sync_steps 64": {"kl"},
    "--grpo.top_entropy_quantile 0.2": set(),
    "--grpo.entropy_coef 0.01": {"entropy_coef"},
    "--grpo.use_adaptive_entropy --grpo.entropy_target 0.3": {"entropy_coef"},
    "--grpo.off_policy_mask_threshold 0.1": set(),
    "--grpo.importance_sampling_mode token_truncate": {"sampling/importance_sampling_ratio/mean"},
    "--grpo.no-importance_sampling_correction": {"rollout_corr/kl"},
    "--grpo.adv_estimator rloo": set(),
    "--grpo.adv_estimator reinforce_plus_plus_baseline": set(),
    "--grpo.adv_estimator grpo_passk": set(),
    "--grpo.multi_objective_aggregation normalize_then_sum": set(),
    "--grpo.scale_rewards batch --grpo.mask_truncated_completions": set(),
    "--rollout.reward_funcs task soft_overlong repetition --rollout.soft_punish_cache 2 --grpo.reward_weights 1 0.5 0.1": set(),
    "--rollout.num_iterations 2 --rollout.steps_per_generation 2": set(),
}  # fmt: skip


def parsed(tmp_path, flags: str) -> TrainConfig:
    base = training.config(tmp_path, batch_size=B)
    return tyro.cli(TrainConfig, default=base, args=flags.split()).validate()


@pytest.fixture(scope="module")
def model():
    return api.load("tiny")


@pytest.mark.parametrize("cuts", [1, 2])
@pytest.mark.parametrize("flags", FLAGS)
def test_flags_choose_the_update(tmp_path, model, flags, cuts):
    """The update of each objective, traced without compiling it, whole and cut into microbatches."""
    config = parsed(tmp_path, f"{flags} --optim.gradient_accumulation_steps {cuts} --rollout.steps_per_generation 1")
    tx = make_optimizer(config.optim, config.max_steps)
    state = jax.eval_shape(
        lambda params: TrainState(jnp.zeros((), jnp.int32), params, tx.init(split(params, config.trainable)[0])),
        model.params,
    )
    number, row = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32), functools.partial(
        jax.ShapeDtypeStruct, dtype=jnp.int32
    )  # fmt: skip
    rollout = Rollout(
        Prompts(row((B, S)), row((B, 3, S)), row((B,)), row((B,)), row((B, S))),
        Completions(row((B, G, T)), row((B, G)), number((B, G, T))),
        number((B, G)),
        None,
        number((B, G, T)),
        number((B, G, T)) if config.grpo.beta else None,
        number((B, G, T)),
    )
    update = Update(model.cfg, tx, config.trainable, config.optim.gradient_accumulation_steps)
    coefficients = (
        number(()) if config.grpo.use_adaptive_entropy else None,
        number(()) if config.grpo.kl_ctrl == "adaptive" else None,
    )
    step = functools.partial(grpo_step, update=update, options=config.grpo, sampling=config.rollout.sampling(()))
    _, metrics = jax.eval_shape(step, state, rollout, *coefficients)
    assert metrics.keys() >= BASE | FLAGS[flags]
    assert all(value.shape == () for value in metrics.values())
    assert ("kl" in metrics) == (config.grpo.beta > 0)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--grpo.num_generations 1", "grpo.num_generations=1: must be at least 2"),
        ("--grpo.loss_type cispo", "grpo.epsilon_high=None: cispo"),
        ("--grpo.loss_type dr_grpo --grpo.max_completion_length None", "grpo.max_completion_length=None: dr_grpo"),
        ("--grpo.kl_ctrl adaptive", "grpo.kl_ctrl='adaptive': there is no KL term while beta is 0"),
        ("--grpo.reward_weights 1 2", "grpo.reward_weights: 2 weights for 1 reward functions"),
        ("--rollout.temperature 0", "rollout.temperature = 0: the completions of a group would all be the same"),
        ("--grpo.beta 0.1 --rollout.top_k 5", "grpo.beta = 0.1: a KL term needs the whole distribution"),
        ("--grpo.beta 0.1 --grpo.sync_ref_model lora:lo-ra-config", "grpo.sync_ref_model: with lora the reference"),
        ("--rollout.soft_punish_cache 2", "rollout.soft_punish_cache = 2: goes with soft_overlong"),
        ("--rollout.reward_funcs task soft_overlong", "rollout.soft_punish_cache = 0: goes with soft_overlong"),
        ("--rollout.reward_funcs task task", "rollout.reward_funcs = .* name each function once"),
        ("--rollout.repetition_max_penalty 1", "rollout.repetition_max_penalty = 1.0: must not be positive"),
        ("--rollout.reward_rules released --data.thinking", "rollout.reward_rules = 'released': .* no thinking format"),
        ("--rollout.max_num_gen_batches 0", "rollout.max_num_gen_batches = 0: must be at least 1"),
        ("--rollout.steps_per_generation 3", "batch_size = 4: must be divisible by"),
        ("--metric_for_best_model a/b --data.eval", "metric_for_best_model = 'a/b': needs eval_steps and data.eval"),
        ("--load_best_model_at_end", "load_best_model_at_end: name the metric"),
        ("--evaluation.max_new_tokens 0", "evaluation.max_new_tokens = 0: must be at least 1"),
        ("--data.style qwen", "data.style = 'qwen': use one of"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        parsed(tmp_path, flags)
