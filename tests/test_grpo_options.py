"""Options of the GRPO family: every wrong one is told by its name (grpo.md section 11.6)."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import pytest

from jaxmllm.losses import correction, surrogates
from jaxmllm.losses.advantages import ADVANTAGE_ESTIMATORS
from jaxmllm.losses.policy import LOSS_TYPES, PUBLISHED, GRPOOptions, grpo_loss
from tests.grpo_reference import draw


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


def test_names_offered_by_the_options_are_the_names_of_the_tables():
    hints = {name: set(typing.get_args(hint)) for name, hint in typing.get_type_hints(GRPOOptions).items()}
    assert hints["loss_type"] == LOSS_TYPES.keys()
    assert hints["importance_sampling_level"] == surrogates.RATIO_LEVELS.keys()
    assert hints["importance_sampling_mode"] == correction.WEIGHT_MODES.keys()
    assert hints["adv_estimator"] == ADVANTAGE_ESTIMATORS.keys() | {"grpo"}
    assert {
        kind.removesuffix("+") for kind in hints["kl_loss_type"]
    } == surrogates.KL_KINDS.keys() | surrogates.KL_ALIASES


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        (GRPOOptions(beta=0.1), "ref_logps"),
        (GRPOOptions(top_entropy_quantile=0.5), "entropies"),
        (GRPOOptions(entropy_coef=0.5), "entropies"),
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
