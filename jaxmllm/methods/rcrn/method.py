"""RCRN as a method: a network on a backbone's features says whether an expression fits, where, and which relation is wrong.

The backbone reads picture and expression once. Regions are its states at the picture's tokens pooled over candidate boxes,
words are its states at the tokens of the phrases. Which of its parameters train is `trainable`: `rcrn/.*` keeps the features
as they are.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxmllm.data.examples import Asking
from jaxmllm.data.pipeline import batches
from jaxmllm.errors import InputError
from jaxmllm.machine import processes
from jaxmllm.machine.mesh import shard_batch
from jaxmllm.methods import shapes
from jaxmllm.methods.method import Clock, Context, Facts, Layout, Method, Own, Params, Report, Rules, Work
from jaxmllm.methods.rcrn import network
from jaxmllm.methods.rcrn.graphs import Arrays, Limits, RelationEncoder, arrays, candidates
from jaxmllm.methods.rcrn.loss import matching_losses
from jaxmllm.methods.shapes import Program, Sizes, Traced, trained_products
from jaxmllm.methods.update import Metrics, Update, apply_gradients
from jaxmllm.model import family
from jaxmllm.model.config import ModelConfig
from jaxmllm.types import Prompts, TrainState

KEY = "rcrn"
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What decides the program of an update."""

    network: network.RCRNConfig
    features: str
    limits: Limits
    cell: int  # resized pixels of a vision token's side


@dataclasses.dataclass
class Batch:
    """Prompts and arrays of one batch; a pytree of arrays but for `Graphs`, which is one itself."""

    prompts: Prompts
    arrays: Arrays


for _cls in (Batch, Arrays):
    jax.tree_util.register_dataclass(_cls, [f.name for f in dataclasses.fields(_cls)], [])


def features(
    params: Params,
    cfg: ModelConfig,
    prompts: Prompts,
    kind: str,
    grid: Any,
    boxes: Any,
    shape: tuple[int, int],
    cell: int,
) -> tuple[Float[Array, "B N D"], Float[Array, "B S D"]]:
    """(regions, words). `shape`: rows and columns of the largest grid of picture tokens in the batch."""
    if kind == "tower":
        states = family.embed_prompts(params, cfg, prompts)
    else:
        states, _ = family.forward(params, cfg, prompts)
    states = states.astype(jnp.float32)
    rows, columns = shape
    start, real = grid[:, 0], grid[:, 1:]
    y, x = jnp.arange(rows)[None, :, None], jnp.arange(columns)[None, None]
    place = (
        start[:, None, None]
        + jnp.minimum(y, real[:, :1, None] - 1) * real[:, 1:, None]
        + jnp.minimum(x, real[:, 1:, None] - 1)
    )
    picked = jnp.take_along_axis(states, place.reshape(len(states), -1, 1), axis=1)
    picture = picked.reshape(len(states), rows, columns, -1)
    return network.roi_features(picture, real, boxes, cell), states


def read(
    params: Params, update: Update, objective: Objective, batch: Batch, shape: tuple[int, int], readout: str
) -> Any:
    """The network's outputs on a batch."""
    given = batch.arrays
    continuous = given.boxes + jnp.asarray([0.0, 0.0, 1.0, 1.0])
    regions, words = features(
        params, update.cfg, batch.prompts, objective.features, given.grid, continuous, shape, objective.cell
    )
    inputs = network.Inputs(
        regions,
        given.boxes,
        given.box_mask,
        given.size,
        words,
        given.entity_words,
        given.relation_words,
        given.graphs,
    )
    return network.apply(params[KEY], objective.network, inputs, readout=readout)


read_jit = jax.jit(read, static_argnames=("update", "objective", "shape", "readout"))


@functools.partial(jax.jit, static_argnames=("update", "objective", "shape"), donate_argnames="state")
def rcrn_step(
    state: TrainState,
    batch: Batch,
    match_weight: Float[Array, ""],
    *,
    update: Update,
    objective: Objective,
    shape: tuple[int, int],
) -> tuple[TrainState, Metrics]:
    """One update; `match_weight` is 0 while grounding is learnt first."""
    count = update.accumulation_steps

    def loss_fn(params, micro: Batch):
        out = read(params, update, objective, micro, shape, "released")
        given = micro.arrays
        parts = matching_losses(
            out["b_root"],
            given.box_mask,
            given.gold,
            params[KEY]["temperature"],
            out["match_logit"],
            given.match,
            out["proposal"],
            given.gold_box,
            out["pred_delta"],
        )
        loss = parts["L_grd"] + match_weight * parts["L_match"] + parts["L_reg"]
        said = out["match_logit"] > 0
        matched = given.match & (given.gold >= 0)
        right = (out["pred_index"] == given.gold) & matched
        return loss / count, {
            "loss/grounding": parts["L_grd"] / count,
            "loss/matching": parts["L_match"] / count,
            "loss/box": parts["L_reg"] / count,
            "accuracy/matching": jnp.mean(said == given.match) / count,
            "accuracy/grounding": right.sum() / jnp.maximum(matched.sum(), 1) / count,
        }

    state, loss, metrics = apply_gradients(state, update, loss_fn, batch)
    once = {name: metrics.pop(name)[0] for name in ("grad_norm", "nonfinite")}
    return state, {name: value.sum() for name, value in metrics.items()} | once | {"loss": loss}


@dataclasses.dataclass(frozen=True)
class RCRN(Method):
    """Options of the network and of what it reads."""

    features: Literal["tower", "decoder"] = "decoder"  # states of the tower and embeddings, or of the last layer
    width: int = 64  # of regions and words after projection (released: 768)
    joint: int = 64  # space of boxes and phrases (released: 1024)
    difference: int = 32  # hidden width of the published difference similarity (released: 256)
    pair_location: int = 32  # width of an embedded relative location (released: 64)
    context: int = 5  # context boxes of an edge
    phrase_encoder: Literal["bilstm", "linear"] = "linear"
    scores: Literal["calibrated", "published"] = "calibrated"  # see `network.calibrated`
    readout: Literal["released", "counterfactual"] = (
        "counterfactual"  # of the wrong relation, see `propagation.readout`
    )
    grounding_first: float = 1 / 6  # share of the run before the matching loss counts
    match_weight: float = 3.0
    max_candidates: int = 10
    max_entities: int = 4
    max_relations: int = 3
    max_phrase_tokens: int = 24  # a relation's are those of subject, predicate and object

    uses_last_step: ClassVar[bool] = True  # by grounding_first
    rules: ClassVar[Rules] = ((f"{KEY}/.*", PartitionSpec()),)
    keys: ClassVar[tuple[str, ...]] = (KEY,)

    def problems(self, facts: Facts) -> list[str]:
        found = []
        for name in ("width", "joint", "difference", "pair_location", "context", "max_candidates", "max_entities"):
            if getattr(self, name) < 1:
                found.append(f"method.{name} = {getattr(self, name)}: must be at least 1")
        if self.joint % 2:
            found.append(f"method.joint = {self.joint}: must be even")
        if not 0 <= self.grounding_first < 1:
            found.append(f"method.grounding_first = {self.grounding_first}: must be at least 0 and below 1")
        if facts.lora:
            found.append("lora: method rcrn trains its own network; choose the backbone's part by `trainable`")
        return found

    def network_config(self, cfg: ModelConfig) -> network.RCRNConfig:
        wide = cfg.text.hidden_size
        return network.RCRNConfig(
            wide,
            wide,
            width=self.width,
            joint=self.joint,
            difference=self.difference,
            pair_location=self.pair_location,
            context=self.context,
            dropout=0.0,
            phrase_encoder=self.phrase_encoder,
            scores=self.scores,
        )

    @property
    def limits(self) -> Limits:
        return Limits(self.max_candidates, self.max_entities, max(1, self.max_relations), self.max_phrase_tokens)

    def objective(self, cfg: ModelConfig) -> Objective:
        cell = cfg.vision.patch_size * cfg.vision.spatial_merge_size
        return Objective(self.network_config(cfg), self.features, self.limits, cell)

    def grow(self, key: jax.Array, params: Params, cfg: ModelConfig) -> Params:
        return params | {KEY: network.init(jax.random.fold_in(key, 2), self.network_config(cfg))}

    def work(self, context: Context) -> "RCRNWork":
        return RCRNWork(self, context)

    def answers(self, params: Params, records: Sequence[Record], context: Context) -> list[str]:
        """The network's verdicts, in the words of the task: match and box, or the wrong relation."""
        encoder = RelationEncoder(context.model.processor, context.evaluating, context.model.buckets)
        encoded = [encoder.encode(record) for record in records]
        prompts, rows = context.model.prepare([row.example for row in encoded])
        total = len(prompts.lengths)
        padded = [*encoded, *[encoded[-1]] * (total - rows)]
        batch, shape = self.batch([row.records[0] for row in padded], prompts, context)
        objective = self.objective(context.cfg)
        out = read_jit(params, context.update, objective, batch, shape, self.readout)
        nodes = jnp.take_along_axis(batch.arrays.boxes, out["node_index"][..., None], 1)
        host = processes.whole(
            {"match": out["match_logit"] > 0, "box": out["pred_box"], "edge": out["mrr_edge"], "nodes": nodes}
        )
        return [
            self.verdict(record, {name: value[i] for name, value in host.items()}, context.evaluating)
            for i, record in enumerate(records)
        ]

    def verdict(self, record: Record, out: Mapping[str, np.ndarray], asking: Asking) -> str:
        """One answer in the task's form, with where each phrase is and which relation it would deny whatever the verdict."""
        width, height = record["size"]
        scale = np.tile(np.divide(record["size"], record["resized"]), 2)

        def pixels(boxes: np.ndarray) -> np.ndarray:
            return np.clip((boxes + [0, 0, 1, 1]) * scale, 0, [width, height, width, height])

        box, edges, edge = pixels(out["box"]), len(record["edges"]), int(out["edge"])
        nodes = pixels(out["nodes"][: len(record["entities"])])
        nodes[record["root"]] = box
        trace = {"nodes": nodes.tolist(), "verdicts": [k != edge for k in range(edges)]}
        said = {**record, "match": bool(out["match"]), "box": box.tolist(), "foil_pos": edge, "trace": trace}
        return asking.task(record).gold(said)

    def batch(self, records: Sequence[Record], prompts: Prompts, context: Context) -> tuple[Batch, tuple[int, int]]:
        """A batch on the mesh and the shape of its largest picture. `prompts` may lie there already."""
        vision = processes.local_rows(prompts.vision_index)
        starts = [int(np.argmax(row >= 0)) for row in vision]
        made = arrays(records, starts, self.objective(context.cfg).cell, self.limits)
        most = np.max(processes.from_all(made.grid[:, 1:].max(0).tolist()), axis=0)
        on_mesh = shard_batch(jax.tree.map(np.asarray, (prompts, made)), context.mesh)
        return Batch(*on_mesh), (int(most[0]), int(most[1]))

    def programs(self, sizes: Sizes, state: TrainState, layout: Layout) -> Generator[Program, Any, None]:
        objective, limits, b = self.objective(layout.cfg), self.limits, sizes.prompts

        def array(dtype: Any, *tail: int) -> Any:
            return jax.ShapeDtypeStruct((b, *tail), dtype)

        m, e, n = limits.entities, limits.relations, limits.objects
        graphs = network.Graphs(
            array(jnp.int32, e, 2),
            array(bool, e),
            array(bool, m),
            array(jnp.int32),
            array(jnp.int32, m),
            array(jnp.int32, e),
        )
        given: Any = Arrays(
            boxes=array(jnp.float32, n, 4),
            box_mask=array(bool, n),
            size=array(jnp.float32, 2),
            grid=array(jnp.int32, 3),
            entity_words=array(jnp.int32, m, limits.phrase),
            relation_words=array(jnp.int32, e, limits.phrase),
            graphs=graphs,
            match=array(bool),
            gold=array(jnp.int32),
            gold_box=array(jnp.float32, 4),
        )
        batch = Batch(shapes.prompts(sizes, layout.cfg, layout.mesh), shapes.put(given, layout.mesh))
        side = max(
            1, int((sizes.windows * layout.cfg.vision.window_patches) ** 0.5) // layout.cfg.vision.spatial_merge_size
        )
        weight = jax.ShapeDtypeStruct((), jnp.float32)
        options: dict[str, Any] = dict(update=layout.update, objective=objective, shape=(side, side))
        forward = Traced(
            lambda p, x: read(p, layout.update, objective, x, (side, side), "released"), (state.params, batch)
        )
        yield Program(
            "update",
            lambda: rcrn_step.lower(state, batch, weight, **options),
            Traced(lambda state, *x: rcrn_step(state, *x, **options), (state, batch, weight)),
            trained_products(forward, layout.lora),
        )


class RCRNWork(Work):
    def __init__(self, method: RCRN, context: Context):
        self.method, self.context, self.objective = method, context, method.objective(context.cfg)
        if not len(context.mixture):
            raise InputError("data.train: it has no records")
        first = context.mixture[0]
        if first.get("task") != "relations":
            raise InputError(f"data.train: method {method.name} learns from records of the task relations")
        candidates(first)
        encoder = RelationEncoder(context.model.processor, context.asking, context.model.buckets)
        self.batches = batches(
            context.mixture,
            context.model.processor,
            encoder,
            context.batch_size,
            context.model.buckets,
            context.seed,
            **context.reading,
        )

    def step(self, state: TrainState, own: Own, stop: Callable[[], bool]) -> tuple[TrainState, Own, Report | None]:
        clock, method, context = Clock(), self.method, self.context
        with clock("data"):
            loaded = next(self.batches)
        with clock("update"):
            batch, shape = method.batch(loaded.records, loaded.prompts, context)
            grounding_first = int(state.step) < method.grounding_first * context.max_steps
            weight = jnp.asarray(0.0 if grounding_first else method.match_weight, jnp.float32)
            state, metrics = rcrn_step(
                state, batch, weight, update=context.update, objective=self.objective, shape=shape
            )
            jax.block_until_ready(state.step)
        return state, own, Report(metrics | clock.metrics(), arrays=lambda: {"prompts": loaded.prompts})
