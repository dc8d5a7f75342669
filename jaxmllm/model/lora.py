"""Low-rank adapters: added to a parameter tree, trained, saved in PEFT's format, merged.

An adapter lives under params["lora"] at its layer's path as {"a": [L, in, r], "b": [L, r, out], "scale": [L]}; `Linear`
adds `scale * (x a) b`. `b` starts at zero, so a fresh adapter changes nothing (arXiv:2106.09685, section 4.1).
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxmllm.errors import InputError
from jaxmllm.machine.mesh import tree_paths
from jaxmllm.model.family import Family
from jaxmllm.model.hf import MAX_LISTED, name_of
from jaxmllm.model.safetensors import is_finite

PREFIX = "base_model.model."  # of PEFT, before a module's name
UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out")  # options of PEFT


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Names are PEFT's, except `targets`."""

    r: int = 16  # rank
    lora_alpha: float = 32.0  # the update is scaled by lora_alpha / r
    targets: str = ""  # regular expression on our layer paths, matched whole; empty: the decoder's, as the family says

    def validate(self) -> "LoRAConfig":
        if self.r < 1:
            raise InputError(f"lora.r = {self.r}: the rank is at least 1")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise InputError(f"lora.targets = {self.targets!r}: not a regular expression ({error})") from None
        return self


def _stacked(path: str, family: Family) -> bool:
    """Whether a layer's kernels lie on a stacked axis: then its Hugging Face name holds a number."""
    return "{layer}" in name_of(f"{path}/kernel", family.names)[0]


def _layers(params: dict, family: Family) -> list[str]:
    """Layers of the family that may carry an adapter."""
    paths = jax.tree.leaves(tree_paths(params))
    kernels = [p.removesuffix("/kernel") for p in paths if p.endswith("/kernel")]
    own = [path for path in kernels if any(re.fullmatch(name, f"{path}/kernel") for name, _ in family.names)]
    return [path for path in own if not re.fullmatch(family.no_adapter, path)]


def _at(tree: dict, path: str) -> dict:
    for key in path.split("/"):
        tree = tree[key]
    return tree


def _put(tree: dict, path: str, value) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def add(key: Key[Array, ""], params: dict, config: LoRAConfig, family: Family) -> dict:
    """`params` with fresh float32 adapters on every kernel whose layer path matches. InputError when none does."""
    config.validate()
    base = {name: value for name, value in params.items() if name != "lora"}
    kernels, targets = _layers(base, family), config.targets or family.adapted
    chosen = [path for path in kernels if re.fullmatch(targets, path)]
    if not chosen:
        raise InputError(f"lora.targets = {targets!r} matches no layer; layers are {', '.join(sorted(kernels))}")
    lora: dict = {}
    for path, one in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        shape = _at(base, path)["kernel"].shape
        lead = shape[:1] if _stacked(path, family) else ()
        width, *out = shape[len(lead) :]
        adapter = {
            "a": jax.random.uniform(one, (*lead, width, config.r), minval=-1, maxval=1) * (3.0 / width) ** 0.5,
            "b": jnp.zeros((*lead, config.r, *out)),
            "scale": jnp.full(lead, config.lora_alpha / config.r),
        }
        _put(lora, path, adapter)
    return base | {"lora": lora}


def _adapters(params: dict) -> dict[str, dict]:
    paths = jax.tree.leaves(tree_paths(params.get("lora", {})))
    return {p.removesuffix("/a"): _at(params["lora"], p.removesuffix("/a")) for p in paths if p.endswith("/a")}


def merge(params: dict) -> dict:
    """The same model without adapters: their products are added to the kernels, in the kernels' dtype."""
    merged = jax.tree.map(lambda x: x, {name: value for name, value in params.items() if name != "lora"})
    for path, adapter in _adapters(params).items():
        layer = _at(merged, path)
        b = adapter["b"].reshape(*adapter["b"].shape[: adapter["scale"].ndim + 1], -1)
        update = (adapter["a"] @ b) * adapter["scale"][..., None, None]
        kernel = layer["kernel"]
        layer["kernel"] = (kernel.astype(jnp.float32) + update.reshape(kernel.shape)).astype(kernel.dtype)
    return merged


def _peft_name(path: str, layer: int | None, family: Family) -> str:
    """Module name in transformers >= 4.52's memory, which is what PEFT matches."""
    template, groups = name_of(path + "/kernel", family.names)
    name = template.format(layer=layer, **(groups | {"leaf": ""})).rstrip(".")
    return PREFIX + family.module(name)


def save(params: dict, config: LoRAConfig, folder: str | Path, family: Family, base_model: str = "") -> None:
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, modules = {}, set()
    for path, adapter in _adapters(params).items():
        a, b = (np.asarray(adapter[k], np.float32) for k in ("a", "b"))
        for layer in range(a.shape[0]) if _stacked(path, family) else [None]:
            name = _peft_name(path, layer, family)
            low, high = (a, b) if layer is None else (a[layer], b[layer])
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(low.T)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(high.reshape(config.r, -1).T)
            modules.add(name.removeprefix("base_model.model."))
    save_file(tensors, folder / "adapter_model.safetensors")
    meta = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
    }
    (folder / "adapter_config.json").write_text(json.dumps(meta, indent=2))


def _read(folder: Path, family: Family) -> tuple[float, dict[str, np.ndarray]]:
    """(scale of the update, tensors by Hugging Face module name) of a PEFT folder."""
    path = folder / "adapter_config.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise InputError(f"{folder}: not a PEFT adapter folder ({error.filename or error} is missing)") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: the adapter cannot be read ({error})") from None
    try:
        rank, alpha = int(meta["r"]), float(meta["lora_alpha"])
        changed = [key for key in UNSUPPORTED if meta.get(key)]
        scale = alpha / (rank**0.5 if meta.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{path}: r and lora_alpha are needed ({error!r})") from None
    if changed:
        raise InputError(f"{path}: {', '.join(changed)} is set and not supported")
    spoiled = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if spoiled:
        raise InputError(f"{folder}: the adapter holds NaN or infinite numbers in {', '.join(spoiled[:MAX_LISTED])}")
    # whatever level the modules lay at in the transformers that wrote them
    return scale, {PREFIX + family.module(family.canonical(k.removeprefix(PREFIX))): v for k, v in tensors.items()}


def load(params: dict, folder: str | Path, family: Family) -> dict:
    """`params` with the adapters of a PEFT folder.

    Raises InputError for a folder that cannot be read and for options that are not supported, and lists every tensor that
    fits no layer, is missing or has another shape.
    """
    folder = Path(folder)
    scale, tensors = _read(folder, family)
    base = {name: value for name, value in params.items() if name != "lora"}
    lora: dict = {}
    problems: list[str] = []
    for path in _layers(base, family):
        kernel = _at(base, path)["kernel"]
        layers = range(kernel.shape[0]) if _stacked(path, family) else [None]
        names = [_peft_name(path, layer, family) for layer in layers]
        if not any(f"{name}.lora_{which}.weight" in tensors for name in names for which in "AB"):
            continue
        width, *out = kernel.shape[1:] if _stacked(path, family) else kernel.shape
        downs: list[Any] = []
        ups: list[Any] = []
        for name in names:
            a, b = (tensors.pop(f"{name}.lora_{which}.weight", None) for which in "AB")
            if a is None or b is None:
                problems.append(f"missing       {name}.lora_{'A' if a is None else 'B'}.weight")
            elif a.ndim != 2 or a.shape[1] != width or b.shape != (math.prod(out), len(a)):
                problems.append(f"misshaped     {name}: A {list(a.shape)}, B {list(b.shape)}")
            elif downs and downs[0].shape[1] != len(a):
                problems.append(f"other rank    {name}: {len(a)}, the layers before have {downs[0].shape[1]}")
            else:
                downs.append(a.T.astype(np.float32))
                ups.append(b.T.astype(np.float32).reshape(-1, *out))
        if not problems:
            adapter = {"a": np.stack(downs), "b": np.stack(ups), "scale": np.full(len(names), scale, np.float32)}
            _put(lora, path, {k: jnp.asarray(v if _stacked(path, family) else v[0]) for k, v in adapter.items()})
    problems += [f"fits no layer {name}" for name in tensors]
    if problems:
        more = f"\n  ... and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise InputError(
            f"{folder}: the adapter does not fit the model:\n  " + "\n  ".join(problems[:MAX_LISTED]) + more
        )
    return base | {"lora": lora}
