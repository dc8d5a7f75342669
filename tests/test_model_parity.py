"""Tower, decoder, gradients and greedy text equal transformers' torch models, in float32.

The torch model runs every prompt alone; ours runs all of them as one padded batch, one program for all prompts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.data.images import PixelConfig
from jaxmllm.model import embedding, family, hf
from jaxmllm.model.family import load_model_config
from jaxmllm.model.logprobs import Sampling
from jaxmllm.rollout import sampler
from tests.support import parity, tiny

torch = pytest.importorskip("torch")
KINDS = ("qwen2_5_vl", "qwen2_vl")
TOLERANCE = 1e-4  # of the largest entry


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(torch model, rows by name, our parameters, our config, the rows as one batch), the same weights."""
    model = parity.torch_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    cfg = load_model_config(folder)
    rows = parity.build(model)
    return model, rows, hf.load_params(folder, cfg), cfg, tiny.pad(list(rows.values()), PixelConfig())


@pytest.fixture(scope="module")
def ours(pair):
    """Logits [B, S, vocab] and vision tokens [B, V, D] of the batch."""
    _, _, params, cfg, prompts = pair

    @jax.jit
    def run(params, prompts):
        tokens = family.encode(params, cfg, prompts.vision)
        hidden, _ = family.forward(params, cfg, prompts, vision_tokens=tokens)
        return embedding.logits(params, hidden), tokens

    return jax.device_get(run(params, prompts))


def relative(ours, theirs) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", parity.ROWS)
def test_logits(pair, ours, name):
    model, rows, *_ = pair
    with torch.no_grad():
        expected = model(**parity.torch_inputs([rows[name]])).logits[0].numpy()
    got = ours[0][list(rows).index(name), : len(expected)]
    assert relative(got, expected) <= TOLERANCE


def test_text_without_a_tower(pair, ours):
    """A batch without any picture is another program: `vision` is None."""
    _, rows, params, cfg, prompts = pair
    text = tiny.pad([rows["text"]], PixelConfig())
    assert text.vision is None
    hidden, _ = jax.jit(family.forward, static_argnums=1)(params, cfg, text)
    got = np.asarray(embedding.logits(params, hidden))[0]
    assert relative(got, ours[0][list(rows).index("text"), : len(got)]) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name, parts in parity.ROWS.items() if len(parts) > 1])
def test_vision_tokens(pair, ours, name):
    model, rows, _, _, prompts = pair
    inputs, b = parity.torch_inputs([rows[name]]), list(rows).index(name)
    for pixels, grid, token in (
        ("pixel_values", "image_grid_thw", parity.IMAGE),
        ("pixel_values_videos", "video_grid_thw", parity.VIDEO),
    ):
        if pixels not in inputs:
            continue
        with torch.no_grad():
            expected = model.model.visual(inputs[pixels], inputs[grid]).pooler_output.numpy()
        length = prompts.lengths[b]
        places = prompts.vision_index[b, :length][prompts.tokens[b, :length] == token]
        assert relative(ours[1][b, places], expected) <= TOLERANCE


def test_gradients_of_every_parameter(pair):
    """Of a mean of randomly weighted logits over all rows."""
    model, rows, params, cfg, prompts = pair
    real = np.arange(prompts.tokens.shape[1]) < prompts.lengths[:, None]
    weights = np.random.default_rng(0).normal(size=(*real.shape, parity.VOCAB)).astype(np.float32) * real[..., None]
    weights /= real.sum()
    model.zero_grad()
    for row, weight in zip(rows.values(), weights, strict=True):
        (model(**parity.torch_inputs([row])).logits[0] * torch.tensor(weight[: len(row.tokens)])).sum().backward()

    @jax.jit
    def gradient(params, prompts):
        def loss(params):
            hidden, _ = family.forward(params, cfg, prompts)
            return jnp.sum(embedding.logits(params, hidden) * weights)

        return jax.grad(loss)(params)

    grads = jax.device_get(gradient(params, prompts))
    state = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): p
        for name, p in model.named_parameters()
    }
    largest = max(float(p.grad.abs().max()) for p in state.values())
    table = hf.key_table(cfg)
    assert table.keys() == state.keys()
    for name, entry in table.items():
        leaf = grads
        for key in entry.path:
            leaf = leaf[key]
        ours = entry.to_hf(leaf if entry.layer is None else leaf[entry.layer])
        theirs = state[name].grad.numpy()
        # a parameter whose true gradient is zero (a key's bias) is compared against the scale of the others
        scale = max(np.abs(theirs).max(), 1e-3 * largest)
        assert np.abs(ours - theirs).max() <= TOLERANCE * scale, name


def test_greedy_generation_is_identical(pair):
    """64 tokens of every row, none of them a vision token, which torch would write and then refuse to read. The torch model's
    next token after every prefix of ours is ours, so its greedy text is too; its own `generate`, which numbers positions
    itself, confirms that on a row where both number alike."""
    model, rows, params, cfg, prompts = pair
    keys = sampler.row_keys(jax.random.key(0), jnp.arange(len(rows)), 1)
    samples = sampler.sample(
        params,
        cfg,
        prompts,
        keys,
        Sampling(temperature=0.0, banned=cfg.vision_token_ids),
        max_new_tokens=64,
        stop_ids=(),
        pad_id=0,
    )
    written = dict(zip(rows, np.asarray(samples.tokens)[:, 0].tolist(), strict=True))
    for name, row in rows.items():
        inputs = parity.torch_inputs([dataclasses.replace(row, tokens=[*row.tokens, *written[name]])])
        with torch.no_grad():
            logits = model(**inputs).logits[0, len(row.tokens) - 1 : -1]
        logits[:, list(cfg.vision_token_ids)] = -torch.inf
        assert written[name] == logits.argmax(-1).tolist(), name
    inputs = parity.torch_inputs([rows["three odd images"]])
    del inputs["position_ids"]
    with torch.no_grad():
        text = model.generate(
            **inputs,
            max_new_tokens=64,
            do_sample=False,
            suppress_tokens=list(cfg.vision_token_ids),
            pad_token_id=0,
        )
    assert written["three odd images"] == text[0, inputs["input_ids"].shape[1] :].tolist()
