"""Hugging Face safetensors in and out, through one invertible table of names.

Tensors are read piece by piece straight into the shards of the target array, so the host holds little more than the
target; nothing is memory-mapped. Everything that does not match is collected and reported at once.
"""

import dataclasses
import functools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxmllm.errors import InputError
from jaxmllm.model import family
from jaxmllm.model.config import ModelConfig
from jaxmllm.model.family import Family
from jaxmllm.model.safetensors import DTYPES, Stored, is_finite, read_headers
from jaxmllm.runfiles import read_json

IGNORED = re.compile(r"rotary_emb\.inv_freq$|rotary_pos_emb\.inv_freq$")  # buffers that old versions saved
MAX_LISTED = 40
STRIP = 256  # columns copied together
PIECE = 1 << 24  # bytes of a matrix read together
ALIGNMENT = 64  # bytes: where the CPU backend wants an array to begin


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint and where it goes: `path` in our tree, `layer` on the stacked axis or None."""

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]  # Hugging Face's shape
    own_shape: tuple[int, ...]  # ours, without the stacked axis

    @property
    def is_turned(self) -> bool:
        """Kernels are [out, in...] there and [in, out...] here. The embedding stays, vectors are only reshaped."""
        return self.path[-1] in ("kernel", "head")

    @property
    def is_matrix(self) -> bool:
        """The leading axis there is one axis here."""
        return len(self.own_shape) == 2 and self.shape[0] == self.own_shape[self.leading]

    @property
    def leading(self) -> int:
        """Which of our axes it is."""
        return len(self.own_shape) - 1 if self.is_turned else 0

    def to_own(self, tensor: np.ndarray) -> np.ndarray:
        """Our view of a tensor, or of some rows of a matrix."""
        shape = list(self.own_shape)
        if self.is_matrix:
            shape[self.leading] = len(tensor)
        if self.is_turned:
            tensor = tensor.reshape(len(tensor), -1).T
        return tensor.reshape(shape)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        if self.is_turned:
            turned = array.reshape(array.shape[0], -1).T
            array = np.empty(turned.shape, turned.dtype)
            _copy(array, turned)
        return np.ascontiguousarray(array.reshape(self.shape))


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source` in strips: transposing a large matrix as a whole misses the cache, five times slower."""
    for start in range(0, source.shape[-1], STRIP):
        target[..., start : start + STRIP] = source[..., start : start + STRIP]


def _leaves(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key in sorted(tree):
        value = tree[key]
        yield from _leaves(value, (*prefix, key)) if isinstance(value, Mapping) else [((*prefix, key), value)]


def abstract_params(cfg: ModelConfig) -> dict:
    """Shapes of every parameter, without any memory."""
    return jax.tree.map(lambda shape: shape, _shapes(cfg))  # the caller's own


@functools.lru_cache(maxsize=8)
def _shapes(cfg: ModelConfig) -> dict:
    return jax.eval_shape(lambda key: family.init(key, cfg), jax.random.key(0))


def name_of(path: str, names: Sequence[tuple[str, str]]) -> tuple[str, dict[str, str]]:
    """The template of a parameter's Hugging Face name by a family's `names`, and what its path puts into it.

    {n} is a captured group, {layer} the index on our stacked axis, {leaf} weight or bias. Raises KeyError for no parameter.
    """
    for pattern, template in names:
        if found := re.fullmatch(pattern, path):
            return template, {name: part.replace("/", ".") for name, part in found.groupdict().items()}
    raise KeyError(path)


def key_table(cfg: ModelConfig) -> dict[str, Entry]:
    """Hugging Face name -> Entry, for every tensor of the architecture."""
    table, own_family = {}, family.of(cfg)
    for path, leaf in _leaves(abstract_params(cfg)):
        joined = "/".join(path)
        template, groups = name_of(joined, own_family.names)
        groups["leaf"] = {"kernel": "weight", "scale": "weight"}.get(groups.get("leaf", ""), groups.get("leaf", ""))
        stacked = "{layer}" in template
        own: tuple[int, ...] = leaf.shape[1:] if stacked else leaf.shape
        shape: tuple[int, ...]
        if special := own_family.stored_shape(joined, own, cfg):
            shape = special
        elif path[-1] in ("kernel", "head"):
            shape = (math.prod(own[1:]), own[0])
        else:
            shape = (math.prod(own),) if path[-1] in ("scale", "bias") else own
        for layer in range(leaf.shape[0]) if stacked else [None]:
            table[template.format(layer=layer, **groups)] = Entry(path, layer, shape, own)
    return table


def stored_tensors(folder: str | Path, of: Family) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder, by the name that its family uses: `model.safetensors` or the shards of its index."""
    return read_headers(folder, of.canonical)


def _check(folder: Path, cfg: ModelConfig, table: dict[str, Entry], found: dict[str, Stored]) -> None:
    """Raises one InputError that lists every missing, unexpected, misshaped, truncated or mistyped tensor."""
    problems = [f"missing     {name} {list(table[name].shape)}" for name in table if name not in found]
    for name, tensor in found.items():
        if name not in table:
            tied = name == "lm_head.weight" and cfg.text.tie_word_embeddings
            if not tied and not IGNORED.search(name):
                problems.append(f"unexpected  {name} {list(tensor.shape)}")
            continue
        if tensor.shape != table[name].shape:
            problems.append(f"misshaped   {name} {list(tensor.shape)}, expected {list(table[name].shape)}")
        elif tensor.dtype not in DTYPES:
            problems.append(f"mistyped    {name} {tensor.dtype}, expected one of {', '.join(DTYPES)}")
        elif tensor.end - tensor.start != math.prod(tensor.shape) * jnp.dtype(DTYPES[tensor.dtype]).itemsize:
            problems.append(f"corrupt     {name}: {tensor.end - tensor.start} bytes for shape {list(tensor.shape)}")
        elif tensor.end > tensor.file.stat().st_size:
            problems.append(f"truncated   {name}: {tensor.file.name} ends before it")
    if problems:
        raise InputError(
            f"{folder}: the checkpoint does not fit its config.json, {len(problems)} tensors differ:\n  {_list(problems)}"
        )


def _list(problems: list[str]) -> str:
    more = f"\n  ... and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    return "\n  ".join(problems[:MAX_LISTED]) + more


def load_params(
    folder: str | Path,
    cfg: ModelConfig,
    *,
    dtype: str | None = None,
    sharding: Callable[[tuple[str, ...], jax.ShapeDtypeStruct], jax.sharding.Sharding] | None = None,
) -> dict:
    """Reads a checkpoint folder into our tree, each array created in its sharding.

    `dtype`: cast to it (None keeps the stored one). `sharding(path, shape)` names the target of each array; the default is
    the first local device. Raises InputError with the full list when tensors are missing, extra, misshaped or truncated,
    and with another when numbers are NaN or infinite, or become so in `dtype`.
    """
    folder = Path(folder)
    table, found = key_table(cfg), stored_tensors(folder, family.of(cfg))
    _check(folder, cfg, table, found)
    members: dict[tuple[str, ...], list[str]] = {}
    for name, entry in table.items():
        members.setdefault(entry.path, []).append(name)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params: dict = {}
    spoiled: list[str] = []  # names of tensors with a number that is none
    for path, leaf in _leaves(abstract_params(cfg)):
        kind = jnp.dtype(dtype) if dtype else _common([found[name].dtype for name in members[path]])
        target = sharding(path, leaf) if sharding else default
        array = _load_leaf(leaf.shape, kind, target, [(n, table[n], found[n]) for n in members[path]], spoiled)
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = array
    if spoiled:
        cast = f", once cast to {dtype}" if dtype else ""
        raise InputError(
            f"{folder}: {len(spoiled)} tensors hold NaN or infinite numbers{cast}; the checkpoint is damaged, "
            f"or needs bfloat16 or float32:\n  {_list(spoiled)}"
        )
    return params


def _common(stored: list[str]) -> jnp.dtype:
    """The dtype of a stacked array whose layers were stored in `stored`."""
    return functools.reduce(jnp.promote_types, {jnp.dtype(DTYPES[name]) for name in stored})


def _pieces(entry: Entry, stored: Stored) -> Iterator[tuple[int, np.ndarray]]:
    """Parts of our view of a tensor along `entry.leading`, with where each begins: a vocabulary never lies here twice."""
    total = stored.shape[0]
    step = max(1, PIECE * total // max(1, stored.end - stored.start)) if entry.is_matrix else total
    for first in range(0, total, step):
        yield first, entry.to_own(stored.read(first, min(step, total - first)))


def _aligned(shape: list[int], dtype: jnp.dtype) -> np.ndarray:
    """Empty memory that the CPU backend takes over instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _load_leaf(shape, dtype, sharding, tensors: list[tuple[str, Entry, Stored]], spoiled: list[str]) -> jax.Array:
    """Fills one buffer per distinct local shard while reading each tensor once; adds names with NaN to `spoiled`."""
    places: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        places.setdefault(bounds, []).append(device)
    buffers = {bounds: _aligned([hi - lo for lo, hi in bounds], dtype) for bounds in places}
    for name, entry, stored in tensors:
        for first, piece in _pieces(entry, stored):
            if dtype == np.float16:  # a number beyond its range is reported, not warned of
                with np.errstate(over="ignore"):
                    piece = piece.astype(dtype)
            if not is_finite(piece) and name not in spoiled:
                spoiled.append(name)
            for bounds, buffer in buffers.items():
                inside = list(bounds)
                if entry.layer is not None:
                    low, high = inside.pop(0)
                    if not low <= entry.layer < high:
                        continue
                    buffer = buffer[entry.layer - low]
                source, target = [slice(*b) for b in inside], [slice(None)] * len(inside)
                low, high = inside[entry.leading]
                start, stop = max(low, first), min(high, first + piece.shape[entry.leading])
                if start < stop:
                    source[entry.leading] = slice(start - first, stop - first)
                    target[entry.leading] = slice(start - low, stop - low)
                    _copy(buffer[tuple(target)], piece[tuple(source)])
    shards = []
    for bounds in list(buffers):
        buffer = buffers.pop(bounds)
        shards += [jax.device_put(buffer, device) for device in places[bounds]]
        jax.block_until_ready(shards)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _to_host(leaf) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def save_params(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 2 << 30,
    pixels: tuple[int, int] | None = None,
) -> None:
    """Writes a folder that transformers loads: safetensors (sharded above `max_shard_bytes`), index and config.json.

    Config, tokenizer and processor files are copied from `source` when given; `pixels` replaces the processor's fewest and
    most pixels of an image. The folder appears whole or not at all; an
    existing checkpoint folder is replaced. Every process must call it; the first writes. Raises InputError for a tree with
    LoRA left or other parameters than the architecture's, and for a folder that holds something else.
    """
    if "lora" in params:
        raise InputError("export: merge the LoRA weights first (jaxmllm.model.lora.merge)")
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").exists())):
        raise InputError(f"{folder}: exists and is not a checkpoint folder; choose another name")
    members: dict[tuple[str, ...], list[tuple[str, Entry]]] = {}
    for name, entry in key_table(cfg).items():
        members.setdefault(entry.path, []).append((name, entry))
    differing = members.keys() ^ {path for path, _ in _leaves(params)}
    if differing:
        raise InputError(
            f"export: parameters differ from the architecture's: {', '.join(map('/'.join, sorted(differing)))}"
        )
    writer = jax.process_index() == 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)) if writer else None
    files: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}

    def flush():
        if shard and stage is not None:
            save_file(shard, stage / f"part-{len(files)}", metadata={"format": "pt"})
            files.append(list(shard))
            shard.clear()

    try:
        total = 0
        for path, leaf in _leaves(params):
            host = _to_host(leaf).astype(jnp.dtype(dtype)) if dtype else _to_host(leaf)
            for name, entry in members[path]:
                tensor = entry.to_hf(host if entry.layer is None else host[entry.layer])
                if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > max_shard_bytes:
                    flush()
                shard[name] = tensor
                total += tensor.nbytes
        flush()
        if stage is not None:
            stored = dtype or params["embed"].dtype.name
            _finish(stage, folder, files, total, cfg, source, stored, pixels)
    except BaseException:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        raise


def _finish(
    stage: Path, folder: Path, files: list[list[str]], total: int, cfg: ModelConfig, source, dtype: str, pixels
) -> None:
    config = family.of(cfg).write_config(cfg)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(files):
        single = len(files) == 1
        name = "model.safetensors" if single else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        os.replace(stage / f"part-{i}", stage / name)
        weight_map |= dict.fromkeys(names, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (stage / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for pattern in family.of(cfg).side_files if source else ():
        for file in Path(source).glob(pattern):
            if file.name != "model.safetensors.index.json":
                shutil.copy(file, stage / file.name)
    if pixels is not None:
        write_limits(stage, *pixels)
    if (stage / "config.json").exists():
        config = json.loads((stage / "config.json").read_text(encoding="utf-8"))
        tie(config, cfg.text.tie_word_embeddings)
    for part in (config, *(config[key] for key in ("text_config", "vision_config") if config.get(key))):
        for key in ("dtype", "torch_dtype"):  # transformers loads in this dtype
            if key in part or (part is config and key == "torch_dtype" and "dtype" not in part):
                part[key] = dtype
    (stage / "config.json").write_text(json.dumps(config, indent=2))
    os.chmod(stage, 0o755)  # made private, as temporary folders are
    for file in stage.iterdir():
        os.chmod(file, 0o644)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(stage, folder)
        shutil.rmtree(old)
    else:
        os.replace(stage, folder)


def tie(config: dict, tied: bool) -> None:
    """Writes into the content of a `config.json` whether the head is the embedding, at both places that may say so."""
    for part in (config, config.get("text_config") or {}):
        if part is config or "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = tied


def write_limits(folder: str | Path, min_pixels: int, max_pixels: int) -> None:
    """Sets the limits of a resized image in the processor files of a checkpoint folder, so that it is asked as it was trained."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = Path(folder) / name
        if not path.exists():
            continue
        raw = read_json(path)
        part = raw.get("image_processor") if name == "processor_config.json" else raw
        if part is not None:
            part |= {"min_pixels": min_pixels, "max_pixels": max_pixels}
            if isinstance(part.get("size"), dict):
                part["size"] |= {"shortest_edge": min_pixels, "longest_edge": max_pixels}
            path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
