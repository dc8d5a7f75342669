"""`jaxmllm data materialise`: a slice of the procedural world as files."""

from pathlib import Path

from tyro.conf import Positional

from jaxmllm.commands.terminal import console
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.world.source import WorldSource
from jaxmllm.world.tfds_builder import materialise


def run(source: Positional[str], out: Path, split: str = "train", start: int = 0, stop: int | None = None) -> None:
    """Write a slice of the procedural world to ArrayRecord files, as a TFDS data set that `tfds:FOLDER` reads.

    Args:
        source: for example world:grounding?objects=2-6.
        out: folder to write into.
        split: name of the split.
        start: first item.
        stop: item to end before; the source's end without it.
    """
    opened = open_source(source)
    if not isinstance(opened, WorldSource):
        raise InputError(f"{source}: only sources of the world are written, such as world:grounding")
    folder = materialise({split: opened}, out, start, stop)
    console().print(f"wrote {folder}: read it as tfds:{folder}?split={split}", soft_wrap=True)
