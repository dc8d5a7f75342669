"""Architecture of the model, read from a Hugging Face `config.json`.

Field names are Hugging Face's. Both forms are read: the flat one of transformers 4 (`hidden_size` beside `vision_config`,
`rope_theta`, `rope_scaling`) and the nested one of transformers 5 (`text_config`, `rope_parameters`).
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmllm.errors import InputError

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower. `model_type` decides norm, MLP and windows: see `jaxmllm/model/vision.py`."""

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
    """A Qwen2-VL or Qwen2.5-VL model, plus how to run it (the last block: not part of the checkpoint)."""

    model_type: str  # qwen2_vl or qwen2_5_vl
    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    dtype: str = "float32"  # dtype of activations and matmuls; parameters keep their own
    remat: str = "none"  # what the backward pass recomputes: none, dots (keep matmul results), full, offload
    unroll: bool = False  # unroll the layer loop: faster for a few small layers on a CPU, slower to compile
    attention: str = "auto"  # auto, dense, cudnn, splash: see jaxmllm/model/attention.py

    @property
    def vision_token_ids(self) -> tuple[int, ...]:
        """Placeholders and markers that only a prompt may hold; the sampler never writes them."""
        return (self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id)


def _required(raw: Mapping[str, Any], key: str, source: str) -> Any:
    if raw.get(key) is None:
        raise InputError(f"{source}: field {key!r} is missing")
    return raw[key]


def _rope_theta(raw: Mapping[str, Any], default: float) -> float:
    return float((raw.get("rope_parameters") or {}).get("rope_theta") or raw.get("rope_theta") or default)


def model_config(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads the content of a `config.json`.

    Raises InputError naming `source` and the field for an unknown architecture, a missing field or sizes that do not fit.
    """
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise InputError(
            f"{source}: model_type is {kind!r}; this library runs {' and '.join(MODEL_TYPES)} "
            "(Qwen2-VL and Qwen2.5-VL checkpoints)"
        )
    text_raw = {**{k: v for k, v in raw.items() if k != "text_config"}, **(raw.get("text_config") or {})}
    vision_raw = dict(_required(raw, "vision_config", source))

    def text(key):
        return _required(text_raw, key, source)

    rope = text_raw.get("rope_scaling") or text_raw.get("rope_parameters") or {}
    section = tuple(rope.get("mrope_section") or ())
    text_config = TextConfig(
        vocab_size=text("vocab_size"),
        hidden_size=text("hidden_size"),
        intermediate_size=text("intermediate_size"),
        num_hidden_layers=text("num_hidden_layers"),
        num_attention_heads=text("num_attention_heads"),
        num_key_value_heads=text_raw.get("num_key_value_heads") or text("num_attention_heads"),
        mrope_section=section,  # type: ignore[arg-type]
        rms_norm_eps=float(text_raw.get("rms_norm_eps", 1e-5)),
        rope_theta=_rope_theta(text_raw, 1_000_000.0),
        # transformers reads the top level; a nested text_config may carry a stale default
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", text_raw.get("tie_word_embeddings", False))),
        max_position_embeddings=text_raw.get("max_position_embeddings") or 32768,
    )
    if text_raw.get("use_sliding_window"):
        raise InputError(f"{source}: use_sliding_window is true; sliding-window attention is not supported")
    if text_config.hidden_size % text_config.num_attention_heads:
        raise InputError(f"{source}: hidden_size is not divisible by num_attention_heads")
    if text_config.num_attention_heads % text_config.num_key_value_heads:
        raise InputError(f"{source}: num_attention_heads is not divisible by num_key_value_heads")
    if len(section) != 3 or sum(section) != text_config.head_dim // 2:
        raise InputError(
            f"{source}: mrope_section {list(section)} must be three numbers whose sum is half the head width, "
            f"{text_config.head_dim // 2}"
        )
    vision_config = _vision_config(vision_raw, kind, text_config.hidden_size, source)

    def token(key, default=None):
        return int(text_raw[key] if text_raw.get(key) is not None else raw.get(key, default))

    eos = text_raw.get("eos_token_id", raw.get("eos_token_id"))
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    return ModelConfig(
        model_type=kind,
        vision=vision_config,
        text=text_config,
        image_token_id=int(raw.get("image_token_id", 151655)),
        video_token_id=int(raw.get("video_token_id", 151656)),
        vision_start_token_id=token("vision_start_token_id", 151652),
        vision_end_token_id=token("vision_end_token_id", 151653),
        eos_token_id=eos_ids,
        pad_token_id=text_raw.get("pad_token_id"),
    )


def _vision_config(raw: dict[str, Any], kind: str, text_width: int, source: str) -> VisionConfig:
    source = f"{source}: vision_config"
    if kind == "qwen2_5_vl":
        width, out = _required(raw, "hidden_size", source), raw.get("out_hidden_size", text_width)
        mlp = _required(raw, "intermediate_size", source)
    else:  # Qwen2-VL calls the tower's width embed_dim and the output's hidden_size
        width, out = _required(raw, "embed_dim", source), raw.get("hidden_size", text_width)
        mlp = int(width * raw.get("mlp_ratio", 4))
    depth = _required(raw, "depth", source)
    config = VisionConfig(
        depth=depth,
        hidden_size=width,
        num_heads=_required(raw, "num_heads", source),
        intermediate_size=mlp,
        out_hidden_size=out,
        patch_size=raw.get("patch_size", 14),
        temporal_patch_size=raw.get("temporal_patch_size", 2),
        spatial_merge_size=raw.get("spatial_merge_size", 2),
        # Qwen2-VL has no window attention; the window is then only how patches are laid out
        window_size=raw.get("window_size", 8 * raw.get("patch_size", 14)),
        fullatt_block_indexes=tuple(raw.get("fullatt_block_indexes", range(depth) if kind == "qwen2_vl" else (7, 15, 23, 31))),
        in_channels=raw.get("in_channels", raw.get("in_chans", 3)),
        hidden_act=raw.get("hidden_act", "silu" if kind == "qwen2_5_vl" else "quick_gelu"),
        rope_theta=_rope_theta(raw, 10000.0),
        tokens_per_second=raw.get("tokens_per_second", 4) if kind == "qwen2_5_vl" else None,
    )
    if out != text_width:
        raise InputError(f"{source}: output width {out} differs from the decoder's hidden_size {text_width}")
    if width % config.num_heads or (width // config.num_heads) % 4:
        raise InputError(f"{source}: head width must be a whole multiple of 4, got {width} / {config.num_heads}")
    if config.window_size % (config.patch_size * config.spatial_merge_size):
        raise InputError(f"{source}: window_size must be a multiple of patch_size * spatial_merge_size")
    return config


def load_model_config(folder: str | Path) -> ModelConfig:
    """Reads `folder/config.json`. Raises InputError when it is missing, is not JSON, or does not fit."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: not found; expected a Hugging Face checkpoint folder") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    return model_config(raw, str(path))
