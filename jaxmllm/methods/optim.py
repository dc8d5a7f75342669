"""The optimiser, and which parameters it sees.

Frozen parameters are outside the differentiated tree: they cost neither gradient nor optimiser state, and a frozen tower
is not differentiated at all.
"""

import dataclasses
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmllm.errors import InputError
from jaxmllm.machine.mesh import RULES, mesh_of, param_shardings, tree_paths
from jaxmllm.types import TrainState


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW; names are transformers' TrainingArguments."""

    learning_rate: float = 1e-6  # at its peak, after warm-up
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"  # how it falls after warm-up
    warmup_steps: int = 0  # updates in which the rate rises from 0
    weight_decay: float = 0.0  # matrices only
    adam_beta1: float = 0.9  # memory of Adam's first moment
    adam_beta2: float = 0.999  # and of its second
    adam_epsilon: float = 1e-8  # added to the root of the second moment
    max_grad_norm: float = 1.0  # global norm; 0 turns clipping off
    gradient_accumulation_steps: int = 1  # microbatches an update, of whole groups
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of Adam's first moment; the second is float32
    max_nonfinite_steps: int = 5  # NaN or Inf steps are skipped; so many in a row stop the run


CONSTANTS = r"lora/.*/scale"  # part of an adapter, never trained


def split(params: dict, trainable: str) -> tuple[dict, dict]:
    """(trainable, frozen) parts of a nested dict by a regular expression on paths; `join` undoes it.

    With adapters the model itself is frozen, and the expression chooses among adapters, by the paths of their layers.
    InputError when nothing matches.
    """
    has_lora = "lora" in params

    def chosen(path: str) -> bool:
        if has_lora and (not path.startswith("lora/") or re.fullmatch(CONSTANTS, path)):
            return False
        return re.fullmatch(trainable, path.removeprefix("lora/")) is not None

    def part(tree: dict, paths: dict, keep: bool) -> dict:
        out = {}
        for key, value in tree.items():
            if isinstance(value, dict):
                inner = part(value, paths[key], keep)
                if inner:
                    out[key] = inner
            elif chosen(paths[key]) == keep:
                out[key] = value
        return out

    paths = tree_paths(params)
    train, frozen = part(params, paths, True), part(params, paths, False)
    if not train:
        places = jax.tree.leaves(paths["lora"] if has_lora else paths)
        what, cure = ("adapter", "; choose their layers with --lora.targets") if has_lora else ("parameter", "")
        known = ", ".join(path.removeprefix("lora/") for path in places[:4])
        raise InputError(f"trainable = {trainable!r} matches no {what}; paths are like {known}{cure}")
    return train, frozen


def state_shardings(train: dict, opt_state: Any, mesh: Mesh | AbstractMesh, rules: Any = RULES) -> tuple[Any, Any]:
    """Where trainable parameters and the optimiser's state lie (arrays or shapes): each moment with its parameter."""
    structure: Any = jax.tree.structure(train)
    by_rule, whole = param_shardings(train, mesh, rules), NamedSharding(mesh, PartitionSpec())

    def is_params(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    def place(node: Any) -> Any:
        return by_rule if is_params(node) else jax.tree.map(lambda _: whole, node)

    return by_rule, jax.tree.map(place, opt_state, is_leaf=is_params)


def kept_layout(train: dict, opt_state: Any, rules: Any = RULES) -> tuple[dict, Any]:
    """Inside a program: both where `state_shardings` says, on the mesh they lie on.

    Left alone, the compiler may split a bias as the product before it, and the next update would be another program.
    """
    mesh = mesh_of(jax.tree.leaves(train)[0])
    if mesh is None:
        return train, opt_state
    return jax.lax.with_sharding_constraint((train, opt_state), state_shardings(train, opt_state, mesh, rules))


def join(a: dict, b: dict) -> dict:
    """Deep union of two nested dicts without a common leaf."""
    out = dict(a)
    for key, value in b.items():
        out[key] = join(out[key], value) if key in out else value
    return out


def reference_params(state: TrainState, trainable: str) -> dict:
    """Weights of the reference model: its own trainable part; without one, adapters train and it is the model without."""
    if state.reference is None:
        return {name: value for name, value in state.params.items() if name != "lora"}
    return join(state.reference, split(state.params, trainable)[1])


def schedule(config: OptimConfig, max_steps: int) -> optax.Schedule:
    """Learning rate by update number: linear warm-up, then constant, linear or cosine to 0 at `max_steps`."""
    peak, warm = config.learning_rate, config.warmup_steps
    rest = max(1, max_steps - warm)
    tail = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.lr_scheduler_type]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warm)), tail], [warm]) if warm else tail


def wide(tree: Any) -> Any:
    """The tree in float32. Of bfloat16 a step is computed in it, and kept in the optimiser's state."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def first_moments(tx: optax.GradientTransformation, train: Any) -> Any:
    """The optimiser's state before the first update, in float32 whatever the parameters are. Traceable."""
    return tx.init(wide(train))


def narrowed(stepped: Any, train: Any, step: Int[Array, ""]) -> Any:
    """float32 values in the dtypes of the parameters `train`; in bfloat16 rounded up or down by chance, in the mean exactly.

    A step at the rates of RL is a hundredth of what bfloat16 resolves: rounded to nearest, nearly all weights would never move
    (arXiv:2010.06192, section 4).
    """
    leaves, structure = jax.tree.flatten(stepped)
    kinds = [x.dtype for x in jax.tree.leaves(train)]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), len(leaves))
    rounded = [
        _by_chance(x, key) if kind == jnp.bfloat16 else x.astype(kind)
        for x, kind, key in zip(leaves, kinds, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, rounded)


def _by_chance(x: Float[Array, "*n"], key: Any) -> Float[Array, "*n"]:
    """bfloat16 is the upper half of float32: a random number below one unit is added before the lower half is cut off."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def make_optimizer(config: OptimConfig, max_steps: int) -> optax.GradientTransformation:
    """AdamW with clipping by global norm; decay on matrices only (everything that is not a norm, bias or scalar)."""

    def decays(params: Any) -> Any:
        return jax.tree.map(lambda path: not re.search(r"(scale|bias)$", path), tree_paths(params))

    adamw = optax.adamw(
        schedule(config, max_steps),
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        mask=decays,
        mu_dtype=jnp.dtype(config.moment_dtype),
    )
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm > 0 else optax.identity()
    return optax.chain(clip, adamw)
