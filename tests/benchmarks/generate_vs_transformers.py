"""Sampling against transformers: same weights, same prompts, same lengths, one run.

    python -m tests.benchmarks.generate_vs_transformers [--generations 8] [--new_tokens 32] [--prompts 2] [--side 448]

Prints tokens/s, peak memory and their ratio; needs the `parity` extra.
"""

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.side_by_side import Side, compare, serve, table

MODULE = "tests.benchmarks.generate_vs_transformers"


def ours(folder: Path) -> None:
    import jax
    import jax.numpy as jnp

    from jaxmllm.config import load_model_config
    from jaxmllm.losses.logprobs import Sampling
    from jaxmllm.model import hf
    from jaxmllm.rollout import sampler
    from tests.benchmarks.peers_48m import jax_prompts

    cfg = load_model_config(folder)
    params, prompts = hf.load_params(folder, cfg), jax_prompts(folder)
    sampling = Sampling(banned=tuple(sorted(set(cfg.vision_token_ids))))

    def run(case: dict) -> dict:
        keys = sampler.row_keys(jax.random.key(0), jnp.arange(prompts.tokens.shape[0]), case["generations"])
        out = sampler.sample(
            params, cfg, prompts, keys, sampling, max_new_tokens=case["new_tokens"], stop_ids=(), pad_id=0
        )
        return {"tokens": int(jax.device_get(out.lengths).sum())}

    serve(run)


def theirs(folder: Path) -> None:
    import numpy as np
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    raw = np.load(folder / "inputs.npz")
    inputs = dict(
        input_ids=torch.tensor(raw["ids"]),
        attention_mask=torch.ones(raw["ids"].shape, dtype=torch.long),
        mm_token_type_ids=torch.tensor(raw["ids"] == 151655, dtype=torch.int32),
        pixel_values=torch.tensor(raw["pixels"].reshape(-1, raw["pixels"].shape[-1])),
        image_grid_thw=torch.tensor(raw["grids"]),
    )

    def run(case: dict) -> dict:
        n = case["new_tokens"]
        with torch.no_grad():
            out = model.generate(
                **inputs,
                do_sample=True,
                top_k=0,
                num_return_sequences=case["generations"],
                max_new_tokens=n,
                min_new_tokens=n,
                pad_token_id=0,
            )
        return {"tokens": out.shape[0] * (out.shape[1] - raw["ids"].shape[1])}

    serve(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--side", type=int, default=448)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        {"ours": ours, "theirs": theirs}[args.serve[0]](Path(args.serve[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        writer = [sys.executable, "-m", "tests.benchmarks.peers_48m", folder, str(args.prompts), str(args.side)]
        subprocess.run(writer, check=True)
        sides = [Side(n, MODULE, "--serve", s, folder) for n, s in (("jaxmllm", "ours"), ("transformers", "theirs"))]
        case = {"generations": args.generations, "new_tokens": args.new_tokens}
        found = compare(sides, case, args.repeats)
        for side in sides:
            side.close()
    for row in found.values():
        row["tokens/s"] = row["tokens"] / row["seconds"]
    print(", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "torch", "transformers")))
    print(table(found, ("seconds", "fastest", "slowest", "tokens/s", "peak_mib")))
    a, b = found["jaxmllm"], found["transformers"]
    print(f"tokens/s {a['tokens/s'] / b['tokens/s']:.1f} x, peak memory {a['peak_mib'] / b['peak_mib']:.2f} x")


if __name__ == "__main__":
    main()
