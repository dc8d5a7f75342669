"""Machines a run is launched on: chips, topology, and how their devices are laid out for training and for sampling.

Every file of `configs/meshes` holds one `MeshTarget` named `mesh`; `load_mesh("v5e_16")` reads it. Rates are makers' peaks
per chip, memory is what a program can use of it.

Two layouts of the same devices (axes as in `jaxmllm.machine.mesh`):

    train    `fsdp` as wide as the machine: state is split over all devices and a layer's parameters are gathered as it runs
    sample   `fsdp` 1: decoding reads every parameter at every token, so a device holds its own, split over `tensor` alone,
             and no step of the decode loop gathers any; the other devices are `replica`s with prompts of their own
"""

import dataclasses
import math
import os
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from jax.sharding import AxisType, Mesh

from jaxmllm.errors import InputError
from jaxmllm.machine.mesh import AXES, MeshConfig

CONFIGS = Path(__file__).parent / "meshes"  # a link to configs/meshes, so that an installed package has them too


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. 1 GB is 1e9 bytes, 1 GiB is 2**30; bandwidths of links are one way."""

    name: str
    platform: Literal["cpu", "cuda", "tpu"]  # jax's name of the backend
    hbm_gib: float  # memory a program may use
    peak_tflops: float  # dense bfloat16 products, 1e12 a second
    hbm_gb_s: float
    ici_gb_s: float  # to the other chips of a slice (TPU) or node (GPU), all links together
    dcn_gb_s: float  # to other slices or nodes, this chip's share of the network
    target_config: str = ""  # GPUs: XLA's GpuTargetConfig as text, to compile without one


# Cloud TPU system architecture pages (cloud.google.com/tpu/docs/v5e, /v5p, /v6e): bf16 peak, HBM, bidirectional ICI of 400,
# 1200 and 800 GB/s (half of it one way), network of 2 x 100 Gb/s for 8 chips, 50 Gb/s a chip, 4 x 200 Gb/s for 8 chips.
# Memory is what libtpu's compiler says is available of the 16, 95 and 32 GB on paper.
V5E = Chip("TPU v5e", "tpu", 15.75, 197.0, 819.0, 200.0, 3.125)
V5P = Chip("TPU v5p", "tpu", 95.73, 459.0, 2765.0, 600.0, 6.25)
V6E = Chip("TPU v6e", "tpu", 31.24, 918.0, 1638.0, 400.0, 12.5)

# NVIDIA H100 SXM5 data sheet: 989.4 dense bf16 TFLOP/s, 80 GB of HBM3 at 3.35 TB/s, NVLink 900 GB/s both ways together;
# network as in DGX H100, one 400 Gb/s adapter a GPU. The target is XLA's description of that device.
H100 = Chip(
    "H100 SXM 80GB",
    "cuda",
    79.1,
    989.4,
    3350.0,
    450.0,
    50.0,
    target_config="""
    gpu_device_info {
      threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
      threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
      clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
      cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }
    platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3"
    """,
)

# Two cores with 256-bit FMA at 3 GHz (bfloat16 runs as float32) and two channels of DDR4: an order of magnitude, not a claim.
CPU = Chip("CPU, two cores", "cpu", 8.0, 0.19, 40.0, 10.0, 1.0)


@runtime_checkable
class Heads(Protocol):
    """A model's configuration, of which a mesh needs this alone."""

    @property
    def heads(self) -> Mapping[str, int]:
        """What a device must hold whole; other dimensions that `tensor` does not divide are laid out otherwise."""


@dataclasses.dataclass(frozen=True)
class MeshTarget:
    """A machine: `devices` chips on `hosts` hosts, one process each, and the two layouts of its devices.

    `topology` is what `jax.experimental.topologies` calls it: chip and torus for TPUs ("v5e:4x4"), partitions x hosts x
    GPUs for GPUs ("1x4x8"), empty for the devices that are here.
    """

    chip: Chip
    topology: str
    devices: int
    hosts: int
    train: MeshConfig
    sample: MeshConfig
    slices: int = 1  # of TPUs: `topology` is of one of them, `devices` and `hosts` are of all

    def layouts(self, model: Heads) -> tuple[MeshConfig, MeshConfig]:
        """(train, sample) for a model: `tensor` narrowed to what divides its heads, the devices set free widen the others."""
        return _narrowed(self.train, model), _narrowed(self.sample, model)

    def compile_devices(self) -> list[Any]:
        """Devices that can be compiled for and not run on; no such hardware is needed.

        Raises InputError when the compiler is not installed: libtpu comes with the extra `tpu`, XLA for GPUs with `cuda`.
        """
        if not self.topology:
            raise InputError(f"{self.chip.name}: this mesh is made of the devices that are here")
        from jax.experimental import topologies

        tpu = self.chip.platform == "tpu"
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not wait for the metadata server of a TPU host
        options: dict[str, Any] = {"topology": self.topology, "target_config": self.chip.target_config}
        if tpu:
            options = {} if self.slices == 1 else {"num_slices": self.slices}
        skipped = (
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"  # of the driver: the plugin asks at its first use, and there is none here
        )
        kept = os.environ.get(skipped)
        os.environ[skipped] = "1"
        try:
            return topologies.get_topology_desc(self.topology, platform=self.chip.platform, **options).devices
        except (RuntimeError, NotImplementedError) as error:
            extra = "tpu" if tpu else "cuda"
            raise InputError(
                f"{self.topology}: no compiler for {self.chip.name} here ({str(error).splitlines()[0]}); "
                f"install the extra {extra!r}: JAXMLLM_EXTRAS={extra} ./launch/local.sh ..."
            ) from error
        finally:
            os.environ.pop(skipped)
            os.environ.update({} if kept is None else {skipped: kept})


def known_meshes() -> tuple[str, ...]:
    """Names of the mesh configs that come with the project."""
    return tuple(sorted(path.stem for path in CONFIGS.glob("*.py")))


def load_mesh(name: str | Path) -> MeshTarget:
    """A mesh config by name ("v5e_16") or path. InputError when there is none, it fails, or its layouts do not fit it."""
    path = Path(name)
    if path.suffix != ".py":
        path = CONFIGS / f"{name}.py"
    if not path.is_file():
        known = ", ".join(known_meshes())
        raise InputError(f"mesh {str(name)!r}: no such config; known are {known}, or give a .py file")
    try:
        target = runpy.run_path(str(path)).get("mesh")
    except Exception as error:
        raise InputError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(target, MeshTarget):
        raise InputError(f"{path}: must define `mesh`, a jaxmllm.machine.targets.MeshTarget")
    for use in ("train", "sample"):
        check_layout(getattr(target, use), target.devices, f"{path}: {use}")
    return target


def check_layout(
    axes: MeshConfig,
    devices: int,
    where: str = "mesh",
    *,
    model: Heads | None = None,
    rows: int | None = None,
    cure: Callable[[int], str] | None = None,
) -> dict[str, int]:
    """Sizes of the axes, -1 filled in, when they suit so many devices, this model and so many prompts at once.

    `rows` are the prompts that a program holds together: a microbatch in training, all of a rollout in sampling; `cure` says
    which flags make them a multiple of so many. Raises InputError with a line per axis that does not fit: the axis, the
    dimension it would have to divide, and what fits.
    """
    sizes: dict[str, int] = {axis: getattr(axes, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise InputError(f"{where}: one axis may be -1 and the others are at least 1, got {_written(sizes)}")
    if free and devices % fixed == 0:
        sizes[free[0]] = devices // fixed
    if math.prod(sizes.values()) != devices:
        raise InputError(
            f"{where}: {_written(sizes)} does not make {devices} devices; axes must multiply to it, "
            f"each one of {_list(_divisors(devices))}"
        )
    problems = []
    tensor, parts = sizes["tensor"], sizes["replica"] * sizes["fsdp"]
    for name, size in (model.heads if model else {}).items():
        if size % tensor:
            fit = [n for n in _divisors(devices) if size % n == 0]
            problems.append(f"{where}: tensor = {tensor} does not divide {name} = {size}; {_list(fit)} would")
    if rows is not None and rows % parts:
        fit = [n for n in _divisors(devices) if rows % n == 0]
        problems.append(
            f"{where}: replica x fsdp = {sizes['replica']} x {sizes['fsdp']} does not divide the {rows} prompts of a "
            f"microbatch; {_list(fit)} would, or {cure(parts) if cure else f'multiples of {parts} prompts'}"
        )
    if problems:
        raise InputError("\n".join(problems))
    return sizes


def same_devices(mesh: Mesh, axes: MeshConfig, where: str = "sample_mesh") -> Mesh:
    """The devices of `mesh`, in its order, under other axes.

    One order for both: a program can then take arrays of one mesh and return them on the other.
    """
    sizes = check_layout(axes, mesh.devices.size, where)
    shape = tuple(sizes[axis] for axis in AXES)
    return Mesh(mesh.devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _narrowed(axes: MeshConfig, model: Heads) -> MeshConfig:
    tensor = math.gcd(axes.tensor, *model.heads.values())
    other = "fsdp" if axes.fsdp > 1 else "replica"
    return dataclasses.replace(axes, **{"tensor": tensor, other: getattr(axes, other) * axes.tensor // tensor})


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _written(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())
