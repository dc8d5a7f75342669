"""The method of an exported folder, known again by its method.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmllm import methods
from jaxmllm.errors import InputError
from jaxmllm.methods.method import DESCRIPTION, TENSORS, Method, Params
from jaxmllm.runfiles import read_json


def described_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of a name and options as they are written into JSON. InputError or TypeError where they do not fit."""
    plain_tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return methods.get(name)(**plain_tuples)


def load_exported(folder: Path) -> tuple[Method, Params] | None:
    """The method that trained an exported folder and the parameters it added; None for a folder without method.json.

    InputError where they do not fit each other.
    """
    if not (folder / DESCRIPTION).exists():
        return None
    from safetensors.flax import load_file

    described = read_json(folder / DESCRIPTION)
    try:
        method = described_method(described["method"], described["options"])
        tensors = load_file(folder / TENSORS)
    except (KeyError, TypeError, OSError, json.JSONDecodeError) as error:
        raise InputError(f"{folder / DESCRIPTION}: {type(error).__name__}: {error}") from error
    params: Params = {}
    for path, tensor in tensors.items():
        node = params
        *parents, last = path.split(".")
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = tensor
    return method, params
