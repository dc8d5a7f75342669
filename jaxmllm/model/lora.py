"""Low-rank adapters: added to a parameter tree, trained, saved in PEFT's format, merged.

An adapter lives under params["lora"] at its layer's path as {"a": [L, in, r], "b": [L, r, out], "scale": [L]}; `Linear`
adds `scale * (x a) b`. `b` starts at zero, so a fresh adapter changes nothing (arXiv:2106.09685, section 4.1).
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key
from safetensors.numpy import load_file, save_file

from jaxmllm.errors import InputError
from jaxmllm.mesh import tree_paths
from jaxmllm.model.hf import NAMES

DECODER_LINEARS = r"text/layers/.*(q|k|v|o|gate|up|down)_proj"


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Names are PEFT's, except `targets`."""

    r: int = 16  # rank
    lora_alpha: float = 32.0  # the update is scaled by lora_alpha / r
    targets: str = DECODER_LINEARS  # regular expression on our layer paths, matched whole

    def validate(self) -> "LoRAConfig":
        if self.r < 1:
            raise InputError(f"lora.r = {self.r}: the rank is at least 1")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise InputError(f"lora.targets = {self.targets!r}: not a regular expression ({error})") from None
        return self


def _stacked(path: str) -> bool:
    return path.startswith(("text/layers/", "vision/blocks/"))


def _at(tree: dict, path: str) -> dict:
    for key in path.split("/"):
        tree = tree[key]
    return tree


def _put(tree: dict, path: str, value) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def add(key: Key[Array, ""], params: dict, config: LoRAConfig) -> dict:
    """`params` with fresh float32 adapters on every kernel whose layer path matches. InputError when none does."""
    config.validate()
    base = {name: value for name, value in params.items() if name != "lora"}
    kernels = [p.removesuffix("/kernel") for p in jax.tree.leaves(tree_paths(base)) if p.endswith("/kernel")]
    chosen = [path for path in kernels if re.fullmatch(config.targets, path)]
    if not chosen:
        raise InputError(f"lora.targets = {config.targets!r} matches no layer; layers are {', '.join(sorted(kernels))}")
    lora: dict = {}
    for path, one in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        shape = _at(base, path)["kernel"].shape
        lead = shape[:1] if _stacked(path) else ()
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


def _peft_name(path: str, layer: int | None) -> str:
    """Module name in transformers >= 4.52's memory, which is what PEFT matches."""
    pattern, template = next((p, t) for p, t in NAMES if re.fullmatch(p, path + "/kernel"))
    groups = {k: v.replace("/", ".") for k, v in re.fullmatch(pattern, path + "/kernel").groupdict().items()}
    name = template.format(layer=layer, **(groups | {"leaf": ""})).rstrip(".")
    nested = re.sub(r"^visual\.", "model.visual.", re.sub(r"^model\.", "model.language_model.", name))
    return f"base_model.model.{nested}"


def save(params: dict, config: LoRAConfig, folder: str | Path, base_model: str = "") -> None:
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, modules = {}, set()
    for path, adapter in _adapters(params).items():
        a, b = (np.asarray(adapter[k], np.float32) for k in ("a", "b"))
        for layer in range(a.shape[0]) if _stacked(path) else [None]:
            name = _peft_name(path, layer)
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


def load(params: dict, folder: str | Path) -> dict:
    """`params` with the adapters of a PEFT folder. InputError lists tensors that fit no layer or are missing."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise InputError(f"{folder}: not a PEFT adapter folder ({error.filename} is missing)") from None
    base = {name: value for name, value in params.items() if name != "lora"}
    scale, lora, problems = meta["lora_alpha"] / meta["r"], {}, []
    for path in (p.removesuffix("/kernel") for p in jax.tree.leaves(tree_paths(base)) if p.endswith("/kernel")):
        kernel = _at(base, path)["kernel"]
        layers = range(kernel.shape[0]) if _stacked(path) else [None]
        names = [_peft_name(path, layer) for layer in layers]
        if not any(f"{name}.lora_A.weight" in tensors for name in names):
            continue
        pairs = []
        for name in names:
            pair = tuple(tensors.pop(f"{name}.lora_{which}.weight", None) for which in "AB")
            if any(t is None for t in pair):
                problems.append(f"missing {name}")
            pairs.append(pair)
        if problems:
            continue
        a = np.stack([pair[0].T for pair in pairs])
        b = np.stack([pair[1].T for pair in pairs])
        one = None if _stacked(path) else 0
        out = kernel.shape[2:] if one is None else kernel.shape[1:]
        adapter = {"a": a, "b": b.reshape(*b.shape[:2], *out), "scale": np.full(len(pairs), scale, np.float32)}
        _put(lora, path, {k: jnp.asarray(v if one is None else v[0]) for k, v in adapter.items()})
    problems += [f"fits no layer: {name}" for name in tensors]
    if problems:
        raise InputError(f"{folder}: the adapter does not fit the model:\n  " + "\n  ".join(problems[:40]))
    return base | {"lora": lora}
