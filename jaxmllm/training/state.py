"""The train state of a config: real, or as shapes for a plan. Both come from the same functions."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmllm.machine.mesh import RULES, param_shardings
from jaxmllm.methods.method import Layout, Params
from jaxmllm.methods.optim import first_moments, make_optimizer, split, state_shardings
from jaxmllm.methods.shapes import with_shardings
from jaxmllm.methods.update import Update
from jaxmllm.model import family, hf, lora
from jaxmllm.model.config import ModelConfig
from jaxmllm.training.config import TrainConfig
from jaxmllm.types import TrainState


def grown(config: TrainConfig, params: Params, cfg: ModelConfig) -> Params:
    """The model's parameters with adapters and with what the method adds. Traceable."""
    key = jax.random.key(config.seed)
    if config.lora is not None:
        params = lora.add(jax.random.fold_in(key, 1), params, config.lora, family.of(cfg))
    return config.method.grow(key, params, cfg)


def layout_of(config: TrainConfig, cfg: ModelConfig, params: Params, mesh: Mesh, sample_mesh: Mesh) -> Layout:
    """The static side of a run whose parameters (arrays or shapes, see `grown`) are these."""
    train, _ = split(params, config.trainable)
    tx = make_optimizer(config.optim, config.max_steps)
    rules = (*config.method.rules, *RULES)
    update = Update(cfg, tx, config.trainable, config.optim.gradient_accumulation_steps, rules)
    frozen_tower = "vision" not in train and "vision" not in train.get("lora", {})
    return Layout(cfg, mesh, sample_mesh, update, config.batch_size, frozen_tower, config.lora is not None)


def first_state(config: TrainConfig, layout: Layout, params: Params) -> TrainState:
    """The state before the first update, on the mesh; `params` as `grown` gives them."""
    mesh, rules, tx = layout.mesh, layout.update.rules, layout.update.tx
    params = jax.device_put(params, param_shardings(params, mesh, rules))
    train, _ = split(params, config.trainable)
    _, shardings = state_shardings(train, jax.eval_shape(partial(first_moments, tx), train), mesh, rules)
    opt_state = jax.jit(partial(first_moments, tx), out_shardings=shardings)(train)
    reference = jax.tree.map(jnp.copy, train) if config.method.reference(layout.lora) else None
    step = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, PartitionSpec()))
    return TrainState(step, params, opt_state, reference)


def planned(config: TrainConfig, cfg: ModelConfig, mesh: Mesh, sample_mesh: Mesh) -> tuple[Layout, TrainState]:
    """(layout, state as shapes with shardings): what `layout_of` and `first_state` would give on these meshes."""
    kind = jnp.dtype(config.param_dtype)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, kind), hf.abstract_params(cfg))
    params = jax.eval_shape(lambda p: grown(config, p, cfg), params)
    layout = layout_of(config, cfg, params, mesh, sample_mesh)
    rules, tx = layout.update.rules, layout.update.tx
    params = with_shardings(params, param_shardings(params, mesh, rules))
    train, _ = split(params, config.trainable)
    shapes = jax.eval_shape(partial(first_moments, tx), train)
    _, placed = state_shardings(train, shapes, mesh, rules)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    reference = train if config.method.reference(layout.lora) else None
    return layout, TrainState(step, params, with_shardings(shapes, placed), reference)


def replaced(layout: Layout, **fields: Any) -> Layout:
    return dataclasses.replace(layout, **fields)
