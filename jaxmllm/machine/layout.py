"""Moving a run between its two layouts: parameters as the sampler wants them, rows from one mesh to the other.

Training splits every parameter over all devices and gathers a layer's as it runs. Decoding reads every parameter at every
token, so it gets a copy of its own, once a rollout: in the type of the products, split over `tensor` alone. Both meshes
hold the same devices in the same order, so each move is one compiled program.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Int

from jaxmllm.machine.mesh import BATCH, RULES, P, param_shardings, tree_paths

VECTORS = ("scale", "bias")  # of norms and linear layers: read in float32 by some, and small


def sampling_params(params: Any, mesh: Mesh, dtype: str) -> Any:
    """Shapes, types and shardings of the sampler's copy: matrices in `dtype`, vectors as they are.

    The model casts a matrix where it uses it, so the copy gives the same numbers bit for bit.
    """

    def leaf(path, x, sharding):
        kind = x.dtype if path.endswith(VECTORS) else jnp.dtype(dtype)
        return jax.ShapeDtypeStruct(x.shape, kind, sharding=sharding)

    return jax.tree.map(leaf, tree_paths(params), params, param_shardings(params, mesh))


def _over_replicas(spec: P) -> P:
    return P(*("replica" if axis == "fsdp" else axis for axis in spec))


def relayout(params: Any, mesh: Mesh, dtype: str) -> Callable[[Any], Any]:
    """The jitted program that makes the sampler's copy of parameters like these (arrays or shapes)."""
    target = sampling_params(params, mesh, dtype)
    # on the way each device holds a part of what it will hold whole: from there it is one gather, never all of a parameter
    halfway = param_shardings(params, mesh, [(pattern, _over_replicas(spec)) for pattern, spec in RULES])

    def copy(params):
        def one(x, like, sharding):
            return jax.lax.with_sharding_constraint(x.astype(like.dtype), sharding)

        return jax.tree.map(one, params, target, halfway)

    return jax.jit(copy, out_shardings=jax.tree.map(lambda like: like.sharding, target))


def needs_copy(params: Any, mesh: Mesh, dtype: str) -> bool:
    """Whether the sampler's copy would differ from the parameters themselves."""
    target = sampling_params(params, mesh, dtype)
    same = jax.tree.map(lambda x, like: x.dtype == like.dtype and _lies(x, like.sharding), params, target)
    return not all(jax.tree.leaves(same))


def _lies(x: Any, sharding: NamedSharding) -> bool:
    """Whether an array is laid out so; under another mesh it is not, even where that places it alike."""
    own = x.sharding
    return isinstance(own, NamedSharding) and own.mesh == sharding.mesh and own.is_equivalent_to(sharding, x.ndim)


@functools.cache
def _mover(sharding: NamedSharding) -> Callable[[Any], Any]:
    return jax.jit(lambda x: x, out_shardings=sharding)


def move_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays with a leading batch axis, and scalars, as `mesh` lays them out."""

    def move(x: Any) -> Any:
        sharding = NamedSharding(mesh, BATCH if x.ndim else P())
        return x if _lies(x, sharding) else _mover(sharding)(x)

    return jax.tree.map(move, tree)


def idle_last(teaches: Bool[np.ndarray, "B"], blocks: int, cuts: int, microbatches: int) -> Int[np.ndarray, "B"]:
    """An order of prompts in which those that teach nothing share the last microbatches, which can then be left out.

    The rows lie in `blocks`, one a device, and stay in theirs. Cut c takes rows c, c + cuts, ... of a block, and of those
    microbatch k takes rows k, k + microbatches, ...; a row stays in its cut.
    """
    size = len(teaches) // blocks
    order = np.empty(len(teaches), np.int32)
    for first in range(0, len(teaches), size):
        for cut in range(cuts):
            places = np.arange(first + cut, first + size, cuts)
            order[places.reshape(-1, microbatches).T.reshape(-1)] = places[np.argsort(~teaches[places], kind="stable")]
    return order


def shortest_first(longest: Int[np.ndarray, "B"], blocks: int) -> tuple[Int[np.ndarray, "B"], int]:
    """An order of prompts in which the shorter half of each block comes first, and what the longest in those halves has.

    `longest`: tokens of each prompt's longest completion. The rows lie in `blocks`, one a device, and stay in theirs.
    """
    rows = longest.reshape(blocks, -1)
    order = np.argsort(rows, axis=1, kind="stable")
    shorter = np.take_along_axis(rows, order, axis=1)[:, : rows.shape[1] // 2]
    order += np.arange(0, len(longest), rows.shape[1])[:, None]
    return order.reshape(-1).astype(np.int32), int(shorter.max(initial=0))


@functools.partial(jax.jit, static_argnames="mesh")
def take_rows(tree: Any, order: Int[Array, "B"], mesh: Mesh) -> Any:
    """Rows of every device's block in `order`, which counts inside the block: nothing is sent."""

    def take(tree, order):
        return jax.tree.map(lambda x: x[order], tree)

    return jax.shard_map(take, mesh=mesh, in_specs=BATCH, out_specs=BATCH)(tree, order)
