"""Corners of the GRPO sheet: limits of the ratios, fallbacks, row against token forms, precision of every loss."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmllm.methods.grpo import advantages, correction, terms
from jaxmllm.methods.grpo.loss import GRPOOptions, grpo_loss
from tests.support import vectors_grpo
from tests.support.grpo_reference import B, T, draw
from tests.support.grpo_variants import (
    VARIANTS,
    assert_equal_to_the_loops,
    assert_same,
    examples,
    jit,
    run_all,
    variant,
)

seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def test_limits_of_vespo():
    """Token ratios beyond e^20, a row below 1e-8 and one above e^20, and rollout weights of 0 (1e-8 in the logarithm)."""
    drawn = draw(21) | {"mask": np.ones((B, T))}
    drawn["logps"] = drawn["old_logps"] + np.array([[25.0], [-25.0], [6.0], [-0.1]]) * (np.arange(T) < 4)
    drawn["logps"][0, 1:] -= 26  # clipped before the sum: 20 - 1 - 1 - 1 - 26
    drawn["advantages"] = np.array([1.0, 1.0, -1.0, -1.0])
    drawn["token_weights"][3] = [0, 1.3, 1e-12, 1, 1]
    variants = {
        "plain": variant("vespo", "old_logps"),
        "weighted": variant("vespo", "old_logps token_weights"),
        "row_weights": variant("vespo", "old_logps row_weights", vespo_k_pos=1.0, vespo_lambda_neg=0.5),
    }
    results = run_all(variants)(drawn)
    for name, v in variants.items():
        assert np.isfinite(results[name][2]).all()
        assert_equal_to_the_loops(results[name], v, drawn)


FALLBACKS = {
    # no engine's log-probabilities: the drift is judged on `old`, and with neither there is none
    "drift_from_old": variant("grpo", "old_logps", off_policy_mask_threshold=-0.02),
    "drift_of_nothing": variant("grpo", "", off_policy_mask_threshold=-0.02),
    "drift_by_token": variant("dapo", "old_logps sampling_logps token_advantages", off_policy_mask_threshold=0.0),
    # left unset the ceiling is `epsilon`: upstream's trap, which `validate` refuses
    "cispo_unset": variant("cispo", "old_logps", epsilon_high=None),
    "token_gspo": variant(
        "grpo", "old_logps token_advantages", importance_sampling_level="sequence_token", epsilon=0.02
    ),
}


@examples(5)
@given(seeds)
def test_fallbacks(seed):
    drawn = draw(seed)
    results = fallbacks(drawn)
    for name, v in FALLBACKS.items():
        assert_equal_to_the_loops(results[name], v, drawn)
    dropped = (drawn["advantages"] < 0)[:, None] & (drawn["mask"] > 0)
    assert (results["drift_of_nothing"][2][dropped] == 0).all()  # 0 is above the threshold


fallbacks = run_all(FALLBACKS)


LEVEL_LOSSES = ("grpo", "dapo", "luspo")
USES = "old_logps ref_logps sampling_logps tool_mask"
PAIRS = {
    f"{loss_type}_{level}": variant(loss_type, USES, importance_sampling_level=level, epsilon=0.05, delta=1.2, beta=0.1)
    for loss_type in LEVEL_LOSSES
    for level in ("sequence", "sequence_token")
}
pairs = run_all(PAIRS)


@examples(5)
@given(seeds)
def test_both_forms_of_gspo_have_one_loss_and_gradient(seed):
    """Section 3: with one advantage per row; only what the clip fractions count differs."""
    results = pairs(draw(seed))
    for loss_type in LEVEL_LOSSES:
        rows, tokens = results[f"{loss_type}_sequence"], results[f"{loss_type}_sequence_token"]
        assert_same(rows[::2], tokens[::2])


def test_extremes_of_clip_fractions_ignore_rows_without_tokens():
    """Also where the ratio is one per row: every row that counts is clipped, so the smallest fraction is 1."""
    drawn = draw(3) | {"mask": np.array([[1.0] * T, [1.0] * T, [0.0] * T, [1, 1, 0, 0, 0]])}
    drawn["logps"] = drawn["old_logps"] - 1
    drawn["advantages"] = -np.ones(B)
    levels = {level: variant("grpo", "old_logps", importance_sampling_level=level) for level in ("token", "sequence")}
    for level, (_, metrics, _) in run_all(levels)(drawn).items():
        assert metrics["clip_ratio/low_min"] == 1 and metrics["clip_ratio/high_max"] == 0
        assert metrics["clip_ratio/low_mean"] == (1 if level == "token" else 0.75)  # the mean counts every row


def test_entropy_bonus_of_the_kept_tokens_only():
    """Section 5: coef times the mean entropy of the tokens that pass the entropy mask, whatever the normaliser."""
    drawn = draw(5) | {"mask": np.ones((B, T))}
    kept = drawn["entropies"] >= np.quantile(drawn["entropies"], 0.7)
    use = {"uses": "old_logps entropies", "top_entropy_quantile": 0.3}
    results = run_all(
        {(name, coef): variant(name, entropy_coef=coef, **use) for name in ("dapo", "grpo") for coef in (0.0, 0.5)}
    )(drawn)
    for name in ("dapo", "grpo"):
        (before, *_), (after, metrics, _) = results[name, 0.0], results[name, 0.5]
        assert before - after == pytest.approx(0.5 * drawn["entropies"][kept].mean())
        assert metrics["entropy_coef"] == 0.5 and metrics["policy_loss"] == before
        assert metrics["entropy"] == pytest.approx(drawn["entropies"].mean())


def test_row_weights_may_be_flat():
    """A batch as wide as it is long: nothing but their meaning tells `[B]` from `[T]`."""
    drawn = {name: jnp.asarray(x) for name, x in draw(6, rows=T).items()}
    chosen = {name: drawn[name] for name in ("old_logps", "advantages", "mask")}

    @jit
    def loss(weights):
        return grpo_loss(drawn["logps"], options=GRPOOptions(), rollout_is_weights=weights, **chosen)[0]

    assert loss(drawn["row_weights"][:, 0]) == pytest.approx(float(loss(drawn["row_weights"])), rel=1e-12)


def test_rollout_diagnostics():
    drawn = draw(31)
    drawn["mask"][1] = 0
    old, smp, mask = drawn["old_logps"], drawn["sampling_logps"], drawn["mask"] > 0
    got = jit(correction.rollout_diagnostics)(jnp.asarray(old), jnp.asarray(smp), jnp.asarray(drawn["mask"]))
    gap = (old - smp)[mask]
    rows = [(old[b][mask[b]], smp[b][mask[b]]) for b in range(B)]
    means = [(o.mean(), s.mean()) if o.size else (0.0, 0.0) for o, s in rows]
    want = {
        "kl": np.mean(-gap),
        "k3_kl": np.mean(np.exp(gap) - gap - 1),
        "training_ppl": np.mean([np.exp(-o) for o, _ in means]),
        "rollout_ppl": np.mean([np.exp(-s) for _, s in means]),
        "ppl_ratio": np.mean([np.exp(s - o) for o, s in means]),
        "log_ppl_abs_diff": np.mean([abs(s - o) for o, s in means]),
        "chi2_token": np.mean(np.exp(2 * gap)) - 1,
        "chi2_seq": np.mean([np.exp(2 * (o - s).sum()) - 1 for o, s in rows]),
        "ess": np.exp(gap).sum() ** 2 / (gap.size * np.exp(2 * gap).sum()),
    }
    assert {name: float(x) for name, x in got.items()} == pytest.approx(want, rel=1e-10)


def test_dual_clip_bounds_the_logarithm_and_takes_token_advantages():
    """`log rho` is clipped to +-20 first; loss and gradient by central differences of the formula in numpy."""
    drawn = draw(13) | {"mask": np.ones((B, T))}
    drawn["logps"][0, :2] = drawn["old_logps"][0, :2] + [30, -30]
    drawn["token_advantages"][0, :2] = [-1.0, 1.0]
    old, adv, c = drawn["old_logps"], drawn["token_advantages"], 1.3

    def reference(lp):
        rho = np.exp(np.clip(lp - old, -20, 20))
        worse = np.maximum(-adv * rho, -adv * np.clip(rho, 0.9, 1.2))
        return np.where(adv < 0, np.minimum(worse, -adv * c), worse).sum(1).mean()

    dual = lambda lp: terms.dual_clip_policy_loss(  # noqa: E731
        lp, *map(jnp.asarray, (old, adv, drawn["mask"])), 0.1, 0.2, c, "seq-mean-token-sum"
    )
    (loss, metrics), grad = jit(jax.value_and_grad(dual, has_aux=True))(jnp.asarray(drawn["logps"]))
    assert float(loss) == pytest.approx(reference(drawn["logps"]), rel=1e-12)
    assert float(metrics["ppo_kl"]) == pytest.approx(np.mean(-np.clip(drawn["logps"] - old, -20, 20)))
    for index in np.ndindex(B, T):
        step = np.zeros((B, T))
        step[index] = 1e-6
        slope = (reference(drawn["logps"] + step) - reference(drawn["logps"] - step)) / 2e-6
        assert float(grad[index]) == pytest.approx(slope, rel=1e-5, abs=1e-7)


# --- precision -----------------------------------------------------------------------------------------------------


def rounded(seed, **changes):
    """Numbers that bfloat16 holds exactly, away from the clip borders where a rounding would change sides."""
    return {name: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for name, x in (draw(seed) | changes).items()}


def without_counts(result):
    """Loss and gradient, and the metrics that are smooth in the inputs."""
    loss, metrics, grad = result
    return loss, {name: x for name, x in metrics.items() if "clip_ratio" not in name}, grad


@pytest.mark.slow
def test_float32_agrees_with_float64_and_bfloat16_with_float32_for_every_variant():
    drawn = rounded(9)
    evaluate = run_all(VARIANTS)
    double = evaluate(drawn)
    single = evaluate({name: x.astype(np.float32) for name, x in drawn.items()})
    half = evaluate({name: jnp.asarray(x, jnp.bfloat16) for name, x in drawn.items()})
    for name in VARIANTS:
        assert_same(without_counts(single[name]), without_counts(double[name]), tolerance=3e-5)
        # the same numbers in, float32 arithmetic; the gradient is returned in bfloat16
        assert_same(half[name][:2], single[name][:2], tolerance=2e-6)
        np.testing.assert_allclose(half[name][2], single[name][2], rtol=2**-7, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_one_token_completions_of_every_variant_are_finite():
    drawn = draw(2, width=1) | {"mask": np.array([[1.0], [0.0], [1.0], [1.0]])}
    for name, (loss, metrics, grad) in run_all(VARIANTS)(drawn).items():
        assert np.isfinite([loss, *metrics.values(), *grad.ravel()]).all() and (grad[1] == 0).all(), name


def test_float32_and_bfloat16_of_what_surrounds_the_loss():
    drawn = rounded(17)
    old, smp, mask = (drawn[name] for name in ("old_logps", "sampling_logps", "mask"))

    @jit
    def everything(lp, old, ref, smp, adv, entropies, rewards):
        masked = jnp.asarray(mask > 0)
        return {
            "dual": terms.dual_clip_policy_loss(lp, old, adv, masked)[0],
            "kl": [terms.kl_estimate(lp, ref, masked, kind) for kind in terms.KL_KINDS],
            "weights": [correction.importance_sampling_weights(old, smp, masked, m) for m in correction.WEIGHT_MODES],
            "keep": correction.off_policy_sequence_mask(adv, lp, smp, masked, 0.011),
            "entropy": correction.high_entropy_mask(entropies, masked, 0.3),
            "diagnostics": correction.rollout_diagnostics(old, smp, masked),
            "advantages": advantages.group_advantages(rewards, 2, (1.0, 0.5)),
        }

    arrays = [drawn[n] for n in ("logps", "old_logps", "ref_logps", "sampling_logps", "advantages", "entropies")]
    arrays.append(np.array([[1.0, 0.5], [0.25, np.nan], [0.125, 2.0], [-1.0, 0.75]]))
    double = everything(*map(jnp.asarray, arrays))
    with jax.enable_x64(False):
        single, half = (everything(*[jnp.asarray(x, t) for x in arrays]) for t in (jnp.float32, jnp.bfloat16))
        assert {x.dtype for x in jax.tree.leaves((single, half))} == {jnp.dtype(jnp.float32)}
    assert_same(single, double, tolerance=2e-5)
    assert_same(half, single, tolerance=2e-6)


# --- the fields of the sheet ---------------------------------------------------------------------------------------

FIELDS = {  # section 12, the optional ones with their defaults
    "old_logps": None, "ref_logps": None, "sampling_logps": None, "tool_mask": None, "entropies": None,
    "rollout_is_weights": None, "loss_type": "dapo", "importance_sampling_level": "token", "epsilon": 0.2,
    "epsilon_high": None, "delta": None, "beta": 0.0, "use_bias_correction_kl": False, "max_completion_length": None,
    "num_items_in_batch": None, "num_processes": 1, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
    "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0,
}  # fmt: skip


def test_every_field_of_the_sheet_is_taken_and_has_its_default(monkeypatch):
    seen = []

    def spy(lp, options, **call):
        seen.append((options, {name: np.asarray(x).tolist() for name, x in call.items()}))
        return lp.sum(), {}

    monkeypatch.setattr(vectors_grpo.policy, "grpo_loss", spy)
    drawn = {name: x.tolist() for name, x in draw(8).items()}
    call = {name: drawn[name] for name in ("logps", "advantages", "mask")}
    evaluate = types.SimpleNamespace(**vectors_grpo.FUNCTIONS)
    evaluate.policy_loss([call, call | FIELDS])
    (bare, arrays), (full, same) = seen
    assert bare == full and arrays | {"num_processes": 1} == same
    changed = FIELDS | {name: 1.5 for name in FIELDS if name.startswith(("vespo", "sapo", "epsilon", "delta", "beta"))}
    changed |= {name: drawn[name] for name in drawn if name in FIELDS} | {"rollout_is_weights": drawn["row_weights"]}
    changed |= {"num_items_in_batch": 7, "num_processes": 2, "max_completion_length": 8, "loss_type": "vespo"}
    changed |= {"importance_sampling_level": "sequence", "use_bias_correction_kl": True, "top_entropy_quantile": 0.5}
    evaluate.policy_loss(call | changed | {"off_policy_mask_threshold": 0.1})
    options, arguments = seen[-1]
    for name, value in (changed | {"off_policy_mask_threshold": 0.1}).items():
        assert (arguments[name] if name in arguments else getattr(options, name)) == value, name
    call.pop("advantages")
    rewards = {"rewards_per_func": [[1.0], [0.0], [None], [0.5]], "num_generations": 2, "reward_weights": None}
    evaluate.end_to_end(call | rewards | FIELDS | {"is_mode": None, "is_clip_max": None})
    assert not seen[-1][0].importance_sampling_correction
    engine = {"sampling_logps": drawn["sampling_logps"], "is_mode": "token_mask", "is_clip_min": 0.5}
    for limits, high in (({}, 3.0), ({"is_clip_max": None}, None), ({"is_clip_max": 2.0}, 2.0)):
        evaluate.end_to_end(call | rewards | engine | limits)
        assert seen[-1][0].importance_sampling_clip_max == high and seen[-1][0].importance_sampling_clip_min == 0.5
        assert seen[-1][0].importance_sampling_correction and seen[-1][0].importance_sampling_mode == "token_mask"
    assert evaluate.sync_reference({"policy": 1, "ref": 0, "alpha": 0.6}) == pytest.approx(0.6)
    assert (
        evaluate.soft_overlong_punishment({"lengths": 90, "max_completion_len": 100, "soft_punish_cache": 20}) == -0.5
    )
    assert evaluate.repetition_penalty({"completion_ids": [[], [1]], "ngram_size": 1, "max_penalty": -1.0}) == [0, 0]
