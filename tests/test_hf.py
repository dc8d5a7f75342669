"""Checkpoints in and out: bit-equal, sharded, under other names, and every kind of bad file refused with what differs."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmllm.errors import InputError
from jaxmllm.machine.mesh import make_mesh, param_shardings
from jaxmllm.model import family, hf
from jaxmllm.model.family import load_model_config, model_config
from tests.support import tiny

KINDS = ("qwen2_5_vl", "qwen2_vl")
CFG = tiny.config()


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float32 checkpoint in one file."""
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    hf.save_params(tiny.params(CFG), CFG, path)
    return path


@pytest.fixture
def broken(folder, tmp_path):
    """(folder to damage, its tensors, function that writes other tensors)."""
    shutil.copytree(folder, tmp_path / "model")
    content = tensors(folder)
    return tmp_path / "model", content, lambda new: save_file(new, tmp_path / "model" / "model.safetensors")


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("limit", [1 << 30, 50_000])
def test_bit_equal_round_trip(kind, dtype, limit, tmp_path):
    """Tensors in, tensors out, in one file and in several."""
    cfg = tiny.config(kind)
    shapes = {name: entry.shape for name, entry in hf.key_table(cfg).items()}
    rng = np.random.default_rng(0)
    content = {name: rng.normal(size=shape).astype(jnp.dtype(dtype)) for name, shape in shapes.items()}
    save_file(content, tmp_path / "model.safetensors")
    params = hf.load_params(tmp_path, cfg)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
    hf.save_params(params, cfg, tmp_path / "out", max_shard_bytes=limit)
    same(tensors(tmp_path / "out"), content)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 1 if limit > 50_000 else len(files) > 2
    assert all(len(load_file(file)) == 1 or file.stat().st_size < limit + 20_000 for file in files)
    same({name: stored.read() for name, stored in hf.stored_tensors(tmp_path / "out", family.of(cfg)).items()}, content)


@pytest.mark.parametrize(("kind", "dtype"), [("qwen2_5_vl", "bfloat16"), ("qwen2_vl", "float32")])
def test_transformers_checkpoint_round_trip(kind, dtype, tmp_path):
    """Written by transformers in several shards -> ours -> written in several shards -> loaded by transformers."""
    torch = pytest.importorskip("torch")
    import transformers

    from tests.support.parity import torch_model

    model = torch_model(kind, tie_word_embeddings=kind == "qwen2_vl").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    cfg = load_model_config(tmp_path / "theirs")
    params = hf.load_params(tmp_path / "theirs", cfg)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
    assert ("head" in params) == (kind == "qwen2_5_vl")

    hf.save_params(params, cfg, tmp_path / "ours", source=tmp_path / "theirs", max_shard_bytes=100_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    canonical = {name: stored.read() for name, stored in hf.stored_tensors(tmp_path / "theirs", family.of(cfg)).items()}
    same(tensors(tmp_path / "ours"), canonical)
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in canonical.values())

    for export, source in (("ours", None), ("plain", True)):
        if source:  # without a source: our own config.json, one file
            hf.save_params(params, cfg, tmp_path / "plain")
        loaded, report = type(model).from_pretrained(
            tmp_path / export, dtype=getattr(torch, dtype), output_loading_info=True
        )
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
    assert transformers.AutoConfig.from_pretrained(tmp_path / "plain").model_type == kind


@pytest.mark.parametrize("kind", KINDS)
def test_config_round_trip(kind):
    cfg = dataclasses.replace(tiny.config(kind), eos_token_id=(7, 9), pad_token_id=3)
    assert model_config(json.loads(json.dumps(family.of(cfg).write_config(cfg)))) == cfg


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_equal_the_torch_models(kind):
    from tests.support.parity import torch_model

    state = torch_model(kind).state_dict()
    theirs = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tuple(value.shape)
        for name, value in state.items()
    }
    # the configuration of tests/support/parity.py, read from transformers' own object
    cfg = model_config(torch_model(kind).config.to_dict())
    assert {name: entry.shape for name, entry in hf.key_table(cfg).items()} == theirs


def test_values_land_where_the_names_say(folder):
    """Kernels are transposed, layers stacked, the fused query-key-value and the 3-D patch kernel flattened."""
    content, params = tensors(folder), hf.load_params(folder, CFG)
    layers = params["text"]["layers"]
    np.testing.assert_array_equal(
        layers["self_attn"]["q_proj"]["kernel"][1], content["model.layers.1.self_attn.q_proj.weight"].T
    )
    np.testing.assert_array_equal(
        layers["input_layernorm"]["scale"][0], content["model.layers.0.input_layernorm.weight"]
    )
    np.testing.assert_array_equal(params["embed"], content["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head"], content["lm_head.weight"].T)
    patch = content["visual.patch_embed.proj.weight"]
    assert patch.shape == (16, 3, 2, 2, 2)
    np.testing.assert_array_equal(params["vision"]["patch_embed"]["kernel"], patch.reshape(16, -1).T)
    fused = content["visual.blocks.1.attn.qkv.weight"]
    np.testing.assert_array_equal(params["vision"]["blocks"]["attn"]["qkv"]["kernel"][1, :, 2], fused[32:].T)


def test_cast_on_load_and_on_save(folder, tmp_path):
    params = hf.load_params(folder, CFG, dtype="bfloat16")
    expected = tensors(folder)["model.norm.weight"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(params["text"]["norm"]["scale"], expected)
    hf.save_params(hf.load_params(folder, CFG), CFG, tmp_path / "half", source=folder, dtype="bfloat16")
    same(tensors(tmp_path / "half"), {name: t.astype(jnp.bfloat16) for name, t in tensors(folder).items()})
    # transformers loads in the dtype that config.json names
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_other_spellings_and_leftovers_are_read(broken):
    """The names of transformers 4.52 to 4.57, old buffers, a tied head that was saved, and mixed dtypes."""
    path, content, write = broken
    renamed = {}
    for name, value in content.items():
        for old, new in (("model.", "model.language_model."), ("visual.", "model.visual.")):
            if name.startswith(old):
                renamed[new + name.removeprefix(old)] = value
                break
        else:
            renamed[name] = value
    renamed["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    renamed["model.visual.rotary_pos_emb.inv_freq"] = np.ones(4, np.float32)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    renamed[name] = renamed[name].astype(jnp.bfloat16)
    write(renamed)
    params = hf.load_params(path, CFG)
    layers = params["text"]["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(layers[1], content["model.layers.1.mlp.up_proj.weight"].T)  # not rounded
    tied = dataclasses.replace(CFG, text=dataclasses.replace(CFG.text, tie_word_embeddings=True))
    assert "head" not in hf.load_params(path, tied)


def test_float64_is_read_as_float32(broken):
    path, content, write = broken
    write({name: value.astype(np.float64) for name, value in content.items()})
    params = hf.load_params(path, CFG)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    np.testing.assert_array_equal(params["embed"], content["model.embed_tokens.weight"])


# ---------------------------------------------------------------- into a sharding


@pytest.mark.parametrize("sizes", [dict(fsdp=4, tensor=2), dict(replica=2, fsdp=2, tensor=2), dict(fsdp=8)])
def test_streamed_into_shards(folder, sizes):
    mesh = make_mesh(**sizes)
    shardings = param_shardings(hf.abstract_params(CFG), mesh)

    def target(path, leaf):
        node = shardings
        for key in path:
            node = node[key]
        return node

    params = hf.load_params(folder, CFG, sharding=target)
    whole = hf.load_params(folder, CFG)

    def check(got, expected, sharding):
        assert got.sharding.is_equivalent_to(sharding, got.ndim)
        np.testing.assert_array_equal(got, expected)
        for shard in got.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])

    jax.tree.map(check, params, whole, shardings)
    kernel = params["text"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size * mesh.shape["fsdp"] * mesh.shape["tensor"] == kernel.size


def test_export_of_sharded_parameters(folder, tmp_path):
    mesh = make_mesh(fsdp=4, tensor=2)
    params = hf.load_params(folder, CFG)
    hf.save_params(jax.device_put(params, param_shardings(params, mesh)), CFG, tmp_path / "out")
    same(tensors(tmp_path / "out"), tensors(folder))


# ---------------------------------------------------------------- bad checkpoints


def refused(path, *words, cfg=CFG) -> str:
    with pytest.raises(InputError) as error:
        hf.load_params(path, cfg)
    for word in (str(path), *words):
        assert word in str(error.value), f"{word!r} not in: {error.value}"
    return str(error.value)


def test_everything_that_differs_is_listed_at_once(broken):
    path, content, write = broken
    del content["model.layers.1.mlp.up_proj.weight"], content["visual.merger.ln_q.weight"]
    content["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    content["score.weight"] = np.zeros((2, 2), np.float32)
    content["model.norm.weight"] = np.zeros(33, np.float32)
    content["model.embed_tokens.weight"] = content["model.embed_tokens.weight"].astype(np.int8)
    write(content)
    refused(
        path,
        "6 tensors differ",
        "missing     model.layers.1.mlp.up_proj.weight [48, 32]",
        "missing     visual.merger.ln_q.weight [16]",
        "unexpected  model.layers.7.mlp.up_proj.weight [2, 2]",
        "unexpected  score.weight [2, 2]",
        "misshaped   model.norm.weight [33], expected [32]",
        "mistyped    model.embed_tokens.weight I8",
    )


def test_a_long_list_is_cut_and_counted(broken):
    path, _, write = broken
    write({"nothing": np.zeros(1, np.float32)})
    total = len(hf.key_table(CFG)) + 1
    message = refused(path, f"{total} tensors differ", f"and {total - hf.MAX_LISTED} more")
    assert len(message.splitlines()) == hf.MAX_LISTED + 2


def test_a_head_where_the_config_ties_it_and_the_other_way(broken):
    path, content, write = broken
    del content["lm_head.weight"]
    write(content)
    refused(path, "missing     lm_head.weight [600, 32]")


@pytest.mark.parametrize("cut", [1, 1000, 100_000])
def test_truncated_data(broken, cut):
    path, content, _ = broken
    file = path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-cut])
    message = refused(path, "truncated", "model.safetensors ends before it")
    # exactly the tensors that reach beyond the end
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    lost = [n for n, raw in header.items() if n in content and raw["data_offsets"][1] > len(data) - 8 - length - cut]
    assert f"{len(lost)} tensors differ" in message


def header_file(header) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        b"PK\x03\x04" + b"\x00" * 100,
        header_file(b"")[:8],
        header_file(b"{"),
        header_file(b"\xff\xfe\x00"),
        header_file(b"[" * 100_000),
        header_file([1, 2]),
        header_file({"model.norm.weight": 3}),
        header_file({"model.norm.weight": {"dtype": "F32"}}),
        header_file({"model.norm.weight": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 4]}}),
        header_file({"model.norm.weight": {"dtype": "F32", "shape": [32], "data_offsets": [0]}}),
        header_file({"model.norm.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
        header_file({"model.norm.weight": {"dtype": "F32", "shape": [32], "data_offsets": [-8, 4]}}),
        (10**15).to_bytes(8, "little") + b"{}",
    ],
    ids=lambda data: f"{data[8:48]!r}",
)
def test_not_safetensors(broken, data):
    path, *_ = broken
    (path / "model.safetensors").write_bytes(data)
    refused(path, "model.safetensors")


def test_offsets_that_do_not_match_the_shape(broken):
    path, content, _ = broken
    file = path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"][1] -= 4
    file.write_bytes(header_file(header) + data[8 + length :])
    refused(path, "corrupt     model.norm.weight: 124 bytes for shape [32]")


def test_no_weights_or_only_pickled_ones(broken):
    path, *_ = broken
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    refused(path, "only safetensors are read")


@pytest.mark.parametrize(
    ("index", "word"),
    [
        ("{", "not a safetensors index"),
        ("[]", "not a safetensors index"),
        ("{}", "not a safetensors index"),
        ('{"weight_map": {}}', "must name files"),
        ('{"weight_map": {"a": 3}}', "not a safetensors index"),
        ('{"weight_map": {"a": "model-1.safetensors"}}', "shards missing from the folder: model-1.safetensors"),
        ('{"weight_map": {"a": "../model/model.safetensors"}}', "must name files of the folder"),
    ],
)
def test_bad_index(broken, index, word):
    path, *_ = broken
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(index)
    refused(path, "model.safetensors.index.json", word)


# ---------------------------------------------------------------- writing


def test_a_failed_export_leaves_the_old_folder(folder, tmp_path, monkeypatch):
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    calls = []

    def full_disk(*args, **options):
        calls.append(args)
        raise OSError("no space left on device")

    monkeypatch.setattr(hf, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        hf.save_params(tiny.params(CFG, seed=1), CFG, path)
    assert calls and [p.name for p in tmp_path.iterdir()] == ["model"]
    same(tensors(path), tensors(folder))


def test_an_existing_checkpoint_is_replaced_and_nothing_else_is(folder, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    params = hf.load_params(path, CFG)
    hf.save_params(jax.tree.map(lambda x: x + 1, params), CFG, path, source=path)
    np.testing.assert_array_equal(tensors(path)["model.norm.weight"], tensors(folder)["model.norm.weight"] + 1)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    for place in (tmp_path / "home", tmp_path / "home/letter.txt"):
        with pytest.raises(InputError, match="is not a checkpoint folder"):
            hf.save_params(params, CFG, place)
    assert (tmp_path / "home/letter.txt").read_text() == "dear"


def test_trees_that_are_not_a_model_are_not_exported(tmp_path):
    params = tiny.params(CFG)
    with pytest.raises(InputError, match="merge the LoRA weights first"):
        hf.save_params(params | {"lora": {}}, CFG, tmp_path / "a")
    with pytest.raises(InputError, match="differ from the architecture's: warmup/kernel"):
        hf.save_params(params | {"warmup": {"kernel": np.zeros(3)}}, CFG, tmp_path / "a")
    del params["embed"]
    with pytest.raises(InputError, match="differ from the architecture's: embed"):
        hf.save_params(params, CFG, tmp_path / "a")
    assert not list(tmp_path.iterdir())
