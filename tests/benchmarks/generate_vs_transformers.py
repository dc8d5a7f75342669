"""Sampling against transformers: same weights, same prompts, same lengths, one run.

    python -m tests.benchmarks.generate_vs_transformers [--generations 8] [--new_tokens 32] [--prompts 2] [--side 448]

Needs the `parity` extra.
"""

import tempfile
from pathlib import Path

from tests.benchmarks.side_by_side import Side, all_versions, compare, options, peak_mib, ratios, report, serve

MODULE = "tests.benchmarks.generate_vs_transformers"
COLUMNS = ("seconds", "processor", "fastest", "slowest", "first", "tokens/s", "imports_mib", "ready_mib", "peak_mib")


def ours(folder: Path) -> None:
    import jax
    import jax.numpy as jnp

    from jaxmllm.model import hf
    from jaxmllm.model.family import load_model_config
    from jaxmllm.model.logprobs import Sampling
    from jaxmllm.rollout import sampler
    from tests.benchmarks.peers_48m import jax_prompts

    imported = peak_mib()
    cfg = load_model_config(folder)
    params, prompts = hf.load_params(folder, cfg), jax_prompts(folder)
    sampling = Sampling(banned=tuple(sorted(set(cfg.vision_token_ids))))

    def run(case: dict) -> dict:
        keys = sampler.row_keys(jax.random.key(0), jnp.arange(prompts.tokens.shape[0]), case["generations"])
        out = sampler.sample(
            params, cfg, prompts, keys, sampling, max_new_tokens=case["new_tokens"], stop_ids=(), pad_id=0
        )
        return {"tokens": int(jax.device_get(out.lengths).sum())}

    serve(run, ("jax", "flax"), imported)


def theirs(folder: Path) -> None:
    import numpy as np
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    imported = peak_mib()
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

    serve(run, ("torch", "transformers"), imported)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--side", type=int, default=448)
    args = parser.parse_args()
    if args.serve:
        {"ours": ours, "theirs": theirs}[args.serve[0]](Path(args.serve[1]))
        return
    from tests.benchmarks import peers_48m

    with tempfile.TemporaryDirectory() as folder:
        peers_48m.make(folder, args.prompts, args.side)
        sides = [
            Side("jaxmllm", MODULE, "ours", folder),
            Side("transformers", MODULE, "theirs", folder, python=args.peer_python),
        ]
        case = {"generations": args.generations, "new_tokens": args.new_tokens}
        rows = compare(sides, case, args.repeats, args.warmup)
        for side in sides:
            side.close()
    for row in rows.values():
        row["tokens/s"] = row["tokens"] / row["seconds"]
    settings = case | {"prompts": args.prompts, "side": args.side, "repeats": args.repeats}
    summary = ratios(rows, "jaxmllm", "transformers")
    report("generate_vs_transformers", rows, COLUMNS, all_versions(sides), settings, summary, args.save)


if __name__ == "__main__":
    main()
