"""A run: one frozen dataclass, written as a Python file under configs/ and overridden by dotted flags.

Option names are TRL's and transformers' where they have one.
"""

import dataclasses
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jaxmllm.data.dialogues import MAX_TURNS
from jaxmllm.errors import InputError
from jaxmllm.methods.grpo.options import GRPOOptions
from jaxmllm.model.logprobs import Sampling
from jaxmllm.model.lora import LoRAConfig
from jaxmllm.tasks import answers
from jaxmllm.tasks.detection import Weights

Remat = Literal["none", "dots", "full", "offload"]  # what the backward pass computes again


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where records come from and how they are shown to the model."""

    train: tuple[str, ...] = ("world:grounding",)  # sources, see jaxmllm.data.sources.open_source
    weights: tuple[float, ...] = ()  # share of each source; equal when empty
    eval: tuple[str, ...] = ()  # evaluated at eval_steps and at both ends
    eval_samples: int = 256  # records of each eval source
    style: str = "qwen2_5_vl"  # how answers are written: qwen2_5_vl (JSON, resized pixels) or qwen2_vl (tokens, 0-1000)
    thinking: bool = False  # answers are <think>..</think><answer>..</answer>; question and system turn ask for it
    system: str | None = None  # system turn of training prompts; None: the template's own (with `thinking`: R1's)
    min_pixels: int | None = None  # of a resized image; None: the checkpoint's
    max_pixels: int | None = None
    max_prompt_length: int = 1024  # tokens, vision included; a longer prompt is an error
    questions_per_image: int = 1  # SFT: questions that share one image and its prefix
    first_corner_weight: float = 1.0  # SFT: weight of the first two numbers of each box in the loss
    label_weight: float = 1.0  # SFT: weight of the words of each label in the loss
    max_bad_records: int = 0  # records that may be unreadable before the run stops
    workers: int = 2  # threads that prepare batches ahead


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW; names are transformers' TrainingArguments."""

    learning_rate: float = 1e-6
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0  # matrices only
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # global norm; 0 turns clipping off
    gradient_accumulation_steps: int = 1  # microbatches an update, of whole groups
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of Adam's first moment
    max_nonfinite_steps: int = 5  # NaN or Inf steps are skipped; so many in a row stop the run


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How completions are drawn and scored."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    # "task": the record's own; "soft_overlong", "repetition": of the tokens, see below; otherwise module:function
    reward_funcs: tuple[str, ...] = ("task",)  # their weights: grpo.reward_weights
    reward_rules: Literal["corrected", "released"] = "corrected"  # of "task"; released: Perception-R1's, bugs included
    reward_matching: Literal["hungarian", "order"] = "hungarian"  # of "task": paired optimally, or as they are listed
    detection: Weights = Weights()  # terms of the detection reward
    soft_punish_cache: int = 0  # of "soft_overlong": tokens before the limit where the punishment begins
    repetition_n_grams: int = 3  # of "repetition": tokens
    repetition_max_penalty: float = -1.0  # of "repetition": for an answer that is one n-gram over and over
    reward_timeout: float = 10.0  # seconds a reward may take for one completion, where it runs in processes
    reward_processes: int | None = (
        None  # 0: rewards in the main one, without limit; None: 2 where one is module:function
    )
    reward_errors: Literal["stop", "skip"] = "stop"  # what one that raises or hangs does; skip: left out and counted
    num_iterations: int = 1  # passes over each rollout
    steps_per_generation: int = 1  # updates a pass: the rollout's prompts are cut into so many batches
    filter_groups: bool = False  # DAPO's dynamic sampling: groups whose rewards do not differ make room for others
    max_num_gen_batches: int = 10  # batches drawn for one rollout; what then is missing is filled with such groups

    def sampling(self, banned: tuple[int, ...]) -> Sampling:
        return Sampling(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, banned
        ).validate()


@dataclasses.dataclass(frozen=True)
class UnlikelihoodConfig:
    """Reflective unlikelihood of dialogues (RePer): see jaxmllm.methods.unlikelihood."""

    alpha: float = 10.0  # weight of log(1 - p); 0 leaves reward-weighted likelihood
    reduction: Literal["dialogue", "token", "turn_mean", "sum"] = "dialogue"
    level: Literal["token", "seq", "seq_geo"] = "token"  # a term a token, or one an answer
    penalise_end: bool = False  # push down the end-of-turn token of bad answers too, as published: they then run on


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Preference optimisation; names are TRL's. The reference is the model that the run starts from."""

    loss_type: Literal["sigmoid", "lipo"] = (
        "sigmoid"  # DPO on the best and worst answer; LiPO-lambda on the whole ranking
    )
    beta: float = 0.1
    label_smoothing: float = 0.0  # sigmoid: chance that a pair is labelled the wrong way round, below 0.5

    @property
    def answers(self) -> int:
        """Of each prompt, at most."""
        return 2 if self.loss_type == "sigmoid" else MAX_TURNS


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How the model is asked in evaluations: greedily, in the style that it is trained in."""

    max_new_tokens: int | None = None  # None: grpo.max_completion_length
    system: str | None = None  # system turn; None: the template's own (with data.thinking: R1's)
    wording: Literal["train", "evaluation"] = "train"  # of questions whose published evaluation asks in other words
    rules: Literal["corrected", "released"] = "corrected"  # how answers are read
    repetition_penalty: float = 1.0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Axes of the device mesh; -1 takes the devices that are left. See configs/meshes."""

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's numbers."""

    name: str
    method: Literal["grpo", "sft", "unlikelihood", "dpo", "vision_warmup"] = "grpo"
    model: str = "tiny"  # a checkpoint folder, a hub id, or "tiny", the embedded model
    from_scratch: bool = False  # random weights in the model's architecture
    output_dir: str = "runs"  # the run folder is output_dir/name
    seed: int = 0
    max_steps: int = 100  # optimiser updates
    max_seconds: float = 0  # stop after this much training time; 0: no limit. Does not enter the schedule
    batch_size: int = 16  # prompts (images in SFT) a rollout or update, over all devices
    trainable: str = r".*"  # regular expression on parameter paths, matched whole; the rest is frozen
    lora: LoRAConfig | None = None
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations and matrix products
    remat: Remat = "none"
    unroll: bool = False  # unroll the layer loop (small models on a CPU)
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GRPOOptions = GRPOOptions()
    evaluation: EvaluationConfig = EvaluationConfig()
    unlikelihood: UnlikelihoodConfig = UnlikelihoodConfig()
    dpo: DPOConfig = DPOConfig()
    loss_norm: Literal["sample", "token"] = "token"  # SFT: see jaxmllm.methods.cross_entropy
    mesh: MeshConfig = MeshConfig()
    sample_mesh: MeshConfig | None = None  # layout of the same devices while sampling; None: as in training
    logging_steps: int = 1
    eval_steps: int = 0  # evaluate every so many updates; 0: only before and after
    eval_on_start: bool = True  # evaluate before the first update
    save_steps: int = 100
    save_total_limit: int = 2
    metric_for_best_model: str = ""  # "<eval source>/<metric>"; its best checkpoint is kept too. Empty: the latest only
    load_best_model_at_end: bool = False  # the last evaluation and the export are of that checkpoint
    completions_steps: int = 10  # write sampled completions every so many updates
    save_pictures: int = 8  # pictures of each evaluation kept for the report
    export: bool = True  # write a Hugging Face folder at the end
    profile: bool = False  # write a trace of the third to fifth update to run_dir/profile
    report_to: tuple[str, ...] = ("tensorboard",)  # besides metrics.jsonl: tensorboard, wandb; all: those installed

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    def validate(self) -> "TrainConfig":
        """Raises InputError with one line per problem, each beginning with its field."""
        problems = []
        for name in ("max_steps", "batch_size", "logging_steps", "save_steps", "save_total_limit"):
            if getattr(self, name) < 1:
                problems.append(f"{name} = {getattr(self, name)}: must be at least 1")
        cut = self.optim.gradient_accumulation_steps * self.rollout.steps_per_generation
        if cut < 1 or self.batch_size % cut:
            problems.append(
                f"batch_size = {self.batch_size}: must be divisible by gradient_accumulation_steps x "
                f"steps_per_generation = {cut}"
            )
        if self.optim.learning_rate <= 0:
            problems.append(f"optim.learning_rate = {self.optim.learning_rate}: must be above 0")
        if self.data.weights and len(self.data.weights) != len(self.data.train):
            problems.append(
                f"data.weights = {self.data.weights}: needs one for each of data.train = {self.data.train}, or none"
            )
        best, tokens = self.metric_for_best_model, self.evaluation.max_new_tokens
        if best and not (self.eval_steps and self.data.eval):
            problems.append(f"metric_for_best_model = {best!r}: needs eval_steps and data.eval to be measured")
        if self.load_best_model_at_end and not best:
            problems.append("load_best_model_at_end: name the metric in metric_for_best_model")
        if tokens is not None and tokens < 1:
            problems.append(f"evaluation.max_new_tokens = {tokens}: must be at least 1")
        if self.data.style not in answers.STYLES:
            problems.append(f"data.style = {self.data.style!r}: use one of {', '.join(answers.STYLES)}")
        if self.method == "grpo":
            problems += self._rollout_problems()
        problems += self._given_problems()
        for part in (self.lora, self.rollout.sampling(()) if self.method == "grpo" else None):
            try:
                if part is not None:
                    part.validate()
            except InputError as error:
                problems.append(str(error))
        if problems:
            raise InputError(f"config {self.name!r}:\n  " + "\n  ".join(problems))
        return self

    def _given_problems(self) -> list[str]:
        """Of methods that learn from answers with rewards."""
        kind = {"unlikelihood": "reflection", "dpo": "preference"}.get(self.method)
        if kind is None:
            return []
        problems = []
        if any(not spec.startswith(f"{kind}:") for spec in self.data.train):
            problems.append(f"data.train = {self.data.train}: method {self.method} learns from {kind}: sources")
        for name in ("questions_per_image", "first_corner_weight", "label_weight"):
            if getattr(self.data, name) != 1:
                problems.append(f"data.{name}: must be 1 with method {self.method}")
        if self.unlikelihood.alpha < 0:
            problems.append(f"unlikelihood.alpha = {self.unlikelihood.alpha}: must not be negative")
        if self.dpo.beta <= 0 or not 0 <= self.dpo.label_smoothing < 0.5:
            problems.append("dpo: beta must be above 0, label_smoothing at least 0 and below 0.5")
        if self.dpo.loss_type == "lipo" and self.dpo.label_smoothing:
            problems.append("dpo.label_smoothing: goes with dpo.loss_type sigmoid")
        if kind == "preference" and self.dpo.answers == 2 and any("answers=all" in spec for spec in self.data.train):
            problems.append("data.train: answers=all goes with dpo.loss_type lipo; sigmoid learns from pairs")
        return problems

    def _rollout_problems(self) -> list[str]:
        rollout, grpo = self.rollout, self.grpo
        problems = []
        try:
            grpo.validate(self.batch_size * grpo.num_generations, len(rollout.reward_funcs))
        except ValueError as error:
            problems += [f"grpo.{line}" for line in str(error).splitlines()]
        if grpo.beta > 0 and (rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p):
            problems.append(
                f"grpo.beta = {grpo.beta}: a KL term needs the whole distribution, a reference that could not have "
                "drawn a token is infinitely far; set rollout.top_p 1, top_k 0 and min_p None, or beta 0"
            )
        if rollout.temperature == 0:
            problems.append("rollout.temperature = 0: the completions of a group would all be the same")
        if grpo.sync_ref_model and self.lora is not None:
            problems.append("grpo.sync_ref_model: with lora the reference is the model without adapters, which stays")
        length = grpo.max_completion_length or 0
        if length < 1:
            problems.append("grpo.max_completion_length: a rollout needs a length in tokens")
        names = rollout.reward_funcs
        if not names or len(set(names)) != len(names):
            problems.append(f"rollout.reward_funcs = {names}: name each function once, and at least one")
        for name in ("num_iterations", "steps_per_generation", "max_num_gen_batches", "repetition_n_grams"):
            if getattr(rollout, name) < 1:
                problems.append(f"rollout.{name} = {getattr(rollout, name)}: must be at least 1")
        if rollout.repetition_max_penalty > 0:
            problems.append(f"rollout.repetition_max_penalty = {rollout.repetition_max_penalty}: must not be positive")
        cache = rollout.soft_punish_cache
        if ("soft_overlong" in names) != (0 < cache <= length):
            problems.append(
                f"rollout.soft_punish_cache = {cache}: goes with soft_overlong in rollout.reward_funcs, and lies in "
                f"1..grpo.max_completion_length = {length}"
            )
        if rollout.reward_timeout <= 0:
            problems.append(f"rollout.reward_timeout = {rollout.reward_timeout}: must be above 0 seconds")
        if rollout.reward_rules == "released" and self.data.thinking:
            problems.append("rollout.reward_rules = 'released': the released rewards know no thinking format")
        return problems


def load_config(path: str | Path) -> TrainConfig:
    """The `config` of a Python file. InputError when the file is missing, fails, or holds no TrainConfig."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such config file")
    try:
        config: Any = runpy.run_path(str(path)).get("config")  # always the text, never bytecode of an earlier one
    except Exception as error:
        raise InputError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, TrainConfig):
        raise InputError(f"{path}: must define `config`, a jaxmllm.training.config.TrainConfig")
    return config


def parse_command(
    command: str, arguments: Sequence[str], names: Sequence[str] = ()
) -> tuple[TrainConfig, dict[str, str]]:
    """`jaxmllm COMMAND CONFIG.py [--field value ...]`: the config, valid, and the values of the flags called `names`.

    All other flags override the config's fields. `arguments` begins with the file.
    """
    import tyro

    path, fields, given, rest = arguments[0], [], {}, iter(arguments[1:])
    for one in rest:
        name, _, value = one.partition("=")
        if name not in names:
            fields.append(one)
        elif not (value := value or next(rest, "")):
            raise InputError(f"{name}: a value is missing")
        else:
            given[name] = value
    config = tyro.cli(TrainConfig, default=load_config(path), args=fields, prog=f"jaxmllm {command} {path}")
    return config.validate(), given
