"""What a run would need and how fast it could be on a machine that is not here.

The programs of the config are compiled for the machine's own chips by XLA, from shapes alone, and read: memory from the
compiler's buffers, products, memory traffic and messages from the program's text with its loops counted out, seconds from
the chip's peak rates. The seconds are a bound: every resource at its peak, everything overlapped.
"""

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxmllm.errors import InputError
from jaxmllm.machine.mesh import make_mesh
from jaxmllm.machine.targets import MeshTarget, same_devices
from jaxmllm.methods.shapes import Program, Sizes, Traced
from jaxmllm.model import family
from jaxmllm.model.config import ModelConfig
from jaxmllm.plan import hlo
from jaxmllm.plan.flops import count
from jaxmllm.plan.placing import check_layouts
from jaxmllm.plan.programs import Planned, architecture, programs_of, sizes_of
from jaxmllm.plan.roofline import Links, Times, links_of
from jaxmllm.training.config import MeshConfig, Remat, TrainConfig

__all__ = ["PhasePlan", "Plan", "advise", "architecture", "plan", "search", "sizes_of"]
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class PhasePlan:
    """One program on one device; bytes and FLOPs are of one run of it."""

    name: str
    runs: int  # times an iteration
    flops: float  # executed, from the compiled program
    useful_flops: float  # what the model needs, no recomputation
    traced_flops: float  # executed, from the traced program: less than `flops` where devices repeat each other's work
    bytes: float  # memory traffic
    collectives: dict[str, float]  # bytes by kind
    seconds: float  # roofline
    bound: str  # products, memory or messages
    busy: dict[str, float]  # seconds by resource
    mfu: float  # useful_flops over what the chip could do in `seconds`
    temporary: float  # bytes of activations and buffers
    peak: float  # bytes of everything that lies on the device while it runs
    compile_seconds: float
    refused: str = ""  # the compiler's message when it does not fit


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on a machine."""

    model: str
    parameters: int
    mesh: str
    devices: int
    chip: str
    capacity: float  # bytes a device
    train: MeshConfig
    sample: MeshConfig
    sizes: Sizes
    microbatch: int  # prompts in one pass of the update, over all devices
    remat: Remat
    memory: dict[str, float]  # bytes a device of what stays: parameters, optimiser, reference, sampler's copy, cache
    phases: list[PhasePlan]
    advice: list[str]  # what to change when it does not fit

    @property
    def fits(self) -> bool:
        return not self.advice

    @property
    def seconds(self) -> float:
        """Of an iteration: all phases one after another."""
        return sum(phase.seconds * phase.runs for phase in self.phases)

    def phase(self, name: str) -> PhasePlan:
        return next(phase for phase in self.phases if phase.name == name)


def local_bytes(tree: Any) -> float:
    """Bytes of a tree of shapes on one device."""
    leaves = [x for x in jax.tree.leaves(tree) if x is not None]
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


def meshes_for(target: MeshTarget, cfg: ModelConfig, config: TrainConfig) -> tuple[Any, Any, MeshConfig, MeshConfig]:
    """(training mesh, sampling mesh, their axes) of devices that may not be here. InputError where they do not suit."""
    devices = target.compile_devices() if target.topology else jax.devices()
    train, sample = target.layouts(cfg)
    check_layouts(config, cfg, train, sample, len(devices))
    mesh = make_mesh(**dataclasses.asdict(train), devices=devices)
    return mesh, same_devices(mesh, sample, "sampling"), train, sample


def plan(
    config: TrainConfig,
    target: MeshTarget,
    *,
    cfg: ModelConfig | None = None,
    mesh_name: str = "",
    vision_tokens: int | None = None,
    prompt_tokens: int | None = None,
    only: tuple[str, ...] = (),
    done: Callable[[str, float], None] = lambda name, seconds: None,
) -> Plan:
    """Compiles every program of `config` for `target` and adds up what they need.

    Args:
        cfg: architecture; None: the config's model.
        vision_tokens, prompt_tokens: of the longest prompt; None: what the config's limits allow.
        only: phases to compile (with those that they build on); all when empty.
        done: told (phase, seconds) after each compilation.

    Raises InputError when the mesh does not suit the model or batch, or no compiler for the chip is installed.
    """
    cfg = architecture(config.model, config.family) if cfg is None else cfg
    sizes = longest(config, cfg, vision_tokens, prompt_tokens)
    mesh, sampling, train, sample = meshes_for(target, cfg, config)
    planned = programs_of(config, cfg, sizes, mesh, sampling)
    links = links_of(target.chip, target.topology, list(mesh.devices.flat))
    memory = {
        "parameters": local_bytes(planned.state.params),
        "optimiser": local_bytes(planned.state.opt_state),
        "reference": local_bytes(planned.state.reference),
    }
    phases, compiled = [], None
    with contextlib.suppress(StopIteration):
        program = next(planned.programs)
        while True:
            compiled, refused = None, ""
            if not only or program.name in only:
                began = time.perf_counter()
                compiled, refused = _compile(program, target)
                taken = time.perf_counter() - began
                if compiled is not None:
                    memory |= {name: local_bytes(tree) for name, tree in program.leaves().items()}
                phases.append(_phase_plan(program, compiled, refused, memory, target, mesh, links, taken, planned))
                done(program.name, taken)
            if refused and program.name == "prefill":
                break  # nothing to decode from
            program = planned.programs.send(compiled)
    capacity = target.chip.hbm_gib * GIB
    advice = advise(phases, memory, capacity, config, train, sample)
    micro = config.batch_size // config.optim.gradient_accumulation_steps // config.method.cuts()
    total = sum(x.size for x in jax.tree.leaves(planned.state.params))
    return Plan(
        config.model, total, mesh_name, mesh.devices.size, target.chip.name, capacity, train, sample, sizes, micro,
        config.remat, memory, phases, advice,
    )  # fmt: skip


def longest(config: TrainConfig, cfg: ModelConfig, vision_tokens: int | None, prompt_tokens: int | None) -> Sizes:
    """The largest batch that the config's limits allow."""
    unit = family.of(cfg).token_pixels(cfg)
    prompt_tokens = prompt_tokens or config.data.max_prompt_length
    limit = config.data.max_pixels // unit if config.data.max_pixels else prompt_tokens
    return sizes_of(config, cfg, max(1, min(vision_tokens or limit, prompt_tokens)), prompt_tokens)


# What the compiler makes of a gather for a SparseCore (v5p, v6e) jaxlib 0.10 cannot read back ("async-update instruction should
# have 1 operands but sees 3").
READABLE = {"xla_tpu_offload_gather_to_sparsecore": "false"}


def _compile(phase: Program, target: MeshTarget) -> tuple[Any, str]:
    """(compiled program, "") or (None, the compiler's message) when the program alone is too large for the chip."""
    try:
        return phase.lower().compile(compiler_options=READABLE if target.chip.platform == "tpu" else None), ""
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        return None, " ".join(text.split())[:400]


def _phase_plan(
    phase: Program,
    compiled: Any,
    refused: str,
    memory: dict[str, float],
    target: MeshTarget,
    mesh: Any,
    links: Links,
    taken: float,
    planned: Planned,
) -> PhasePlan:
    n, chip = mesh.devices.size, target.chip
    traced = _flops(phase.executes, planned, phase.steps) / n
    useful = traced if phase.needs is None else _flops(phase.needs, planned, phase.steps) / n
    beside = sum(memory[name] for name in phase.beside)
    if compiled is None:
        nan = float("nan")
        return PhasePlan(
            phase.name, phase.runs, nan, useful, traced, nan, {}, nan, "", {}, nan, nan, _needed(refused) + beside, taken, refused
        )  # fmt: skip
    read = hlo.Program(compiled.as_text(), steps=phase.steps, chosen=planned.full_share)
    cost, stats = read.cost, compiled.memory_analysis()
    if read.unknown_loops > (phase.steps > 1):
        raise RuntimeError(f"{phase.name}: {read.unknown_loops} loops of unknown length in the compiled program")
    collectives: dict[str, float] = {}
    for message, often in cost.messages.items():
        collectives[message.kind] = collectives.get(message.kind, 0.0) + often * message.size
    times = Times(
        cost.flops / (chip.peak_tflops * 1e12),
        cost.bytes / (chip.hbm_gb_s * 1e9),
        sum(count * links.seconds(message) for message, count in cost.messages.items()),
    )
    own = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    mfu = useful / (chip.peak_tflops * 1e12 * times.seconds) if times.seconds else 0.0
    return PhasePlan(
        phase.name, phase.runs, cost.flops, useful, traced, cost.bytes, collectives, times.seconds, times.bound,
        {"products": times.products, "memory": times.memory, "messages": times.messages}, mfu,
        float(stats.temp_size_in_bytes), own + stats.temp_size_in_bytes + beside, taken,
    )  # fmt: skip


def _flops(traced: Traced | None, planned: Planned, steps: int) -> float:
    """Of all devices together."""
    if traced is None:
        return 0.0
    return traced.times * count(traced.function, *traced.arguments, steps=steps, chosen=planned.full_share)


def _needed(refused: str) -> float:
    """Bytes that the compiler says a program would use ("Used 17.2G of 15.75G hbm")."""
    found = re.search(r"Used ([\d.]+)([KMGT])", refused)
    return float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1) if found else float("inf")


def advise(
    phases: list[PhasePlan],
    memory: dict[str, float],
    capacity: float,
    config: TrainConfig,
    train: MeshConfig,
    sample: MeshConfig,
) -> list[str]:
    """What to change for each phase that does not fit, the likeliest remedy first."""
    lines = []
    for phase in phases:
        if phase.peak <= capacity:
            continue
        remedies = []
        kept = memory["parameters"] + memory["optimiser"] + memory["reference"]
        if kept > capacity / 2:
            remedies.append(
                f"parameters and optimiser alone are {kept / GIB:.1f} GiB a chip: more chips (fsdp), or --lora"
            )
            if config.optim.moment_dtype == "float32":
                remedies.append("--optim.moment_dtype bfloat16")
        if phase.name in ("update", "score"):
            if config.remat != "full":
                remedies.append("--remat full")
            share = config.batch_size // config.optim.gradient_accumulation_steps // (train.replica * train.fsdp)
            if share > 1 and phase.name == "update":
                remedies.append(
                    f"a smaller microbatch ({share} prompts a device now): --optim.gradient_accumulation_steps"
                )
            remedies.append("a mesh with a larger tensor axis")
        else:
            copy = memory.get("sampler's copy", 0.0)
            if copy > capacity / 3:
                remedies.append(f"the sampler's copy is {copy / GIB:.1f} GiB a chip: a larger tensor axis for sampling")
            remedies.append(f"fewer prompts a rollout than {config.batch_size}, or fewer --grpo.max_completion_length")
        need = f"{phase.peak / GIB:.1f} GiB" if phase.peak < float("inf") else "more than the chip has"
        lines.append(f"{phase.name} needs {need} of {capacity / GIB:.1f}: " + "; or ".join(remedies))
    return lines


# ---------------------------------------------------------------- search


def search(config: TrainConfig, target: MeshTarget, **options: Any) -> Iterator[Plan]:
    """Plans of every microbatch, remat policy and training layout that suit; only the update differs, so only it is compiled.

    The caller keeps the fastest that fits and plans it whole.
    """
    cfg = options.pop("cfg", None) or architecture(config.model, config.family)
    base, _ = target.layouts(cfg)
    tried = set()
    for tensor in (base.tensor, 1, 2, 4, 8):
        layout = dataclasses.replace(base, fsdp=max(1, base.fsdp * base.tensor // tensor), tensor=tensor)
        for steps in (1, 2, 4, 8, 16):
            for remat in ("full", "dots", "none"):
                optim = dataclasses.replace(config.optim, gradient_accumulation_steps=steps)
                one = dataclasses.replace(config, remat=remat, optim=optim)
                machine = dataclasses.replace(target, train=layout)
                key = (machine.layouts(cfg)[0], steps, remat)
                if key in tried or config.batch_size % steps:
                    continue
                tried.add(key)
                try:
                    yield plan(one, machine, cfg=cfg, only=("update",), **options)
                except InputError:
                    continue  # this layout does not suit the model or the microbatch
