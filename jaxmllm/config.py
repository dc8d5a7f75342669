"""Architecture of the model, read from a Hugging Face `config.json`.

Field names are Hugging Face's. Both forms are read: the flat one of transformers 4 (`hidden_size` beside `vision_config`,
`rope_theta`, `rope_scaling`) and the nested one of transformers 5 (`text_config`, `rope_parameters`).
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmllm.errors import InputError
from jaxmllm.model.names import EMBED, HEAD, canonical
from jaxmllm.model.safetensors import INDEX, SINGLE, equal, read_headers

log = logging.getLogger(__name__)
MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
DTYPES = ("float32", "bfloat16", "float16")
REMAT = ("none", "dots", "full", "offload")
KERNELS = ("auto", "dense", "cudnn", "splash")  # of attention


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

    def __post_init__(self):
        for field, known in (("dtype", DTYPES), ("remat", REMAT), ("attention", KERNELS)):
            if getattr(self, field) not in known:
                raise InputError(f"{field} = {getattr(self, field)!r}: must be one of {', '.join(known)}")

    @property
    def vision_token_ids(self) -> tuple[int, ...]:
        """Placeholders and markers that only a prompt may hold; the sampler never writes them."""
        return (self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id)


# Hugging Face leaves out of a config.json what equals the defaults of its classes
TEXT_DEFAULTS: dict[str, Any] = dict(
    vocab_size=152064,
    hidden_size=8192,
    intermediate_size=29568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=32768,
    hidden_act="silu",
)
VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_vl": dict(embed_dim=1280, hidden_size=3584, hidden_act="quick_gelu", mlp_ratio=4),
    "qwen2_5_vl": dict(
        hidden_size=3584,
        out_hidden_size=3584,
        intermediate_size=3420,
        hidden_act="silu",
        window_size=112,
        fullatt_block_indexes=(7, 15, 23, 31),
        tokens_per_second=4,
    ),
}
for _defaults in VISION_DEFAULTS.values():
    _defaults |= dict(depth=32, num_heads=16, patch_size=14, temporal_patch_size=2, spatial_merge_size=2, in_channels=3)
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu")


class _Fields:
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
        return _Fields(found, self.source, {}).positive("rope_theta", default)


def model_config(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads the content of a `config.json`.

    Raises InputError naming `source` and the field for an unknown architecture, a missing field or sizes that do not fit.
    """
    whole = _Fields(raw, source, {})
    kind = whole.get("model_type")
    if kind not in MODEL_TYPES:
        raise InputError(
            f"{source}: model_type is {kind!r}; this library runs {' and '.join(MODEL_TYPES)} "
            "(Qwen2-VL and Qwen2.5-VL checkpoints)"
        )
    nested = _Fields(whole.get("text_config") or {}, f"{source}: text_config", {})
    # values of the nested form win; None counts as absent
    merged = {**raw, **{key: value for key, value in nested.raw.items() if value is not None}}
    text = _Fields(merged, nested.source if nested.raw else source, TEXT_DEFAULTS)
    section = text.rope().get("mrope_section") or ()
    if not isinstance(section, list | tuple) or not all(isinstance(n, int) for n in section):
        raise InputError(f"{text.source}: mrope_section is {section!r}; it must be a list of whole numbers")
    section = tuple(section)
    heads = text.size("num_attention_heads")
    alike = {**raw, **nested.raw}.get("num_key_value_heads", 0) is None  # null: as many as queries
    text_config = TextConfig(
        vocab_size=text.size("vocab_size"),
        hidden_size=text.size("hidden_size"),
        intermediate_size=text.size("intermediate_size"),
        num_hidden_layers=text.size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=heads if alike else text.size("num_key_value_heads"),
        mrope_section=section,  # type: ignore[arg-type]
        rms_norm_eps=text.positive("rms_norm_eps", 1e-5),
        rope_theta=text.rope_theta(1_000_000.0),
        # as transformers 5: either place counts, since version 4 saved it in the nested part alone
        tie_word_embeddings=bool(whole.get("tie_word_embeddings") or nested.get("tie_word_embeddings")),
        max_position_embeddings=text.size("max_position_embeddings"),
    )
    if text.get("use_sliding_window"):
        raise InputError(f"{text.source}: use_sliding_window is true; sliding-window attention is not supported")
    text.choice("hidden_act", ("silu",))
    if text_config.hidden_size % heads:
        raise text.fail("hidden_size", f"divisible by num_attention_heads, {heads}")
    if heads % text_config.num_key_value_heads:
        raise text.fail("num_attention_heads", f"divisible by num_key_value_heads, {text_config.num_key_value_heads}")
    if len(section) != 3 or sum(section) != text_config.head_dim // 2:
        raise InputError(
            f"{text.source}: mrope_section {section} must be three numbers whose sum is half the head width, "
            f"{text_config.head_dim // 2}"
        )
    if whole.get("vision_config") is None:
        raise InputError(f"{source}: field 'vision_config' is missing")
    vision = _Fields(whole.get("vision_config"), f"{source}: vision_config", VISION_DEFAULTS[kind])
    return ModelConfig(
        model_type=kind,
        vision=_vision_config(vision, kind, text_config.hidden_size),
        text=text_config,
        image_token_id=whole.token("image_token_id", 151655),  # type: ignore[arg-type]
        video_token_id=whole.token("video_token_id", 151656),  # type: ignore[arg-type]
        vision_start_token_id=text.token("vision_start_token_id", 151652),  # type: ignore[arg-type]
        vision_end_token_id=text.token("vision_end_token_id", 151653),  # type: ignore[arg-type]
        eos_token_id=text.token_list("eos_token_id"),
        pad_token_id=text.token("pad_token_id", None),
    )


def _vision_config(fields: _Fields, kind: str, text_width: int) -> VisionConfig:
    windowed = kind == "qwen2_5_vl"
    if windowed:
        width, out, mlp = (fields.size(key) for key in ("hidden_size", "out_hidden_size", "intermediate_size"))
    else:  # Qwen2-VL calls the tower's width embed_dim and the output's hidden_size
        width, out = fields.size("embed_dim"), fields.size("hidden_size")
        mlp = int(width * fields.positive("mlp_ratio", 4))
    patch, depth = fields.size("patch_size"), fields.size("depth")
    blocks = fields.get("fullatt_block_indexes") if windowed else range(depth)
    if not isinstance(blocks, list | tuple | range) or not all(isinstance(i, int) for i in blocks):
        raise fields.fail("fullatt_block_indexes", "a list of block numbers")
    config = VisionConfig(
        depth=depth,
        hidden_size=width,
        num_heads=fields.size("num_heads"),
        intermediate_size=mlp,
        out_hidden_size=out,
        patch_size=patch,
        temporal_patch_size=fields.size("temporal_patch_size"),
        spatial_merge_size=fields.size("spatial_merge_size"),
        # Qwen2-VL has no window attention; the window is then only how patches are laid out
        window_size=fields.size("window_size") if windowed else 8 * patch,
        fullatt_block_indexes=tuple(blocks),
        in_channels=fields.size("in_chans" if "in_chans" in fields.raw else "in_channels"),
        hidden_act=fields.choice("hidden_act", ACTIVATIONS),
        rope_theta=fields.rope_theta(10000.0),
        tokens_per_second=fields.positive("tokens_per_second", 4) if windowed else None,
    )
    if out != text_width:
        raise InputError(f"{fields.source}: output width {out} differs from the decoder's hidden_size {text_width}")
    if width % config.num_heads or (width // config.num_heads) % 4:
        raise InputError(f"{fields.source}: head width must be a whole multiple of 4, got {width} / {config.num_heads}")
    if config.window_size % (patch * config.spatial_merge_size):
        raise fields.fail("window_size", "a multiple of patch_size * spatial_merge_size")
    return config


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    return _Fields(raw, str(path), {}).raw


def load_model_config(folder: str | Path) -> ModelConfig:
    """Reads `folder/config.json`, and the end tokens of `folder/generation_config.json` where there is one.

    A head that was trained apart from the embedding counts, whatever the file says: transformers (5.8) reads it so too.
    Raises InputError when the file is missing, is not JSON, or does not fit.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: not found; expected a Hugging Face checkpoint folder")
    config = model_config(_read_object(path), str(path))
    path = path.with_name("generation_config.json")
    if path.is_file() and (ends := _Fields(_read_object(path), str(path), {}).token_list("eos_token_id")):
        config = dataclasses.replace(config, eos_token_id=ends)
    if config.text.tie_word_embeddings and _has_own_head(Path(folder)):
        log.warning(
            "%s: lm_head.weight differs from the embedding that config.json ties it to; it is read apart", folder
        )
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, tie_word_embeddings=False))
    return config


def _has_own_head(folder: Path) -> bool:
    """Whether the folder's weights hold a head beside the embedding and other than it. Folders without weights have none."""
    if not (folder / SINGLE).is_file() and not (folder / INDEX).exists():
        return False  # a configuration alone, for a plan
    stored = read_headers(folder, canonical)
    pair = [stored[name] for name in (HEAD, EMBED) if name in stored]
    return len(pair) == 2 and all(tensor.is_readable for tensor in pair) and not equal(*pair)
