"""What commands say besides their output: to standard error, so that the output can be piped."""

from rich.console import Console


def console() -> Console:
    return Console(stderr=True, highlight=False)
