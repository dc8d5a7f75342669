"""What a run is made of: model on the mesh, optimiser, data, checkpoints, all from one config."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmllm import api
from jaxmllm.config import load_model_config
from jaxmllm.data.chat import Processor
from jaxmllm.data.examples import Asking, Sized
from jaxmllm.data.images import PixelConfig
from jaxmllm.data.pipeline import agree_with_all, rl_batches, sft_batches
from jaxmllm.data.sources import RecordSource, all_records, open_source
from jaxmllm.errors import InputError
from jaxmllm.eval.harness import Generate
from jaxmllm.machine.mesh import make_mesh, param_shardings
from jaxmllm.machine.processes import row_block
from jaxmllm.machine.targets import same_devices
from jaxmllm.methods.box_targets import BoxTargets
from jaxmllm.methods.given import Supervised, weigh_parts
from jaxmllm.methods.grpo.rollout import GRPO
from jaxmllm.methods.optim import make_optimizer, split, state_shardings
from jaxmllm.methods.update import Update
from jaxmllm.methods.warmup import HEADS, Warmup, init_heads, warmup_batches
from jaxmllm.model import lora
from jaxmllm.tasks import answers, ocr
from jaxmllm.training.config import EvaluationConfig, TrainConfig
from jaxmllm.training.run import Run, Step
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


def generator(run: Run) -> Generate:
    """Greedy answers of the current policy to records, for the evaluation harness."""
    config = run.config
    asking = eval_asking(config)

    def generate(records: Sequence[Mapping[str, Any]]) -> list[str]:
        model = dataclasses.replace(run.model, params=run.state.params)
        answers = api.generate(
            model,
            [asking.conversation(dict(record)) for record in records],
            max_new_tokens=config.evaluation.max_new_tokens or config.grpo.max_completion_length or 512,
            temperature=0.0,
            repetition_penalty=config.evaluation.repetition_penalty,
            batch_size=max(len(records), 1),
        )
        return [group[0].text for group in answers]

    return generate


def _new_state(config: TrainConfig, model: api.Model, mesh: Mesh) -> tuple[TrainState, Update]:
    tx = make_optimizer(config.optim, config.max_steps)
    params = model.params
    if config.lora is not None:
        params = lora.add(jax.random.fold_in(jax.random.key(config.seed), 1), params, config.lora)
    if config.method == "vision_warmup":
        params = params | {HEADS: init_heads(jax.random.key(config.seed), model.cfg.vision.out_hidden_size)}
    params = jax.device_put(params, param_shardings(params, mesh))
    train, _ = split(params, config.trainable)
    _, shardings = state_shardings(train, jax.eval_shape(tx.init, train), mesh)
    opt_state = jax.jit(tx.init, out_shardings=shardings)(train)
    # with adapters the reference is the model without them
    compared = config.method == "dpo" or (config.method == "grpo" and config.grpo.beta > 0)
    reference = jax.tree.map(jnp.copy, train) if compared and config.lora is None else None
    step = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, PartitionSpec()))
    cut = config.optim.gradient_accumulation_steps
    skip_idle = config.method == "grpo" and cut > 1 and config.grpo.only_advantages
    update = Update(model.cfg, tx, config.trainable, cut, skip_idle)
    return TrainState(step, params, opt_state, reference), update


def _target_sources(config: TrainConfig, pixels: PixelConfig) -> list[Any]:
    """Sources of the world, and detection records made to tell what each cell of a picture shows."""
    opened = [open_source(spec) for spec in config.data.train]
    return [source if hasattr(source, "grid_targets") else BoxTargets(source, pixels) for source in opened]


def build(config: TrainConfig) -> Run:
    """Loads, shards and opens everything. Raises InputError before anything is compiled or written."""
    config.validate()
    mesh = build_mesh(config)
    data = config.data
    asking = asking_of(config)
    model = load_model(config, mesh)
    state, update = _new_state(config, model, mesh)
    common: dict[str, Any] = dict(
        max_bad_records=data.max_bad_records,
        threads=data.workers,
        process=row_block(mesh),
        agree=agree_with_all if jax.process_count() > 1 else None,
    )
    batches: Any
    step: Step
    if config.method == "grpo":
        batches = rl_batches(
            _mixture(config), model.processor, config.batch_size, model.buckets, config.seed, asking=asking, **common
        )
        step = GRPO(config)
    elif config.method != "vision_warmup":
        mixture = _mixture(config)
        if config.method == "sft":
            _check_questions(mixture, data.questions_per_image)
        batches = sft_batches(
            mixture,
            model.processor,
            config.batch_size,
            model.buckets,
            config.seed,
            asking=asking,
            questions=config.dpo.answers if config.method == "dpo" else data.questions_per_image,
            weigh=weigh_parts(model.tokenizer, data.first_corner_weight, data.label_weight),
            **common,
        )
        step = Supervised(config)
    else:
        pixels = model.processor.pixel_config
        sources = _target_sources(config, pixels)
        batches, token_index = warmup_batches(sources, pixels, config.batch_size, config.seed, data.workers)
        step = Warmup(sources, model.tokenizer, token_index)
    return Run(config, mesh, model, state, update, batches, asking, step, build_sample_mesh(config, mesh))


def _mixture(config: TrainConfig) -> RecordSource:
    specs = list(config.data.train)
    if config.data.weights:
        specs = [f"{s}{'&' if '?' in s else '?'}weight={w}" for s, w in zip(specs, config.data.weights, strict=True)]
    return open_source(specs if len(specs) > 1 else specs[0])


def _check_questions(source: RecordSource, wanted: int, looks: int = 16) -> None:
    """InputError where no picture seems to have as many questions: the rest would be empty answers, which cost the same."""
    if wanted == 1 or not len(source):
        return
    found = []
    for k in range(looks):
        with contextlib.suppress(InputError):  # a bad record: the pipeline's to judge
            found.append(len(all_records(source, k * len(source) // looks)))
    if found and (most := max(found)) < wanted:
        raise InputError(
            f"data.questions_per_image = {wanted}: of {looks} pictures looked at in data.train none has more than {most}; "
            f"set it to {most}, or write questions={wanted} in a world: source"
        )


def host_scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as floats, fetched together."""
    return {name: float(np.asarray(value)) for name, value in jax.device_get(dict(metrics)).items()}
