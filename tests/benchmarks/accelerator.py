"""A GRPO step on one accelerator, phase by phase, at the size of Qwen2.5-VL-3B with random bfloat16 weights.

    python -m tests.benchmarks.accelerator [--save] [--model tiny --side 112 ...]

Needs jax, flax, optax, einops, numpy, transformers and safetensors, nothing else. Prints the time of every phase, tokens/s,
MFU, memory, which attention kernels run and compile times, then the same generation and supervised step in transformers
where torch is there. Under eight minutes on an H100: phases that would pass `--seconds` are left out and named.
"""

import dataclasses
import gc
import statistics
import time
import zlib

from tests.benchmarks.phases import STEP, Phases, Size, architecture, peaks, stand_in
from tests.benchmarks.side_by_side import options, report, versions

COLUMNS = ("seconds", "compile", "tokens/s", "TFLOP/s", "MFU", "memory_gib")
TINY = dict(
    text=dict(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        mrope_section=(4, 6, 6),
    ),
    vision=dict(
        depth=2, hidden_size=32, num_heads=2, intermediate_size=64, out_hidden_size=64, fullatt_block_indexes=(1,)
    ),
    image_token_id=2047,
    video_token_id=2046,
    vision_start_token_id=2045,
    vision_end_token_id=2044,
)


def memory_gib() -> float:
    """Most memory in use so far on the first device; of the process where the backend does not say."""
    import jax

    from tests.benchmarks.side_by_side import peak_mib

    stats = jax.devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else peak_mib() / 1024


def kernels(cfg, phases: Phases) -> dict[str, str]:
    """Which attention implementation the prompt and the tower's full blocks take."""
    from jaxmllm.model.attention import choose_kernel

    vision = cfg.vision
    patches = (phases.size.side // vision.patch_size) ** 2
    return {
        "prompt": choose_kernel(cfg.attention, phases.prompts.tokens.shape[1], cfg.text.head_dim, cfg.dtype),
        "tower": choose_kernel(cfg.attention, patches, vision.hidden_size // vision.num_heads, cfg.dtype),
    }


def host_work(phases: Phases, repeats: int) -> dict[str, dict[str, float]]:
    """Pictures to patches, and a reward of every completion."""
    size = phases.size
    texts = ["0123456789" * size.new_tokens] * (size.prompts * size.generations)

    def median(function) -> float:
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    return {
        "data": {"seconds": median(phases.make_prompts)},
        "reward": {"seconds": median(lambda: [zlib.crc32(text.encode()) for text in texts])},
    }


def measure(phases: Phases, repeats: int, limit: float, peak: float) -> tuple[dict, list[str]]:
    """Rows of the table, and the phases left out because `limit` seconds had passed."""
    size, began, rows, left = phases.size, time.perf_counter(), host_work(phases, repeats), []
    completions = size.prompts * size.generations * size.new_tokens
    # decoding takes the state of a prefill with it, so these two are timed together
    for names in (("encode",), ("prefill", "decode"), ("score",), ("update",), ("sft",)):
        if time.perf_counter() - began > limit:
            left += names
            continue
        for name, found in phases.seconds(names, repeats).items():
            seconds = found["seconds"]
            row = {"seconds": seconds, "compile": found["first"] - seconds, "memory_gib": memory_gib()}
            rate = phases.flops(name) / seconds
            rows[name] = row | {"tokens/s": completions / seconds, "TFLOP/s": rate / 1e12, "MFU": rate / peak}
    return rows, left


def transformers_rows(cfg, size: Size, repeats: int) -> dict[str, dict[str, float]]:
    """Generation and one supervised step of transformers on the same device, random weights of the same sizes."""
    try:
        import torch
        import transformers
    except ImportError:
        return {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and cfg.text.hidden_size > 256:
        return {}
    text, vision = dataclasses.asdict(cfg.text), dataclasses.asdict(cfg.vision)
    section = list(text.pop("mrope_section"))
    text |= {
        "rope_parameters": {"rope_type": "default", "rope_theta": text.pop("rope_theta"), "mrope_section": section}
    }
    vision |= {"fullatt_block_indexes": list(vision["fullatt_block_indexes"])}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(cfg, name) for name in names}
    config = transformers.Qwen2_5_VLConfig(text_config=text | ids, vision_config=vision, **ids)
    with torch.device(device):
        kind = torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=kind)
    grid = size.side // cfg.vision.patch_size
    vision_tokens = grid * grid // cfg.vision.spatial_merge_size**2
    rows = size.prompts * size.generations

    def inputs(count: int, extra: int) -> dict:
        tokens = torch.randint(0, cfg.text.vocab_size // 2, (count, vision_tokens + size.text + extra), device=device)
        tokens[:, 4 : 4 + vision_tokens] = cfg.image_token_id
        pixels = torch.randn(count * grid * grid, cfg.vision.patch_pixels, device=device, dtype=kind)
        found = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=pixels)
        found["mm_token_type_ids"] = (tokens == cfg.image_token_id).int()
        return found | {"image_grid_thw": torch.tensor([[1, grid, grid]] * count, device=device)}

    n = size.new_tokens
    prompt = inputs(size.prompts, 0)

    @torch.no_grad()
    def generate() -> None:
        forced = dict(max_new_tokens=n, min_new_tokens=n, pad_token_id=0, eos_token_id=1)
        model.generate(**prompt, do_sample=True, top_k=0, num_return_sequences=size.generations, **forced)

    whole = inputs(rows, n)
    labels = torch.full_like(whole["input_ids"], -100)
    labels[:, -n:] = whole["input_ids"][:, -n:]

    def supervised() -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        model(**whole, labels=labels).loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    found = {}
    for name, function in (("generate", generate), ("sft", supervised)):
        times = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        seconds = statistics.median(times[1:])
        memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else memory_gib()
        found[f"transformers {name}"] = {"seconds": seconds, "tokens/s": rows * n / seconds, "memory_gib": memory}
    return found


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", default="Qwen2.5-VL-3B-Instruct", help="or 48M, or tiny")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="full", choices=("none", "dots", "full"))
    parser.add_argument("--seconds", type=float, default=360, help="after so long no further phase is begun")
    defaults = Size(prompts=8, generations=8, new_tokens=128, side=448, text=64)
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name}", type=int, default=getattr(defaults, field.name))
    args = parser.parse_args()
    stand_in("jaxtyping", "PIL")
    import jax

    size = Size(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Size)})
    small = args.model == "tiny"
    cfg = architecture("48M" if small else args.model, dtype=args.dtype, remat=args.remat, **(TINY if small else {}))
    measured = peaks()
    peak = measured[f"{args.dtype} FLOP/s"]
    phases = Phases(cfg, size, param_dtype=args.dtype, moment_dtype=args.dtype)
    rows, left = measure(phases, args.repeats, args.seconds, peak)
    chosen = kernels(cfg, phases)
    del phases
    gc.collect()
    rows |= transformers_rows(cfg, size, args.repeats)
    device = jax.devices()[0]
    summary = {f"measured {name}": value for name, value in measured.items()}
    summary |= {f"attention of the {part}": kernel for part, kernel in chosen.items()}
    summary |= {"device": device.device_kind, "step": sum(rows[n]["seconds"] for n in STEP if n in rows)}
    if left:
        summary["left out for time"] = ", ".join(left)
    settings = dataclasses.asdict(size) | {"model": args.model, "dtype": args.dtype, "remat": args.remat}
    used = versions("jax", "jaxlib", "flax", "optax", "transformers", "torch")
    name = "accelerator_" + "".join(c if c.isalnum() else "_" for c in device.device_kind.lower())
    report(name, rows, COLUMNS, used, settings, summary, args.save)


if __name__ == "__main__":
    main()
