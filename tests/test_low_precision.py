"""Training in bfloat16 at the rates of RL, adapters chosen by path, exports of any checkpoint."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm import api
from jaxmllm.errors import InputError
from jaxmllm.methods import SFT
from jaxmllm.methods.optim import narrowed
from jaxmllm.model.lora import LoRAConfig
from jaxmllm.training.checkpoint import read_params
from jaxmllm.training.config import DataConfig, OptimConfig
from jaxmllm.training.exporting import export_checkpoint
from jaxmllm.training.loop import train
from tests.support import training

pytestmark = pytest.mark.usefixtures("one_device")
SCENES = DataConfig(train=("world:grounding?size=84x84&objects=2-3&length=64",))


def test_steps_are_rounded_by_chance_and_right_in_the_mean():
    values = np.array([1.0, 1.0 + 2**-10, -3.0 - 2**-9, 1e-30, 0.0], np.float32)
    like = {"w": jnp.zeros(5, jnp.bfloat16), "v": jnp.zeros(5, jnp.float32)}

    @jax.jit
    def draw(step):
        return narrowed({"w": jnp.asarray(values), "v": jnp.asarray(values)}, like, step)

    drawn = [draw(jnp.asarray(step)) for step in range(4000)]
    assert all((d["v"] == values).all() for d in drawn), "float32 is left as it is"
    low = np.array([np.asarray(d["w"], np.float32) for d in drawn])
    assert (low[:, [0, 4]] == values[[0, 4]]).all(), "what bfloat16 holds does not move"
    unit = 2.0**-7 * np.array([1, 1, 2, 1e-30, 1])
    error = np.abs(low.mean(0) - values) / unit
    assert (error < 4 * 0.5 / np.sqrt(4000)).all()
    assert (np.abs(low - values) <= unit).all() and len(set(low[:, 1].tolist())) == 2
    odd = narrowed({"w": jnp.array([jnp.inf, -jnp.inf, jnp.nan])}, {"w": jnp.zeros(3, jnp.bfloat16)}, jnp.asarray(0))[
        "w"
    ]
    assert np.isposinf(odd[0]) and np.isneginf(odd[1]) and np.isnan(odd[2])


def test_weights_in_bfloat16_move_as_far_as_those_in_float32(tmp_path):
    moved = {}
    for kind in ("float32", "bfloat16"):
        config = training.config(
            tmp_path,
            name=kind,
            method=SFT(),
            data=SCENES,
            param_dtype=kind,
            batch_size=4,
            max_steps=12,
            save_steps=12,
            optim=OptimConfig(learning_rate=1e-6, lr_scheduler_type="constant"),
        )
        before = api.load("tiny", dtype=kind).params["text"]["layers"]
        folder = train(config)
        after = read_params(folder / "checkpoints" / "12")["text"]["layers"]
        flat = [
            np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(t)]) for t in (before, after)
        ]
        moved[kind] = flat[1] - flat[0]
    exact = moved["float32"]
    along = (np.sign(exact) * moved["bfloat16"]).mean() / np.abs(exact).mean()
    assert 0.7 < along < 1.3  # rounded to nearest, 0.0 .. 0.1
    share = (moved["bfloat16"] != 0).mean()
    assert share > 0.03


def test_trainable_chooses_among_adapters(tmp_path):
    both = r"(text/layers|vision/blocks)/.*(q_proj|qkv)"
    config = training.config(
        tmp_path, method=SFT(), data=SCENES, max_steps=2, lora=LoRAConfig(r=2, targets=both), trainable=r"vision/.*"
    )
    folder = train(config)
    params = read_params(folder / "checkpoints" / "2")["lora"]

    def trained(tree) -> bool:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return any(np.asarray(x).any() for path, x in leaves if jax.tree_util.keystr(path).endswith("['b']"))

    assert trained(params["vision"]) and not trained(params["text"])
    decoder = dataclasses.replace(config, name="none", lora=LoRAConfig(r=2))
    with pytest.raises(InputError, match=r"trainable = 'vision/.\*' matches no adapter; .*text/layers.*--lora.targets"):
        train(decoder)


def test_any_checkpoint_can_be_exported(tmp_path):
    config = training.config(
        tmp_path,
        method=SFT(),
        data=SCENES,
        max_steps=4,
        save_steps=2,
        lora=LoRAConfig(r=2),
        trainable=".*",
        export=True,
    )
    folder = train(config)
    assert export_checkpoint(folder, tmp_path / "last") == 4
    training.assert_same(api.load(tmp_path / "last").params, api.load(folder / "export").params)
    assert export_checkpoint(folder, tmp_path / "early", step=2) == 2
    early, last = (api.load(tmp_path / name).params for name in ("early", "last"))
    assert any(
        (np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (early, last)), strict=True)
    )
    adapter = json.loads((tmp_path / "last_adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 2
    with pytest.raises(InputError, match="there is no checkpoint 3; it has 2, 4"):
        export_checkpoint(folder, tmp_path / "x", step=3)
    shutil.rmtree(folder / "checkpoints" / "2" / "state")
    with pytest.raises(InputError, match="checkpoints/2: the checkpoint cannot be read"):
        export_checkpoint(folder, tmp_path / "x", step=2)
