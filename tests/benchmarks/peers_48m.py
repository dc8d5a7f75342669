"""The 48M configuration that comparisons run: written once by transformers, read by every side.

Tower 8 x 160, decoder 8 x 256, vocabulary 151,936; prompts of one image of `side` pixels and 24 text tokens.
"""

import sys
from pathlib import Path

import numpy as np

IMAGE = 151655


def write(folder: Path, prompts: int = 2, side: int = 448) -> None:
    """Checkpoint and inputs.npz: ids, pixels in Hugging Face's order, grids, M-RoPE positions."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    text = dict(
        vocab_size=151936,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters=rope,
    )
    vision = dict(
        depth=8,
        hidden_size=160,
        num_heads=4,
        intermediate_size=432,
        out_hidden_size=256,
        fullatt_block_indexes=[1, 3, 5, 7],
    )
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    rng, grid = np.random.default_rng(0), side // 14
    vision_tokens = grid * grid // 4
    ids = rng.integers(1000, 50000, (prompts, vision_tokens + 24))
    ids[:, 3], ids[:, 4 : 4 + vision_tokens], ids[:, 4 + vision_tokens] = 151652, IMAGE, 151653
    grids = np.array([[1, grid, grid]] * prompts)
    kinds = torch.tensor(ids == IMAGE, dtype=torch.int32)
    positions, delta = model.model.get_rope_index(
        torch.tensor(ids), mm_token_type_ids=kinds, image_grid_thw=torch.tensor(grids)
    )
    np.savez(
        folder / "inputs.npz",
        ids=ids,
        pixels=rng.normal(size=(prompts, grid * grid, 1176)).astype(np.float32),
        grids=grids,
        positions=positions.numpy(),
        delta=delta.numpy(),
    )


def jax_prompts(folder: Path):
    """The same inputs as `jaxmllm.types.Prompts`."""
    import jax.numpy as jnp

    from jaxmllm.data.images import PixelConfig, window_layout
    from jaxmllm.types import Prompts, Vision

    raw = np.load(folder / "inputs.npz")
    ids, cfg = raw["ids"], PixelConfig()
    layout = window_layout(*raw["grids"][0][1:].tolist(), cfg)
    patches = raw["pixels"][:, layout.index] * (layout.index >= 0)[..., None]
    index = np.where(ids == IMAGE, np.cumsum(ids == IMAGE, axis=1) - 1, -1)
    index = np.where(index >= 0, layout.token_index[np.maximum(index, 0)], -1)
    rows, length = ids.shape
    return Prompts(
        tokens=jnp.asarray(ids, jnp.int32),
        positions=jnp.asarray(raw["positions"].transpose(1, 0, 2), jnp.int32),
        lengths=jnp.full(rows, length, jnp.int32),
        next_position=jnp.asarray(raw["delta"].reshape(-1) + length, jnp.int32),
        vision_index=jnp.asarray(index, jnp.int32),
        vision=Vision(jnp.asarray(patches[:, None]), jnp.asarray(np.stack([layout.positions] * rows)[:, None])),
    )


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:]))
