"""`jaxmllm data preview`: records of a source on one sheet."""

from pathlib import Path

from tyro.conf import Positional

from jaxmllm.commands.terminal import console
from jaxmllm.data.sources import open_source
from jaxmllm.world import preview


def run(source: Positional[str], out: Path = Path("preview.png"), n: int = 16) -> None:
    """Draw the first records of a source with their annotations on one sheet.

    Args:
        source: for example world:detection or coco:instances.json?task=detection.
        out: PNG file to write.
        n: records to draw.
    """
    preview(open_source(source), out, n)
    console().print(f"wrote {out}")
