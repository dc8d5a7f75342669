"""Which programs a mesh would compile for a config, from shapes alone: no weights, no device.

They are the functions that training calls, listed by the method itself.
"""

import dataclasses
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmllm import api
from jaxmllm.data.chat import Buckets
from jaxmllm.errors import InputError
from jaxmllm.methods.method import Layout
from jaxmllm.methods.shapes import Program, Sizes
from jaxmllm.model import attention, family
from jaxmllm.model.config import ModelConfig
from jaxmllm.model.family import load_model_config, model_config
from jaxmllm.runfiles import read_json
from jaxmllm.training.config import TrainConfig
from jaxmllm.training.state import planned
from jaxmllm.types import TrainState

ARCHITECTURES = Path(api.__file__).parent / "assets" / "architectures"  # config.json of published checkpoints


def architecture(name: str, family: str = "") -> ModelConfig:
    """The model's sizes: of "tiny", a checkpoint folder, a .json file, or a published model by the end of its hub id."""
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        return model_config(read_json(path), str(path), family)
    known = ARCHITECTURES / f"{path.name}.json"
    if not path.is_dir() and known.is_file():
        return model_config(read_json(known), str(known), family)
    if name != "tiny" and not path.is_dir():
        raise InputError(
            f"model {name!r}: its sizes are not known here. Give --model a folder with a config.json, that file itself, or "
            f"one of {', '.join(sorted(p.stem for p in ARCHITECTURES.glob('*.json')))}"
        )
    return load_model_config(api.resolve(name), family)


def sizes_of(config: TrainConfig, cfg: ModelConfig, vision_tokens: int, prompt_tokens: int) -> Sizes:
    """Sizes for one picture of so many vision tokens in prompts of so many tokens, both at most."""
    buckets = Buckets()
    unit = family.of(cfg).window_tokens(cfg)  # vision tokens of a window
    side = math.isqrt(unit)
    # a picture that is nearly square, the usual worst case: its windows at two edges are only partly filled
    windows = math.ceil(math.sqrt(vision_tokens) / side) ** 2
    generations, length = config.method.lengths()
    return Sizes(
        config.batch_size,
        generations,
        1,
        buckets.fit("windows", windows),
        buckets.fit("prompt", prompt_tokens),
        length or buckets.fit("completion", 512),
    )


@dataclasses.dataclass
class Planned:
    """A config on a pair of meshes, as shapes; `programs` is handed each compiled program."""

    layout: Layout
    state: TrainState
    programs: Generator[Program, Any, None]

    @property
    def full_share(self) -> float:
        """Of the tower's blocks, those that attend over the whole frame: the conditional of its scanned body."""
        return family.of(self.layout.cfg).full_share(self.layout.cfg)


def programs_of(config: TrainConfig, cfg: ModelConfig, sizes: Sizes, train: Mesh, sample: Mesh) -> Planned:
    """The programs of an iteration; shapes are those of the whole batch. InputError where the method has no plan."""
    # of a machine that is not here: the kernel that the machine itself would choose
    platform, kernel = train.devices.flat[0].platform, cfg.attention
    if kernel == "auto" and platform != jax.default_backend():
        kernel = attention.BACKENDS.get("gpu" if platform == "cuda" else platform, "dense")
    cfg = dataclasses.replace(cfg, dtype=config.dtype, remat=config.remat, unroll=config.unroll, attention=kernel)
    layout, state = planned(config, cfg, train, sample)
    return Planned(layout, state, config.method.programs(sizes, state, layout))
