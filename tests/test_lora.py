"""Adapters: what they add, merging, PEFT's files, and training nothing else."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmllm.errors import InputError
from jaxmllm.methods.optim import join, split
from jaxmllm.model import embedding, family, lora
from tests.support import tiny

CFG = tiny.config()
FAMILY = family.of(CFG)
PARAMS = tiny.params(CFG)
EVERY = r"(text|vision)/.*"
CONFIG = lora.LoRAConfig(r=3, lora_alpha=7.0, targets=EVERY)


def adapted(config=CONFIG, seed=0):
    """Parameters with adapters whose B is not zero, as after training."""
    params = lora.add(jax.random.key(seed), PARAMS, config, FAMILY)
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        return 0.1 * rng.normal(size=leaf.shape).astype(np.float32) if path[-1].key == "b" else np.asarray(leaf)

    return params | {"lora": jax.tree_util.tree_map_with_path(fill, params["lora"])}


def hidden_states(params, prompts):
    return np.asarray(FORWARD(params, CFG, prompts)[0])


FORWARD = jax.jit(family.forward, static_argnums=1)


def leaves(tree) -> dict[str, np.ndarray]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in flat}


def test_a_fresh_adapter_changes_nothing():
    prompts = tiny.prompts(CFG)
    fresh = lora.add(jax.random.key(0), PARAMS, CONFIG, FAMILY)
    np.testing.assert_array_equal(hidden_states(fresh, prompts), hidden_states(PARAMS, prompts))


def test_merged_equals_applied():
    """In the tower, the merger and the decoder; and the merged kernel is W + alpha / r * A B, by hand."""
    prompts, params = tiny.prompts(CFG), adapted()
    merged = lora.merge(params)
    assert "lora" not in merged and jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    applied, plain = hidden_states(params, prompts), hidden_states(PARAMS, prompts)
    np.testing.assert_allclose(hidden_states(merged, prompts), applied, atol=2e-5)
    assert np.abs(applied - plain).max() > 0.1
    for layer in range(2):
        one = params["lora"]["vision"]["blocks"]["attn"]["qkv"]
        change = np.einsum("ir,rco->ico", one["a"][layer], one["b"][layer]) * (7 / 3)
        kernel = PARAMS["vision"]["blocks"]["attn"]["qkv"]["kernel"][layer]
        np.testing.assert_allclose(
            merged["vision"]["blocks"]["attn"]["qkv"]["kernel"][layer], kernel + change, atol=1e-5
        )
    np.testing.assert_array_equal(merged["embed"], PARAMS["embed"])


def test_merge_keeps_the_kernels_dtype():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    merged = lora.merge(half | {"lora": adapted()["lora"]})
    assert {leaf.dtype.name for leaf in jax.tree.leaves(merged)} == {"bfloat16"}


def test_targets_choose_layers():
    chosen = leaves(
        lora.add(jax.random.key(0), PARAMS, lora.LoRAConfig(r=2, targets=r"text/.*/(q|v)_proj"), FAMILY)["lora"]
    )
    assert sorted(chosen) == [f"text/layers/self_attn/{p}_proj/{x}" for p in "qv" for x in ("a", "b", "scale")]
    default = leaves(lora.add(jax.random.key(0), PARAMS, lora.LoRAConfig(r=2), FAMILY)["lora"])
    assert len(default) == 7 * 3 and all(path.startswith("text/layers/") for path in default)
    everything = leaves(lora.add(jax.random.key(0), PARAMS, lora.LoRAConfig(r=2, targets=".*"), FAMILY)["lora"])
    # the patch embedding is a convolution elsewhere, embedding and head are no layers
    assert len(everything) == (7 + 5 + 2) * 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora.LoRAConfig(targets="nothing"), "matches no layer; layers are .*text/layers/mlp/down_proj"),
        (lora.LoRAConfig(targets="("), "not a regular expression"),
        (lora.LoRAConfig(r=0), "lora.r = 0"),
    ],
)
def test_bad_options(config, message):
    with pytest.raises(InputError, match=message):
        lora.add(jax.random.key(0), PARAMS, config, FAMILY)


def test_only_adapters_are_trained_and_each_gets_a_gradient():
    params = adapted(lora.LoRAConfig(r=2, targets=EVERY))
    train, frozen = split(params, ".*")
    assert set(train) == {"lora"} and not any(path.endswith("scale") for path in leaves(train))
    assert leaves(join(train, frozen)).keys() == leaves(params).keys()
    prompts = tiny.prompts(CFG, [[3, (4, 6), 2]])
    weights = np.random.default_rng(0).normal(size=(1, prompts.tokens.shape[1], 32)).astype(np.float32)

    @jax.jit
    def gradient(train):
        return jax.grad(lambda t: jnp.sum(family.forward(join(t, frozen), CFG, prompts)[0] * weights))(train)

    for path, grad in leaves(gradient(train)).items():
        assert np.abs(grad).max() > 1e-6, path


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ("text/.*", {"text"}),
        ("(text|head|embed).*", {"text", "head", "embed"}),
        (r"vision/(merger.*|ln_q.*)", {"vision"}),
        (r"(?!vision/).*", {"text", "head", "embed"}),
    ],
)
def test_freezing_by_expression(trainable, expected):
    train, frozen = split(PARAMS, trainable)
    assert set(train) == expected
    paths, kept = leaves(train), leaves(frozen)
    assert not paths.keys() & kept.keys() and paths.keys() | kept.keys() == leaves(PARAMS).keys()


# ---------------------------------------------------------------- files


def test_saved_and_loaded(tmp_path):
    params = adapted()
    lora.save(params, CONFIG, tmp_path / "adapter", FAMILY)
    back = leaves(lora.load(PARAMS, tmp_path / "adapter", FAMILY)["lora"])
    expected = leaves(params["lora"])
    assert back.keys() == expected.keys()
    for path in expected:
        np.testing.assert_array_equal(back[path], expected[path], err_msg=path)


def test_names_are_pefts(tmp_path):
    """As PEFT names modules of transformers' models: every target is one of their linear layers, with its shapes."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    lora.save(adapted(), CONFIG, tmp_path, FAMILY)
    config = FAMILY.write_config(CFG)
    kind = transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(kind)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, module in linear.items():
        a, b = (tensors.pop(f"base_model.model.{name}.lora_{which}.weight") for which in "AB")
        assert a.shape == (3, module.in_features) and b.shape == (module.out_features, 3), name
    assert not tensors
    meta = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(meta["target_modules"]) == sorted(linear)
    assert (meta["peft_type"], meta["r"], meta["lora_alpha"]) == ("LORA", 3, 7.0)


def test_peft_itself_computes_the_same(tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from jaxmllm.data.images import PixelConfig
    from jaxmllm.model import hf
    from jaxmllm.model.family import load_model_config
    from tests.support import parity

    model = parity.torch_model("qwen2_5_vl")
    model.save_pretrained(tmp_path / "base")
    cfg = load_model_config(tmp_path / "base")
    base = hf.load_params(tmp_path / "base", cfg)
    params = lora.add(jax.random.key(0), base, CONFIG, FAMILY)
    params["lora"] = jax.tree.map(lambda x: jnp.where(x == 0, 0.05, x), params["lora"])
    lora.save(params, CONFIG, tmp_path / "adapter", FAMILY)
    rows = parity.build(model)
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")(
            **parity.torch_inputs([rows["one image"]])
        ).logits[0]
    hidden, _ = family.forward(params, cfg, tiny.pad([rows["one image"]], PixelConfig()))
    np.testing.assert_allclose(embedding.logits(params, hidden)[0], expected, atol=1e-3)


def test_names_from_before_transformers_4_52_and_rank_stabilised_scale(tmp_path):
    params = adapted()
    lora.save(params, CONFIG, tmp_path, FAMILY)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    old = {
        name.replace("model.model.language_model.", "model.model.").replace(
            "model.model.visual.", "model.visual."
        ): value
        for name, value in tensors.items()
    }
    assert old.keys().isdisjoint(tensors)
    save_file(old, tmp_path / "adapter_model.safetensors")
    meta = json.loads((tmp_path / "adapter_config.json").read_text()) | {"use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(meta))
    back, expected = leaves(lora.load(PARAMS, tmp_path, FAMILY)["lora"]), leaves(params["lora"])
    for path in expected:
        want = np.full_like(expected[path], 7 / 3**0.5) if path.endswith("scale") else expected[path]
        np.testing.assert_allclose(back[path], want, rtol=1e-6)


def test_adapters_that_do_not_fit_are_refused_with_the_list(tmp_path):
    lora.save(adapted(), CONFIG, tmp_path, FAMILY)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    start = "base_model.model.model.language_model.layers"
    del tensors[f"{start}.0.mlp.up_proj.lora_B.weight"]
    tensors[f"{start}.1.mlp.gate_proj.lora_A.weight"] = np.zeros((3, 31), np.float32)
    tensors[f"{start}.9.mlp.up_proj.lora_A.weight"] = np.zeros((3, 32), np.float32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError) as error:
        lora.load(PARAMS, tmp_path, FAMILY)
    for words in (
        f"missing       {start}.0.mlp.up_proj.lora_B.weight",
        f"misshaped     {start}.1.mlp.gate_proj: A [3, 31], B [48, 3]",
        f"fits no layer {start}.9.mlp.up_proj.lora_A.weight",
    ):
        assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_model.safetensors", None, "adapter_model.safetensors"),
        ("adapter_model.safetensors", b"abc", "cannot be read"),
        ("adapter_config.json", None, "adapter_config.json is missing"),
        ("adapter_config.json", b"{", "cannot be read"),
        ("adapter_config.json", b"[]", "r and lora_alpha"),
        ("adapter_config.json", b'{"r": 0, "lora_alpha": 1}', "r and lora_alpha"),
        ("adapter_config.json", b'{"r": 3, "lora_alpha": 7, "use_dora": true}', "use_dora is set and not supported"),
        ("adapter_config.json", b'{"r": 3, "lora_alpha": 7, "rank_pattern": {"q": 1}}', "rank_pattern is set"),
    ],
)
def test_bad_files(tmp_path, file, content, message):
    lora.save(adapted(), CONFIG, tmp_path, FAMILY)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        lora.load(PARAMS, tmp_path, FAMILY)
