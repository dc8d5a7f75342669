"""Completions that hold pictures of their own, as those of tools: scored as if they were part of one long prompt."""

import dataclasses

import jax
import numpy as np

from jaxmllm.model import family
from jaxmllm.types import Completions
from tests.support import tiny

CFG = tiny.config()
SPLIT = 14  # tokens of the prompt: the picture after it belongs to the completion


def test_hidden_states_equal_those_of_one_long_prompt():
    params = tiny.params(CFG)
    whole = tiny.prompts(CFG, [[2, (4, 6), 5, (6, 4), 4]])
    length = int(whole.lengths[0])
    first = np.flatnonzero(whole.vision_index[0] < 0)  # text; the cut lies in it
    assert SPLIT in first and (whole.vision_index[0, SPLIT:] >= 0).any() and (whole.vision_index[0, :SPLIT] >= 0).any()
    expected, _ = jax.jit(family.forward, static_argnums=1)(params, CFG, whole)

    prompts = dataclasses.replace(
        whole,
        tokens=whole.tokens[:, :SPLIT],
        positions=whole.positions[:, :, :SPLIT],
        lengths=np.array([SPLIT], np.int32),
        vision_index=whole.vision_index[:, :SPLIT],
    )
    twice = [np.repeat(x[:, None], 2, axis=1) for x in (whole.tokens, whole.positions, whole.vision_index)]
    tokens, positions, index = (x[..., SPLIT:length] for x in twice)
    completions = Completions(
        tokens, np.full((1, 2), length - SPLIT, np.int32), np.ones(tokens.shape, np.float32), positions, index
    )
    _, hidden = jax.jit(family.forward, static_argnums=1)(params, CFG, prompts, completions)
    for g in range(2):
        np.testing.assert_allclose(hidden[0, g], expected[0, SPLIT - 1 : length - 1], atol=1e-5)
    # without its positions and pictures it is something else
    bare = dataclasses.replace(completions, positions=None, vision_index=None)
    _, other = jax.jit(family.forward, static_argnums=1)(params, CFG, prompts, bare)
    assert np.abs(other - hidden).max() > 1e-2
