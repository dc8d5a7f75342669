"""What a run is made of: model on the mesh, optimiser, data, checkpoints, all from one config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmllm import api
from jaxmllm.config import load_model_config
from jaxmllm.data.chat import Processor
from jaxmllm.data.examples import Asking, Sized
from jaxmllm.data.pipeline import agree_with_all
from jaxmllm.data.sources import RecordSource, open_source
from jaxmllm.machine.mesh import make_mesh
from jaxmllm.machine.processes import row_block
from jaxmllm.machine.targets import same_devices
from jaxmllm.methods.method import Context
from jaxmllm.tasks import answers, ocr
from jaxmllm.training.config import EvaluationConfig, TrainConfig
from jaxmllm.training.state import first_state, grown, layout_of
from jaxmllm.types import TrainState


def build_mesh(config: TrainConfig) -> Mesh:
    return make_mesh(**dataclasses.asdict(config.mesh))


def build_sample_mesh(config: TrainConfig, mesh: Mesh) -> Mesh:
    return mesh if config.sample_mesh is None else same_devices(mesh, config.sample_mesh)


def load_model(config: TrainConfig, mesh: Mesh) -> api.Model:
    """The configured checkpoint, or its architecture with random weights, on the mesh."""
    data = config.data
    shape: dict[str, Any] = dict(remat=config.remat, unroll=config.unroll)
    limits: dict[str, Any] = dict(
        min_pixels=data.min_pixels, max_pixels=data.max_pixels, max_prompt_length=data.max_prompt_length
    )
    if not config.from_scratch:
        model = api.load(config.model, mesh=mesh, dtype=config.param_dtype, **limits, **shape)
        model.cfg = dataclasses.replace(model.cfg, dtype=config.dtype)
        return model
    folder = api.resolve(config.model)
    cfg = dataclasses.replace(load_model_config(folder), dtype=config.dtype, **shape)
    params = api.init_params(cfg, config.seed, mesh)
    return api.Model(params, cfg, Processor.from_pretrained(folder, cfg, **limits), mesh, folder)


def eval_sources(config: TrainConfig, processor: Processor) -> dict[str, RecordSource]:
    """The evaluation sources by name: their spec without options, numbered when it repeats."""
    found: dict[str, RecordSource] = {}
    for spec in config.data.eval:
        name = spec.partition("?")[0]
        name = name if name not in found else f"{name} ({len(found)})"
        found[name] = Sized(open_source(spec), processor.pixel_config)
    return found


def system_turn(config: TrainConfig, system: str | None) -> str | None:
    """With thinking, R1's system turn takes the place of the usual ones."""
    plain = (None, answers.SYSTEM, ocr.SYSTEM)
    return answers.THINKING_SYSTEM if config.data.thinking and system in plain else system


def asking_of(config: TrainConfig) -> Asking:
    """How training asks."""
    data = config.data
    return Asking({"style": data.style, "thinking": data.thinking}, system_turn(config, data.system))


def eval_options(config: TrainConfig) -> dict[str, Any]:
    """Options of the tasks in evaluations; those at default are left out, as in folders of earlier versions."""
    given = {"wording": config.evaluation.wording, "rules": config.evaluation.rules}
    usual = EvaluationConfig()
    rest = {name: value for name, value in given.items() if value != getattr(usual, name)}
    return {"style": config.data.style, "thinking": config.data.thinking} | rest


def eval_asking(config: TrainConfig) -> Asking:
    """How evaluations ask."""
    options = {name: value for name, value in eval_options(config).items() if name != "rules"}
    return Asking(options, system_turn(config, config.evaluation.system))


def open_mixture(config: TrainConfig) -> RecordSource:
    """The training sources as one, mixed by their weights."""
    specs = list(config.data.train)
    if config.data.weights:
        specs = [f"{s}{'&' if '?' in s else '?'}weight={w}" for s, w in zip(specs, config.data.weights, strict=True)]
    return open_source(specs if len(specs) > 1 else specs[0])


def build(config: TrainConfig) -> tuple[Context, TrainState]:
    """Loads, shards and opens everything. Raises InputError before anything is compiled or written."""
    config.validate()
    mesh = build_mesh(config)
    sample_mesh, data = build_sample_mesh(config, mesh), config.data
    model = load_model(config, mesh)
    params = grown(config, model.params, model.cfg)
    layout = layout_of(config, model.cfg, params, mesh, sample_mesh)
    state = first_state(config, layout, params)
    context = Context(
        **{field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)},
        model=dataclasses.replace(model, params={}),
        specs=data.train,
        mixture=open_mixture(config),
        asking=asking_of(config),
        evaluating=eval_asking(config),
        style={"style": data.style, "thinking": data.thinking},
        reading=dict(
            max_bad_records=data.max_bad_records,
            threads=data.workers,
            process=row_block(mesh),
            agree=agree_with_all if jax.process_count() > 1 else None,
        ),
        seed=config.seed,
        max_steps=config.max_steps,
        max_new_tokens=config.evaluation.max_new_tokens or config.method.lengths()[1] or 512,
        repetition_penalty=config.evaluation.repetition_penalty,
        cache=config.run_dir / "cache",
    )
    return context, state


def host_scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as floats, fetched together."""
    return {name: float(np.asarray(value)) for name, value in jax.device_get(dict(metrics)).items()}
