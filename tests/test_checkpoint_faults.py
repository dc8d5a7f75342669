"""Checkpoints whose numbers would be wrong without a word: heads under a tied config, two checkpoints in a folder, float16,
tensors that share bytes, numbers that are none."""

import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmllm
from jaxmllm.api import TINY
from jaxmllm.errors import InputError
from jaxmllm.model import hf
from jaxmllm.model.family import load_model_config
from jaxmllm.training.convert import from_orbax, to_orbax

TALK = [{"role": "user", "content": "Count the red circles."}]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model, whose config ties the head."""
    return shutil.copytree(TINY, tmp_path / "model", copy_function=shutil.copyfile)


def weights(folder, dtype="float32"):
    return {name: value.astype(dtype) for name, value in load_file(folder / "model.safetensors").items()}


def write(content, file):
    save_file(content, file, metadata={"format": "pt"})


def with_own_head(folder):
    content = weights(folder)
    content[HEAD] = np.roll(content[EMBED], 5, axis=0)
    write(content, folder / "model.safetensors")
    return content


# ---------------------------------------------------------------- a head of its own


def test_a_head_trained_apart_counts_although_the_config_ties_it(folder, tmp_path):
    content = with_own_head(folder)
    model = jaxmllm.load(folder, dtype="float32")
    np.testing.assert_array_equal(model.params["head"], content[HEAD].T)
    tied = jaxmllm.load("tiny", dtype="float32")
    ids = [tied.tokenizer.encode(" 3 objects", add_special_tokens=False)]
    ours, plain = (jaxmllm.score(m, [TALK], [ids])[0][0] for m in (model, tied))
    assert np.abs(ours - plain).max() > 0.1
    # token i of the rolled head is token i - 5 of the embedding
    shifted = jaxmllm.score(tied, [TALK], [[[ids[0][0] - 5]]])[0][0]
    np.testing.assert_allclose(ours[0], shifted[0], atol=1e-4)

    jaxmllm.api.save(model, tmp_path / "out")  # and out again, with a config that keeps it
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(weights(tmp_path / "out")[HEAD], content[HEAD])
    to_orbax(folder, tmp_path / "orbax", "float32")
    from_orbax(tmp_path / "orbax", tmp_path / "back")
    np.testing.assert_array_equal(weights(tmp_path / "back")[HEAD], content[HEAD])


def test_transformers_reads_our_export_of_it_alike(folder, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import Qwen2_5_VLForConditionalGeneration

    with_own_head(folder)
    model = jaxmllm.load(folder, dtype="float32")
    jaxmllm.api.save(model, tmp_path / "out")
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    prompt = model.processor.encode(TALK).tokens.tolist()
    ids = model.tokenizer.encode(" 3 objects", add_special_tokens=False)
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    want = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(jaxmllm.score(model, [TALK], [[ids]])[0][0], want, atol=1e-3)


def test_a_saved_copy_of_the_embedding_stays_tied(folder):
    content = weights(folder)
    write(content | {HEAD: content[EMBED].copy()}, folder / "model.safetensors")
    assert load_model_config(folder).text.tie_word_embeddings


# ---------------------------------------------------------------- two checkpoints in a folder


@pytest.mark.parametrize("shards_left", [True, False])
def test_a_single_file_counts_beside_an_index_of_others(folder, shards_left, caplog):
    """As transformers chooses, which the second half of the test asks."""
    old = weights(folder)
    write(old, folder / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(old, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    if not shards_left:
        (folder / "model-00001-of-00001.safetensors").unlink()
    write({name: value + 1 for name, value in old.items()}, folder / "model.safetensors")
    params = hf.load_params(folder, load_model_config(folder))
    np.testing.assert_array_equal(params["text"]["norm"]["scale"], old["model.norm.weight"] + 1)
    assert "holds two checkpoints" in caplog.text and "model.safetensors is read" in caplog.text
    torch = pytest.importorskip("torch")
    from transformers import Qwen2_5_VLForConditionalGeneration

    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    np.testing.assert_array_equal(theirs.model.language_model.norm.weight.detach(), old["model.norm.weight"] + 1)


def test_one_tensor_in_two_places_is_refused(folder):
    content = weights(folder)
    write(
        content | {"model.language_model.norm.weight": content["model.norm.weight"] + 1}, folder / "model.safetensors"
    )
    with pytest.raises(InputError, match=r"model\.norm\.weight; remove one"):
        load_model_config(folder), hf.load_params(folder, load_model_config(folder))


# ---------------------------------------------------------------- numbers that are none


def overflowing(folder):
    """The same function with activations beyond float16's range inside; every weight is within it."""
    content = weights(folder)
    for n in range(4):
        content[f"model.layers.{n}.mlp.up_proj.weight"] *= 30000
        content[f"model.layers.{n}.mlp.down_proj.weight"] /= 30000
    write({name: value.astype(np.float16) for name, value in content.items()}, folder / "model.safetensors")


def test_a_float16_checkpoint_is_not_computed_in_float16(folder, caplog):
    overflowing(folder)
    model = jaxmllm.load(folder)
    assert model.cfg.dtype == "float32" and "computed in float32" in caplog.text
    picture = {"type": "image", "image": np.zeros((84, 84, 3), np.uint8)}
    talk = [{"role": "user", "content": [picture, {"type": "text", "text": "How many red circles are in the image?"}]}]
    ours = jaxmllm.generate(model, [talk], max_new_tokens=4, temperature=0)[0][0]
    tiny = jaxmllm.load("tiny", dtype="float32")
    plain = jaxmllm.generate(tiny, [talk], max_new_tokens=4, temperature=0)[0][0]
    assert ours.token_ids == plain.token_ids
    np.testing.assert_allclose(ours.logprobs, plain.logprobs, atol=0.1)

    half = jaxmllm.load(folder, dtype="float16")
    for call in (
        lambda: jaxmllm.generate(half, [talk], max_new_tokens=2, temperature=0),
        lambda: jaxmllm.generate(half, [talk], max_new_tokens=2, temperature=1.0, top_p=0.9),
        lambda: jaxmllm.score(half, [talk], [[[1, 2]]]),
        lambda: list(jaxmllm.stream(half, talk, max_new_tokens=2)),
    ):
        with pytest.raises(InputError, match=r'computed in float16: .*dtype="bfloat16"'):
            call()


def test_the_command_refuses_weights_that_are_no_numbers(folder):
    content = weights(folder, jnp.bfloat16)
    content["visual.blocks.1.mlp.gate_proj.weight"][3, 4] = np.nan
    content["model.layers.2.mlp.up_proj.weight"][0, 0] = np.inf
    write(content, folder / "model.safetensors")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "jaxmllm.cli",
            "eval",
            "--model",
            str(folder),
            "--data",
            "world:counting",
            "--limit",
            "1",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert run.returncode == 2
    for word in ("2 tensors hold NaN or infinite", "visual.blocks.1.mlp.gate_proj", "model.layers.2.mlp.up_proj"):
        assert word in run.stderr


def test_numbers_that_leave_float16_when_cast_are_refused(folder):
    content = weights(folder)
    content["model.norm.weight"][7] = 1e5
    write(content, folder / "model.safetensors")
    assert jaxmllm.load(folder).cfg.dtype == "float32"
    with pytest.raises(
        InputError, match=r"(?s)1 tensors hold NaN or infinite numbers, once cast to float16.*model\.norm"
    ):
        jaxmllm.load(folder, dtype="float16")


# ---------------------------------------------------------------- bytes


def edited_header(file, edit):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = edit(data[8 : 8 + length])
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_tensors_that_share_bytes_are_refused(folder):
    first, second = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"

    def edit(text):
        header = json.loads(text)
        header[second]["data_offsets"] = header[first]["data_offsets"]
        return json.dumps(header).encode()

    edited_header(folder / "model.safetensors", edit)
    with pytest.raises(InputError, match="corrupt, the bytes of .* overlap"):
        jaxmllm.load(folder)


def test_a_name_that_stands_twice_in_a_header_is_refused(folder):
    def edit(text):
        header = json.loads(text)
        entry = json.dumps({"model.norm.weight": header["model.layers.0.input_layernorm.weight"]})
        return text.rstrip()[:-1] + b"," + entry[1:].encode()

    edited_header(folder / "model.safetensors", edit)
    with pytest.raises(InputError, match=r"model\.norm\.weight stands there twice"):
        jaxmllm.load(folder)
