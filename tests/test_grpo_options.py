"""Options of the GRPO family: every wrong one is told by its name (grpo.md section 11.6)."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import pytest

from jaxmllm.methods.grpo import correction, terms
from jaxmllm.methods.grpo.advantages import ADVANTAGE_ESTIMATORS
from jaxmllm.methods.grpo.loss import LOSS_TYPES, PUBLISHED, GRPOOptions, grpo_loss
from tests.support.grpo_reference import draw


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"loss_type": "cispo"}, "epsilon_high"),
        ({"loss_type": "cispo", "epsilon_high": 0.2}, "epsilon_high"),
        ({"num_generations": 1}, "num_generations"),
        ({"num_generations": 3}, "num_generations"),
        ({"reward_weights": (1.0,)}, "reward_weights"),
        ({"reward_weights": (1.0, float("nan"))}, "reward_weights"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "max_completion_length"),
        ({"loss_type": "ppo"}, "loss_type"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level"),
        ({"importance_sampling_mode": "clip"}, "importance_sampling_mode"),
        ({"importance_sampling_clip_max": 0.5}, "importance_sampling_clip_max"),
        (
            {"importance_sampling_mode": "token_truncate", "importance_sampling_clip_max": None},
            "importance_sampling_clip_max",
        ),
        ({"kl_loss_type": "full"}, "kl_loss_type"),
        ({"scale_rewards": "row"}, "scale_rewards"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation"),
        ({"adv_estimator": "gae"}, "adv_estimator"),
        ({"beta": float("nan")}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"delta": 1.1}, "delta"),
        ({"top_entropy_quantile": 1.5}, "top_entropy_quantile"),
        ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos"),
        ({"entropy_coef_min": 2.0}, "entropy_coef_min"),
        ({"loss_type": "sapo", "delta": 3.0}, "delta"),
        ({"loss_type": "gmpo", "importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"kl_ctrl": "adaptive"}, "kl_ctrl"),
        ({"kl_ctrl": "linear", "beta": 0.1}, "kl_ctrl"),
        ({"beta": 0.1, "kl_ctrl": "adaptive", "target_kl": 0.0}, "target_kl"),
        ({"beta": 0.1, "kl_ctrl": "adaptive", "horizon": 0}, "horizon"),
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"use_bias_correction_kl": True}, "use_bias_correction_kl"),
        ({"adv_estimator": "rloo", "scale_rewards": "none"}, "scale_rewards"),
        ({"adv_estimator": "rloo", "multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation"),
    ],
)
def test_configuration_errors_name_the_field(changes, field):
    """11.6."""
    with pytest.raises(ValueError, match=f"^{field}"):
        GRPOOptions(**changes).validate(batch_size=8, num_reward_functions=2)


def test_several_configuration_errors_are_told_at_once():
    with pytest.raises(ValueError, match="(?s)beta=-1.*num_generations=3") as error:
        GRPOOptions(beta=-1, num_generations=3).validate(batch_size=8)
    assert len(str(error.value).splitlines()) == 2


def test_defaults_and_published_settings_are_valid_and_hashable():
    for options in (GRPOOptions(), *PUBLISHED.values()):
        assert options.validate(batch_size=16) is options
        assert hash(options) == hash(dataclasses.replace(options))


def test_defaults_are_those_of_trl():
    """grpo.md section 9; rollout correction is TRL's `vllm_importance_sampling_...`."""
    trl = {
        "num_generations": 8,
        "max_completion_length": 512,
        "loss_type": "dapo",
        "importance_sampling_level": "token",
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": None,
        "beta": 0.0,
        "scale_rewards": "group",
        "multi_objective_aggregation": "sum_then_normalize",
        "reward_weights": None,
        "mask_truncated_completions": False,
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "entropy_target": 0.2,
        "entropy_coef_delta": 0.005,
        "entropy_coef_min": 0.0,
        "entropy_coef_max": 1.0,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "sync_ref_model": False,
        "ref_model_mixup_alpha": 0.6,
        "ref_model_sync_steps": 512,
        "off_policy_mask_threshold": None,
        "use_bias_correction_kl": False,
        "importance_sampling_correction": True,
        "importance_sampling_mode": "sequence_mask",
        "importance_sampling_clip_min": None,
        "importance_sampling_clip_max": 3.0,
    }
    assert trl.items() <= dataclasses.asdict(GRPOOptions()).items()


def test_names_offered_by_the_options_are_the_names_of_the_tables():
    hints = {name: set(typing.get_args(hint)) for name, hint in typing.get_type_hints(GRPOOptions).items()}
    assert hints["loss_type"] == LOSS_TYPES.keys()
    assert hints["importance_sampling_level"] == terms.RATIO_LEVELS.keys()
    assert hints["importance_sampling_mode"] == correction.WEIGHT_MODES.keys()
    assert hints["adv_estimator"] == ADVANTAGE_ESTIMATORS.keys() | {"grpo"}
    assert {kind.removesuffix("+") for kind in hints["kl_loss_type"]} == terms.KL_KINDS.keys() | terms.KL_ALIASES


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        (GRPOOptions(beta=0.1), "ref_logps"),
        (GRPOOptions(top_entropy_quantile=0.5), "entropies"),
        (GRPOOptions(entropy_coef=0.5), "entropies"),
        (GRPOOptions(use_adaptive_entropy=True), "entropy_coef"),
        (GRPOOptions(loss_type="dr_grpo", max_completion_length=None), "max_completion_length"),
        (GRPOOptions(loss_type="ppo"), "loss_type"),
        (GRPOOptions(importance_sampling_level="word"), "importance_sampling_level"),
    ],
)
def test_a_missing_argument_is_named(options, missing):
    arrays = draw(8)
    with pytest.raises(ValueError, match=f"^{missing}"):
        chosen = {name: jnp.asarray(arrays[name]) for name in ("logps", "advantages", "mask")}
        jax.eval_shape(functools.partial(grpo_loss, options=options), chosen.pop("logps"), **chosen)
