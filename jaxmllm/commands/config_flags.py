"""The flags of commands that read a run's config: `jaxmllm train CONFIG.py [--field value ...]`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from jaxmllm import flags, methods
from jaxmllm.commands.gathering import gathered
from jaxmllm.errors import InputError
from jaxmllm.machine.mesh import MeshConfig
from jaxmllm.model.lora import LoRAConfig
from jaxmllm.training.config import TrainConfig, load_config

Run = Annotated[
    TrainConfig, tyro.conf.arg(name="")
]  # a command's parameter `config`: its fields are flags without a prefix
OPTIONAL: dict[str, type] = {"lora": LoRAConfig, "sample_mesh": MeshConfig}  # parts that a config may leave out
EXAMPLES = {"lora": "r 8", "sample_mesh": "fsdp 2"}


def parse_with_config(
    function: Callable[..., Any], arguments: Sequence[str], prog: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call a command's function with; `arguments` begins with the file of the config.

    InputError for a missing value, a switch that is neither true nor false, and what `TrainConfig.validate` refuses.
    """
    usual = (tyro.conf.AvoidSubcommands,)
    if not arguments or arguments[0].startswith("-"):
        if {"-h", "--help"} & set(arguments):
            shown = gathered(function, config=_with_all_parts(TrainConfig("NAME")))
            tyro.cli(shown, args=["--help"], prog=f"{prog} CONFIG.py", config=usual)
        raise InputError(f"{prog}: name a config first, such as configs/quickstart.py; --help lists the flags")
    path, *rest = arguments
    words, method, off = _taken_out(rest)
    config = load_config(path)
    if method is not None:  # its options are read after it: they start at its own defaults
        config = dataclasses.replace(config, method=methods.get(method)())
    whole = _with_all_parts(
        config
    )  # flags of the parts that it leaves out are known too, and any of them turns its part on
    words = flags.spelled(words, flags.flag_types(whole) | flags.flag_types(function))
    given = {word[2:].partition(".")[0].replace("-", "_") for word in words if word.startswith("--")}
    positional, values = tyro.cli(gathered(function, config=whole), args=words, prog=f"{prog} {path}", config=usual)
    left_out: dict[str, Any] = {
        part: None for part in OPTIONAL if part in off or (getattr(config, part) is None and part not in given)
    }
    values["config"] = dataclasses.replace(values["config"], **left_out).validate()
    return positional, values


def _with_all_parts(config: TrainConfig) -> TrainConfig:
    absent: dict[str, Any] = {part: kind() for part, kind in OPTIONAL.items() if getattr(config, part) is None}
    return dataclasses.replace(config, **absent)


def _taken_out(arguments: Sequence[str]) -> tuple[list[str], str | None, set[str]]:
    """Arguments without those that tyro cannot read: the name of a method, and the parts that are turned off."""
    words, method, off, rest = [], None, set(), iter(arguments)
    for argument in rest:
        name, _, value = argument.partition("=")
        part = name[2:].replace("-", "_") if name.startswith("--") else ""
        if name != "--method" and part not in OPTIONAL:
            words.append(argument)
        elif not (value := value or next(rest, "")):
            raise InputError(f"{name}: a value is missing")
        elif name == "--method":
            method = value
        elif value.lower() == "none":
            off.add(part)
        else:
            example = f"{name}.{EXAMPLES[part]}"
            raise InputError(f"{name} {value}: write {name} None, or flags of its fields, such as {example}")
    return words, method, off


def config_of(arguments: Sequence[str]) -> TrainConfig:
    """The config that `jaxmllm train CONFIG.py [--field value ...]` runs, valid."""

    def only(config: Run) -> None: ...

    _, values = parse_with_config(only, arguments, "jaxmllm train")
    config: TrainConfig = values["config"]
    return config
