"""The calls of a notebook, on a small random model with the embedded tokenizer."""

import dataclasses
import json
import shutil

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmllm
from jaxmllm import api
from jaxmllm.data.chat import Buckets
from jaxmllm.errors import InputError
from jaxmllm.machine.mesh import make_mesh
from jaxmllm.model import family, hf
from jaxmllm.model.family import load_model_config
from jaxmllm.model.logprobs import Sampling
from jaxmllm.types import Prompts
from tests.support import tiny

BUCKETS = Buckets(frames=(1, 6), windows=(1, 4), prompt=(96, 256), completion=(16,))
NEW = 10


def write(folder, **text):
    """The embedded model's files with two narrow layers of random weights."""
    shutil.copytree(api.TINY, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    raw = json.loads((folder / "config.json").read_text())
    raw |= dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    raw |= dict(rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, tie_word_embeddings=False)
    raw["vision_config"] |= dict(
        depth=2, hidden_size=16, num_heads=2, intermediate_size=24, out_hidden_size=32, fullatt_block_indexes=[1]
    )
    (folder / "config.json").write_text(json.dumps(raw | text))
    cfg = load_model_config(folder)
    hf.save_params(tiny.params(cfg), cfg, folder, source=folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("api") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return jaxmllm.load(folder, buckets=BUCKETS)


def picture(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def say(*parts):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def image(width, height, seed=0):
    return {"type": "image", "image": picture(width, height, seed)}


MIXED = [
    say("How many red circles are there?"),
    say(image(42, 56), "Where is the blue square?"),
    say("Compare", image(28, 28, 1), "with", image(70, 42, 2)),
    say({"type": "video", "video": [picture(42, 42, s) for s in range(4)], "fps": 2.0}, "What moves?"),
]


@pytest.fixture(scope="module")
def drawn(model):
    return jaxmllm.generate(model, MIXED, num_generations=2, max_new_tokens=NEW, seed=3)


# ---------------------------------------------------------------- generate


def test_generations(model, drawn):
    assert [len(group) for group in drawn] == [2] * 4
    for group in drawn:
        for one in group:
            stopped = one.stop_reason == "stop"
            assert len(one.token_ids) == len(one.logprobs) == (len(one.token_ids) if stopped else NEW)
            assert (one.token_ids[-1] in model.stop_ids) == stopped
            written = one.token_ids[:-1] if stopped else one.token_ids
            assert not set(written) & set(model.stop_ids)
            assert one.text == model.tokenizer.decode(written, skip_special_tokens=False)
            assert not set(one.token_ids) & set(model.cfg.vision_token_ids)
            assert (one.logprobs < 0).all()
    assert drawn[1][0].token_ids != drawn[1][1].token_ids


def test_a_completion_does_not_depend_on_the_batch_size(model, drawn):
    """Batches of three: the second is filled up. Buckets differ too: the first batch holds no video."""
    again = jaxmllm.generate(model, MIXED, num_generations=2, max_new_tokens=NEW, seed=3, batch_size=3)
    for a, b in zip(drawn, again, strict=True):
        assert [x.token_ids for x in a] == [x.token_ids for x in b]
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-4)


def test_options_reach_the_sampler(model):
    """Greedy has one answer; a stop id ends it and is kept."""
    (group,) = jaxmllm.generate(model, MIXED[:1], num_generations=2, max_new_tokens=NEW, temperature=0, stop_ids=())
    assert group[0].token_ids == group[1].token_ids and len(group[0].token_ids) == NEW
    stop = group[0].token_ids[3]
    (short,) = jaxmllm.generate(model, MIXED[:1], max_new_tokens=NEW, temperature=0, stop_ids=(stop,))
    assert short[0].token_ids == group[0].token_ids[: group[0].token_ids.index(stop) + 1]
    assert short[0].stop_reason == "stop"


def test_nothing_to_do(model):
    assert jaxmllm.generate(model, []) == [] and jaxmllm.score(model, [], []) == []


def test_streaming_equals_generating(model):
    sampling = Sampling(temperature=0.8, top_k=30)
    pieces = list(
        jaxmllm.stream(model, MIXED[1], num_generations=2, max_new_tokens=NEW, sampling=sampling, seed=5, every=3)
    )
    (whole,) = jaxmllm.generate(
        model, MIXED[1:2], num_generations=2, max_new_tokens=NEW, temperature=0.8, top_k=30, seed=5
    )
    assert len(pieces) == 1 + -(-(NEW - 1) // 3)
    for piece in pieces:
        for g in range(2):
            n = len(piece[g].token_ids)
            assert piece[g].token_ids == whole[g].token_ids[:n]
    for last, one in zip(pieces[-1], whole, strict=True):
        assert (last.token_ids, last.text, last.stop_reason) == (one.token_ids, one.text, one.stop_reason)
        np.testing.assert_array_equal(last.logprobs, one.logprobs)


# ---------------------------------------------------------------- score


def test_score_equals_a_plain_log_softmax(model):
    """Prompt and completion as one sequence, without the library's buckets and completion part."""
    completions = [[[5, 9, 700, 3], "a red circle"], [[11]]]
    conversations = [MIXED[0], say("Hello")]
    scores = jaxmllm.score(model, conversations, completions)
    for conversation, group, got in zip(conversations, completions, scores, strict=True):
        prompt = model.processor.encode(conversation).tokens.tolist()
        for completion, logps in zip(group, got, strict=True):
            text = isinstance(completion, str)
            ids = model.tokenizer.encode(completion, add_special_tokens=False) if text else completion
            n = len(prompt) + len(ids)
            line = np.zeros((1, 64), np.int32)
            line[0, :n] = prompt + ids
            places = np.broadcast_to(np.arange(64, dtype=np.int32), (1, 3, 64))
            row = Prompts(
                line, places, np.array([n], np.int32), np.array([n], np.int32), np.full((1, 64), -1, np.int32)
            )
            hidden, _ = PLAIN(model.params, model.cfg, row)
            log_probs = jax.nn.log_softmax(np.asarray(hidden)[0] @ np.asarray(model.params["head"]), axis=-1)
            expected = [log_probs[len(prompt) - 1 + t, ids[t]] for t in range(len(ids))]
            np.testing.assert_allclose(logps, expected, atol=1e-4)


PLAIN = jax.jit(family.forward, static_argnums=1)


def test_score_equals_what_generate_reported(model, drawn):
    ids = [[one.token_ids for one in group] for group in drawn]
    scores = jaxmllm.score(model, MIXED, ids, sampling=Sampling(), batch_size=2)
    for group, found in zip(drawn, scores, strict=True):
        for one, logps in zip(group, found, strict=True):
            np.testing.assert_allclose(logps, one.logprobs, atol=1e-4)
    own = jaxmllm.score(model, MIXED, ids)
    # vision tokens have some probability under the model itself, none under what generate draws from
    assert all((a < b).all() for x, y in zip(own, scores, strict=True) for a, b in zip(x, y, strict=True))


# ---------------------------------------------------------------- compilation and devices


def test_one_program_for_a_stream_of_mixed_batches(model):
    """Twenty batches of other texts, sizes and numbers of pictures inside one bucket."""
    rng = np.random.default_rng(0)
    one = dataclasses.replace(model, buckets=Buckets(frames=(6,), windows=(4,), prompt=(256,), completion=(16,)))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiled.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
    )
    for number in range(20):
        batch = []
        for _ in range(2):
            sizes = 7 * rng.integers(2, 11, (int(rng.integers(1, 4)), 2))
            batch.append(say(*(image(int(w), int(h)) for w, h in sizes), "count " * int(rng.integers(1, 20))))
        found = jaxmllm.generate(one, batch, max_new_tokens=4, seed=number)
        jaxmllm.score(one, batch, [[group[0].token_ids] for group in found])
        if number == 0:
            assert compiled
            compiled.clear()
        assert not compiled, f"batch {number} compiled again"


def test_on_eight_devices(folder, model, drawn):
    """Rows are filled up to what the mesh divides; ids and log-probabilities are those of one device."""
    mesh = make_mesh(fsdp=4, tensor=2)
    there = jaxmllm.load(folder, mesh=mesh, buckets=BUCKETS)
    kernel = there.params["text"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 8
    found = jaxmllm.generate(there, MIXED[:3], num_generations=2, max_new_tokens=NEW, seed=3)
    for group, expected in zip(found, drawn, strict=False):
        assert [one.token_ids for one in group] == [one.token_ids for one in expected]
        for a, b in zip(group, expected, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_random_parameters_are_created_in_their_shards(model):
    mesh = make_mesh(fsdp=4, tensor=2)
    there, here = api.init_params(model.cfg, 3, mesh), api.init_params(model.cfg, 3)
    assert not there["text"]["layers"]["mlp"]["up_proj"]["kernel"].is_fully_replicated
    for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


# ---------------------------------------------------------------- load and save


def test_saved_model_is_the_same(model, folder, tmp_path, drawn):
    jaxmllm.save(model, tmp_path / "copy")
    again = jaxmllm.load(tmp_path / "copy", buckets=BUCKETS)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.cfg == model.cfg
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
    assert {p.name for p in (tmp_path / "copy").iterdir()} == {p.name for p in folder.iterdir()}


def test_dtype(folder):
    half = jaxmllm.load(folder, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"} and half.cfg.dtype == "bfloat16"
    assert half.params["embed"].dtype == jnp.bfloat16
    assert jaxmllm.load(folder).cfg.dtype == "float32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype = 'int8': must be one of float32, bfloat16, float16"),
        ({"remat": "some"}, "remat = 'some'"),
        ({"attention": "flash"}, "attention = 'flash'"),
        ({"min_pixels": 9000, "max_pixels": 100}, "min_pixels"),
    ],
    ids=str,
)
def test_bad_options_of_load(folder, options, message):
    with pytest.raises(InputError, match=message):
        jaxmllm.load(folder, **options)


def test_what_cannot_be_loaded(folder, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="config.json: not found"):
        jaxmllm.load(tmp_path / "empty")
    for name in (tmp_path / "nowhere", "./nowhere/model", "nowhere", folder / "config.json"):
        with pytest.raises(InputError, match="no such checkpoint folder"):
            jaxmllm.load(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "other").mkdir(parents=True)
    with pytest.raises(InputError, match="runs/mine: no such checkpoint folder; runs holds other"):
        jaxmllm.load("runs/mine")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="nobody/nothing: not a local folder, and the hub download failed"):
        jaxmllm.load("nobody/nothing")


def test_a_wrong_tokenizer(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(raw | {"image_token_id": 3}))
    with pytest.raises(InputError, match="wrong tokenizer: .*image_pad.* is .* and 3 in config.json"):
        jaxmllm.load(tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="the tokenizer cannot be loaded|wrong tokenizer"):
        jaxmllm.load(tmp_path / "model")


# ---------------------------------------------------------------- bad input, before any compile


@pytest.fixture
def no_compile(monkeypatch):
    from jaxmllm.rollout import sampler

    def never(*args, **options):
        raise AssertionError("reached the model")

    monkeypatch.setattr(sampler, "sample", never)
    monkeypatch.setattr(sampler, "start", never)
    monkeypatch.setattr(api, "score_jit", never)


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (say({"type": "image", "image": "/nowhere.jpg"}, "a"), "/nowhere.jpg: image file not found"),
        (say({"type": "video", "video": "/nowhere.mp4"}, "a"), "/nowhere.mp4"),
        (say({"type": "image", "image": np.zeros((0, 4, 3), np.uint8)}), "the image is empty"),
        (say({"type": "image", "image": np.zeros((1, 10000, 3), np.uint8)}), "more than 200 times"),
        (say({"type": "image"}, "a"), "0 images are given for 1 image parts"),
        (say("word " * 20000), "max_prompt_length"),
        (say("<|image_pad|>"), "placeholder tokens must not be written in a text"),
        ([], "expected a list of messages"),
        ("hello", "expected a list of messages"),
        ([{"content": "no role"}], "role"),
    ],
    ids=range(10),
)
def test_bad_conversations(model, conversation, message):
    for call in (
        lambda: jaxmllm.generate(model, [conversation]),
        lambda: next(jaxmllm.stream(model, conversation)),
        lambda: jaxmllm.score(model, [conversation], [["a"]]),
    ):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 0}, "num_generations"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"temperature": -1}, "temperature = -1"),
        ({"top_p": 0}, "top_p = 0"),
        ({"top_k": -2}, "top_k = -2"),
        ({"min_p": 2}, "min_p = 2"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
    ],
    ids=str,
)
def test_bad_options_of_generate(model, options, message):
    with pytest.raises(InputError, match=message):
        jaxmllm.generate(model, MIXED, **options)


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize(
    ("completions", "message"),
    [
        ([["a"], ["b"]], "2 lists of completions for 1 conversations"),
        ([["a", ""]], "conversation 0: a completion without a token"),
        ([[[]]], "a completion without a token"),
        ([[[5, 10**6]]], "token ids outside 0 .. "),
        ([[[-1]]], "token ids outside"),
        ([["a " * 5000]], "buckets: .* is above the largest size of completion"),
    ],
    ids=range(6),
)
def test_bad_completions(model, completions, message):
    with pytest.raises(InputError, match=message):
        jaxmllm.score(model, MIXED[:1], completions)


def test_train_stays_a_function():
    """Also once its package is imported, which has the same name."""
    from jaxmllm.training.config import TrainConfig

    with pytest.raises(InputError, match="max_steps = 0: must be at least 1"):
        jaxmllm.train(TrainConfig("none", max_steps=0))
