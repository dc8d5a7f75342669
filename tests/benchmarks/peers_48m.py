"""The 48M configuration that comparisons run: written once by transformers, read by every side.

Tower 8 x 160, decoder 8 x 256, vocabulary 151,936; prompts of one image of `side` pixels. `write` makes the checkpoint,
arrays for sides that call a model (`inputs.npz`, 24 text tokens) and a tokenizer, preprocessor and `chat.jsonl` for sides
that start from pictures and text.
"""

import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

IMAGE = 151655
QUESTION = "Count the round things in the picture."
MARKERS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()  # ids 151643 to 151656
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, text_ids: int = 151643, eos_token: str | None = "<|im_end|>") -> None:
    """The markers after `text_ids` ids of text (the default gives them their real ids); the text is bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = letters + [f"<{i}>" for i in range(len(letters), text_ids)]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in MARKERS])
    PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=TEMPLATE, eos_token=eos_token, pad_token="<|endoftext|>"
    ).save_pretrained(folder)


def write_preprocessors(folder: Path, sizes: dict[str, int]) -> None:
    """The preprocessor configs of transformers, for pictures and for videos."""
    for name, kind in (("preprocessor", "image"), ("video_preprocessor", "video")):
        config = sizes | {
            f"{kind}_processor_type": f"Qwen2VL{kind.title()}Processor",
            "processor_class": "Qwen2_5_VLProcessor",
        }
        (folder / f"{name}_config.json").write_text(json.dumps(config))


def write_chat(folder: Path, prompts: int, side: int) -> None:
    """Preprocessor configs, pictures of noise, and `chat.jsonl` with one question about each."""
    from PIL import Image

    sizes = dict(patch_size=14, temporal_patch_size=2, merge_size=2, min_pixels=784, max_pixels=side * side)
    write_preprocessors(folder, sizes)
    rng, lines = np.random.default_rng(1), []
    for k in range(prompts):
        noise = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
        noise.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{k}.png")
        lines.append(json.dumps({"id": str(k), "prompt": QUESTION, "image": f"{k}.png"}))
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n")


def checksum(text: str, record: Any = None) -> float:
    """A reward that differs between completions, so that every group has a gradient."""
    return zlib.crc32(text.encode()) / 2**32


def make(folder: str | Path, *arguments: int) -> None:
    """`write` in a process of its own, so that the driver stays small and the sides inherit nothing."""
    subprocess.run([sys.executable, "-m", "tests.benchmarks.peers_48m", str(folder), *map(str, arguments)], check=True)


def write(folder: Path, prompts: int = 2, side: int = 448) -> None:
    """Everything. inputs.npz: ids, pixels in Hugging Face's order, grids, M-RoPE positions."""
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
    write_tokenizer(folder)
    write_chat(folder, prompts, side)


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
