"""Tiny models with random weights and random prompts for them, built without the library's processor and chat code.

A prompt is a list of parts: an int is that many text tokens, (h, w) an image and ("video", t, h, w) a video, in patches.
"""

import dataclasses

import jax
import numpy as np

from jaxmllm.data.images import PixelConfig, window_layout
from jaxmllm.model import hf
from jaxmllm.model.config import ModelConfig, TextConfig, VisionConfig
from jaxmllm.types import Completions, Prompts, Vision

IMAGE, VIDEO, START, END = 590, 591, 592, 593
VOCAB = 600
TEXT_TOKENS = 580  # ids below it are text


def video(t: int, h: int, w: int) -> tuple:
    return ("video", t, h, w)


MIXED = [[9], [4, (4, 6), 6], [2, (6, 4), video(3, 4, 10), 3, (4, 8), 2], [15, video(1, 4, 4), 1]]


def config(kind: str = "qwen2_5_vl", **run) -> ModelConfig:
    """Two layers of 32 channels, patches of 2 x 2 pixels, windows of 4 x 4 patches."""
    vision = VisionConfig(
        depth=2,
        hidden_size=16,
        num_heads=2,
        intermediate_size=24,
        out_hidden_size=32,
        patch_size=2,
        window_size=8 if kind == "qwen2_5_vl" else 16,
        fullatt_block_indexes=(1,) if kind == "qwen2_5_vl" else (0, 1),
        hidden_act="silu" if kind == "qwen2_5_vl" else "quick_gelu",
        tokens_per_second=4 if kind == "qwen2_5_vl" else None,
    )
    text = TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(1, 1, 2),
    )
    ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
    return ModelConfig(kind, vision, text, **ids, **run)


def params(cfg: ModelConfig, seed: int = 0) -> dict:
    """Weights large enough that errors show, norms near 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return 1 + 0.1 * noise if path[-1].key == "scale" else 0.15 * noise

    return jax.tree_util.tree_map_with_path(draw, hf.abstract_params(cfg))


def pixel_config(cfg: ModelConfig) -> PixelConfig:
    v = cfg.vision
    return PixelConfig(v.patch_size, v.temporal_patch_size, v.spatial_merge_size, v.window_size)


@dataclasses.dataclass
class Row:
    """One prompt, unpadded."""

    tokens: list[int]
    positions: np.ndarray  # [3, tokens]
    sources: list  # (frame, token of the frame) of every token, None for text
    frames: list  # (patches [W, P, C], positions [W, P, 2]) of every frame
    pictures: list  # (is_video, (t, h, w), patches in Hugging Face's order)


def row(parts: list, pixels: PixelConfig, rng: np.random.Generator, time_step: int = 1) -> Row:
    """`time_step`: positions from one temporal patch of a video to the next."""
    tokens, positions, sources, frames, pictures, following = [], [], [], [], [], 0

    def text(ids):
        nonlocal following
        tokens.extend(ids)
        positions.extend([[following + i] * 3 for i in range(len(ids))])
        sources.extend([None] * len(ids))
        following += len(ids)

    for part in parts:
        if isinstance(part, int):
            text(rng.integers(0, TEXT_TOKENS, part).tolist())
            continue
        is_video = part[0] == "video"
        t, h, w = part[1:] if is_video else (1, *part)
        patches = rng.normal(size=(t * h * w, pixels.patch_pixels)).astype(np.float32)
        pictures.append((is_video, (t, h, w), patches))
        layout = window_layout(h, w, pixels)
        windows = patches.reshape(t, h * w, -1)[:, layout.index] * (layout.index >= 0)[..., None]
        text([START])
        m = pixels.merge_size
        tokens += [VIDEO if is_video else IMAGE] * (t * h * w // m**2)
        grid = np.array(list(np.ndindex(t, h // m, w // m))) * [time_step, 1, 1]
        positions += (following + grid).tolist()
        sources += [(len(frames) + f, int(k)) for f in range(t) for k in layout.token_index]
        following += int(grid.max()) + 1
        text([END])
        frames += [(window, layout.positions) for window in windows]
    return Row(tokens, np.array(positions, np.int32).T, sources, frames, pictures)


def pad(rows: list[Row], pixels: PixelConfig, *, s: int = 0, f: int = 0, w: int = 0) -> Prompts:
    """One batch; at least `s` tokens, `f` frames and `w` windows a frame. Padding holds garbage, not zeros."""
    rng = np.random.default_rng(99)
    s = max(s, *(len(one.tokens) for one in rows))
    tokens = rng.integers(0, TEXT_TOKENS, (len(rows), s)).astype(np.int32)
    positions = rng.integers(0, 50, (len(rows), 3, s)).astype(np.int32)
    index = np.full((len(rows), s), -1, np.int32)
    frames = [frame for one in rows for frame in one.frames]
    vision = None
    if frames or f:
        f = max(f, *(len(one.frames) for one in rows))
        w = max(w, *(len(patches) for patches, _ in frames))
        patches = rng.normal(size=(len(rows), f, w, pixels.window_patches, pixels.patch_pixels)).astype(np.float32)
        vision = Vision(patches, np.full((*patches.shape[:4], 2), -1, np.int32))
    for i, one in enumerate(rows):
        n = len(one.tokens)
        tokens[i, :n], positions[i, :, :n] = one.tokens, one.positions
        for j, (windows, place) in enumerate(one.frames):
            vision.patches[i, j, : len(windows)], vision.positions[i, j, : len(place)] = windows, place
        for k, source in enumerate(one.sources):
            if source is not None:
                index[i, k] = source[0] * w * pixels.window_patches // pixels.merge_size**2 + source[1]
    lengths = np.array([len(one.tokens) for one in rows], np.int32)
    following = np.array([one.positions.max() + 1 for one in rows], np.int32)
    return Prompts(tokens, positions, lengths, following, index, vision)


def prompts(cfg: ModelConfig, rows: list[list] = MIXED, seed: int = 0, **least) -> Prompts:
    rng, pixels = np.random.default_rng(seed), pixel_config(cfg)
    return pad([row(parts, pixels, rng) for parts in rows], pixels, **least)


def completions(b: int, g: int, t: int, seed: int = 0) -> Completions:
    """Random lengths from 1 to t, at least one of them t; garbage after the end."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, t + 1, (b, g)).astype(np.int32)
    lengths[0, 0] = t
    weights = (np.arange(t) < lengths[..., None]).astype(np.float32)
    return Completions(rng.integers(0, TEXT_TOKENS, (b, g, t)).astype(np.int32), lengths, weights)
