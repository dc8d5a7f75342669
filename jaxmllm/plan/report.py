"""A plan as a table for the terminal, as JSON, and as one row of a comparison."""

import json
from typing import Any

from jaxmllm.plan import GIB, PhasePlan, Plan
from jaxmllm.runfiles import plain


def as_json(found: Plan) -> dict[str, Any]:
    """Plain values; bytes and seconds as in `Plan`."""
    return plain(found) | {"fits": found.fits, "seconds": found.seconds}


def json_text(found: Plan) -> str:
    return json.dumps(as_json(found), indent=1)


def _axes(layout: Any) -> str:
    return " x ".join(f"{name} {getattr(layout, name)}" for name in ("replica", "fsdp", "tensor"))


def _amount(value: float, units: str = " KMGTP") -> str:
    """1.5e12 -> 1.5 T."""
    if value != value:
        return "-"
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {units[power]}".strip()


def _time(seconds: float) -> str:
    return "-" if seconds != seconds else f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def _phase_row(phase: PhasePlan, capacity: float) -> list[str]:
    messages = ", ".join(f"{kind} {_amount(size)}B" for kind, size in sorted(phase.collectives.items())) or "none"
    peak = "more than fits" if phase.peak == float("inf") else f"{phase.peak / GIB:.2f}"
    return [
        phase.name + (f" x {phase.runs}" if phase.runs > 1 else ""),
        "-" if phase.temporary != phase.temporary else f"{phase.temporary / GIB:.2f}",
        peak + ("" if phase.peak <= capacity else " (!)"),
        _amount(phase.flops),
        _amount(phase.bytes),
        messages,
        _time(phase.seconds),
        phase.bound,
        f"{100 * phase.mfu:.0f} %" if phase.useful_flops and phase.mfu == phase.mfu else "-",
        f"{phase.compile_seconds:.0f} s",
    ]


COLUMNS = (
    "phase", "temporaries GiB", "peak GiB", "FLOPs", "bytes", "messages", "at least", "bound by", "MFU", "compiled in",
)  # fmt: skip


def show(found: Plan, console: Any) -> None:
    """Prints the table to a rich console."""
    from rich.table import Table

    s = found.sizes
    console.print(
        f"{found.model}, {found.parameters / 1e9:.2f} B parameters, on {found.mesh}: {found.devices} x {found.chip}\n"
        f"training {_axes(found.train)}; sampling {_axes(found.sample)}; remat {found.remat}\n"
        f"{s.prompts} prompts a rollout x {s.generations} completions, {s.prompt_tokens} + {s.new_tokens} tokens (padded), "
        f"{found.microbatch} prompts a microbatch"
    )
    kinds = ", ".join(f"{name} {size / GIB:.2f}" for name, size in found.memory.items() if size)
    console.print(f"a chip holds {found.capacity / GIB:.2f} GiB; what stays: {kinds} GiB")
    table = Table(*COLUMNS, title="on one chip; times are a bound: every resource at its peak, everything overlapped")
    for phase in found.phases:
        table.add_row(*_phase_row(phase, found.capacity))
    console.print(table)
    for phase in found.phases:
        if phase.flops > 1.15 * phase.traced_flops > 0:
            console.print(f"{phase.name}: devices repeat work, {phase.flops / phase.traced_flops:.2f} x what was to do")
    if found.fits:
        console.print(f"fits; an iteration takes at least {_time(found.seconds)}")
    for line in found.advice:
        console.print(f"does not fit: {line}")


def markdown(plans: list[dict[str, Any]]) -> str:
    """One row a plan, given as `as_json` returns it."""
    lines = [
        "| model | mesh | microbatch | fits | peak GiB of | iteration | update | bound by | update MFU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in plans:
        peak = max(float(phase["peak"]) for phase in one["phases"])  # inf and nan are strings in JSON
        update = next(phase for phase in one["phases"] if phase["name"] == "update")
        seconds, mfu = float(update["seconds"]), float(update["mfu"])
        lines.append(
            f"| {one['model'].rpartition('/')[2]} | {one['mesh']} | {one['microbatch']} | {'yes' if one['fits'] else 'no'} "
            f"| {peak / GIB:.1f} of {one['capacity'] / GIB:.1f} | {_time(float(one['seconds']))} | {_time(seconds)} "
            f"| {update['bound'] or '-'} | {'-' if mfu != mfu else f'{100 * mfu:.0f} %'} |"
        )
    return "\n".join(lines)
