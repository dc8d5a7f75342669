"""Advantages, dynamic sampling, shaping rewards and schedules against their definitions in plain Python."""

import dataclasses
import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.methods.grpo import advantages, schedules
from jaxmllm.methods.grpo.loss import GRPOOptions

ROWS, GROUP = 6, 3
EPS = 1e-4


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def jitted(function, *static):
    # small and run a few times: compiling it well costs more than it saves
    compiled = jax.jit(function, static_argnames=static, compiler_options={"xla_backend_optimization_level": 0})
    return lambda rewards, **options: jax.tree.map(np.asarray, compiled(jnp.asarray(rewards), **options))


group_advantages = jitted(
    advantages.group_advantages, "num_generations", "reward_weights", "scale_rewards", "multi_objective_aggregation"
)
rloo = jitted(advantages.rloo_advantages, "num_generations")
whitened = jitted(advantages.reinforce_baseline_advantages, "num_generations")
pass_at_k = jitted(advantages.pass_at_k_advantages, "num_generations")
keep_groups = jitted(advantages.dynamic_sampling_keep, "num_generations")

# Few distinct values make ties, groups without spread and unscorable rows likely.
entries = st.sampled_from([None, None, 0.0, 1.0, 0.1, 0.30000000000000004, -2.5])
tables = st.lists(st.tuples(entries, entries), min_size=ROWS, max_size=ROWS)
columns = st.lists(entries, min_size=ROWS, max_size=ROWS)


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def mean(values):
    found = [v for v in values if not math.isnan(v)]
    return statistics.fmean(found) if found else math.nan


def deviation(values):
    found = [v for v in values if not math.isnan(v)]
    return statistics.stdev(found) if len(found) > 1 else math.nan


def zero_if_missing(value):
    return 0.0 if math.isnan(value) else value


def groups_of(values):
    return [values[i : i + GROUP] for i in range(0, len(values), GROUP)]


def summed(table, weights):
    return [
        math.nan
        if all(r is None for r in row)
        else sum(w * r for w, r in zip(weights, row, strict=True) if r is not None)
        for row in table
    ]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(scale):
    @examples(40)
    @given(tables)
    def check(table):
        got, metrics = group_advantages(
            advantages.reward_table(table), num_generations=GROUP, reward_weights=(1.0, 0.5), scale_rewards=scale
        )
        rewards = summed(table, (1.0, 0.5))
        want, spreads = [], []
        for group in groups_of(rewards):
            for r in group:
                spreads.append(deviation(rewards) if scale == "batch" else deviation(group))
                divisor = 1.0 if scale == "none" else spreads[-1] + EPS
                want.append(zero_if_missing((r - mean(group)) / divisor))
        np.testing.assert_allclose(got, want, atol=1e-9)
        np.testing.assert_allclose(metrics["reward"], mean(rewards), atol=1e-12)
        np.testing.assert_allclose(metrics["reward_std"], deviation(rewards), atol=1e-12)
        assert metrics["frac_reward_zero_std"] == pytest.approx(sum(s <= 1e-8 for s in spreads) / ROWS)

    check()


@examples(40)
@given(tables)
def test_gdpo_advantages(table):
    got, metrics = group_advantages(
        advantages.reward_table(table),
        num_generations=GROUP,
        reward_weights=(1.0, 2.0),
        multi_objective_aggregation="normalize_then_sum",
        scale_rewards="none",  # has no effect
    )
    values = advantages.reward_table(table).tolist()
    scores = [0.0] * ROWS
    for k, weight in enumerate((1.0, 2.0)):
        for g, group in enumerate(groups_of([row[k] for row in values])):
            for i, r in enumerate(group):
                scores[g * GROUP + i] += weight * zero_if_missing((r - mean(group)) / (deviation(group) + EPS))
    scores = [math.nan if row == (None, None) else y for row, y in zip(table, scores, strict=True)]
    want = [zero_if_missing((y - mean(scores)) / (deviation(scores) + EPS)) for y in scores]
    # A sum of scores that is 0 but for rounding is divided by about EPS
    np.testing.assert_allclose(got, want, atol=1e-8)
    assert metrics["frac_reward_zero_std"] == float(deviation(scores) <= 1e-8)


@examples(40)
@given(columns)
def test_other_estimators(column):
    rewards = np.array(column, float)
    want_rloo, want_best, centred = [], [], []
    for group in groups_of(rewards.tolist()):
        scored = sorted((r for r in group if not math.isnan(r)), reverse=True)
        gap = (scored[0] - scored[1]) / (deviation(group) + EPS) if len(scored) > 1 else 0.0
        best = group.index(scored[0]) if scored else None
        for i, r in enumerate(group):
            others = [x for j, x in enumerate(group) if j != i]
            want_rloo.append(zero_if_missing(r - mean(others)))
            want_best.append(gap if i == best else 0.0)
            centred.append(r - mean(group))
    np.testing.assert_allclose(rloo(rewards, num_generations=GROUP), want_rloo, atol=1e-12)
    np.testing.assert_allclose(pass_at_k(rewards, num_generations=GROUP), want_best, atol=1e-12)
    want = [zero_if_missing((c - mean(centred)) / (deviation(centred) + EPS)) for c in centred]
    np.testing.assert_allclose(whitened(rewards, num_generations=GROUP), want, atol=1e-9)
    keep = [deviation(group) > 1e-6 for group in groups_of(rewards.tolist())]
    assert keep_groups(rewards, num_generations=GROUP).tolist() == keep


@pytest.mark.parametrize("value", [0.1, 0.4, 0.9, 1e6 + 0.1])
def test_a_group_of_equal_rewards_has_exactly_zero_advantage_in_float32(value):
    """The float32 mean of equal numbers can miss them by an ulp, which a deviation of 0 + eps would blow up."""
    with jax.enable_x64(False):
        rewards = np.full((9, 1), value, np.float32)
        for scale in ("group", "batch"):
            got, metrics = group_advantages(rewards, num_generations=9, scale_rewards=scale)
            assert (got == 0).all() and metrics["frac_reward_zero_std"] == 1
        assert not keep_groups(rewards[:, 0], num_generations=9).any()
        assert (rloo(rewards[:, 0], num_generations=9) == 0).all()


def test_order_of_groups_and_of_members_does_not_matter():
    rewards = np.random.default_rng(0).normal(size=(ROWS, 2))
    order = np.array([4, 3, 5, 0, 2, 1])
    batch = {"reward_weights": (1.0, 0.5), "scale_rewards": "batch"}
    gdpo = {"reward_weights": (1.0, 2.0), "multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"}
    for options in (batch, gdpo):
        got, metrics = group_advantages(rewards, num_generations=GROUP, **options)
        moved, moved_metrics = group_advantages(rewards[order], num_generations=GROUP, **options)
        np.testing.assert_allclose(moved, got[order], atol=1e-12)
        assert {k: float(v) for k, v in moved_metrics.items()} == pytest.approx(
            {k: float(v) for k, v in metrics.items()}
        )
        assert got.reshape(-1, GROUP).sum(1) == pytest.approx(0, abs=1e-9)


def test_estimator_is_chosen_by_name():
    table = advantages.reward_table([[1.0, None], [0.0, 1.0], [None, None], [0.5, 0.5]])
    options = GRPOOptions(num_generations=2, reward_weights=(1.0, 2.0), scale_rewards="none")

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def estimates(table):
        rewards = jnp.array([1.0, 2.0, jnp.nan, 1.5])  # the weighted sums
        want = {name: estimator(rewards, 2) for name, estimator in advantages.ADVANTAGE_ESTIMATORS.items()}
        names = ("grpo", *advantages.ADVANTAGE_ESTIMATORS)
        chosen = {name: dataclasses.replace(options, adv_estimator=name) for name in names}
        got = {name: advantages.estimate_advantages(table, chosen[name]) for name in names}
        return got, want | {"grpo": jnp.array([-0.5, 0.5, 0, 0])}

    got, want = estimates(jnp.asarray(table))
    for name, (values, metrics) in got.items():
        np.testing.assert_allclose(values, want[name], atol=1e-12)
        assert float(metrics["reward"]) == pytest.approx(1.5)
    assert len({tuple(map(float, values)) for values in want.values()}) == 4
    with pytest.raises(ValueError, match="adv_estimator"):
        advantages.estimate_advantages(jnp.asarray(table), dataclasses.replace(options, adv_estimator="gae"))


def test_booleans_of_trl_and_a_single_column_are_read():
    table = advantages.reward_table([1.0, None, 0.5, 0.25])
    assert table.shape == (4, 1)
    for boolean, name in ((False, "none"), (True, "group")):
        got, want = (group_advantages(table, num_generations=2, scale_rewards=scale)[0] for scale in (boolean, name))
        assert got.tolist() == want.tolist()


@pytest.mark.parametrize(
    ("rows", "options", "field"),
    [
        (4, {"num_generations": 1}, "num_generations"),
        (4, {"num_generations": 3}, "num_generations"),
        (4, {"num_generations": 2, "reward_weights": (1.0,)}, "reward_weights"),
        (4, {"num_generations": 2, "scale_rewards": "row"}, "scale_rewards"),
        (4, {"num_generations": 2, "multi_objective_aggregation": "max"}, "multi_objective_aggregation"),
    ],
)
def test_errors_name_the_field(rows, options, field):
    with pytest.raises(ValueError, match=f"^{field}"):
        advantages.group_advantages(jnp.ones((rows, 2)), **options)


def test_reward_and_completion_metrics():
    table = jnp.asarray(advantages.reward_table([[1.0, None, None], [0.0, 1.0, None]]))
    metrics = jitted(advantages.reward_metrics, "names")(table, names=("iou", "format", "length"))
    assert float(metrics["rewards/iou/mean"]) == 0.5
    assert float(metrics["rewards/iou/std"]) == pytest.approx(math.sqrt(0.5))
    assert float(metrics["rewards/format/mean"]) == 1.0
    missing = ("rewards/format/std", "rewards/length/mean", "rewards/length/std")
    assert all(math.isnan(metrics[name]) for name in missing)
    with pytest.raises(ValueError, match="names"):
        advantages.reward_metrics(table, ["iou"])

    lengths = jnp.array([3, 10, 6])
    completion_metrics = jax.jit(advantages.completion_metrics)
    metrics = completion_metrics(lengths, jnp.array([True, False, True]))
    want = {"mean_length": 19 / 3, "min_length": 3, "max_length": 10, "clipped_ratio": 1 / 3}
    want |= {"mean_terminated_length": 4.5, "min_terminated_length": 3, "max_terminated_length": 6}
    assert {name: float(v) for name, v in metrics.items()} == pytest.approx(
        {f"completions/{name}": v for name, v in want.items()}
    )
    none_ended = completion_metrics(lengths, jnp.zeros(3, bool))
    assert none_ended["completions/mean_terminated_length"] == 0 and none_ended["completions/clipped_ratio"] == 1


def test_soft_overlong_punishment():
    lengths = range(0, 130)
    got = advantages.soft_overlong_punishment(lengths, max_completion_len=100, soft_punish_cache=20)
    assert all(p == 0 for p in got[:81]) and all(p == -1 for p in got[100:])
    np.testing.assert_allclose(np.diff(got[80:101]), -1 / 20)
    assert advantages.soft_overlong_punishment([100, 101], 100, 0) == [0.0, -1.0]


@examples(60)
@given(st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=4), st.integers(1, 4))
def test_repetition_penalty(completions, n):
    got = advantages.repetition_penalty(completions, n, max_penalty=-2.0)
    for ids, penalty in zip(completions, got, strict=True):
        windows = [ids[i : i + n] for i in range(len(ids) - n + 1)]
        repeats = sum(window in windows[:i] for i, window in enumerate(windows))
        assert penalty == pytest.approx(-2.0 * repeats / max(len(windows), 1))


def test_repetition_penalty_errors():
    for bad in ({"ngram_size": 0}, {"max_penalty": 0.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            advantages.repetition_penalty([[1, 2]], **bad)


def test_adaptive_coefficients():
    # 20 % a horizon at most, none at the target
    assert float(schedules.adaptive_kl_coef(0.1, 10.0, 0.5, n_steps=100, horizon=100)) == pytest.approx(0.12)
    assert float(schedules.adaptive_kl_coef(0.1, 0.0, 0.5, n_steps=100, horizon=100)) == pytest.approx(0.08)
    assert float(schedules.adaptive_kl_coef(0.1, 0.55, 0.5, n_steps=10, horizon=100)) == pytest.approx(0.101)
    update = lambda coef, entropy: float(schedules.adaptive_entropy_coef(coef, entropy, 0.2, 0.3, 0.0, 1.0))  # noqa: E731
    assert [update(0.5, 0.2), update(0.5, 0.21), update(0.9, 0.0), update(0.1, 1.0)] == pytest.approx([0.8, 0.2, 1, 0])
    applied = [float(schedules.applied_entropy_coef(0.5, entropy, 0.2)) for entropy in (jnp.inf, 0.3, 0.2, 0.1)]
    assert applied == [0, 0, 0.5, 0.5]


def test_reference_sync_keeps_the_dtypes_of_the_reference():
    policy = {"w": jnp.array([1.0, -2.0], jnp.float32), "b": jnp.array(3.0)}
    ref = {"w": jnp.array([0.0, 0.5], jnp.bfloat16), "b": jnp.array(1.0)}
    mixed = schedules.sync_reference(policy, ref, 0.6)
    assert mixed["w"].dtype == jnp.bfloat16 and float(mixed["b"]) == pytest.approx(2.2)
    np.testing.assert_allclose(mixed["w"].astype(float), [0.6, -1.0], rtol=2**-8)
    assert jax.tree.map(float, schedules.sync_reference({"a": 1.0}, {"a": 0.0}, 0.25)) == {"a": 0.25}
