"""Every objective of the GRPO family is a matter of flags; combinations that cannot be meant are refused by field."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from jaxmllm.errors import InputError
from jaxmllm.methods.grpo import step
from jaxmllm.methods.grpo.step import Rollout
from jaxmllm.methods.optim import make_optimizer
from jaxmllm.methods.update import Update
from jaxmllm.model.logprobs import Sampling
from jaxmllm.training.config import TrainConfig
from jaxmllm.types import Completions, Prompts, TrainState
from tests.support import training

B, G, S, T = 4, 2, 8, 4
CLIP = {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
BASE = {"loss", "policy_loss", "entropy", "grad_norm", "nonfinite"}
FLAGS = {  # flags: metrics that show the objective at work
    "--method.loss_type grpo": CLIP,
    "--method.loss_type bnpo": CLIP,
    "--method.loss_type dr_grpo --method.scale_rewards none": CLIP,
    "--method.loss_type dapo --method.epsilon_high 0.28 --method.filter_groups": CLIP,
    "--method.loss_type luspo --method.importance_sampling_level sequence --method.epsilon 2e-3": CLIP,
    "--method.loss_type grpo --method.importance_sampling_level sequence --method.epsilon 3e-4 --method.epsilon_high 4e-4": CLIP,
    "--method.importance_sampling_level sequence_token": CLIP,
    "--method.loss_type cispo --method.epsilon_high 5": {"cispo_clip_ratio"},
    "--method.loss_type sapo --method.sapo_temperature_neg 1.1": set(),
    "--method.loss_type vespo": {"vespo/phi_seq_mean"},
    "--method.loss_type gmpo --method.epsilon 0.4": CLIP,
    "--method.delta 3 --method.epsilon_high 0.3": CLIP | {"pg_clipfrac_lower"},  # dual clip
    "--method.beta 0.04 --method.kl_loss_type k2": {"kl"},
    "--method.beta 0.04 --method.use_bias_correction_kl": {"kl"},
    "--method.beta 0.01 --method.kl_loss_type low_var_kl --method.kl_clip": {"kl"},
    "--method.beta 0.001 --method.kl_ctrl adaptive --method.target_kl 0.1 --method.horizon 10000": {"kl", "kl_coef"},
    "--method.beta 0.04 --method.sync_ref_model --method.ref_model_sync_steps 64": {"kl"},
    "--method.top_entropy_quantile 0.2": set(),
    "--method.entropy_coef 0.01": {"entropy_coef"},
    "--method.use_adaptive_entropy --method.entropy_target 0.3": {"entropy_coef"},
    "--method.off_policy_mask_threshold 0.1": set(),
    "--method.importance_sampling_mode token_truncate": {"sampling/importance_sampling_ratio/mean"},
    "--method.no-importance_sampling_correction": {"rollout_corr/kl"},
    "--method.adv_estimator rloo": set(),
    "--method.adv_estimator reinforce_plus_plus_baseline": set(),
    "--method.adv_estimator grpo_passk": set(),
    "--method.multi_objective_aggregation normalize_then_sum": set(),
    "--method.scale_rewards batch --method.mask_truncated_completions": set(),
    "--method.reward_funcs task soft_overlong repetition --method.soft_punish_cache 2 --method.reward_weights 1 0.5 0.1": set(),
    "--method.num_iterations 2 --method.steps_per_generation 2": set(),
}  # fmt: skip


def parsed(tmp_path, flags: str) -> TrainConfig:
    base = training.config(tmp_path, batch_size=B)
    return tyro.cli(TrainConfig, default=base, args=flags.split()).validate()


def score(params, cfg, prompts, completions, sampling, vision_tokens=None, short=0):
    """Stands for the model: log-probabilities and entropies that depend on one parameter and on the tokens."""
    x = params["w"] * (1 + completions.tokens.astype(jnp.float32)) / 8
    return -x, x**2


def arrays() -> Rollout:
    """A rollout whose policy has moved a little from the one that drew it; rows of different lengths."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 8, (B, G, T)).astype(np.int32)
    logps = -(1 + tokens) / 8.0

    def near() -> np.ndarray:
        return (logps + rng.normal(0, 0.1, logps.shape)).astype(np.float32)

    lengths = rng.integers(1, T + 1, (B, G)).astype(np.int32)
    prompt = np.zeros((B, S), np.int32)
    return Rollout(
        Prompts(prompt, np.zeros((B, 3, S), np.int32), prompt[:, 0] + S, prompt[:, 0] + S, prompt - 1),
        Completions(tokens, lengths, (np.arange(T) < lengths[..., None]).astype(np.float32)),
        rng.normal(size=(B, G)).astype(np.float32),
        old_logps=near(),
        ref_logps=near(),
        sampling_logps=near(),
    )


def update(config: TrainConfig, cuts: int):
    """(a function of a rollout that does one update in so many microbatches, its rollout)."""
    tx = make_optimizer(config.optim, config.max_steps)
    coefficients = (
        jnp.float32(0.01) if config.method.use_adaptive_entropy else None,
        jnp.float32(0.02) if config.method.kl_ctrl == "adaptive" else None,
    )

    def call(rollout: Rollout):
        params = {"w": jnp.ones(())}
        return step.grpo_step(
            TrainState(jnp.zeros((), jnp.int32), params, tx.init(params)),
            rollout,
            *coefficients,
            update=Update(None, tx, ".*", cuts),  # type: ignore[arg-type]
            options=config.method.loss,
            sampling=Sampling(),
        )[1]

    return call, arrays() if config.method.beta else arrays().replace(ref_logps=None)


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_choose_the_update(tmp_path, monkeypatch, flags):
    """Traced, not compiled: the metrics of each objective."""
    monkeypatch.setattr(step, "score_halves", score)
    config = parsed(tmp_path, flags)
    metrics = jax.eval_shape(*update(config, 1))
    assert metrics.keys() >= BASE | FLAGS[flags] and all(value.shape == () for value in metrics.values())
    assert ("kl" in metrics) == (config.method.beta > 0)


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS)
def test_updates_are_finite_and_do_not_depend_on_the_cut(tmp_path, monkeypatch, flags):
    monkeypatch.setattr(step, "score_halves", score)
    config = parsed(tmp_path, flags)
    found = []
    for cuts in (1, 2):
        call, rollout = update(config, cuts)
        found.append({name: float(value) for name, value in call(rollout).items()})
    whole, cut = found
    assert whole.keys() == cut.keys()
    assert np.isfinite(list(whole.values())).all() and whole["nonfinite"] == 0 and whole["grad_norm"] > 0
    if config.method.loss_type != "bnpo":  # which depends on the cut by definition
        for name in ("loss", "grad_norm", *FLAGS[flags]):
            assert cut[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--method.num_generations 1", "method.num_generations=1: must be at least 2"),
        ("--method.loss_type cispo", "method.epsilon_high=None: cispo"),
        (
            "--method.loss_type dr_grpo --method.max_completion_length None",
            "method.max_completion_length=None: dr_grpo",
        ),
        ("--method.kl_ctrl adaptive", "method.kl_ctrl='adaptive': there is no KL term while beta is 0"),
        ("--method.reward_weights 1 2", "method.reward_weights: 2 weights for 1 reward functions"),
        ("--method.temperature 0", "method.temperature = 0: the completions of a group would all be the same"),
        ("--method.beta 0.1 --method.top_k 5", "method.beta = 0.1: a KL term needs the whole distribution"),
        (
            "--method.beta 0.1 --method.sync_ref_model lora:lo-ra-config",
            "method.sync_ref_model: with lora the reference",
        ),
        ("--method.soft_punish_cache 2", "method.soft_punish_cache = 2: goes with soft_overlong"),
        ("--method.reward_funcs task soft_overlong", "method.soft_punish_cache = 0: goes with soft_overlong"),
        ("--method.reward_funcs task task", "method.reward_funcs = .* name each function once"),
        ("--method.repetition_max_penalty 1", "method.repetition_max_penalty = 1.0: must not be positive"),
        ("--method.reward_rules released --data.thinking", "method.reward_rules = 'released': .* no thinking format"),
        ("--method.max_num_gen_batches 0", "method.max_num_gen_batches = 0: must be at least 1"),
        ("--method.steps_per_generation 3", "batch_size = 4: must be divisible by"),
        ("--data.weights 1 2 3", "data.weights = .*: needs one for each of data.train = .*, or none"),
        ("--metric_for_best_model a/b --data.eval", "metric_for_best_model = 'a/b': needs eval_steps and data.eval"),
        ("--load_best_model_at_end", "load_best_model_at_end: name the metric"),
        ("--evaluation.max_new_tokens 0", "evaluation.max_new_tokens = 0: must be at least 1"),
        ("--data.style qwen", "data.style = 'qwen': use one of"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        parsed(tmp_path, flags)
