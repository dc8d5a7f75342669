"""What a run leaves: a Hugging Face folder, its adapters, what the method added; of a run or of any of its checkpoints."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import SafetensorError

from jaxmllm import api
from jaxmllm.data.images import load_pixel_config
from jaxmllm.errors import InputError
from jaxmllm.methods.exported import described_method
from jaxmllm.methods.method import Method, Params
from jaxmllm.model import family, hf, lora
from jaxmllm.model.config import ModelConfig
from jaxmllm.model.family import load_model_config
from jaxmllm.runfiles import read_json
from jaxmllm.training.checkpoint import read_params
from jaxmllm.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export must know of a run."""

    method: Method
    lora: lora.LoRAConfig | None
    model: str  # what the run began with
    min_pixels: int | None
    max_pixels: int | None
    adapter: str = "adapter"  # folder of the adapters, beside the export

    @classmethod
    def of(cls, config: TrainConfig) -> "Exported":
        return cls(config.method, config.lora, config.model, config.data.min_pixels, config.data.max_pixels)


def export(run: Exported, cfg: ModelConfig, params: Params, folder: Path, source: Path) -> None:
    """The model as a Hugging Face folder, which shows pictures as in training; adapters are also saved, then merged.

    The method adds what it trained besides. `source`: the folder whose config and tokenizer files are copied.
    InputError where the folder cannot be written, or the disk is full.
    """
    try:
        _write(run, cfg, params, folder, source)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: the export could not be written ({error}); the checkpoints are intact") from error


def _write(run: Exported, cfg: ModelConfig, params: Params, folder: Path, source: Path) -> None:
    model = {name: value for name, value in params.items() if name not in run.method.keys}
    if run.lora is not None:
        lora.save(model, run.lora, folder.with_name(run.adapter), family.of(cfg), base_model=run.model)
        model = jax.jit(lora.merge)(model)
    model = jax.tree.map(jnp.asarray, model)
    pixels = load_pixel_config(source, cfg, min_pixels=run.min_pixels, max_pixels=run.max_pixels)
    hf.save_params(model, cfg, folder, source=source, pixels=(pixels.min_pixels, pixels.max_pixels))
    run.method.export(params, folder)


def is_run(folder: str | Path) -> bool:
    """Whether a folder is a run's: it has a config and checkpoints."""
    return (Path(folder) / "config.json").is_file() and (Path(folder) / "checkpoints").is_dir()


def export_checkpoint(run: Path, target: Path, step: int | None = None) -> int:
    """Exports a checkpoint of a run, the newest or that of `step`, and returns its step.

    InputError where the run has no such checkpoint, or its config is of another version.
    """
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    if not steps or (step is not None and step not in steps):
        known = ", ".join(map(str, steps)) or "none"
        raise InputError(f"{run}: there is no checkpoint {'' if step is None else step}; it has {known}")
    chosen = steps[-1] if step is None else step
    described = dataclasses.replace(_described(run / "config.json"), adapter=f"{target.name}_adapter")
    source = api.resolve(described.model)
    export(described, load_model_config(source), read_params(run / "checkpoints" / str(chosen)), target, source)
    return chosen


def _described(path: Path) -> Exported:
    content: Mapping[str, Any] = read_json(path)
    try:
        options = dict(content["method"])
        adapters, data = content["lora"], content["data"]
        return Exported(
            described_method(options.pop("name"), options),
            None if adapters is None else lora.LoRAConfig(**adapters),
            content["model"],
            data["min_pixels"],
            data["max_pixels"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not written by this version ({type(error).__name__}: {error})") from None
