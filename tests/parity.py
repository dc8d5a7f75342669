"""Builds the same random batch for transformers' torch model and for ours, without our processor or chat code.

Positions come from the torch model's own `get_rope_index`, patches are random numbers in Hugging Face's order.
"""


import numpy as np
import pytest

from jaxmllm.data.images import PixelConfig, window_layout
from jaxmllm.types import Prompts, Vision

IMAGE, VIDEO, START, END = 590, 591, 592, 593
VOCAB = 600
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    bos_token_id=None,
    eos_token_id=None,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
)
IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)


def torch_model(kind: str, seed: int = 0):
    """A tiny randomly initialised torch model with weights large enough that errors show."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(seed)
    if kind == "qwen2_5_vl":
        vision = dict(
            depth=4, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=64, fullatt_block_indexes=[1, 3]
        )
        config = transformers.Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision, **IDS)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    else:
        vision = dict(depth=3, embed_dim=32, num_heads=2, mlp_ratio=3, hidden_size=64)
        config = transformers.Qwen2VLConfig(text_config=TEXT, vision_config=vision, **IDS)
        model = transformers.Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))
    return model.eval()




def video(t: int, h: int, w: int) -> tuple:
    return ("video", t, h, w)


def build(rows: list[list], model, seed: int = 0):
    """(torch inputs, Prompts) of rows of parts: int = text tokens, (h, w) = image, video(t, h, w); patch counts."""
    import torch

    rng, cfg = np.random.default_rng(seed), PixelConfig()
    ids, frames_of_row, tokens_of_row = [], [], []
    image_patches, image_grids, video_patches, video_grids, per_row_grids = [], [], [], [], []
    for parts in rows:
        tokens, frames, sources, grids = [], [], [], []
        for part in parts:
            if isinstance(part, int):
                tokens += rng.integers(0, 580, part).tolist()
                sources += [None] * part
                continue
            t, h, w = part[1:] if part[0] == "video" else (1, *part)
            is_video = part[0] == "video"
            patches = rng.normal(size=(t * h * w, cfg.patch_pixels)).astype(np.float32)
            (video_patches if is_video else image_patches).append(patches)
            (video_grids if is_video else image_grids).append((t, h, w))
            grids.append((is_video, (t, h, w)))
            layout = window_layout(h, w, cfg)
            windows = patches.reshape(t, h * w, -1)[:, layout.index] * (layout.index >= 0)[..., None]
            pads = t * h * w // 4
            tokens += [START, *[VIDEO if is_video else IMAGE] * pads, END]
            sources += [None] + [(len(frames) + f, k) for f in range(t) for k in layout.token_index] + [None]
            frames += [(window, layout.positions) for window in windows]
        ids.append(tokens)
        frames_of_row.append(frames)
        tokens_of_row.append(sources)
        per_row_grids.append(grids)
    width = max(map(len, ids))
    input_ids = np.zeros((len(rows), width), np.int64)
    mask = np.zeros_like(input_ids)
    for i, tokens in enumerate(ids):
        input_ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
    inputs = dict(input_ids=torch.tensor(input_ids), attention_mask=torch.tensor(mask))
    inputs["mm_token_type_ids"] = torch.tensor(
        np.where(input_ids == IMAGE, 1, np.where(input_ids == VIDEO, 2, 0)) * mask, dtype=torch.int32
    )
    if image_patches:
        inputs |= dict(pixel_values=torch.tensor(np.concatenate(image_patches)), image_grid_thw=torch.tensor(image_grids))
    if video_patches:
        inputs |= dict(
            pixel_values_videos=torch.tensor(np.concatenate(video_patches)), video_grid_thw=torch.tensor(video_grids)
        )
    names = ("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask", "mm_token_type_ids")
    positions, delta = model.model.get_rope_index(**{k: inputs.get(k) for k in names})
    lengths = mask.sum(1)
    vision, index = None, np.full((len(rows), width), -1, np.int32)
    if any(frames_of_row):
        f = max(map(len, frames_of_row))
        w = max(p.shape[0] for frames in frames_of_row for p, _ in frames)
        patches = np.zeros((len(rows), f, w, cfg.window_patches, cfg.patch_pixels), np.float32)
        place = np.full((*patches.shape[:4], 2), -1, np.int32)
        for i, frames in enumerate(frames_of_row):
            for j, (p, q) in enumerate(frames):
                patches[i, j, : len(p)], place[i, j, : len(p)] = p, q
            for s, source in enumerate(tokens_of_row[i]):
                if source is not None:
                    index[i, s] = source[0] * w * cfg.window_tokens + source[1]
        vision = Vision(patches, place)
    positions = positions.numpy().transpose(1, 0, 2).astype(np.int32)
    following = (delta.numpy().reshape(-1) + lengths).astype(np.int32)
    prompts = Prompts(input_ids.astype(np.int32), positions, lengths.astype(np.int32), following, index, vision)
    return inputs, prompts


BATCHES = {
    "text": [[17]],
    "one image": [[4, (8, 12), 6]],
    "three odd images": [[3, (6, 10), 2, (14, 4), (10, 10), 5]],
    "odd video": [[5, video(3, 6, 8), 7]],
    "image and video": [[2, (8, 4), 3, video(2, 4, 6), 1, (4, 4), 4]],
    "padded mix": [[9], [4, (8, 12), 6], [2, (6, 4), video(3, 4, 10), 3, (12, 8), 2], [30, video(1, 4, 4), 1]],
}
