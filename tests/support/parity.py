"""The same random batch for transformers' torch model and for ours, without our processor or chat code.

M-RoPE positions follow the paper and are passed to the torch model, which would place text after a long video sooner (see
tests/test_chat.py). Patches are random numbers in Hugging Face's order.
"""

import numpy as np
import pytest

from jaxmllm.data.images import PixelConfig
from tests.support import tiny
from tests.support.tiny import END, IMAGE, START, VIDEO, VOCAB, video

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

# sizes in patches of 14 pixels
ROWS = {
    "text": [17],
    "one image": [4, (8, 12), 6],
    "three odd images": [3, (6, 10), 2, (14, 4), (10, 10), 5],
    "odd video": [5, video(3, 6, 8), 7],
    "image and video": [2, (8, 4), 3, video(2, 4, 6), 1, (4, 4), 4],
    "video first": [2, (6, 4), video(3, 4, 10), 3, (12, 8), 2],
    "short": [1],
    "image last": [30, video(1, 4, 4), 1, (10, 6)],
}


def torch_model(kind: str, seed: int = 0, **text):
    """A tiny randomly initialised torch model with weights large enough that errors show."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    torch.manual_seed(seed)
    if kind == "qwen2_5_vl":
        vision = dict(
            depth=4, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=64, fullatt_block_indexes=[1, 3]
        )
        config = transformers.Qwen2_5_VLConfig(text_config=TEXT | text, vision_config=vision, **IDS, **text)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    else:
        vision = dict(depth=3, embed_dim=32, num_heads=2, mlp_ratio=3, hidden_size=64)
        config = transformers.Qwen2VLConfig(text_config=TEXT | text, vision_config=vision, **IDS, **text)
        model = transformers.Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))
    return model.eval()


def torch_inputs(rows: list[tiny.Row]) -> dict:
    """Right-padded inputs of the torch model for one or several rows."""
    import torch

    ids = np.zeros((len(rows), max(len(row.tokens) for row in rows)), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.tokens)], mask[i, : len(row.tokens)] = row.tokens, 1
    positions = np.zeros((3, *ids.shape), np.int64)
    for i, row in enumerate(rows):  # tokens written after the prompt go on one by one
        more = row.positions.max() + 1 + np.arange(len(row.tokens) - row.positions.shape[1])
        positions[:, i, : len(row.tokens)] = np.concatenate([row.positions, np.tile(more, (3, 1))], axis=1)
    kinds = np.where(ids == IMAGE, 1, np.where(ids == VIDEO, 2, 0)) * mask
    inputs = dict(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        mm_token_type_ids=torch.tensor(kinds, dtype=torch.int32),
        position_ids=torch.tensor(positions),
    )
    for is_video, pixels, grid in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        chosen = [picture for row in rows for picture in row.pictures if picture[0] == is_video]
        if chosen:
            inputs[pixels] = torch.tensor(np.concatenate([patches for _, _, patches in chosen]))
            inputs[grid] = torch.tensor([size for _, size, _ in chosen])
    return inputs


def build(model, seed: int = 0) -> dict[str, tiny.Row]:
    """ROWS with random contents."""
    rng, step = np.random.default_rng(seed), getattr(model.config.vision_config, "tokens_per_second", 1)
    return {name: tiny.row(parts, PixelConfig(), rng, step) for name, parts in ROWS.items()}
