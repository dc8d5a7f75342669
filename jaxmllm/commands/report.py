"""`jaxmllm report`: the HTML report of a run folder."""

from pathlib import Path

from tyro.conf import Positional

from jaxmllm.commands.terminal import console
from jaxmllm.report.html import write_report


def run(folder: Positional[Path], out: Path | None = None) -> None:
    """Write the self-contained HTML report of a run folder.

    Args:
        folder: of a run, such as runs/quickstart.
        out: HTML file to write; report.html in the folder without it.
    """
    path = out or folder / "report.html"
    write_report(folder, path)
    console().print(f"wrote {path}")
