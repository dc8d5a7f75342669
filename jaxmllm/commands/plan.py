"""`jaxmllm plan`."""

import dataclasses
import sys
from typing import Any

from rich.console import Console

from jaxmllm.commands.config_flags import Run
from jaxmllm.commands.options import at_least
from jaxmllm.commands.terminal import console
from jaxmllm.errors import InputError
from jaxmllm.machine.targets import MeshTarget, load_mesh
from jaxmllm.plan import Plan, plan, report
from jaxmllm.plan import search as plans_of_layouts
from jaxmllm.training.config import TrainConfig

EXIT_NO_FIT = 1


def run(
    config: Run,
    *,
    mesh: str,
    vision_tokens: int | None = None,
    prompt_tokens: int | None = None,
    phases: str = "",
    search: bool = False,
    json: bool = False,
) -> int:
    """What a config needs on a machine that is not here, and how fast it could be.

    Its programs are compiled for that machine's chips from shapes alone. Exit status 1 when it does not fit. The other flags
    override the config's fields.

    Args:
        mesh: a file of configs/meshes, such as v5e_16.
        vision_tokens: of the largest picture; the config's data.max_pixels without it.
        prompt_tokens: of the longest prompt, vision included; the config's data.max_prompt_length without it.
        phases: compile only these, with commas between: relayout, encode, prefill, decode, score, update.
        search: try microbatches, remat policies and layouts, and plan the fastest that fits.
        json: everything as JSON.
    """
    at_least(1, vision_tokens=vision_tokens, prompt_tokens=prompt_tokens)
    target = load_mesh(mesh)
    sizes: dict[str, Any] = {"mesh_name": mesh}
    sizes |= {"vision_tokens": vision_tokens} if vision_tokens else {}
    sizes |= {"prompt_tokens": prompt_tokens} if prompt_tokens else {}
    if search:
        config, target = _fastest(config, target, sizes)
    log = console()
    planned = plan(
        config,
        target,
        only=tuple(phase for phase in phases.split(",") if phase),
        done=lambda name, seconds: log.print(f"{name}: compiled in {seconds:.0f} s"),
        **sizes,
    )
    if json:
        print(report.json_text(planned))
    else:
        report.show(planned, Console(highlight=False, width=None if sys.stdout.isatty() else 200))
    return 0 if planned.fits else EXIT_NO_FIT


def _fastest(config: TrainConfig, target: MeshTarget, sizes: dict[str, Any]) -> tuple[TrainConfig, MeshTarget]:
    """The config and machine with the microbatch, remat policy and training layout whose update is the fastest."""
    best: Plan | None = None
    for tried in plans_of_layouts(config, target, **sizes):
        update = tried.phase("update")
        verdict = f"{update.seconds:.2f} s" if tried.fits else "does not fit"
        console().print(
            f"microbatch {tried.microbatch}, remat {tried.remat}, fsdp {tried.train.fsdp}, tensor {tried.train.tensor}: "
            f"{verdict}"
        )
        if tried.fits and (best is None or update.seconds < best.phase("update").seconds):
            best = tried
    if best is None:
        raise InputError(
            f"nothing fits {sizes['mesh_name']}: fewer prompts (--batch_size), a smaller model, adapters (--lora.r 8) or more "
            "chips"
        )
    steps = config.batch_size // config.method.cuts() // best.microbatch
    optim = dataclasses.replace(config.optim, gradient_accumulation_steps=steps)
    return dataclasses.replace(config, remat=best.remat, optim=optim), dataclasses.replace(target, train=best.train)
