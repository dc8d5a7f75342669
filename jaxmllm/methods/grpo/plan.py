"""The programs of a GRPO iteration on shapes: relayout, encode, prefill, decode, score, update."""

from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxmllm.machine import layout as layouts
from jaxmllm.machine.mesh import P
from jaxmllm.methods import shapes
from jaxmllm.methods.grpo.options import GRPOOptions
from jaxmllm.methods.grpo.step import Rollout, grpo_step
from jaxmllm.methods.method import Layout
from jaxmllm.methods.shapes import Program, Sizes, Traced, trained_products
from jaxmllm.model import family
from jaxmllm.model.logprobs import Sampling
from jaxmllm.rollout import sampler
from jaxmllm.rollout.scorer import encode_jit, score, score_jit
from jaxmllm.types import TrainState

STOPS = (0, 1)  # stop tokens: how many there are changes nothing


def programs(
    sizes: Sizes,
    state: TrainState,
    layout: Layout,
    *,
    loss: GRPOOptions,
    sampling: Sampling,
    num_iterations: int,
    cuts: int,
) -> Generator[Program, Any, None]:
    cfg, mesh, params = layout.cfg, layout.mesh, state.params
    target = params
    beside: tuple[str, ...] = ("optimiser", "reference")
    if layouts.needs_copy(params, layout.sample_mesh, cfg.dtype):
        target = layouts.sampling_params(params, layout.sample_mesh, cfg.dtype)
        relayout: Any = layouts.relayout(params, layout.sample_mesh, cfg.dtype)
        copy = {"sampler's copy": target}
        yield Program("relayout", lambda: relayout.lower(params), None, beside=beside, leaves=lambda: copy)
    if layout.frozen_tower:
        pictures = shapes.prompts(sizes, cfg, mesh).vision
        yield Program(
            "encode",
            lambda: encode_jit.lower(params, cfg, pictures),
            Traced(lambda p, v: family.encode(p, cfg, v), (params, pictures)),
            beside=beside,
        )
    sampling_beside = (*beside, *(("parameters",) if target is not params else ()))
    yield from _sampling(sizes, target, layout, sampling, sampling_beside)
    rollout = _rollout(sizes, layout, loss, updates=num_iterations * cuts)
    inputs = (params, rollout.prompts, rollout.completions, rollout.vision_tokens)
    forward = Traced(lambda p, x, c, v: score(p, cfg, x, c, sampling, v), inputs)
    if loss.beta:
        given = (rollout.prompts, rollout.completions, sampling, rollout.vision_tokens)
        # the parameters it reads are the reference's, the policy's lie beside
        held = ("optimiser",) if layout.lora else ("parameters", "optimiser")
        yield Program("score", lambda: score_jit.lower(params, cfg, *given), forward, beside=held)
    part = rollout if cuts == 1 else jax.tree.map(lambda x: _cut(x, cuts), rollout)
    # without `skip_idle`: a plan counts every group as one that teaches
    options: dict[str, Any] = dict(update=layout.update, options=loss, sampling=sampling)
    yield Program(
        "update",
        lambda: grpo_step.lower(state, part, None, **options),
        Traced(lambda state, x: grpo_step(state, x, None, **options), (state, part)),
        trained_products(forward, layout.lora, 1 / cuts),
        runs=num_iterations * cuts,
    )


def _cut(x: Any, cuts: int) -> Any:
    return jax.ShapeDtypeStruct((x.shape[0] // cuts, *x.shape[1:]), x.dtype, sharding=x.sharding)


def _sampling(
    sizes: Sizes, params: Any, layout: Layout, sampling: Sampling, beside: tuple[str, ...]
) -> Generator[Program, Any, None]:
    """Prefill, and decode whose arguments lie as the compiled prefill lays them out."""
    cfg, mesh = layout.cfg, layout.sample_mesh
    prompts = shapes.prompts(sizes, cfg, mesh, vision=not layout.frozen_tower)
    keys = shapes.put(jax.ShapeDtypeStruct((sizes.prompts, sizes.generations), jax.random.key(0).dtype), mesh)
    tokens = shapes.vision_tokens(sizes, cfg, mesh) if layout.frozen_tower else None
    options: dict[str, Any] = dict(
        num_generations=sizes.generations, max_new_tokens=sizes.new_tokens, stop_ids=STOPS, pad_id=0
    )

    def start(params: Any, prompts: Any, keys: Any, tokens: Any) -> sampler.State:
        return sampler.start(params, cfg, prompts, keys, sampling, vision_tokens=tokens, **options)

    inputs = (params, prompts, keys, tokens)
    prefill = yield Program(
        "prefill",
        lambda: sampler.start.lower(params, cfg, prompts, keys, sampling, vision_tokens=tokens, **options),
        Traced(start, inputs),
        beside=beside,
    )
    opened = jax.eval_shape(start, *inputs)
    if prefill is not None:
        opened = shapes.with_shardings(opened, prefill.output_shardings)
    until = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    cache = {"cache": opened.cache} if prefill is not None else {}

    def advance(params: Any, state: sampler.State, n: Any) -> sampler.State:
        return sampler.advance(params, cfg, state, n, sampling, STOPS)

    # every completion as long as it may be: the last token of each is written, and not read
    yield Program(
        "decode",
        lambda: sampler.advance.lower(params, cfg, opened, until, sampling, STOPS),
        Traced(advance, (params, opened, until)),
        steps=max(1, sizes.new_tokens - 1),
        beside=beside,
        leaves=lambda: cache,
    )


def _rollout(sizes: Sizes, layout: Layout, loss: GRPOOptions, updates: int) -> Rollout:
    mesh, cfg, frozen = layout.mesh, layout.cfg, layout.frozen_tower
    shape = (sizes.prompts, sizes.generations)
    logps = shapes.put(jax.ShapeDtypeStruct((*shape, sizes.new_tokens), jnp.float32), mesh)
    return Rollout(
        prompts=shapes.prompts(sizes, cfg, mesh, vision=not frozen),
        completions=shapes.completions(sizes, mesh),
        advantages=shapes.put(jax.ShapeDtypeStruct(shape, jnp.float32), mesh),  # type: ignore[arg-type]
        vision_tokens=shapes.vision_tokens(sizes, cfg, mesh) if frozen else None,
        old_logps=logps if updates > 1 else None,
        ref_logps=logps if loss.beta else None,
        sampling_logps=logps,
    )
