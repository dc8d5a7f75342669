"""How close every phase comes to this machine: FLOP/s against a large product's, bytes/s against a copy's.

    python -m tests.benchmarks.roofline [--model 48M] [--generations 8] [--prompts 2] [--dtype float32] [--repeats 5] [--save]
    python -m tests.benchmarks.roofline --model Qwen2.5-VL-3B-Instruct --layers 2   # products as large as a real model's

FLOPs are products alone, counted from the traced program's loops; what a rematerialised block runs twice counts twice.
Bytes are the least a phase must move: its parameters once a pass (decoding: once a token) and, in an update, gradients and
both moments read and written. `of peak` is the larger of the two shares. The 48M configuration is narrow, 160 and 256, so
small operations weigh as much as products; of a published model a few layers are enough to fill a machine. With --save the
figures go to tests/benchmarks/results, under the model's name.
"""

import dataclasses

from tests.benchmarks.phases import STEP, Phases, Size, architecture, peaks
from tests.benchmarks.side_by_side import options, report, versions

COLUMNS = ("seconds", "GFLOP", "GFLOP/s", "GB/s", "share of FLOP/s", "share of bytes/s", "of peak")


def least_bytes(phases: Phases, name: str) -> float:
    import jax

    def size(tree) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    params = phases.state.params
    vision = size(params["vision"])
    text = size(params) - vision
    return {
        "encode": vision,
        "prefill": text,
        "decode": text * (phases.size.new_tokens - 1),
        "score": text + vision,
        # forward and backward read the weights; gradients are written and read, weights and moments read and written
        "update": 2 * size(params) + 4 * size(params) + 2 * size(phases.state.opt_state),
    }[name]


def measure(phases: Phases, peak: dict[str, float], repeats: int) -> dict[str, dict[str, float]]:
    product = peak[f"{phases.cfg.dtype} FLOP/s"]
    found = phases.seconds(STEP, repeats)
    rows = {}
    for name in STEP:
        seconds, flops, moved = found[name]["seconds"], phases.flops(name), least_bytes(phases, name)
        shares = {
            "share of FLOP/s": flops / seconds / product,
            "share of bytes/s": moved / seconds / peak["copy bytes/s"],
        }
        rows[name] = {"seconds": seconds, "GFLOP": flops / 1e9, "GFLOP/s": flops / seconds / 1e9}
        rows[name] |= {"GB/s": moved / seconds / 1e9, **shares, "of peak": max(shares.values())}
    return rows


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", default="48M")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--layers", type=int, default=0, help="of tower and decoder each; 0: the model's")
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    args = parser.parse_args()
    size = Size(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Size)})
    peak = peaks()
    changes: dict = {}
    if args.layers:  # the last block of the tower attends over whole frames
        full = {"depth": args.layers, "fullatt_block_indexes": (args.layers - 1,)}
        changes = {"text": {"num_hidden_layers": args.layers}, "vision": full}
    cfg = architecture(args.model, dtype=args.dtype, remat="full", **changes)
    rows = measure(Phases(cfg, size), peak, args.repeats)
    settings = dataclasses.asdict(size) | {
        name: getattr(args, name) for name in ("model", "layers", "dtype", "repeats")
    }
    summary = {name: value / 1e9 for name, value in peak.items()}
    summary = {f"peak, 1e9 {name}": value for name, value in summary.items()}
    summary["update: share of the matmul peak"] = rows["update"]["share of FLOP/s"]
    report(f"roofline_{args.model}", rows, COLUMNS, versions("jax", "jaxlib", "flax"), settings, summary, args.save)


if __name__ == "__main__":
    main()
