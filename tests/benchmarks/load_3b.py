"""The real 3B layout: memory of loading, logits against torch, export bit for bit.

    python -m tests.benchmarks.load_3b --folder /tmp/qwen_3b [--json FILE]

transformers writes Qwen2.5-VL-3B's architecture with random bfloat16 weights in two or more shards (7.5 GB, and as much
again for the export; removed at the end). Every measurement runs in a process of its own, one at a time, so 12 GB of
memory do. Needs the `parity` extra.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

TORCH = ("bfloat16_sdpa", "bfloat16_eager", "float32_sdpa")  # dtype and attention of the reference runs
MODULE = "tests.benchmarks.load_3b"
# config.json of Qwen2.5-VL-3B-Instruct, where it differs from the defaults of its classes or names a size
TEXT = dict(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    max_position_embeddings=128000,
    rms_norm_eps=1e-6,
    bos_token_id=151643,
    eos_token_id=151645,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
)
VISION = dict(
    depth=32,
    hidden_size=1280,
    num_heads=16,
    intermediate_size=3420,
    out_hidden_size=2048,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
    tokens_per_second=2,
)
PROMPT = "Output the bounding box of the red circle in the image."
SIDES = (196, 252)  # pixels, height and width of the image


def write(folder: Path, layers: int) -> dict:
    """Checkpoint, tokenizer and `inputs.npz`, the prompt as the torch model reads it."""
    import torch
    from PIL import Image
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from jaxmllm.data.chat import Processor
    from jaxmllm.data.images import patchify
    from jaxmllm.model.family import load_model_config
    from tests.benchmarks.peers_48m import write_tokenizer

    torch.manual_seed(0)
    text = TEXT | {"num_hidden_layers": layers}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=VISION, tie_word_embeddings=True)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    write_tokenizer(folder)
    cfg = load_model_config(folder)
    processor = Processor.from_pretrained(folder, cfg)
    noise = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(SIDES[::-1], Image.Resampling.BICUBIC)
    image.save(folder / "image.png")
    ids = processor.encode(conversation(folder)).tokens[None].astype(np.int64)
    pixels, grid = patchify(image, processor.pixel_config)
    np.savez(folder / "inputs.npz", ids=ids, pixels=pixels, grids=np.array([grid]))
    files = sorted(folder.glob("*.safetensors"))
    return {"shards": len(files), "bytes": sum(file.stat().st_size for file in files), "tokens": ids.shape[1]}


def conversation(folder: Path) -> list[dict]:
    parts = [{"type": "image", "image": folder / "image.png"}, {"type": "text", "text": PROMPT}]
    return [{"role": "user", "content": parts}]


def ours(folder: Path) -> dict:
    """Loads, exports, then runs: the peak of each is read before the next begins."""
    import jax
    import jax.numpy as jnp

    import jaxmllm
    from jaxmllm.model import embedding, family

    jax.block_until_ready(jnp.zeros(1) + 1)
    figures = {"imports_bytes": peak()}
    started = time.perf_counter()
    model = jaxmllm.load(folder, dtype="bfloat16")
    jax.block_until_ready(model.params)
    figures |= {"load_seconds": time.perf_counter() - started, "load_peak_bytes": peak()}
    started = time.perf_counter()
    jaxmllm.save(model, folder / "export")
    figures |= {"export_seconds": time.perf_counter() - started, "export_peak_bytes": peak()}
    prompts, _ = model.prepare([model.processor.encode(conversation(folder))])

    def forward(params, prompts):
        hidden, _ = family.forward(params, model.cfg, prompts)
        return embedding.logits(params, hidden)

    # XLA's CPU backend multiplies in float32: left alone it widens all layers before the loop over them, 15 GB more
    options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    run = jax.jit(forward, compiler_options=options if jax.default_backend() == "cpu" else None)
    logits = run(model.params, prompts)[0, : int(prompts.lengths[0])]
    np.save(folder / "ours.npy", np.asarray(logits, np.float32))
    return figures | {"forward_peak_bytes": peak()}


def widen(model, wide, pixels) -> None:
    """Every part computes in `wide`, its weights widened only while it runs: exact, since they are stored in bfloat16."""
    visual, text = model.model.visual, model.model.language_model

    def before(module, _):
        module.narrow = {parameter: parameter.data for parameter in module.parameters()}
        for parameter, data in module.narrow.items():
            parameter.data = data.to(wide)

    def after(module, *_):
        for parameter, data in module.narrow.items():
            parameter.data = data

    # the tower's own dtype is still the narrow one, so its input comes rounded
    visual.patch_embed.register_forward_pre_hook(lambda *_: (pixels.to(wide),))
    text.embed_tokens.register_forward_hook(lambda module, ids, output: output.to(wide))
    for part in (visual.patch_embed, *visual.blocks, visual.merger, *text.layers, text.norm, model.lm_head):
        part.register_forward_pre_hook(before)
        part.register_forward_hook(after)


def theirs(folder: Path, dtype: str, attention: str = "sdpa") -> dict:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation=attention
    ).eval()
    figures = {"load_peak_bytes": peak()}
    raw, wide = np.load(folder / "inputs.npz"), getattr(torch, dtype)
    pixels = torch.tensor(raw["pixels"])
    if wide != model.dtype:
        widen(model, wide, pixels)
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(raw["ids"]),
            attention_mask=torch.ones(raw["ids"].shape, dtype=torch.long),
            mm_token_type_ids=torch.tensor(raw["ids"] == model.config.image_token_id, dtype=torch.int32),
            pixel_values=pixels,
            image_grid_thw=torch.tensor(raw["grids"]),
        ).logits
    assert logits.dtype == wide, logits.dtype
    np.save(folder / f"{dtype}_{attention}.npy", logits[0].float().numpy())
    return figures | {"forward_peak_bytes": peak()}


def unequal(folder: Path) -> dict:
    """Tensors of the export that differ from the checkpoint's in name, dtype, shape or any bit."""
    import torch
    from safetensors import safe_open

    def tensors(where: Path) -> dict:
        handles = [safe_open(file, "pt") for file in sorted(where.glob("*.safetensors"))]
        # transformers 5 may nest the names one level deeper than the files of the hub
        return {name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): (handle, name)
                for handle in handles for name in handle.keys()}  # fmt: skip

    before, after = tensors(folder), tensors(folder / "export")

    def same(name: str) -> bool:
        a, b = (handle.get_tensor(key) for handle, key in (before[name], after[name]))
        return (
            a.dtype == b.dtype == torch.bfloat16
            and a.shape == b.shape
            and torch.equal(a.view(torch.int16), b.view(torch.int16))
        )

    differing = sorted(before.keys() ^ after.keys()) + [n for n in before.keys() & after.keys() if not same(n)]
    return {"tensors": len(before), "differing": differing}


def peak() -> int:
    """Bytes: the most that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def distance(a: np.ndarray, b: np.ndarray) -> dict:
    """`a` against `b`, logits [tokens, vocabulary]."""
    difference = a.astype(np.float64) - b
    return {
        "relative": float(np.linalg.norm(difference) / np.linalg.norm(b)),
        "largest": float(np.abs(difference).max()),
        "same_top": float((a.argmax(-1) == b.argmax(-1)).mean()),
    }


STAGES = {
    "write": write,
    "ours": lambda folder, _: ours(folder),
    "bfloat16_sdpa": lambda folder, _: theirs(folder, "bfloat16"),
    "bfloat16_eager": lambda folder, _: theirs(folder, "bfloat16", "eager"),
    "float32_sdpa": lambda folder, _: theirs(folder, "float32"),
    "compare": lambda folder, _: unequal(folder),
}


def report(found: dict, folder: Path) -> dict:
    size, loaded = found["write"]["bytes"], found["ours"]
    logits = {name: np.load(folder / f"{name}.npy") for name in ("ours", *TORCH)}
    bf16, eager, f32 = (logits[name] for name in TORCH)
    pairs = {
        "jaxmllm bf16 - torch f32": distance(logits["ours"], f32),
        "torch bf16 - torch f32": distance(bf16, f32),
        "jaxmllm bf16 - torch bf16": distance(logits["ours"], bf16),
        # what two correct bfloat16 programs differ by: torch's own two attention kernels
        "torch eager - torch bf16": distance(eager, bf16),
    }
    compared = found["compare"]
    print(f"checkpoint: {size / 2**30:.2f} GiB in {found['write']['shards']} shards, {compared['tensors']} tensors")
    print(f"{'peak memory':28}{'GiB':>10}{'x file':>10}")
    for label, value in (
        ("jaxmllm imports", loaded["imports_bytes"]),
        ("jaxmllm load", loaded["load_peak_bytes"]),
        ("jaxmllm load and export", loaded["export_peak_bytes"]),
        ("jaxmllm and forward", loaded["forward_peak_bytes"]),
        ("torch load", found["bfloat16_sdpa"]["load_peak_bytes"]),
        ("torch load and forward", found["bfloat16_sdpa"]["forward_peak_bytes"]),
    ):
        print(f"{label:28}{value / 2**30:>10.2f}{value / size:>10.2f}")
    print(f"load {loaded['load_seconds']:.0f} s, export {loaded['export_seconds']:.0f} s")
    print(f"{'logits':28}{'relative':>10}{'largest':>10}{'same top':>10}")
    for label, row in pairs.items():
        print(f"{label:28}{row['relative']:>10.5f}{row['largest']:>10.4f}{row['same_top']:>10.3f}")
    print(f"export: {len(compared['differing'])} of {compared['tensors']} tensors differ")
    return found | {"logits": pairs, "load_peak_x_file": loaded["load_peak_bytes"] / size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="must not exist yet; removed at the end")
    parser.add_argument("--layers", type=int, default=36, help="of the decoder; fewer to try the script")
    parser.add_argument("--json", type=Path, help="write all figures here as well")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(STAGES[args.stage](args.folder, args.layers)))
        return
    args.folder.mkdir(parents=True)
    found = {}
    try:
        for stage in STAGES:
            options = ["--folder", args.folder, "--layers", str(args.layers), "--stage", stage]
            command = [sys.executable, "-m", MODULE, *options]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[stage] = json.loads(out.splitlines()[-1])
        figures = report(found, args.folder)
    finally:
        shutil.rmtree(args.folder)
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
