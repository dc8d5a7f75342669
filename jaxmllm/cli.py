"""The `jaxmllm` command. A mistake in the input prints one message; `--debug` adds the traceback."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxmllm.commands import parser
from jaxmllm.errors import EXIT_INPUT, InputError


def _keep_freed_memory() -> None:
    """Tells glibc to keep the big blocks that are freed: XLA's CPU client frees and takes its buffers anew in every step.

    Given back to the system, each is filled with zeros again page by page: a fifth of an update of the tiny model.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8  # malloc.h
    for option, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**28), (m_arena_max, 1)):
        mallopt(option, value)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 2 for a mistake in the input, 75 when saved after a signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # as a program, before jax is imported: what was compiled once is kept for the next start
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jaxmllm" / "compiled"))
        if arguments[:1] == ["train"]:
            _keep_freed_memory()
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(name)s: %(message)s")
    # a failed write of a checkpoint is told in one message, not in the traceback of each thread
    logging.getLogger("absl").setLevel(logging.ERROR if debug else logging.CRITICAL)
    try:
        return parser.run(arguments)
    except InputError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_INPUT
    except BrokenPipeError:  # what reads the output has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # a defect: say so in one line, the traceback on request
        if debug:
            raise
        print(f"error: {type(error).__name__}: {error}\n(--debug shows the traceback)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
