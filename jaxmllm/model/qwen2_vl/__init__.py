"""Qwen2-VL and Qwen2.5-VL."""

from jaxmllm.model.config import ModelConfig
from jaxmllm.model.family import Family, PixelDefaults
from jaxmllm.model.qwen2_vl import config, model
from jaxmllm.model.qwen2_vl.names import ALIASES, DECODER_LINEARS, MODULES, NAMES, SPECIAL_TOKENS
from jaxmllm.model.qwen2_vl.positions import positions


class Qwen2VL(Family):
    """Two generations that share a decoder; the tower's norm, MLP and windows differ, and so does how they write boxes."""

    names = NAMES
    aliases = ALIASES
    module_prefixes = MODULES
    adapted = DECODER_LINEARS
    no_adapter = r"vision/patch_embed"
    special_tokens = SPECIAL_TOKENS
    pixels = PixelDefaults(
        image_mean=(0.48145466, 0.4578275, 0.40821073),  # CLIP's
        image_std=(0.26862954, 0.26130258, 0.27577711),
        image_pixels=(56 * 56, 28 * 28 * 1280),
        frame_pixels=(128 * 28 * 28, 768 * 28 * 28),
    )

    read_config = staticmethod(config.read_config)
    write_config = staticmethod(config.write_config)
    positions = staticmethod(positions)
    init = staticmethod(model.init)
    encode = staticmethod(model.encode)
    embed_prompts = staticmethod(model.embed_prompts)
    forward = staticmethod(model.forward)
    prefill = staticmethod(model.prefill)
    decode = staticmethod(model.decode)

    def style(self, cfg: ModelConfig) -> str:
        """Qwen2-VL: box tokens, 0 to 1000. Qwen2.5-VL: JSON, pixels of the resized image."""
        return cfg.model_type

    def full_share(self, cfg: ModelConfig) -> float:
        return len(cfg.vision.fullatt_block_indexes) / cfg.vision.depth

    def stored_shape(self, path: str, shape: tuple[int, ...], cfg: ModelConfig) -> tuple[int, ...] | None:
        """The patch projection is a 3-D convolution there."""
        v = cfg.vision
        if path != "vision/patch_embed/kernel":
            return None
        return shape[1], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size


FAMILY = Qwen2VL()
