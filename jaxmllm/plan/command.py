"""`jaxmllm plan`."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from jaxmllm.errors import EXIT_INPUT, InputError
from jaxmllm.machine.targets import MeshTarget, load_mesh
from jaxmllm.plan import Plan, report, search
from jaxmllm.plan import plan as make_plan
from jaxmllm.training.config import TrainConfig, parse_command

EXIT_NO_FIT = 1
VALUES = ("--mesh", "--vision_tokens", "--prompt_tokens", "--phases")


def plan(arguments: Sequence[str]) -> int:
    """jaxmllm plan CONFIG.py --mesh MESH [options] [--field value ...]

    What the config would need on a machine that is not here, and how fast it could be: its programs are compiled for that
    machine's chips from shapes alone. Exit status 1 when it does not fit. Flags besides these override the config's fields.

      --mesh MESH         a file of configs/meshes
      --vision_tokens N   of the largest picture; the config's data.max_pixels without it
      --prompt_tokens N   of the longest prompt, vision included; the config's data.max_prompt_length without it
      --phases A,B        compile only these: relayout, encode, prefill, decode, score, update
      --search            try microbatches, remat policies and layouts, and plan the fastest that fits
      --json              everything as JSON
    """
    asked = {flag: flag in arguments for flag in ("--json", "--search", "--help", "-h")}
    rest = [one for one in arguments if one not in asked]
    if not rest or not any(one.partition("=")[0] == "--mesh" for one in rest[1:]):
        print(plan.__doc__)
        return 0 if asked["--help"] or asked["-h"] else EXIT_INPUT
    config, given = parse_command("plan", rest, VALUES)
    target, log = load_mesh(given["--mesh"]), Console(stderr=True, highlight=False)
    sizes: dict[str, Any] = {"mesh_name": given["--mesh"]}
    for name in ("vision_tokens", "prompt_tokens"):
        if (value := given.get(f"--{name}")) is not None:
            if not value.isdigit() or not int(value):
                raise InputError(f"--{name} = {value!r}: must be a whole number of at least 1")
            sizes[name] = int(value)
    if asked["--search"]:
        config, target = _fastest(config, target, sizes, log)
    only = tuple(part for part in given.get("--phases", "").split(",") if part)
    found = make_plan(
        config, target, only=only, done=lambda name, seconds: log.print(f"{name}: compiled in {seconds:.0f} s"), **sizes
    )
    if asked["--json"]:
        print(json.dumps(report.as_json(found), indent=1))
    else:
        report.show(found, Console(highlight=False, width=None if sys.stdout.isatty() else 200))
    return 0 if found.fits else EXIT_NO_FIT


def _fastest(
    config: TrainConfig, target: MeshTarget, sizes: dict[str, Any], log: Console
) -> tuple[TrainConfig, MeshTarget]:
    """The config and machine with the microbatch, remat policy and training layout whose update is the fastest."""
    best: Plan | None = None
    for one in search(config, target, **sizes):
        update = one.phase("update")
        verdict = f"{update.seconds:.2f} s" if one.fits else "does not fit"
        log.print(
            f"microbatch {one.microbatch}, remat {one.remat}, fsdp {one.train.fsdp}, tensor {one.train.tensor}: {verdict}"
        )
        if one.fits and (best is None or update.seconds < best.phase("update").seconds):
            best = one
    if best is None:
        raise InputError(
            f"nothing fits {sizes['mesh_name']}: fewer prompts (--batch_size), a smaller model, adapters (--lora) or more chips"
        )
    steps = config.batch_size // config.method.cuts() // best.microbatch
    optim = dataclasses.replace(config.optim, gradient_accumulation_steps=steps)
    return dataclasses.replace(config, remat=best.remat, optim=optim), dataclasses.replace(target, train=best.train)
