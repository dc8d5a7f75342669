"""Token cross-entropy against numpy, finite differences and microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxmllm import api
from jaxmllm.methods.sft import cross_entropy, cross_entropy_sums, weigh_parts

RNG = np.random.default_rng(0)
LOGPS = -RNG.exponential(size=(2, 3, 5))  # prompts, completions, tokens
WEIGHTS = np.array([[[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0] * 5], [[0.5, 2, 0, 0, 1], [0, 0, 0, 0, 1], [0] * 5]])


def reference(logps, weights, norm):
    """Plain numpy, one sample at a time."""
    samples = [(-(lp * w).sum(), w.sum()) for lp, w in zip(logps.reshape(-1, 5), weights.reshape(-1, 5), strict=True)]
    samples = [(top, bottom) for top, bottom in samples if bottom > 0]
    if norm == "sample":
        return np.mean([top / bottom for top, bottom in samples])
    return sum(top for top, _ in samples) / sum(bottom for _, bottom in samples)


@pytest.mark.parametrize("norm", ["sample", "token"])
def test_value_gradient_and_masked_garbage(norm):
    with jax.enable_x64(True):
        loss = jax.jit(jax.value_and_grad(lambda x, w: cross_entropy(x, w, norm)))
        value, gradient = loss(jnp.asarray(LOGPS), jnp.asarray(WEIGHTS))
        assert float(value) == pytest.approx(reference(LOGPS, WEIGHTS, norm), rel=1e-12)
        for index in np.ndindex(LOGPS.shape):
            moved = [
                LOGPS + sign * 1e-6 * np.eye(LOGPS.size)[np.ravel_multi_index(index, LOGPS.shape)].reshape(2, 3, 5)
                for sign in (1, -1)
            ]
            slope = (reference(moved[0], WEIGHTS, norm) - reference(moved[1], WEIGHTS, norm)) / 2e-6
            assert float(gradient[index]) == pytest.approx(slope, abs=1e-8)
        for garbage in (np.nan, np.inf, -np.inf, 1e300):
            dirty, dirty_gradient = loss(jnp.asarray(np.where(WEIGHTS > 0, LOGPS, garbage)), jnp.asarray(WEIGHTS))
            assert float(dirty) == float(value)
            np.testing.assert_array_equal(dirty_gradient, gradient)
        empty, empty_gradient = loss(jnp.asarray(LOGPS), jnp.zeros((2, 3, 5)))
        assert float(empty) == 0 and not empty_gradient.any()


def test_long_answers_dominate_tokens_but_not_samples():
    """The two normalisers of the sheets: a 9-token answer at 1 nat and a 1-token answer at 11."""
    logps = -jnp.asarray([[1.0] * 9, [11.0] + [0.0] * 8])
    weights = jnp.asarray([[1] * 9, [1] + [0] * 8])
    assert float(cross_entropy(logps, weights, "sample")) == 6
    assert float(cross_entropy(logps, weights, "token")) == 2


@pytest.mark.parametrize("norm", ["sample", "token"])
def test_microbatches_padding_and_bfloat16(norm):
    want = reference(LOGPS, WEIGHTS, norm)
    sums = jax.jit(lambda x, w: cross_entropy_sums(x, w, norm))
    loss = jax.jit(lambda x, w: cross_entropy(x, w, norm))
    parts = [sums(jnp.asarray(LOGPS[:, k]), jnp.asarray(WEIGHTS[:, k])) for k in range(3)]
    assert float(sum(a for a, _ in parts) / sum(b for _, b in parts)) == pytest.approx(want, rel=1e-6)
    pad = ((0, 1), (0, 2), (0, 3))
    padded = loss(jnp.asarray(np.pad(LOGPS, pad)), jnp.asarray(np.pad(WEIGHTS, pad)))
    assert float(padded) == pytest.approx(want, rel=1e-6)
    low = jnp.asarray(LOGPS, jnp.bfloat16)
    value = loss(low, jnp.asarray(WEIGHTS))
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(reference(np.asarray(low, np.float64), WEIGHTS, norm), rel=1e-6)


def test_unknown_normaliser_is_refused():
    with pytest.raises(ValueError, match="sample or token"):
        cross_entropy(jnp.zeros((1, 1)), jnp.ones((1, 1)), "mean")


IN_JSON = (
    '```json\n[\n\t{"bbox_2d": [7, 27, 37, 57], "label": "large red square"},\n'
    '\t{"bbox_2d": [9, 8, 24, 22], "label": "star"}\n]\n```'
)
IN_TOKENS = (
    "<|object_ref_start|>large red square<|object_ref_end|><|box_start|>(7,27),(37,57)<|box_end|>"
    "<|object_ref_start|>star<|object_ref_end|><|box_start|>(9,8),(24,22)<|box_end|>"
)


@pytest.mark.parametrize("answer", [IN_JSON, IN_TOKENS])
def test_weights_of_first_corners_and_labels(answer):
    tokenizer = AutoTokenizer.from_pretrained(str(api.TINY))
    tokens = tokenizer.encode(answer, add_special_tokens=False)
    weights = weigh_parts(tokenizer, 3.0, 4.0)({}, tokens)
    written = [(tokenizer.decode([token]).strip(), weight) for token, weight in zip(tokens, weights, strict=True)]
    chosen = [(piece.strip('"'), weight) for piece, weight in written if weight != 1]
    named = [(word, 4.0) for word in ("large", "red", "square", "star")]
    assert [pair for pair in chosen if pair[1] == 3] == [(number, 3.0) for number in ("7", "27", "9", "8")]
    assert [pair for pair in chosen if pair[1] == 4] == named
    assert weigh_parts(tokenizer, 1.0, 1.0) is None
    assert set(weigh_parts(tokenizer, 3.0, 4.0)({}, tokenizer.encode("no box here"))) == {1.0}
