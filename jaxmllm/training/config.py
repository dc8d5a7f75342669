"""A run: one frozen dataclass, written as a Python file under configs/ and overridden by dotted flags.

Option names are TRL's and transformers' where they have one.
"""

import dataclasses
import math
import os
import runpy
import sys
from pathlib import Path
from typing import Any, Literal

from jaxmllm import flags, tasks
from jaxmllm.errors import InputError
from jaxmllm.machine.mesh import MeshConfig
from jaxmllm.methods.grpo.method import GRPO
from jaxmllm.methods.method import Facts, Method
from jaxmllm.methods.optim import OptimConfig
from jaxmllm.model.lora import LoRAConfig
from jaxmllm.runfiles import not_a_bucket
from jaxmllm.tasks import answers

Remat = Literal["none", "dots", "full", "offload"]  # what the backward pass computes again


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where records come from and how they are shown to the model."""

    train: tuple[str, ...] = ("world:grounding",)  # sources, see jaxmllm.data.sources.open_source
    weights: tuple[float, ...] = ()  # share of each source; equal when empty
    eval: tuple[str, ...] = ()  # evaluated at eval_steps and at both ends
    eval_samples: int = 256  # records of each eval source
    style: str | None = None  # how boxes are written, see tasks.answers.STYLES; None: as the model's family writes them
    task_options: tuple[str, ...] = ()  # of the tasks: name=value, or task.name=value, "detection.weights.penalty=true"
    thinking: bool = False  # answers are <think>..</think><answer>..</answer>; question and system turn ask for it
    system: str | None = None  # system turn of training prompts; None: the template's own (with `thinking`: R1's)
    min_pixels: int | None = None  # of a resized image; None: the checkpoint's
    max_pixels: int | None = None  # of a resized image; None: the checkpoint's
    max_source_pixels: int | None = None  # of a stored image; a larger one is a bad record. None: 89,478,485
    max_prompt_length: int = 1024  # tokens, vision included; a longer prompt is an error
    max_bad_records: int = 0  # records that may be unreadable before the run stops
    workers: int = 2  # threads that prepare batches ahead


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How the model is asked in evaluations: greedily, in the style that it is trained in."""

    max_new_tokens: int | None = None  # None: the method's, or 512
    system: str | None = None  # system turn; None: the template's own (with data.thinking: R1's)
    wording: Literal["train", "evaluation"] = "train"  # of questions whose published evaluation asks in other words
    rules: Literal["corrected", "released"] = "corrected"  # how answers are read
    repetition_penalty: float = 1.0  # above 1 makes tokens that were said before less likely


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's numbers."""

    name: str  # of the run folder, below output_dir
    method: Method = GRPO()  # how the model is trained, with its own options: see jaxmllm.methods
    model: str = "tiny"  # a checkpoint folder, a hub id, or "tiny", the embedded model
    family: str = ""  # module:object of a model family of another package; empty: the one of the model_type
    from_scratch: bool = False  # random weights in the model's architecture
    output_dir: str = "runs"  # the run folder is output_dir/name
    seed: int = 0  # of everything that is drawn at random
    max_steps: int = 100  # optimiser updates
    max_seconds: float = 0  # stop after this much training time; 0: no limit. Does not enter the schedule
    resume_from: str = ""  # a run folder: begin with its newest checkpoint, under this config's schedule and rate
    batch_size: int = 16  # prompts (images in SFT) a rollout or update, over all devices
    trainable: str = r".*"  # regular expression on parameter paths, matched whole; the rest is frozen
    lora: LoRAConfig | None = None  # None: no adapters. --lora.r 8 and its like turn them on, --lora None off
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; bfloat16 is rounded by chance
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations and matrix products
    remat: Remat = "none"  # what the backward pass computes again, to save memory
    unroll: bool = False  # unroll the layer loop (small models on a CPU)
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = MeshConfig()
    sample_mesh: MeshConfig | None = None  # layout of the same devices while sampling; None: as in training
    logging_steps: int = 1  # log means over so many updates
    eval_steps: int = 0  # evaluate every so many updates; 0: only before and after
    eval_on_start: bool = True  # evaluate before the first update
    save_steps: int = 100  # write a checkpoint every so many updates
    save_total_limit: int = 2  # newest checkpoints that are kept
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
        numbers = list(flags.numbers(self))
        for field in ("output_dir", "model", "resume_from"):
            not_a_bucket(getattr(self, field), field)
        problems = [f"{name} = {value}: must be a finite number" for name, value in numbers if not math.isfinite(value)]
        if problems:  # what is compared with NaN passes, and what is computed from it fails
            raise InputError(f"config {self.name!r}:\n  " + "\n  ".join(problems))
        for name, value in numbers:
            if value < (least := AT_LEAST.get(name, -math.inf)):
                problems.append(f"{name} = {value}: must be at least {least}")
        cut = self.optim.gradient_accumulation_steps
        if cut < 1 or self.batch_size % cut:
            problems.append(
                f"batch_size = {self.batch_size}: must be divisible by optim.gradient_accumulation_steps = {cut}"
            )
        for field in ("learning_rate", "adam_epsilon"):
            if getattr(self.optim, field) <= 0:
                problems.append(f"optim.{field} = {getattr(self.optim, field)}: must be above 0")
        for field in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self.optim, field) < 1:
                problems.append(f"optim.{field} = {getattr(self.optim, field)}: must be at least 0 and below 1")
        if self.data.weights and len(self.data.weights) != len(self.data.train):
            problems.append(
                f"data.weights = {self.data.weights}: needs one for each of data.train = {self.data.train}, or none"
            )
        best = self.metric_for_best_model
        if best and not (self.eval_steps and self.data.eval):
            problems.append(f"metric_for_best_model = {best!r}: needs eval_steps and data.eval to be measured")
        if self.load_best_model_at_end and not best:
            problems.append("load_best_model_at_end: name the metric in metric_for_best_model")
        if self.data.style not in (None, *answers.STYLES):
            problems.append(f"data.style = {self.data.style!r}: use one of {', '.join(answers.STYLES)}")
        try:
            tasks.parsed_options(self.data.task_options)
        except InputError as error:
            problems.append(f"data.task_options: {error}")
        problems += self.method.problems(self.facts)
        if self.lora is not None:
            try:
                self.lora.validate()
            except InputError as error:
                problems.append(str(error))
        if problems:
            raise InputError(f"config {self.name!r}:\n  " + "\n  ".join(problems))
        return self

    @property
    def facts(self) -> Facts:
        """What a method's checks may read."""
        return Facts(
            batch_size=self.batch_size,
            microbatches=self.optim.gradient_accumulation_steps,
            sources=self.data.train,
            thinking=self.data.thinking,
            lora=self.lora is not None,
            trainable=self.trainable,
        )


# 0 is "never" of an interval and "no limit" of a time; a flag that is not here may have any finite value
AT_LEAST = {
    **dict.fromkeys(("max_steps", "batch_size", "logging_steps", "save_steps", "save_total_limit"), 1),
    **dict.fromkeys(("max_seconds", "eval_steps", "completions_steps", "save_pictures"), 0),
    **dict.fromkeys((f"data.{name}" for name in ("eval_samples", "max_prompt_length", "min_pixels", "max_pixels")), 1),
    **dict.fromkeys(("data.max_bad_records",), 0),
    **dict.fromkeys(("optim.warmup_steps", "optim.weight_decay", "optim.max_grad_norm"), 0),
    **dict.fromkeys(
        ("data.max_source_pixels", "data.workers", "optim.max_nonfinite_steps", "evaluation.max_new_tokens"), 1
    ),
}
FREE_FIELDS = (
    *("max_seconds", "output_dir", "logging_steps", "save_steps", "save_total_limit", "export", "report_to"),
    *("completions_steps", "save_pictures", "data.workers", "data.max_bad_records", "optim.max_nonfinite_steps"),
    *("metric_for_best_model", "load_best_model_at_end"),  # which checkpoint is kept and exported, not what it holds
    *("profile", "mesh", "sample_mesh"),  # another machine: the same numbers up to rounding
)


def free_fields(config: TrainConfig) -> tuple[str, ...]:
    """Fields that may differ when a run goes on: they do not enter the numbers of an update."""
    longer = config.optim.lr_scheduler_type == "constant" and not config.method.uses_last_step
    return (*FREE_FIELDS, *(("max_steps",) if longer else ()), *(f"method.{name}" for name in config.method.free))


def load_config(path: str | Path) -> TrainConfig:
    """The `config` of a Python file. InputError when the file is missing, fails, or holds no TrainConfig."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such config file")
    for folder in (
        str(path.resolve().parent),
        os.getcwd(),
    ):  # where a reward of one's own may lie; reward processes inherit it
        if folder not in sys.path:
            sys.path.append(folder)
    try:
        config: Any = runpy.run_path(str(path)).get("config")  # always the text, never bytecode of an earlier one
    except Exception as error:
        raise InputError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, TrainConfig):
        raise InputError(f"{path}: must define `config`, a jaxmllm.training.config.TrainConfig")
    return config
