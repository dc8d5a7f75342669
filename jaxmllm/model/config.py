"""Architecture of a model, and how to run it; names of fields are Hugging Face's. A family reads it from a `config.json`."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmllm.errors import InputError

DTYPES = ("float32", "bfloat16", "float16")
REMAT = ("none", "dots", "full", "offload")
KERNELS = ("auto", "dense", "cudnn", "splash")  # of attention


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower."""

    depth: int  # blocks
    hidden_size: int  # width of the tower
    num_heads: int
    intermediate_size: int  # width of the MLP
    out_hidden_size: int  # width of the merged vision tokens, equal to the decoder's
    patch_size: int = 14  # pixels a side
    temporal_patch_size: int = 2  # frames in a patch; an image is repeated
    spatial_merge_size: int = 2  # patches a side that become one vision token
    window_size: int = 112  # pixels a side of an attention window
    fullatt_block_indexes: tuple[int, ...] = ()  # blocks that attend over the whole frame
    in_channels: int = 3
    hidden_act: str = "silu"
    rope_theta: float = 10000.0
    tokens_per_second: float | None = None  # temporal M-RoPE steps a second; None: one step a temporal patch

    @property
    def window_patches(self) -> int:
        """P: patches of one window."""
        return (self.window_size // self.patch_size) ** 2

    @property
    def patch_pixels(self) -> int:
        """C: numbers in one patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    mrope_section: tuple[int, int, int]  # rotary frequencies given to temporal, height, width; sums to head_dim / 2
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A vision-language model, plus how to run it (the last block: not part of the checkpoint)."""

    model_type: str  # Hugging Face's
    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    family: str = ""  # module:object of a family from outside the package; empty: the one of `model_type`
    dtype: str = "float32"  # dtype of activations and matmuls; parameters keep their own
    remat: str = "none"  # what the backward pass recomputes: none, dots (keep matmul results), full, offload
    unroll: bool = False  # unroll the layer loop: faster for a few small layers on a CPU, slower to compile
    attention: str = "auto"  # auto, dense, cudnn, splash: see jaxmllm/model/attention.py

    def __post_init__(self):
        for field, known in (("dtype", DTYPES), ("remat", REMAT), ("attention", KERNELS)):
            if getattr(self, field) not in known:
                raise InputError(f"{field} = {getattr(self, field)!r}: must be one of {', '.join(known)}")

    @property
    def vision_token_ids(self) -> tuple[int, ...]:
        """Placeholders and markers that only a prompt may hold; the sampler never writes them."""
        return (self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id)

    @property
    def heads(self) -> dict[str, int]:
        """What a device must hold whole, by the field's name: `tensor` of a mesh divides each."""
        return {
            "num_attention_heads": self.text.num_attention_heads,
            "num_key_value_heads": self.text.num_key_value_heads,
            "vision_config.num_heads": self.vision.num_heads,
        }


class Fields:
    """Typed reading of one JSON object; every error names the file and the field."""

    def __init__(self, raw: Any, source: str, defaults: Mapping[str, Any]):
        if not isinstance(raw, Mapping):
            raise InputError(f"{source}: expected a JSON object, got {type(raw).__name__}")
        self.raw, self.source, self.defaults = raw, source, defaults

    def get(self, key: str) -> Any:
        value = self.raw.get(key)
        return self.defaults.get(key) if value is None else value

    def fail(self, key: str, need: str) -> InputError:
        return InputError(f"{self.source}: {key} is {self.get(key)!r}; it must be {need}")

    def size(self, key: str) -> int:
        """A whole number of at least 1."""
        value = self.get(key)
        if value is None:
            raise InputError(f"{self.source}: field {key!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(key, "a whole number of at least 1")
        return value

    def positive(self, key: str, default: float) -> float:
        value = default if self.get(key) is None else self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.fail(key, "a positive number")
        return float(value)

    def token(self, key: str, default: int | None) -> int | None:
        value = default if self.get(key) is None else self.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise self.fail(key, "a token id")
        return value

    def token_list(self, key: str) -> tuple[int, ...]:
        """None, one id or a list of them."""
        value = self.get(key)
        ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.fail(key, "a token id or a list of them")
        return ids

    def choice(self, key: str, known: tuple[str, ...]) -> str:
        if self.get(key) not in known:
            raise self.fail(key, f"one of {', '.join(known)}")
        return self.get(key)

    def rope(self) -> Mapping[str, Any]:
        """The rotary settings of either form of the file. Only the plain kind of frequencies is known."""
        rope = self.get("rope_scaling") or self.get("rope_parameters") or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
        if kind not in ("default", "mrope", "axial"):
            raise InputError(f"{self.source}: rotary embedding of type {kind!r} is not supported; remove rope scaling")
        return rope

    def rope_theta(self, default: float) -> float:
        found = {**self.raw, **{k: v for k, v in self.rope().items() if k == "rope_theta"}}
        return Fields(found, self.source, {}).positive("rope_theta", default)


def read_object(path: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    return Fields(raw, str(path), {}).raw
