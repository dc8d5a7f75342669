"""What a run is made of: model on the mesh, optimiser, data, checkpoints, all from one config."""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmllm import api, tasks
from jaxmllm.data.chat import Processor
from jaxmllm.data.examples import Asking, Sized
from jaxmllm.data.overlap import shared_records
from jaxmllm.data.pipeline import agree_with_all
from jaxmllm.data.sources import RecordSource, Spec, open_source
from jaxmllm.errors import InputError
from jaxmllm.eval import measure
from jaxmllm.machine.mesh import make_mesh
from jaxmllm.machine.processes import row_block
from jaxmllm.machine.targets import same_devices
from jaxmllm.methods.method import Context
from jaxmllm.model import family
from jaxmllm.model.config import ModelConfig
from jaxmllm.model.family import load_model_config
from jaxmllm.tasks import answers, ocr
from jaxmllm.tasks.task import DIRECTIONS
from jaxmllm.training.config import EvaluationConfig, TrainConfig
from jaxmllm.training.metrics import chosen_trackers
from jaxmllm.training.state import first_state, grown, layout_of
from jaxmllm.types import TrainState

log = logging.getLogger(__name__)


def build_mesh(config: TrainConfig) -> Mesh:
    return make_mesh(**dataclasses.asdict(config.mesh))


def build_sample_mesh(config: TrainConfig, mesh: Mesh) -> Mesh:
    return mesh if config.sample_mesh is None else same_devices(mesh, config.sample_mesh)


def load_model(config: TrainConfig, mesh: Mesh) -> api.Model:
    """The configured checkpoint, or its architecture with random weights, on the mesh."""
    data = config.data
    shape: dict[str, Any] = dict(remat=config.remat, unroll=config.unroll)
    limits: dict[str, Any] = dict(
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        max_source_pixels=data.max_source_pixels,
        max_prompt_length=data.max_prompt_length,
    )
    if not config.from_scratch:
        model = api.load(config.model, mesh=mesh, dtype=config.param_dtype, family=config.family, **limits, **shape)
        model.cfg = dataclasses.replace(model.cfg, dtype=config.dtype)
        return model
    folder = api.resolve(config.model)
    cfg = dataclasses.replace(load_model_config(folder, config.family), dtype=config.dtype, **shape)
    params = api.init_params(cfg, config.seed, mesh)
    return api.Model(params, cfg, Processor.from_pretrained(folder, cfg, **limits), mesh, folder)


def eval_sources(config: TrainConfig) -> dict[str, RecordSource]:
    """The evaluation sources by name: their spec without options, or with those that tell two of a name apart."""
    return {name: open_source(spec) for name, spec in source_names(config.data.eval).items()}


def source_names(specs: Sequence[str]) -> dict[str, Spec]:
    """Specs by a short name that keeps what tells them apart."""
    read = [Spec.parse(text) for text in specs]
    names: dict[str, Spec] = {}
    for spec in read:
        twins = [set(other.options) for other in read if other.name == spec.name]
        shared = set.intersection(*twins)
        own = dataclasses.replace(spec, options=tuple(item for item in spec.options if item not in shared))
        full = str(own) if len(twins) > 1 else spec.name
        names[full if full not in names else f"{full} ({len(names)})"] = spec
    return names


@dataclasses.dataclass(frozen=True)
class Opened:
    """The data of a run, opened and looked at before a model is loaded."""

    mixture: RecordSource
    evaluation: dict[str, RecordSource]  # by name
    shared: dict[str, str]  # by name of an evaluation source, a sentence about training records in it

    def sized(self, context: Context) -> dict[str, RecordSource]:
        """The evaluation sources with the sizes that the model will see."""
        pixels = context.model.processor.pixel_config
        return {name: Sized(source, pixels) for name, source in self.evaluation.items()}


def best_direction(config: TrainConfig, sources: Mapping[str, RecordSource]) -> int:
    """1 where a larger value of the metric for the best model, "<source>/<figure>", is better, -1 where a smaller one is.

    InputError where there is no such source, or it has no such figure with a better end.
    """
    metric = config.metric_for_best_model
    if not metric:
        return 1
    figure = next((metric[len(name) + 1 :] for name in sources if metric.startswith(f"{name}/")), None)
    if figure is None:
        raise InputError(
            f"metric_for_best_model = {metric!r}: write <source>/<figure>, the sources are {', '.join(sources)}"
        )
    name = metric[: -len(figure) - 1]
    task = tasks.of(sources[name][0])
    ways = {own: DIRECTIONS[way] for own, way in config.method.figures.items()}
    sign = ways.get(figure) or measure.direction(task, figure)
    if not sign:
        known = [f"{name}/{own}" for own in (*ways, *task.figures) if ways.get(own) or task.direction(own)]
        neither = "neither better higher nor lower" if task.way(figure) else "not measured"
        raise InputError(f"metric_for_best_model = {metric!r}: {neither}; use one of {', '.join(known)}")
    return sign


def open_data(config: TrainConfig) -> Opened:
    """What can be checked without the model: data, what the method names, trackers, the metric, the output folder.

    Raises InputError.
    """
    mixture, evaluation = open_mixture(config), eval_sources(config)
    shared = shared_records(mixture, evaluation, config.data.eval_samples, asking_of(config))
    for name, sentence in shared.items():
        log.warning("%s: %s", name, sentence)
    opened = Opened(mixture, evaluation, shared)
    config.method.check()
    chosen_trackers(config.report_to)
    best_direction(config, opened.evaluation)
    if (
        config.resume_from and not (config.run_dir / "config.json").exists()
    ):  # one that has begun has its own checkpoints
        _check_resume_from(config)
    folder = config.run_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"output_dir: {config.run_dir} cannot be written ({folder} is no folder that may be written)")
    return opened


def _check_resume_from(config: TrainConfig) -> None:
    """Raises InputError where the run to begin with has no checkpoint, or has made as many updates as are asked for."""
    folder = Path(config.resume_from) / "checkpoints"
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    if not steps:
        raise InputError(f"resume_from = {config.resume_from}: there is no run with checkpoints")
    if config.max_steps <= max(steps):
        raise InputError(
            f"max_steps = {config.max_steps}: {config.resume_from} has made {max(steps)} updates, which count; use a larger one"
        )


def system_turn(config: TrainConfig, system: str | None) -> str | None:
    """With thinking, R1's system turn takes the place of the usual ones."""
    plain = (None, answers.SYSTEM, ocr.SYSTEM)
    return answers.THINKING_SYSTEM if config.data.thinking and system in plain else system


def task_options(config: TrainConfig) -> dict[str, Any]:
    """Options of the tasks in training."""
    data = config.data
    style = {} if data.style is None else {"style": data.style}
    return {**style, "thinking": data.thinking, **tasks.parsed_options(data.task_options)}


def asking_of(config: TrainConfig) -> Asking:
    """How training asks."""
    data = config.data
    return Asking(task_options(config), system_turn(config, data.system))


def eval_options(config: TrainConfig) -> dict[str, Any]:
    """Options of the tasks in evaluations; those at default are left out, as in folders of earlier versions."""
    given = {"wording": config.evaluation.wording, "rules": config.evaluation.rules}
    usual = EvaluationConfig()
    rest = {name: value for name, value in given.items() if value != getattr(usual, name)}
    return task_options(config) | rest


def eval_asking(config: TrainConfig) -> Asking:
    """How evaluations ask."""
    return Asking(eval_options(config), system_turn(config, config.evaluation.system))


def chosen_style(style: str | None, cfg: ModelConfig) -> str:
    """How boxes are written: as is asked for, or as the published checkpoints of the model's family write them.

    Another style than the family's is warned about. InputError for one that is unknown.
    """
    own = family.of(cfg).style(cfg)
    if style not in (None, *answers.STYLES):
        raise InputError(f"style {style!r}: use one of {', '.join(answers.STYLES)}")
    if style not in (None, own):
        usual = answers.STYLES[own].words
        log.warning("style %s: checkpoints of this family write %s (style %s)", style, usual, own)
    return style or own


def with_style(config: TrainConfig) -> TrainConfig:
    """The config with the style of its boxes filled in, from the config.json of its model."""
    if config.data.style is not None:
        return config
    cfg = load_model_config(api.resolve(config.model), config.family)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, style=chosen_style(None, cfg)))


def boxes_in_words(config: TrainConfig, source: Sized) -> str:
    """How boxes are written, with the first gold answer that has one; "" where the first records have none."""
    asking = asking_of(config)
    for index in range(min(len(source), 8)):
        try:
            record = source[index]
            if "box" in record or "boxes" in record or "points" in record:
                gold = asking.answer(dict(record))
                style = answers.STYLES[str(config.data.style)]
                return f"boxes are {style.words}; a right answer: {gold[:200]!r}"
        except (InputError, LookupError, TypeError, ValueError):
            continue
    return ""


def open_mixture(config: TrainConfig) -> RecordSource:
    """The training sources as one, mixed by their weights."""
    weights = config.data.weights or [None] * len(config.data.train)
    specs = [Spec.parse(text).with_options(weight=w) for text, w in zip(config.data.train, weights, strict=True)]
    return open_source(specs if len(specs) > 1 else specs[0])


def build(config: TrainConfig, opened: Opened | None = None) -> tuple[Context, TrainState]:
    """Loads and shards the model of a config. Raises InputError before anything is compiled or written."""
    opened = open_data(config.validate()) if opened is None else opened
    config = with_style(config)
    mesh = build_mesh(config)
    sample_mesh, data = build_sample_mesh(config, mesh), config.data
    for name, laid_out in (("mesh", mesh), ("sample_mesh", sample_mesh)):
        parts = laid_out.shape["replica"] * laid_out.shape["fsdp"]
        if config.batch_size % parts:
            raise InputError(
                f"batch_size = {config.batch_size}: does not divide over replica x fsdp = {parts} devices of {name}; use "
                f"--batch_size {-(-config.batch_size // parts) * parts}"
            )
    model = load_model(config, mesh)
    chosen_style(config.data.style, model.cfg)
    if boxes := boxes_in_words(config, Sized(opened.mixture, model.processor.pixel_config)):
        log.info("%s", boxes)
    params = grown(config, model.params, model.cfg)
    layout = layout_of(config, model.cfg, params, mesh, sample_mesh)
    state = first_state(config, layout, params)
    context = Context(
        **{field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)},
        model=dataclasses.replace(model, params={}),
        specs=data.train,
        mixture=opened.mixture,
        asking=asking_of(config),
        evaluating=eval_asking(config),
        task_options=task_options(config),
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
