"""`jaxmllm convert`: between a Hugging Face folder and an Orbax one; a checkpoint of a run as the first."""

from pathlib import Path

from tyro.conf import Positional

from jaxmllm.commands.options import Dtype
from jaxmllm.commands.terminal import console
from jaxmllm.errors import InputError
from jaxmllm.training.convert import from_orbax, is_orbax, to_orbax
from jaxmllm.training.exporting import export_checkpoint, is_run


def run(source: Positional[str], target: Positional[Path], dtype: Dtype = None, step: int | None = None) -> None:
    """Convert between a Hugging Face folder and an Orbax one, or export a checkpoint of a run.

    Args:
        source: Hugging Face folder, hub id, a folder this command wrote, or a run's.
        target: folder to write; must not exist.
        step: the checkpoint of the run; the newest without it.
    """
    if target.exists():
        raise InputError(f"{target}: exists already; name a new folder")
    if step is not None and not is_run(source):
        raise InputError(f"--step {step}: {source} is no run folder with checkpoints")
    if is_run(source):
        exported = export_checkpoint(Path(source), target, step)
        console().print(f"checkpoint {exported} of {source}")
    elif is_orbax(source):
        from_orbax(Path(source), target, dtype)
    else:
        to_orbax(source, target, dtype)
    console().print(f"wrote {target}")
