"""`jaxmllm data fetch`: a published data set from the hub."""

from pathlib import Path

from rich.progress import Progress
from tyro.conf import Positional

from jaxmllm.commands.terminal import console
from jaxmllm.data.fetch import fetch


def run(name: Positional[str], out: Path = Path("data")) -> None:
    """Download a published data set to where the recipes look for it; the same call goes on where it stopped.

    Args:
        name: pr1:grounding, refcoco or pixmo.
        out: folder of the data.
    """
    with Progress(console=console(), transient=True) as bar:
        line = bar.add_task("pictures", total=None)
        source = fetch(name, out, lambda done, total: bar.update(line, completed=done, total=total))
    print(f"read it as {source}")
