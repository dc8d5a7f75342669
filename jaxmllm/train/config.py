"""A run: one frozen dataclass, written as a Python file under configs/ and overridden by dotted flags.

Option names are TRL's and transformers' where they have one.
"""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any, Literal

from jaxmllm.errors import InputError
from jaxmllm.losses.grpo_options import GRPOOptions
from jaxmllm.losses.logprobs import Sampling
from jaxmllm.model.lora import LoRAConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where records come from and how they are shown to the model."""

    train: tuple[str, ...] = ("world:grounding",)  # sources, see jaxmllm.data.sources.open_source
    weights: tuple[float, ...] = ()  # share of each source; equal when empty
    eval: tuple[str, ...] = ()  # evaluated at eval_steps and at both ends
    eval_samples: int = 256  # records of each eval source
    style: str = "qwen2_5_vl"  # how answers are written: qwen2_5_vl (JSON, resized pixels) or qwen2_vl (tokens, 0-1000)
    thinking: bool = False  # answers are <think>..</think><answer>..</answer>
    min_pixels: int | None = None  # of a resized image; None: the checkpoint's
    max_pixels: int | None = None
    max_prompt_length: int = 1024  # tokens, vision included; a longer prompt is an error
    questions_per_image: int = 1  # SFT: questions that share one image and its prefix
    first_corner_weight: float = 1.0  # SFT: weight of the first two numbers of each box in the loss
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
    reward_funcs: tuple[str, ...] = ("task",)  # "task": the record's own; otherwise module:function
    reward_timeout: float = 10.0  # seconds a reward may take for one completion
    reward_processes: int = 0  # processes that compute rewards; 0: in the main one (no time limit)
    num_iterations: int = 1  # passes over each rollout
    steps_per_generation: int = 1  # updates a pass: the rollout's prompts are cut into so many batches
    soft_punish_cache: int = 0  # tokens before the limit where the overlong punishment begins; 0: none

    def sampling(self, banned: tuple[int, ...]) -> Sampling:
        return Sampling(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, banned
        ).validate()


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
    method: Literal["grpo", "sft", "vision_warmup"] = "grpo"
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
    remat: Literal["none", "dots", "full", "offload"] = "none"
    unroll: bool = False  # unroll the layer loop (small models on a CPU)
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GRPOOptions = GRPOOptions()
    loss_norm: Literal["sample", "token"] = "token"  # SFT: see jaxmllm.losses.supervised
    mesh: MeshConfig = MeshConfig()
    sample_mesh: MeshConfig | None = None  # layout of the same devices while sampling; None: as in training
    logging_steps: int = 1
    eval_steps: int = 0  # evaluate every so many updates; 0: only before and after
    save_steps: int = 100
    save_total_limit: int = 2
    metric_for_best_model: str = ""  # "<eval source>/<metric>", larger is better; empty: keep the latest only
    completions_steps: int = 10  # write sampled completions every so many updates
    save_pictures: int = 8  # pictures of each evaluation kept for the report
    export: bool = True  # write a Hugging Face folder at the end
    profile: bool = False  # write a trace of the third to fifth update to run_dir/profile

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
            problems.append(f"data.weights: {len(self.data.weights)} weights for {len(self.data.train)} sources")
        if self.method == "grpo":
            batch = self.batch_size * self.grpo.num_generations
            try:
                self.grpo.validate(batch, len(self.rollout.reward_funcs))
            except ValueError as error:
                problems += [f"grpo.{line}" for line in str(error).splitlines()]
            sampling = self.rollout
            if self.grpo.beta > 0 and (sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p):
                problems.append(
                    f"grpo.beta = {self.grpo.beta}: a KL term needs the whole distribution, a reference that could not have "
                    "drawn a token is infinitely far; set rollout.top_p 1, top_k 0 and min_p None, or beta 0"
                )
            if not self.grpo.max_completion_length:
                problems.append("grpo.max_completion_length: a rollout needs a length in tokens")
        for part in (self.lora, self.rollout.sampling(()) if self.method == "grpo" else None):
            try:
                if part is not None:
                    part.validate()
            except InputError as error:
                problems.append(str(error))
        if problems:
            raise InputError(f"config {self.name!r}:\n  " + "\n  ".join(problems))
        return self


def load_config(path: str | Path) -> TrainConfig:
    """The `config` of a Python file. InputError when the file is missing, fails, or holds no TrainConfig."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such config file")
    spec = importlib.util.spec_from_file_location(f"jaxmllm_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path}: {type(error).__name__}: {error}") from error
    config: Any = getattr(module, "config", None)
    if not isinstance(config, TrainConfig):
        raise InputError(f"{path}: must define `config`, a jaxmllm.train.config.TrainConfig")
    return config
