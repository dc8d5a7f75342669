"""Device mesh and sharding: one ordered list of rules decides where every parameter lies.

Axes: `replica` copies parameters (slow links between slices or nodes), `fsdp` splits parameters and the batch, `tensor`
splits heads, MLP width and vocabulary. Optimiser state and gradients follow their parameter.
"""

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmllm.errors import InputError

log = logging.getLogger(__name__)
P = PartitionSpec
AXES = ("replica", "fsdp", "tensor")
ROWS = ("replica", "fsdp")
BATCH = P(ROWS)  # prompts are split over both, completions follow their prompt
CACHE = P(None, ROWS, None, None, "tensor")  # of the completions: layers, prompts, G, tokens, heads

# (regular expression on the parameter's path, spec of its last dimensions). First match wins; a leading layer axis is whole.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"lora/.*/a", P("fsdp", None)),
    (r"lora/.*/b", P(None, "tensor")),
    (r"embed", P("tensor", "fsdp")),
    (r"head", P("fsdp", "tensor")),
    (r".*/attn/qkv/kernel", P("fsdp", None, "tensor")),
    (r".*/(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1|merger_fc1)/kernel", P("fsdp", "tensor")),
    (r".*/(o_proj|down_proj|proj|fc2|merger_fc2)/kernel", P("tensor", "fsdp")),
    (r".*/patch_embed/kernel", P(None, "fsdp")),
    (r".*/(scale|bias)", P()),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Axes of the device mesh; -1 takes the devices that are left. See configs/meshes."""

    replica: int = 1  # copies of the parameters, each with rows of its own
    fsdp: int = -1  # parts that parameters and rows are split into
    tensor: int = 1  # parts that heads and hidden units are split into


def make_mesh(*, replica: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what is left.

    Devices of several slices (TPU pods joined by a network, GPUs by NVLink domain) are laid out so that `replica`, then `fsdp`,
    crosses the network and `tensor` never does. InputError when the sizes do not multiply up, or slices would be cut.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"replica": replica, "fsdp": fsdp, "tensor": tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 for axis, size in sizes.items() if axis not in free):
        raise InputError(f"mesh: at most one axis may be -1 and the others are at least 1, got {sizes}")
    if len(devices) % known or (not free and known != len(devices)):
        raise InputError(
            f"mesh: {' x '.join(f'{a} {n}' for a, n in sizes.items() if n != -1)} needs "
            f"{'a multiple of ' if free else ''}{known} devices, there are {len(devices)}"
        )
    if free:
        sizes[free[0]] = len(devices) // known
    shape = tuple(sizes[axis] for axis in AXES)
    # Auto on purpose: the default axis type differs between jax versions
    types = (AxisType.Auto,) * 3
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    across = _across(sizes, slices)
    inside = tuple(size // part for size, part in zip(shape, across, strict=True))
    laid_out = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    return Mesh(laid_out, AXES, axis_types=types)


def _across(sizes: Mapping[str, int], slices: int) -> tuple[int, ...]:
    """Into how many slices each axis reaches: `replica` first, whose messages are the fewest, then `fsdp`, never `tensor`."""
    left, parts = slices, []
    for axis in ROWS:
        parts.append(math.gcd(sizes[axis], left))
        left //= parts[-1]
    if left > 1:
        raise InputError(
            f"mesh: {slices} slices of devices, and replica {sizes['replica']} x fsdp {sizes['fsdp']} cannot be split over "
            f"them (tensor {sizes['tensor']} stays inside of one); use replica {slices}"
        )
    return (*parts, 1)


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules=RULES) -> PartitionSpec:
    """The first rule that matches, aligned to the last dimensions.

    An axis that does not divide its dimension moves to the largest free dimension it divides, or is dropped; both are
    logged. Axes of size 1 and whole dimensions at the end are left out: so the compiler names what a program returns, and
    another name for the same layout would be another program.

    Raises ValueError for a path without a rule or a rule that names an axis twice.
    """
    rule = next((spec for pattern, spec in rules if re.fullmatch(pattern, path)), None)
    if rule is None:
        raise ValueError(f"no sharding rule matches {path!r}")
    if len(rule) > len(shape):
        raise ValueError(f"rule {rule} has more dimensions than {path} {shape}")
    named = [axis for entry in rule for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis]
    if len(named) != len(set(named)):
        raise ValueError(f"rule {rule} for {path} uses an axis twice")
    dims: list[Any] = [None] * (len(shape) - len(rule)) + list(rule)
    for i, axis in enumerate(dims):
        size = math.prod(mesh.shape[a] for a in (axis if isinstance(axis, tuple) else (axis,))) if axis else 1
        if size == 1:
            dims[i] = None
        if shape[i] % size == 0:
            continue
        dims[i] = None
        free = [
            j for j in range(len(shape)) if dims[j] is None and j not in (i,) and shape[j] % size == 0 and shape[j] > 1
        ]
        if free:
            dims[max(free, key=lambda j: shape[j])] = axis
        log.info("%s %s: axis %s does not divide dimension %d, now %s", path, shape, axis, i, dims)
    while dims and dims[-1] is None:
        dims.pop()
    return P(*dims)


def tree_paths(tree: Any) -> Any:
    """The same tree with "a/b/c" path strings as leaves."""

    def name(key) -> str:
        return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))

    return jax.tree_util.tree_map_with_path(lambda path, _: "/".join(map(name, path)), tree)


def param_shardings(params: Any, mesh: Mesh | AbstractMesh, rules=RULES) -> Any:
    """NamedSharding of every parameter (arrays or shapes)."""
    return jax.tree.map(
        lambda path, x: NamedSharding(mesh, spec_for(path, x.shape, mesh, rules)), tree_paths(params), params
    )


def mesh_of(x: Any) -> AbstractMesh | None:
    """Inside a program: the mesh that `x` lies on; None where that is none of ours."""
    mesh = jax.typeof(x).sharding.mesh
    return mesh if not mesh.empty and set(AXES) <= set(mesh.axis_names) else None


def lay_out(x: Any, spec: PartitionSpec, like: Any) -> Any:
    """Inside a program: `x` split so over the mesh that `like` lies on; `x` itself where that is none of ours.

    For arrays that a program makes from nothing, which the compiler would otherwise keep whole on every device. An axis that
    does not divide its dimension is dropped.
    """
    mesh = mesh_of(like)
    if mesh is None:
        return x

    def size(axes: Any) -> int:
        return math.prod(mesh.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))

    dims = [axes if axes and n % size(axes) == 0 else None for axes, n in zip(spec, x.shape, strict=False)]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*dims)))


def gathered(x: Any, path: str, dtype: Any) -> Any:
    """Inside a program: the parameter at `path` in `dtype`, whole over `fsdp`, split over `tensor`; its gradient split again.

    Said at every use: left alone, the compiler may keep the parameter split and move the activations, which are larger. `x`
    itself, in its own type, without a mesh that splits it or a rule for the path.
    """
    mesh = mesh_of(x)
    known = any(re.fullmatch(pattern, path) for pattern, _ in RULES)
    if mesh is None or mesh.shape["fsdp"] == 1 or not known:
        return x
    stored = spec_for(path, x.shape, mesh)
    whole = P(*(None if axis == "fsdp" else axis for axis in stored))
    return _gathered(x.astype(dtype), NamedSharding(mesh, stored), NamedSharding(mesh, whole))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x: Any, stored: NamedSharding, whole: NamedSharding) -> Any:
    return jax.lax.with_sharding_constraint(x, whole)


def _gathered_forward(x: Any, stored: NamedSharding, whole: NamedSharding) -> tuple[Any, None]:
    return _gathered(x, stored, whole), None


def _gathered_backward(stored: NamedSharding, whole: NamedSharding, _: None, gradient: Any) -> tuple[Any]:
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def row_parts(like: Any) -> int:
    """Inside a program: into how many parts the mesh that `like` lies on splits the rows of a batch."""
    mesh = mesh_of(like)
    return 1 if mesh is None else mesh.shape["replica"] * mesh.shape["fsdp"]


def vocabulary_parts(like: Any) -> int:
    """Inside a program: into how many parts the mesh that `like` lies on splits the vocabulary."""
    mesh = mesh_of(like)
    return 1 if mesh is None else mesh.shape["tensor"]


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays with a leading batch axis -> global arrays split over `replica` and `fsdp`.

    Each process passes its own rows. Raises InputError when the rows do not divide.
    """
    parts = mesh.shape["replica"] * mesh.shape["fsdp"]
    sharding = NamedSharding(mesh, BATCH)

    def place(x):
        x = np.asarray(x)
        rows = x.shape[0] * jax.process_count()
        if rows % parts:
            raise InputError(f"batch of {rows} rows does not divide over replica x fsdp = {parts} devices of the mesh")
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(place, batch)
