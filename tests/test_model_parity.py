"""Tower, decoder, gradients and greedy text equal transformers' torch models, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.config import load_model_config
from jaxmllm.model import hf, qwen_vl
from tests import parity

torch = pytest.importorskip("torch")
KINDS = ("qwen2_5_vl", "qwen2_vl")
TOLERANCE = 1e-4  # of the largest entry


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(torch model, our parameters, our config), the same weights."""
    model = parity.torch_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    cfg = load_model_config(folder)
    return model, hf.load_params(folder, cfg), cfg


def relative(ours, theirs) -> float:
    theirs = np.asarray(theirs)
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("batch", parity.BATCHES)
def test_logits_and_vision_tokens(pair, batch):
    model, params, cfg = pair
    inputs, prompts = parity.build(parity.BATCHES[batch], model)
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()

    @jax.jit
    def run(params, prompts):
        hidden, _ = qwen_vl.forward(params, cfg, prompts)
        return qwen_vl.logits(params, hidden)

    ours = np.asarray(run(params, prompts))
    for row, length in enumerate(prompts.lengths):
        assert relative(ours[row, :length], expected[row, :length]) <= TOLERANCE, batch
    if prompts.vision is None or "pixel_values" not in inputs:
        return
    with torch.no_grad():
        tower = model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output.numpy()
    tokens = np.asarray(jax.jit(qwen_vl.encode, static_argnums=1)(params, cfg, prompts.vision))
    is_image = np.asarray(prompts.tokens) == parity.IMAGE
    ours = np.concatenate([tokens[b][prompts.vision_index[b][is_image[b]]] for b in range(len(tokens))])
    assert relative(ours, tower) <= TOLERANCE


@pytest.mark.parametrize("batch", ["three odd images", "padded mix"])
def test_gradients_of_every_parameter(pair, batch):
    model, params, cfg = pair
    inputs, prompts = parity.build(parity.BATCHES[batch], model)
    real = np.arange(prompts.tokens.shape[1]) < prompts.lengths[:, None]
    weights = np.random.default_rng(0).normal(size=(*real.shape, parity.VOCAB)).astype(np.float32) * real[..., None]
    model.zero_grad()
    (model(**inputs).logits * torch.tensor(weights)).mean().backward()

    @jax.jit
    def gradient(params):
        def loss(params):
            hidden, _ = qwen_vl.forward(params, cfg, prompts)
            return jnp.mean(qwen_vl.logits(params, hidden) * weights)

        return jax.grad(loss)(params)

    grads = gradient(params)
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
        ours = entry.to_hf(np.asarray(leaf if entry.layer is None else leaf[entry.layer]))
        theirs = state[name].grad.numpy()
        # a parameter whose true gradient is zero (a key's bias) is compared against the scale of the others
        scale = max(np.abs(theirs).max(), 1e-3 * largest)
        assert np.abs(ours - theirs).max() <= TOLERANCE * scale, name


def test_greedy_generation_is_identical(pair):
    from jaxmllm.losses.logprobs import Sampling
    from jaxmllm.rollout import sampler

    model, params, cfg = pair
    inputs, prompts = parity.build(parity.BATCHES["image and video"], model)
    with torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=0)
    expected = expected[:, inputs["input_ids"].shape[1] :].numpy()
    keys = sampler.row_keys(jax.random.key(0), jnp.arange(1), 1)
    samples = sampler.sample(
        params, cfg, jax.tree.map(jnp.asarray, prompts), keys, Sampling(temperature=0.0), max_new_tokens=64, stop_ids=(), pad_id=0
    )
    assert np.asarray(samples.tokens)[:, 0].tolist() == expected.tolist()
