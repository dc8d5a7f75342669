"""`jaxmllm train`."""

from jaxmllm.commands.config_flags import Run
from jaxmllm.commands.terminal import console
from jaxmllm.machine import processes
from jaxmllm.plan.placing import on_mesh
from jaxmllm.training.run import run_and_report
from jaxmllm.training.stopping import EXIT_INTERRUPTED, Interrupted


def run(config: Run, *, mesh: str | None = None) -> int:
    """Train by a config, or go on with its run; dotted flags override the config's fields.

    `--method NAME` or `--method module:Class` takes another method with its own defaults, whose options are then --method.X.
    `--lora.r 8` turns adapters on, `--lora None` off; so with --sample-mesh. A run that was interrupted by a signal has saved
    everything and ends with status 75: the same command goes on.

    Args:
        mesh: a file of configs/meshes, such as v5e_16, whose layouts take the place of the config's.
    """
    with processes.leaving_together():
        processes.start()
        if mesh is not None:
            config = on_mesh(config, mesh)
        try:
            run_and_report(config)
        except Interrupted as stopped:
            console().print(f"[yellow]{stopped}")
            return EXIT_INTERRUPTED
    return 0
