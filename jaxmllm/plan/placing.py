"""A config on the devices that are here, laid out as a mesh config says."""

import dataclasses
from pathlib import Path

import jax

from jaxmllm.errors import InputError
from jaxmllm.machine.mesh import MeshConfig
from jaxmllm.machine.targets import check_layout, load_mesh
from jaxmllm.model.config import ModelConfig
from jaxmllm.plan.programs import architecture
from jaxmllm.training.config import TrainConfig


def on_mesh(config: TrainConfig, name: str | Path) -> TrainConfig:
    """The config with both layouts of a mesh in place of its own, for the devices that are here.

    Raises InputError when there are others than the mesh's, or its layouts do not suit the model or the batch.
    """
    target = load_mesh(name)
    devices = jax.device_count()
    if target.topology and devices != target.devices:
        raise InputError(
            f"mesh {name}: it is made of {target.devices} x {target.chip.name}, here are {devices} "
            f"{jax.devices()[0].device_kind}; choose another mesh, or leave --mesh out to use all devices that are here"
        )
    cfg = architecture(config.model, config.family)
    train, sample = target.layouts(cfg)
    check_layouts(config, cfg, train, sample, devices, f"mesh {name}: ")
    return dataclasses.replace(config, mesh=train, sample_mesh=sample)


def check_layouts(
    config: TrainConfig, cfg: ModelConfig, train: MeshConfig, sample: MeshConfig, devices: int, where: str = ""
) -> None:
    """Raises InputError where the layouts do not suit so many devices, the model or the batch, with the flags that cure it."""

    def cure(parts: int) -> str:
        """The fewest prompts and the most microbatches of which each is a multiple of `parts`."""
        cuts = config.method.cuts()
        batch = -(-config.batch_size // (parts * cuts)) * parts * cuts
        steps = range(config.optim.gradient_accumulation_steps, 0, -1)
        most = next(k for k in steps if batch % (k * cuts * parts) == 0)
        return f"--batch_size {batch} --optim.gradient_accumulation_steps {most}"

    rows = config.batch_size // config.optim.gradient_accumulation_steps // config.method.cuts()
    check_layout(train, devices, f"{where}train", model=cfg, rows=rows, cure=cure)
    check_layout(sample, devices, f"{where}sample", model=cfg, rows=config.batch_size, cure=cure)
