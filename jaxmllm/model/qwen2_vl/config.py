"""Qwen2-VL's and Qwen2.5-VL's `config.json`, in and out.

Both forms are read: the flat one of transformers 4 (`hidden_size` beside `vision_config`, `rope_theta`, `rope_scaling`) and the
nested one of transformers 5 (`text_config`, `rope_parameters`). The flat one is written: every transformers >= 4.51 reads it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmllm.errors import InputError
from jaxmllm.model.config import Fields, ModelConfig, TextConfig, VisionConfig

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")

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


def read_config(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads the content of a `config.json`.

    Raises InputError naming `source` and the field for a missing field or sizes that do not fit.
    """
    whole = Fields(raw, source, {})
    kind = whole.get("model_type")
    nested = Fields(whole.get("text_config") or {}, f"{source}: text_config", {})
    # values of the nested form win; None counts as absent
    merged = {**raw, **{key: value for key, value in nested.raw.items() if value is not None}}
    text = Fields(merged, nested.source if nested.raw else source, TEXT_DEFAULTS)
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
    vision = Fields(whole.get("vision_config"), f"{source}: vision_config", VISION_DEFAULTS[kind])
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


def _vision_config(fields: Fields, kind: str, text_width: int) -> VisionConfig:
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


def _plain(number: float) -> float:
    """transformers 5 refuses 4.0 where it expects a whole number."""
    return int(number) if number == int(number) else number


def write_config(cfg: ModelConfig) -> dict:
    """The `config.json` content of a configuration, in the flat form that every transformers >= 4.51 reads."""
    text, vision = dataclasses.asdict(cfg.text), dataclasses.asdict(cfg.vision)
    section = text.pop("mrope_section")
    rope_theta = vision.pop("rope_theta")
    if rope_theta != 10000.0:
        vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": rope_theta}
    if cfg.model_type == "qwen2_vl":
        vision["embed_dim"] = vision.pop("hidden_size")
        vision["hidden_size"] = vision.pop("out_hidden_size")
        vision["mlp_ratio"] = _plain(vision.pop("intermediate_size") / vision["embed_dim"])
        for key in ("window_size", "fullatt_block_indexes", "tokens_per_second"):
            vision.pop(key)
    else:
        vision["tokens_per_second"] = _plain(vision["tokens_per_second"])
    architecture = {"qwen2_vl": "Qwen2VLForConditionalGeneration", "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration"}
    return {
        "architectures": [architecture[cfg.model_type]],
        "model_type": cfg.model_type,
        **text,
        "hidden_act": "silu",
        "rope_scaling": {"type": "mrope", "mrope_section": list(section)},
        "use_sliding_window": False,
        "vision_config": {"model_type": cfg.model_type, **vision},
        "image_token_id": cfg.image_token_id,
        "video_token_id": cfg.video_token_id,
        "vision_start_token_id": cfg.vision_start_token_id,
        "vision_end_token_id": cfg.vision_end_token_id,
        "eos_token_id": list(cfg.eos_token_id) if len(cfg.eos_token_id) > 1 else next(iter(cfg.eos_token_id), None),
        "pad_token_id": cfg.pad_token_id,
    }
