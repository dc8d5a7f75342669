"""The one parser of the command line: a command's flags are the parameters of its function, their help is its docstring's.

A command whose first parameter is a run's config takes a file first, `jaxmllm train CONFIG.py [--field value ...]`: the fields
of the file's config are flags too.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import tyro

from jaxmllm import commands
from jaxmllm.commands.gathering import gathered
from jaxmllm.errors import EXIT_INPUT, InputError
from jaxmllm.flags import flag_types, spelled

DESCRIPTION = (
    "Post-train vision-language models in JAX. `jaxmllm COMMAND --help` shows a command's flags. A mistake in the input prints "
    "one message; --debug adds the traceback."
)


def run(arguments: Sequence[str]) -> int:
    """Runs `jaxmllm ARGUMENTS`; returns the command's exit status. Help and what tyro refuses end by SystemExit."""
    words = 2 if arguments[:1] and arguments[0] in commands.GROUPS else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name not in commands.COMMANDS:
        _overview(arguments)
    function = commands.function(name)
    positional, values = parse(function, rest, f"jaxmllm {name}")
    return function(*positional, **values) or 0


def parse(function: Callable[..., Any], arguments: Sequence[str], prog: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call a command's function with: positional and named arguments.

    InputError for a number that is not finite, a switch that is neither true nor false, and an invalid config.
    """
    if "config" in inspect.signature(function).parameters:
        from jaxmllm.commands.config_flags import parse_with_config  # with jax, which other commands may not need

        positional, values = parse_with_config(function, arguments, prog)
    else:
        words = spelled(arguments, flag_types(function))
        positional, values = tyro.cli(gathered(function), args=words, prog=prog)
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name} {value}: must be a finite number")
    return positional, values


def _overview(arguments: Sequence[str]) -> NoReturn:
    """Ends with the help of all commands or of a group, or with what is wrong with a name."""
    group = arguments[0] if arguments and arguments[0] in commands.GROUPS else ""
    lines: dict[str, str] = {}
    for name, line in commands.COMMANDS.items():
        first, _, second = name.partition(" ")
        if not group:
            lines[first] = commands.GROUPS.get(first, line)
        elif first == group:
            lines[second] = line
    tyro.extras.subcommand_cli_from_dict(
        {name: _named(line) for name, line in lines.items()},
        args=arguments[1:] if group else arguments,
        prog=f"jaxmllm {group}".strip(),
        description=commands.GROUPS.get(group, DESCRIPTION),
    )
    raise SystemExit(EXIT_INPUT)


def _named(line: str) -> Callable[[], None]:
    """A command as its line of the help."""

    def command() -> None: ...

    command.__doc__ = line
    return command
