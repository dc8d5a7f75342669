"""Model families: what the library asks of one, the ones it has, and the calls that pass on to a configuration's family.

A family is a folder beside this file, or `module:object` from outside the package. It knows its `config.json`, its network, the
names of its weights, its pixels and positions, and how it writes boxes. Nothing else compares `model_type`.
"""

import dataclasses
import functools
import importlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxmllm.errors import InputError
from jaxmllm.model.config import Fields, ModelConfig, read_object
from jaxmllm.model.safetensors import INDEX, SINGLE, equal, read_headers
from jaxmllm.types import Completions, KVCache, Prompts, Vision

log = logging.getLogger(__name__)
Params = dict
# Hugging Face's model_type -> module:object
FAMILIES = {
    "qwen2_vl": "jaxmllm.model.qwen2_vl:FAMILY",
    "qwen2_5_vl": "jaxmllm.model.qwen2_vl:FAMILY",
}


@dataclasses.dataclass(frozen=True)
class PixelDefaults:
    """How a family's pictures become numbers where a checkpoint's files do not say."""

    image_mean: tuple[float, float, float]  # of RGB in 0..1
    image_std: tuple[float, float, float]
    image_pixels: tuple[int, int]  # fewest and most of a resized image
    frame_pixels: tuple[int, int]  # fewest and most of a resized video frame


@runtime_checkable
class Clip(Protocol):
    """What a family may know of one image or video of a prompt; `jaxmllm.data.images.Frames` is one."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Temporal patches, rows and columns of patches."""

    @property
    def seconds_per_grid(self) -> float | None:
        """From one temporal patch to the next; None: an image."""


class Family:
    """What a family is asked. The base gives what most share; methods without a body are each family's own.

    Arrays are those of `jaxmllm.types`. Parameters are a plain nested dict with "embed" [vocab, D], "head" [D, vocab] unless it
    is tied, and one part for the tower and the decoder each.
    """

    names: ClassVar[tuple[tuple[str, str], ...]]
    """(regular expression on our path, Hugging Face's name), see `jaxmllm.model.hf`; the first that matches whole counts."""
    aliases: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(other beginning of a name, the one in `names`): spellings of other versions."""
    module_prefixes: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(beginning of a name in `names`, the module's in memory): what PEFT names adapters by."""
    adapted: ClassVar[str]
    """Regular expression of the layer paths that LoRA adapts unless told otherwise."""
    no_adapter: ClassVar[str] = ""
    """Regular expression of layer paths that cannot carry an adapter, such as a convolution."""
    special_tokens: ClassVar[Mapping[str, str]]
    """Field of the configuration -> the token's text in the tokenizer."""
    pixels: ClassVar[PixelDefaults]
    side_files: ClassVar[tuple[str, ...]] = ("*.json", "*.jinja", "*.txt", "*.model")
    """Files beside the weights that belong to a checkpoint: configs, tokenizer, template."""

    # ---- configuration

    def read_config(self, raw: Mapping[str, Any], source: str) -> ModelConfig:
        """From the content of a `config.json`. InputError naming `source` and the field."""
        raise NotImplementedError

    def write_config(self, cfg: ModelConfig) -> dict[str, Any]:
        """The content of a `config.json` that transformers reads, and `read_config` reads back."""
        raise NotImplementedError

    def style(self, cfg: ModelConfig) -> str:
        """How the published checkpoints write boxes: a style of `jaxmllm.tasks.answers`."""
        raise NotImplementedError

    # ---- prompts

    def expand(
        self, text: str, clips: Mapping[str, Sequence[Clip]], cfg: ModelConfig
    ) -> tuple[str, dict[str, list[int]]]:
        """The rendered conversation as it is tokenised, and the temporal patches behind each placeholder of each kind.

        A family that writes something about the frames, such as their times, writes it here, with a placeholder a frame.
        """
        return text, {kind: [clip.grid[0] for clip in some] for kind, some in clips.items()}

    def positions(self, clip: Clip, cfg: ModelConfig) -> Int[np.ndarray, "3 f rows columns"]:
        """Rotary positions (time, height, width) of one placeholder's vision tokens, counted from its first."""
        raise NotImplementedError

    # ---- the network

    def init(self, key: Key[Array, ""], cfg: ModelConfig) -> Params:
        """Random float32 parameters."""
        raise NotImplementedError

    def encode(self, params: Params, cfg: ModelConfig, vision: Vision) -> Float[Array, "B V E"]:
        """Images and videos to vision tokens, `vision_width` numbers each."""
        raise NotImplementedError

    def embed_prompts(
        self, params: Params, cfg: ModelConfig, prompts: Prompts, vision_tokens: Float[Array, "B V E"] | None = None
    ) -> Float[Array, "B S D"]:
        """What the decoder reads: token embeddings with the vision tokens in their places."""
        raise NotImplementedError

    def forward(
        self,
        params: Params,
        cfg: ModelConfig,
        prompts: Prompts,
        completions: Completions | None = None,
        vision_tokens: Float[Array, "B V E"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B G T D"] | None]:
        """Hidden states of prompts, and of completions such that entry t predicts token t."""
        raise NotImplementedError

    def prefill(
        self,
        params: Params,
        cfg: ModelConfig,
        prompts: Prompts,
        num_generations: int,
        max_new_tokens: int,
        vision_tokens: Float[Array, "B V E"] | None = None,
    ) -> tuple[Float[Array, "B D"], KVCache]:
        """The prompt's last hidden state and a cache with room for `max_new_tokens` tokens of each completion."""
        raise NotImplementedError

    def decode(
        self, params: Params, cfg: ModelConfig, tokens: Int[Array, "B G"], step: Int[Array, ""], cache: KVCache
    ) -> tuple[Float[Array, "B G D"], KVCache]:
        """Reads token number `step` of every completion and returns the next hidden state."""
        raise NotImplementedError

    # ---- sizes, which `plan` and the trainer ask for

    def vision_width(self, cfg: ModelConfig) -> int:
        """E: numbers of a vision token. More than the decoder's width where the tower returns several levels."""
        return cfg.vision.out_hidden_size

    def window_tokens(self, cfg: ModelConfig) -> int:
        """Vision tokens of a window of the host's layout."""
        return cfg.vision.window_patches // cfg.vision.spatial_merge_size**2

    def token_pixels(self, cfg: ModelConfig) -> int:
        """Pixels of a resized picture behind one vision token."""
        return (cfg.vision.patch_size * cfg.vision.spatial_merge_size) ** 2

    def full_share(self, cfg: ModelConfig) -> float:
        """Of the tower's blocks, those that attend over the whole frame."""
        return 1.0

    # ---- names

    def canonical(self, name: str) -> str:
        """A tensor's name in the spelling of `names`."""
        for other, own in self.aliases:
            name = name.replace(other, own, 1) if name.startswith(other) else name
        return name

    def module(self, name: str) -> str:
        """The module in transformers' memory (>= 4.52) whose canonical name is given."""
        return next((new + name.removeprefix(old) for old, new in self.module_prefixes if name.startswith(old)), name)

    def stored_shape(self, path: str, shape: tuple[int, ...], cfg: ModelConfig) -> tuple[int, ...] | None:
        """Hugging Face's shape of a parameter of ours (without the stacked axis) where it is not the usual one, else None."""
        return None


# ---------------------------------------------------------------- finding one


@functools.cache
def named(spec: str) -> Family:
    """The family at `module:object`. InputError when there is none, or it lacks what `Family` asks for."""
    module, _, name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"family {spec!r}: expected module:object of a model family ({error})") from None
    if not isinstance(found, Family):
        raise InputError(f"family {spec!r}: it is a {type(found).__name__}, not a jaxmllm.model.family.Family")
    lacks = [name for name in Family.__annotations__ if not hasattr(found, name)]
    if lacks:
        raise InputError(f"family {spec!r}: it lacks {', '.join(lacks)}")
    return found


def of(cfg: ModelConfig) -> Family:
    """The family of a configuration."""
    return named(cfg.family or FAMILIES[cfg.model_type])


def model_config(raw: Mapping[str, Any], source: str = "config.json", family: str = "") -> ModelConfig:
    """Reads the content of a `config.json`; `family` (module:object) reads it in place of the family of its `model_type`.

    Raises InputError naming `source` and the field for an unknown architecture, a missing field or sizes that do not fit.
    """
    kind = Fields(raw, source, {}).get("model_type")
    if not family and (not isinstance(kind, str) or kind not in FAMILIES):
        raise InputError(f"{source}: model_type is {kind!r}; this library runs {' and '.join(FAMILIES)} checkpoints")
    config = named(family or FAMILIES[kind]).read_config(raw, source)
    return dataclasses.replace(config, family=family)


def load_model_config(folder: str | Path, family: str = "") -> ModelConfig:
    """Reads `folder/config.json`, and the end tokens of `folder/generation_config.json` where there is one.

    A head that was trained apart from the embedding counts, whatever the file says: transformers (5.8) reads it so too.
    Raises InputError when the file is missing, is not JSON, or does not fit.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: not found; expected a Hugging Face checkpoint folder")
    config = model_config(read_object(path), str(path), family)
    path = path.with_name("generation_config.json")
    if path.is_file() and (ends := Fields(read_object(path), str(path), {}).token_list("eos_token_id")):
        config = dataclasses.replace(config, eos_token_id=ends)
    if config.text.tie_word_embeddings and _has_own_head(Path(folder), of(config)):
        log.warning(
            "%s: lm_head.weight differs from the embedding that config.json ties it to; it is read apart", folder
        )
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, tie_word_embeddings=False))
    return config


def _has_own_head(folder: Path, family: Family) -> bool:
    """Whether the folder's weights hold a head beside the embedding and other than it. Folders without weights have none."""
    if not (folder / SINGLE).is_file() and not (folder / INDEX).exists():
        return False  # a configuration alone, for a plan
    stored, known = read_headers(folder, family.canonical), dict(family.names)
    head, embed = stored.get(known["head"]), stored.get(known["embed"])
    if head is None or embed is None or not head.is_readable or not embed.is_readable:
        return False  # what is amiss is said when the weights are read
    return not equal(head, embed)


# ---------------------------------------------------------------- the network of a configuration's family


def init(key: Key[Array, ""], cfg: ModelConfig) -> Params:
    """Random float32 parameters. Wrap in `jax.eval_shape` for shapes alone, in `jax.jit` to create them sharded."""
    return of(cfg).init(key, cfg)


def encode(params: Params, cfg: ModelConfig, vision: Vision) -> Float[Array, "B V E"]:
    """See `Family.encode`, and so the others."""
    return of(cfg).encode(params, cfg, vision)


def embed_prompts(
    params: Params, cfg: ModelConfig, prompts: Prompts, vision_tokens: Float[Array, "B V E"] | None = None
) -> Float[Array, "B S D"]:
    return of(cfg).embed_prompts(params, cfg, prompts, vision_tokens)


def forward(
    params: Params,
    cfg: ModelConfig,
    prompts: Prompts,
    completions: Completions | None = None,
    vision_tokens: Float[Array, "B V E"] | None = None,
) -> tuple[Float[Array, "B S D"], Float[Array, "B G T D"] | None]:
    return of(cfg).forward(params, cfg, prompts, completions, vision_tokens)


def prefill(
    params: Params,
    cfg: ModelConfig,
    prompts: Prompts,
    num_generations: int,
    max_new_tokens: int,
    vision_tokens: Float[Array, "B V E"] | None = None,
) -> tuple[Float[Array, "B D"], KVCache]:
    return of(cfg).prefill(params, cfg, prompts, num_generations, max_new_tokens, vision_tokens)


def decode(
    params: Params, cfg: ModelConfig, tokens: Int[Array, "B G"], step: Int[Array, ""], cache: KVCache
) -> tuple[Float[Array, "B G D"], KVCache]:
    return of(cfg).decode(params, cfg, tokens, step, cache)
