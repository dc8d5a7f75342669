"""Options of the GRPO family: names, defaults, published settings and the errors a wrong one gives."""

import dataclasses
import math
import typing
from typing import Literal

from jaxmllm.methods.grpo.terms import ClipRange

LossTypeName = Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "gmpo"]
RatioLevel = Literal["token", "sequence", "sequence_token"]
KLKind = Literal["k1", "k2", "k3", "abs", "kl", "mse", "low_var_kl", "k1+", "k3+", "abs+", "kl+", "low_var_kl+"]
RewardScale = Literal["group", "batch", "none"]
RewardAggregation = Literal["sum_then_normalize", "normalize_then_sum"]
AdvantageEstimator = Literal["grpo", "rloo", "reinforce_plus_plus_baseline", "grpo_passk"]
KLControl = Literal["fixed", "adaptive"]
WeightMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclasses.dataclass(frozen=True)
class GRPOOptions:
    """Options of the objective, hashable so that they can be static under `jit` (they choose the program).

    Names and defaults are TRL's `GRPOConfig` unless a field says otherwise. Coefficients that change during training
    (`beta`, `entropy_coef`) can be passed to `grpo_loss` as arrays, so that a schedule does not recompile.
    """

    num_generations: int = 8
    """G, completions a prompt; at least 2, and it must divide the batch."""
    max_completion_length: int | None = 512
    """Tokens; the constant row length that `dr_grpo` divides by. Needed by `dr_grpo` only."""
    loss_type: LossTypeName = "dapo"
    """How a token's loss is formed and how the batch is averaged."""
    importance_sampling_level: RatioLevel = "token"
    """`token`, `sequence` (GSPO) or `sequence_token` (GSPO with the gradient of each token)."""
    epsilon: float = 0.2
    """Lower clip distance: the ratio is clipped at 1 - epsilon; a distance in log space for `gmpo` (0.4 published)."""
    epsilon_high: float | None = None
    """Upper clip distance, `epsilon` if None. For `cispo` the ceiling on the ratio itself, about 5, and required."""
    delta: float | None = None
    """Two-sided clip: a ceiling on the ratio, above 1 + epsilon_high, that bounds rows with A < 0. It is the `clip_ratio_c`
    of verl's dual clip (3 there), the same loss; tokens that it holds are logged as verl's `pg_clipfrac_lower`."""
    beta: float = 0.0
    """Coefficient of the KL term; 0: no reference model is needed."""
    use_bias_correction_kl: bool = False
    """Multiply the KL of each token by the (unclipped) importance ratio, through which gradient flows."""
    kl_loss_type: KLKind = "k3"
    """verl's name: `k1`, `k2`, `k3` (TRL's only kind), `abs`; with `+` the gradient of k2. See `kl_estimate`."""
    kl_clip: bool = False
    """Bound k3 as verl and EasyR1 do: exponent to +-20, value to +-10. Not in TRL."""
    kl_ctrl: KLControl = "fixed"
    """verl's `kl_ctrl.type`: `adaptive` starts at `beta` and steers it towards `target_kl` (`adaptive_kl_coef`)."""
    target_kl: float = 0.1
    """Nats per token, of the adaptive coefficient."""
    horizon: int = 10_000
    """Completions in which the adaptive coefficient may change by about 20 %."""

    scale_rewards: RewardScale = "group"
    """What advantages are divided by: the deviation of the `group`, of the `batch`, or `none` (Dr. GRPO)."""
    multi_objective_aggregation: RewardAggregation = "sum_then_normalize"
    """Or `normalize_then_sum` (GDPO): standardise each reward function in its group, then add."""
    reward_weights: tuple[float, ...] | None = None
    """One weight per reward function; all 1 if None."""
    adv_estimator: AdvantageEstimator = "grpo"
    """verl's name: `grpo`, `rloo`, `reinforce_plus_plus_baseline` or `grpo_passk`. Not in TRL."""
    mask_truncated_completions: bool = False
    """Overlong filtering: completions cut off by the length limit get mask 0."""

    top_entropy_quantile: float = 1.0
    """Share of tokens, highest entropy first, that the policy term learns from; 1: all."""
    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus."""
    use_adaptive_entropy: bool = False
    """Steer `entropy_coef` towards `entropy_target` (see `schedules`); pass the current value to `grpo_loss`."""
    entropy_target: float = 0.2
    """Nats per token; the bonus applies while the previous step's entropy is at or below it."""
    entropy_coef_delta: float = 0.005
    """Step of the adaptive coefficient."""
    entropy_coef_min: float = 0.0
    """Lower bound of the adaptive coefficient."""
    entropy_coef_max: float = 1.0
    """Upper bound of the adaptive coefficient."""

    sapo_temperature_pos: float = 1.0
    """SAPO's temperature for A > 0."""
    sapo_temperature_neg: float = 1.05
    """SAPO's temperature for A <= 0."""
    vespo_k_pos: float = 2.0
    """VESPO's exponent for A >= 0."""
    vespo_lambda_pos: float = 3.0
    """VESPO's decay for A >= 0."""
    vespo_k_neg: float = 3.0
    """VESPO's exponent for A < 0."""
    vespo_lambda_neg: float = 2.0
    """VESPO's decay for A < 0."""

    off_policy_mask_threshold: float | None = None
    """Nats per token; drop rows with A < 0 that the policy has left by more than this. None: keep all."""
    importance_sampling_correction: bool = True
    """Weigh by policy over rollout engine where `sampling_logps` are given (`vllm_importance_sampling_correction`)."""
    importance_sampling_mode: WeightMode = "sequence_mask"
    """`token_truncate`, `token_mask`, `sequence_truncate` or `sequence_mask` (TRL: `vllm_importance_sampling_mode`)."""
    importance_sampling_clip_min: float | None = None
    """Lower bound of the rollout weights, None for none (TRL: `vllm_importance_sampling_clip_min`)."""
    importance_sampling_clip_max: float | None = 3.0
    """Upper bound of the rollout weights, None for none (TRL: `vllm_importance_sampling_clip_max`)."""

    sync_ref_model: bool = False
    """Move the reference towards the policy every `ref_model_sync_steps` steps (TR-DPO)."""
    ref_model_mixup_alpha: float = 0.6
    """Share of the policy in a synchronised reference."""
    ref_model_sync_steps: int = 512
    """Optimizer steps between synchronisations."""

    @property
    def clip_range(self) -> ClipRange:
        """`epsilon`, `epsilon_high` with its fallback, `delta`."""
        return ClipRange(self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high, self.delta)

    @property
    def only_advantages(self) -> bool:
        """Whether a completion whose advantage is 0 adds nothing to loss and gradient: no KL term, no entropy bonus."""
        bonus = self.use_adaptive_entropy or self.entropy_coef != 0
        return self.beta == 0 and self.kl_ctrl == "fixed" and not bonus

    def validate(self, batch_size: int | None = None, num_reward_functions: int | None = None) -> "GRPOOptions":
        """Self if the options make sense, also for a batch of `batch_size` completions and so many reward functions.

        Raises ValueError with one line per problem, each beginning with its field.
        """
        problems = [*_unknown_names(self), *_out_of_range(self), *_contradictions(self)]
        if batch_size is not None and self.num_generations > 1 and batch_size % self.num_generations:
            problems.append(
                f"num_generations={self.num_generations} does not divide the batch of {batch_size} completions"
            )
        weights = self.reward_weights
        if weights is not None and num_reward_functions is not None and len(weights) != num_reward_functions:
            problems.append(f"reward_weights: {len(weights)} weights for {num_reward_functions} reward functions")
        if problems:
            raise ValueError("\n".join(problems))
        return self


AT_LEAST = {
    "num_generations": 2,
    "epsilon": 0,
    "epsilon_high": 0,
    "beta": 0,
    "top_entropy_quantile": 0,
    "entropy_coef_delta": 0,
    "vespo_k_pos": 0,
    "vespo_k_neg": 0,
    "ref_model_mixup_alpha": 0,
    "ref_model_sync_steps": 1,
    "horizon": 1,
    "importance_sampling_clip_min": 0,
}
AT_MOST = {"top_entropy_quantile": 1, "ref_model_mixup_alpha": 1}
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # losses of the clipped surrogate
POSITIVE = ("target_kl", "sapo_temperature_pos", "sapo_temperature_neg", "vespo_lambda_pos", "vespo_lambda_neg")


def _unknown_names(options: GRPOOptions) -> list[str]:
    """One line per field of fixed choices that holds something else."""
    hints = typing.get_type_hints(GRPOOptions)
    choices = {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is Literal}
    return [
        f"{name}={getattr(options, name)!r}: use one of {', '.join(names)}"
        for name, names in choices.items()
        if getattr(options, name) not in names
    ]


def _out_of_range(options: GRPOOptions) -> list[str]:
    """One line per number that is not finite or leaves its range."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    numbers = {name: v for name, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    problems = [f"{name}={v}: not a finite number" for name, v in numbers.items() if not math.isfinite(v)]
    problems += [
        f"{name}={v}: must be at least {AT_LEAST[name]}" for name, v in numbers.items() if v < AT_LEAST.get(name, v)
    ]
    problems += [
        f"{name}={v}: must be at most {AT_MOST[name]}" for name, v in numbers.items() if v > AT_MOST.get(name, v)
    ]
    problems += [f"{name}={numbers[name]}: must be above 0" for name in POSITIVE if numbers[name] <= 0]
    if not all(math.isfinite(weight) for weight in options.reward_weights or ()):
        problems.append(f"reward_weights={options.reward_weights}: not finite numbers")
    return problems


def _contradictions(options: GRPOOptions) -> list[str]:
    """One line per combination of options that cannot be meant."""
    problems = []
    if options.loss_type == "cispo" and (options.epsilon_high is None or options.epsilon_high <= 1):
        problems.append(
            f"epsilon_high={options.epsilon_high}: cispo takes it as the ceiling on the ratio itself, give one above 1 "
            "(5 is usual); at 1 or below every weight would shrink to it"
        )
    if options.loss_type == "dr_grpo" and not (options.max_completion_length or 0) > 0:
        problems.append(f"max_completion_length={options.max_completion_length}: dr_grpo divides by it, give tokens")
    if options.delta is not None and options.delta <= 1 + options.clip_range.high:
        problems.append(f"delta={options.delta}: must be above 1 + epsilon_high = {1 + options.clip_range.high}")
    if options.delta is not None and options.loss_type not in CLIPPED:
        problems.append(
            f"delta={options.delta}: {options.loss_type} does not clip with it; use one of {', '.join(CLIPPED)}"
        )
    if options.importance_sampling_level != "token" and options.loss_type in ("gmpo", "vespo"):
        problems.append(
            f"importance_sampling_level={options.importance_sampling_level!r}: {options.loss_type} has a ratio of its own"
        )
    if options.beta == 0:
        for name, default in (("kl_ctrl", "fixed"), ("sync_ref_model", False), ("use_bias_correction_kl", False)):
            if getattr(options, name) != default:
                problems.append(f"{name}={getattr(options, name)!r}: there is no KL term while beta is 0")
    if options.adv_estimator != "grpo":
        for name, default in (("scale_rewards", "group"), ("multi_objective_aggregation", "sum_then_normalize")):
            if getattr(options, name) != default:
                problems.append(
                    f"{name}={getattr(options, name)!r}: adv_estimator {options.adv_estimator} does not use it"
                )
    if options.entropy_coef_min > options.entropy_coef_max:
        problems.append(
            f"entropy_coef_min={options.entropy_coef_min} is above entropy_coef_max={options.entropy_coef_max}"
        )
    low, high = options.importance_sampling_clip_min, options.importance_sampling_clip_max
    if not (0 if low is None else low) <= 1 <= (1 if high is None else high):
        problems.append(
            f"importance_sampling_clip_max={high} and importance_sampling_clip_min={low} must enclose 1, "
            "the weight of text that the policy itself wrote"
        )
    if options.importance_sampling_mode.endswith("_truncate") and low is None and high is None:
        problems.append(
            f"importance_sampling_clip_max=None: {options.importance_sampling_mode} needs a bound "
            "(importance_sampling_clip_min or importance_sampling_clip_max)"
        )
    return problems


PUBLISHED = {
    "grpo": GRPOOptions(loss_type="grpo", beta=0.04),
    "r1": GRPOOptions(loss_type="grpo", beta=0.001),
    "dapo": GRPOOptions(loss_type="dapo", epsilon_high=0.28),
    "dr_grpo": GRPOOptions(loss_type="dr_grpo", scale_rewards="none"),
    "gspo": GRPOOptions(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
    "luspo": GRPOOptions(loss_type="luspo", importance_sampling_level="sequence", epsilon=2e-3, epsilon_high=2.5e-3),
    "gmpo": GRPOOptions(loss_type="gmpo", epsilon=0.4),
    "cispo": GRPOOptions(loss_type="cispo", epsilon_high=5.0),
    "vlm_r1": GRPOOptions(loss_type="grpo", beta=0.04),
    "easy_r1": GRPOOptions(
        loss_type="dapo", epsilon_high=0.3, delta=3.0, beta=0.01, kl_loss_type="low_var_kl", kl_clip=True
    ),
}
"""The settings their papers and repositories report (grpo.md section 9), the rest at default."""
