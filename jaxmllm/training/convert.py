"""Parameters of a Hugging Face folder as an Orbax checkpoint, and back."""

import json
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from jaxmllm import api
from jaxmllm.errors import InputError
from jaxmllm.model import family, hf
from jaxmllm.model.family import load_model_config

PARAMS = "params"  # the Orbax part of a converted folder; config and tokenizer files lie beside it


def is_orbax(folder: str | Path) -> bool:
    return (Path(folder) / PARAMS / "_METADATA").exists()


def to_orbax(source: str | Path, target: Path, dtype: str | None = None) -> None:
    """Writes target/params (Orbax) and copies config, tokenizer and processor files."""
    folder = api.resolve(source)
    cfg = load_model_config(folder)
    params = hf.load_params(folder, cfg, dtype=dtype)
    target.mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((target / PARAMS).absolute(), params)
    for pattern in family.of(cfg).side_files:
        for file in folder.glob(pattern):
            if file.name != "model.safetensors.index.json":
                shutil.copy(file, target / file.name)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    hf.tie(config, cfg.text.tie_word_embeddings)
    (target / "config.json").write_text(json.dumps(config, indent=2))


def from_orbax(source: Path, target: Path, dtype: str | None = None) -> None:
    """Writes a Hugging Face folder from what `to_orbax` wrote. InputError when the tree does not fit config.json."""
    cfg = load_model_config(source)
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore((source / PARAMS).absolute())
    shapes, expected = jax.tree.map(lambda x: x.shape, params), jax.tree.map(lambda x: x.shape, hf.abstract_params(cfg))
    if shapes != expected:
        raise InputError(f"{source}: the parameters do not fit config.json")
    hf.save_params(params, cfg, target, source=source, dtype=dtype)
