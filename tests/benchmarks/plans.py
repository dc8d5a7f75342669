"""The README's table of plans: Perception-R1's grounding with all parameters trained, four sizes on the meshes.

    python -m tests.benchmarks.plans FOLDER             compiles what FOLDER lacks, one program at a time; start it again any time
    python -m tests.benchmarks.plans FOLDER --show      the table of what is there

G 8, up to 1,280 vision and 512 other prompt tokens, 768 new ones. Each line of the table is the command that is printed while
it runs, cut into its phases so that nothing is compiled twice. Needs the compilers: the extras `tpu` and `cuda`.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxmllm.plan.report import markdown

ROOT = Path(__file__).parents[2]
PHASES = ("update", "relayout,prefill,decode", "score")  # each a process of its own
# (size, mesh): prompts a rollout; two microbatches each, with one or two prompts a device
CASES = {
    ("3B", "v5e_16"): 32,
    ("7B", "v5e_64"): 128,
    ("32B", "v5e_256"): 128,
    ("72B", "v5p_64"): 128,
    ("3B", "h100_8"): 16,
    ("7B", "h100_8"): 16,
    ("32B", "h100_8x4"): 64,
}


def command(size: str, mesh: str, batch: int) -> list[str]:
    return [
        *("jaxmllm", "plan", "configs/perception_r1/grounding_2b.py", "--mesh", mesh),
        *("--model", f"Qwen/Qwen2.5-VL-{size}-Instruct", "--batch_size", str(batch)),
        *("--optim.gradient_accumulation_steps", "2", "--vision_tokens", "1280", "--prompt_tokens", "1792"),
    ]


def file(folder: Path, size: str, mesh: str, phases: str) -> Path:
    return folder / f"{size}_{mesh}_{phases.replace(',', '+')}.json"


def compile_all(folder: Path) -> None:
    for phases in PHASES:
        for (size, mesh), batch in CASES.items():
            out = file(folder, size, mesh, phases)
            if out.exists():
                continue
            line = command(size, mesh, batch)
            print(" ".join(line), "--phases", phases, flush=True)
            began = time.monotonic()
            ran = subprocess.run(
                [sys.executable, "-m", "jaxmllm.cli", *line[1:], "--phases", phases, "--json"],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=open(out.with_suffix(".log"), "w"), text=True,
            )  # fmt: skip
            if ran.returncode not in (0, 1) or not ran.stdout:  # 1: it does not fit
                print(f"  failed with {ran.returncode}, see {out.with_suffix('.log')}", flush=True)
                continue
            out.write_text(ran.stdout)
            found = json.loads(ran.stdout)
            what = "; ".join(found["advice"]) or f"update MFU {mfu(found)}"
            print(f"  {time.monotonic() - began:.0f} s; {what}", flush=True)


def mfu(found: dict[str, Any]) -> str:
    return ", ".join(f"{100 * float(one['mfu']):.0f} %" for one in found["phases"] if one["name"] == "update") or "-"


def together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One plan of those of its phases."""
    whole = parts[0] | {"phases": [], "advice": [], "memory": {}}
    for part in parts:
        whole["phases"] += part["phases"]
        whole["advice"] += part["advice"]
        whole["memory"] |= part["memory"]
    whole["seconds"] = sum(float(part["seconds"]) for part in parts)
    whole["fits"] = not whole["advice"]
    return whole


def main(folder: Path, show: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not show:
        compile_all(folder)
    plans = []
    for size, mesh in CASES:
        files = [file(folder, size, mesh, phases) for phases in PHASES]
        if files[0].exists():
            missing = [path.stem for path in files if not path.exists()]
            if missing:
                print(f"without {', '.join(missing)}", file=sys.stderr)
            plans.append(together([json.loads(path.read_text()) for path in files if path.exists()]))
    print(markdown(plans))
    for one in plans:
        for line in one["advice"]:
            print(f"{one['model'].rpartition('/')[2]} on {one['mesh']}: {line}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--show" in sys.argv[2:])
