"""How the time and memory of a GRPO step grow with G, prompt, completion, picture, depth and vocabulary; compile times.

    python -m tests.benchmarks.scaling [--axes G prompt ...] [--repeats 5] [--save]

48M configuration from 2 prompts of one 448 px picture, G 8 and 32 new tokens; one of them is changed at a time. A step is
prefill, decode, scoring under the reference and update. Memory is what the compiler reserves for the largest program, its
arguments included. The exponent is the slope of log seconds over log size.
"""

import dataclasses
import math
import time

from tests.benchmarks.phases import Phases, Size, architecture
from tests.benchmarks.side_by_side import options, report, versions

STEP = ("prefill", "decode", "score", "update")
G_PICTURE = 896  # pixels: 1,024 vision tokens
AXES: dict[str, tuple[int, ...]] = {
    "G": (2, 4, 8, 16, 32, 64),
    "prompt": (64, 256, 1024, 2048),  # text tokens
    "completion": (16, 32, 64, 128),  # tokens
    "picture": (224, 448, 672, 896),  # pixels a side
    "depth": (4, 8, 16),  # layers of the decoder
    "vocabulary": (9496, 37984, 151936),
}
COLUMNS = ("seconds", *STEP, "compile", "memory_mib")


def case(axis: str, value: int):
    """(architecture, size) of a point."""
    size, changes = Size(side=G_PICTURE) if axis == "G" else Size(), {}
    field = {"G": "generations", "prompt": "text", "completion": "new_tokens", "picture": "side"}.get(axis)
    if field:
        size = dataclasses.replace(size, **{field: value})
    else:
        changes = {"text": {"num_hidden_layers" if axis == "depth" else "vocab_size": value}}
    if axis == "vocabulary":
        changes |= dict(image_token_id=value - 1, video_token_id=value - 2, vision_start_token_id=value - 3)
        changes |= dict(vision_end_token_id=value - 4)
    return architecture("48M", remat="full", **changes), size


def measure(axis: str, value: int, repeats: int) -> dict[str, float]:
    import jax

    jax.clear_caches()
    phases = Phases(*case(axis, value))
    found = phases.seconds(STEP, repeats)
    row = {name: found[name]["seconds"] for name in STEP}
    row["seconds"] = sum(row.values())
    row["compile"] = sum(found[name]["first"] for name in STEP) - row["seconds"]
    memory = phases.compiled("update").memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return row | {"memory_mib": (kept + memory.temp_size_in_bytes) / 2**20}


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = [math.log(n) for n in sizes], [math.log(t) for t in seconds]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--largest", type=int, default=0, help="leave out larger sizes of the axes")
    args = parser.parse_args()
    rows, summary, began = {}, {}, time.perf_counter()
    for axis in args.axes:
        values = [n for n in AXES[axis] if not args.largest or n <= args.largest]
        for value in values:
            rows[f"{axis} {value}"] = measure(axis, value, args.repeats)
            print(f"{axis} {value}: {rows[f'{axis} {value}']['seconds']:.2f} s", flush=True)
        fitted = [n for n in values if axis != "G" or n <= 16]
        if len(fitted) > 1:
            seconds = [rows[f"{axis} {n}"]["seconds"] for n in fitted]
            summary[f"exponent of {axis}, {fitted[0]} to {fitted[-1]}"] = exponent(fitted, seconds)
    summary["seconds in all"] = time.perf_counter() - began
    settings = {"repeats": args.repeats, "picture of the G axis": G_PICTURE}
    report("scaling", rows, COLUMNS, versions("jax", "jaxlib", "flax"), settings, summary, args.save)


if __name__ == "__main__":
    main()
