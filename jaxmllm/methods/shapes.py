"""The programs of an iteration as `plan` reads them: the functions that training calls, on shapes instead of arrays."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxmllm.machine.mesh import BATCH, P
from jaxmllm.model import family
from jaxmllm.model.config import ModelConfig
from jaxmllm.types import Completions, Prompts, Vision


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The largest batch of a run, in the buckets that it will be padded to."""

    prompts: int  # B, of a rollout or update, over all devices
    generations: int  # G
    frames: int  # F
    windows: int  # W
    prompt_tokens: int  # S
    new_tokens: int  # T


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function and the arrays or shapes to count its products on."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    times: float = 1.0


@dataclasses.dataclass
class Program:
    """One program of an iteration: how to compile it, how often it runs, and what it has to do."""

    name: str
    lower: Callable[[], Any]
    executes: Traced | None  # None: no products
    needs: Traced | None = None  # what the model needs of them, without recomputation; None: all
    steps: int = 1  # passes of the loop whose length the compiler does not know
    beside: tuple[str, ...] = ()  # kinds of memory that lie there while it runs, besides its arguments: see `plan`
    runs: int = 1  # times an iteration
    # memory that stays once it ran, by name: trees of shapes with shardings, asked for after it is compiled
    leaves: Callable[[], Mapping[str, Any]] = dict


def put(tree: Any, mesh: Mesh) -> Any:
    """Shapes with a leading batch axis, and scalars, as the mesh lays them out."""
    rows, whole = NamedSharding(mesh, BATCH), NamedSharding(mesh, P())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows if x.ndim else whole), tree)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def prompts(sizes: Sizes, cfg: ModelConfig, mesh: Mesh, vision: bool = True) -> Prompts:
    """`vision` False: of a frozen tower, whose output is given instead of pictures."""
    s, v = sizes, cfg.vision

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((s.prompts, *shape), dtype)

    place = (s.frames, s.windows, v.window_patches)
    pictures: Any = Vision(array(*place, v.patch_pixels, dtype=jnp.float32), array(*place, 2))
    text: Any = dict(
        tokens=array(s.prompt_tokens),
        positions=array(3, s.prompt_tokens),
        lengths=array(),
        next_position=array(),
        vision_index=array(s.prompt_tokens),
    )
    return put(Prompts(**text, vision=pictures if vision else None), mesh)


def completions(sizes: Sizes, mesh: Mesh) -> Completions:
    b, g, t = sizes.prompts, sizes.generations, sizes.new_tokens
    tokens, lengths = jax.ShapeDtypeStruct((b, g, t), jnp.int32), jax.ShapeDtypeStruct((b, g), jnp.int32)
    weights = jax.ShapeDtypeStruct((b, g, t), jnp.float32)
    return put(Completions(tokens, lengths, weights), mesh)  # type: ignore[arg-type]


def vision_tokens(sizes: Sizes, cfg: ModelConfig, mesh: Mesh) -> Any:
    """[B, V, E], the output of the tower."""
    own = family.of(cfg)
    shape = (sizes.prompts, sizes.frames * sizes.windows * own.window_tokens(cfg), own.vision_width(cfg))
    return put(jax.ShapeDtypeStruct(shape, jnp.dtype(cfg.dtype)), mesh)


def trained_products(forward: Traced, lora: bool, times: float = 1.0) -> Traced:
    """What an update needs without recomputation: its backward pass has two products for each of the forward pass, one
    where the weight is frozen (adapters).
    """
    return dataclasses.replace(forward, times=(2 if lora else 3) * times)
