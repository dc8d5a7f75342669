"""The sampler against the scorer, against exact distributions, and against itself in other batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxmllm.model import embedding, family
from jaxmllm.model.logprobs import MASKED, Sampling, warp
from jaxmllm.rollout import sampler
from jaxmllm.rollout.scorer import score_jit
from jaxmllm.types import Completions
from tests.support import tiny

CFG = tiny.config()
PARAMS = tiny.params(CFG)
TEXT = [[9], [4], [13]]  # three prompts without pictures: no tower to compile
T, G = 12, 3


def keys(rows, groups=G, seed=0):
    return sampler.row_keys(jax.random.key(seed), jnp.asarray(rows), groups)


def run(prompts, row_keys, sampling=Sampling(), **options):  # noqa: B008 (frozen)
    given = dict(max_new_tokens=T, stop_ids=(), pad_id=599) | options
    return jax.device_get(sampler.sample(PARAMS, CFG, prompts, row_keys, sampling, **given))


@pytest.fixture(scope="module")
def batch():
    """Prompts of three lengths and a run of temperature 1 without stop tokens."""
    prompts = tiny.prompts(CFG, TEXT)
    return prompts, run(prompts, keys(range(3)))


def score(prompts, samples, sampling):
    completions = Completions(samples.tokens, samples.lengths, np.ones(samples.tokens.shape, np.float32))
    return np.asarray(score_jit(PARAMS, CFG, prompts, completions, sampling)[0])


OPTIONS = [
    {},
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_p": 0.6},
    {"min_p": 0.3},
    {"repetition_penalty": 1.5},
    {"banned": (5, 400)},
    {"temperature": 0.0, "banned": (5,)},
    {"temperature": 1.4, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3, "banned": (1, 2, 3)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_log_probabilities_equal_the_scorers(options):
    sampling, prompts = Sampling(**options), tiny.prompts(CFG, TEXT)
    samples = run(prompts, keys(range(3)), sampling)
    np.testing.assert_allclose(samples.logps, score(prompts, samples, sampling), atol=1e-4)
    assert samples.logps.min() > MASKED / 2  # nothing outside the filters was drawn
    assert not np.isin(samples.tokens, sampling.banned).any()


def test_with_pictures_and_a_reused_tower_output():
    prompts = tiny.prompts(CFG)
    seen = jax.jit(family.encode, static_argnums=1)(PARAMS, CFG, prompts.vision)
    samples = run(prompts, keys(range(4)), vision_tokens=seen)
    np.testing.assert_allclose(samples.logps, score(prompts, samples, Sampling()), atol=1e-4)


def test_greedy_takes_the_likeliest_token_at_every_step(batch):
    prompts, _ = batch
    samples = run(prompts, keys(range(3)), Sampling(temperature=0.0))
    assert (samples.tokens == samples.tokens[:, :1]).all()  # every completion alike
    completions = Completions(samples.tokens, samples.lengths, np.ones(samples.tokens.shape, np.float32))
    _, hidden = jax.jit(family.forward, static_argnums=1)(PARAMS, CFG, prompts, completions)
    np.testing.assert_array_equal(np.asarray(embedding.logits(PARAMS, hidden)).argmax(-1), samples.tokens)


# ---------------------------------------------------------------- frequencies


def chi_square(tokens, probs):
    """p-value of drawing `tokens` from `probs`; entries expected less than 5 times are pooled."""
    counts, expected = np.bincount(tokens, minlength=len(probs)), probs.astype(np.float64) * len(tokens)
    assert not counts[probs == 0].any()
    rare = expected < 5
    counts = [*counts[~rare], counts[rare].sum()]
    expected = [*expected[~rare], expected[rare].sum()]
    keep = np.array(expected) > 0
    counts, expected = np.array(counts)[keep], np.array(expected)[keep]
    return stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


@pytest.mark.parametrize("vocab", [600, 512, 1300])
def test_draws_follow_the_distribution(vocab):
    rng = np.random.default_rng(vocab)
    x = np.where(rng.random(vocab) < 0.5, 2 * rng.normal(size=vocab), MASKED).astype(np.float32)
    norm = np.float32(np.log(np.exp(x.astype(np.float64)).sum()))
    n = 20_000

    @jax.jit
    def many(keys):
        return sampler.draw(keys, jnp.broadcast_to(x, (keys.shape[0], vocab)))

    drawn = [many(k) for k in jax.random.split(jax.random.key(1), n).reshape(20, -1)]
    tokens, logps = (np.concatenate(part) for part in zip(*drawn, strict=True))
    np.testing.assert_allclose(logps, x[tokens] - norm, atol=1e-5)
    probs = np.exp(x.astype(np.float64) - norm) * (x > MASKED / 2)
    assert chi_square(tokens, probs) > 1e-3


def test_draw_never_takes_an_entry_without_weight(monkeypatch):
    """Not even where the parallel sum that it inverts is off by a rounding error."""
    rng = np.random.default_rng(0)
    x = np.where(rng.random((64, 600)) < 0.1, rng.normal(size=(64, 600)), MASKED).astype(np.float32)
    exact = jnp.cumsum

    def shaky(a, axis):
        noise = 1 + 1e-2 * jax.random.normal(jax.random.key(0), a.shape)
        return exact(a, axis=axis) * noise

    monkeypatch.setattr(jnp, "cumsum", shaky)
    for seed in range(20):
        tokens, _ = sampler.draw(jax.random.split(jax.random.key(seed), 64), jnp.asarray(x))
        tokens = np.asarray(tokens)
        assert (x[np.arange(64), tokens] > MASKED / 2).all()


def test_first_and_second_token_frequencies_of_the_sampler():
    """1,500 completions of one prompt: the first token, and the second after the commonest first."""
    sampling = Sampling(temperature=0.3, top_k=8)
    prompts = tiny.prompts(CFG, [[9]])
    samples = run(prompts, keys([0], 1500), sampling, max_new_tokens=2)
    tokens = samples.tokens[0]
    first = np.bincount(tokens[:, 0]).argmax()
    follow = tokens[tokens[:, 0] == first, 1]
    given = np.array([[[first, 0]]], np.int32)
    _, hidden = family.forward(PARAMS, CFG, prompts, Completions(given, np.array([[2]]), np.ones((1, 1, 2))))
    probs = np.asarray(jax.nn.softmax(warp(embedding.logits(PARAMS, hidden)[0, 0], sampling), axis=-1))
    assert chi_square(tokens[:, 0], probs[0]) > 1e-3
    assert len(follow) > 300 and chi_square(follow, probs[1]) > 1e-3


# ---------------------------------------------------------------- what a completion depends on


def test_a_row_does_not_depend_on_the_batch_around_it(batch):
    """Alone, in another order, with other prompts of other lengths, with more completions a prompt."""
    prompts, samples = batch
    one = jax.tree.map(lambda x: x[1:2, ...], prompts)
    alone = run(one.replace(tokens=one.tokens[:, :4], positions=one.positions[..., :4]), keys([1]))
    np.testing.assert_array_equal(alone.tokens[0], samples.tokens[1])
    order = np.array([2, 0, 1])
    turned = run(jax.tree.map(lambda x: x[order], prompts), keys(order))
    np.testing.assert_array_equal(turned.tokens, samples.tokens[order])
    more = run(prompts, keys(range(3), G + 1))
    np.testing.assert_array_equal(more.tokens[:, :G], samples.tokens)


def test_seeds_rows_and_completions_differ(batch):
    prompts, samples = batch
    other = run(prompts, keys(range(3), seed=1))
    assert (other.tokens != samples.tokens).any(-1).all()
    assert len(np.unique(samples.tokens.reshape(-1, T), axis=0)) == 3 * G
    same = jax.tree.map(lambda x: np.repeat(x[:1], 3, axis=0), prompts)
    assert len(np.unique(run(same, keys(range(3))).tokens.reshape(-1, T), axis=0)) == 3 * G  # by id, not by prompt


# ---------------------------------------------------------------- stopping


def test_stop_tokens_end_a_completion(batch):
    prompts, free = batch
    stops = (int(free.tokens[0, 0, 4]), int(free.tokens[2, 1, 0]), 598)
    samples = run(prompts, keys(range(3)), stop_ids=stops)
    for b, g in np.ndindex(3, G):
        at = np.flatnonzero(np.isin(free.tokens[b, g], stops))
        n = at[0] + 1 if len(at) else T
        assert samples.lengths[b, g] == n and samples.stopped[b, g] == bool(len(at))
        np.testing.assert_array_equal(samples.tokens[b, g], [*free.tokens[b, g, :n], *[599] * (T - n)])
        np.testing.assert_allclose(samples.logps[b, g], [*free.logps[b, g, :n], *[0] * (T - n)], atol=1e-5)
    assert samples.lengths[2, 1] == 1 and samples.steps == T


def test_the_loop_ends_with_the_last_completion(batch):
    prompts, free = batch
    stops = tuple(int(token) for token in free.tokens[..., :3].reshape(-1))
    samples = run(prompts, keys(range(3)), stop_ids=stops)
    assert samples.steps == samples.lengths.max() < T


def test_counts_leave_the_other_completions_empty(batch):
    prompts, free = batch
    counts = np.array([2, 0, 3], np.int32)
    samples = run(prompts, keys(range(3)), counts=counts)
    wanted = np.arange(G) < counts[:, None]
    np.testing.assert_array_equal(samples.lengths, np.where(wanted, T, 0))
    np.testing.assert_array_equal(samples.tokens, np.where(wanted[..., None], free.tokens, 599))
    assert not samples.logps[~wanted].any() and not samples.stopped.any()


def test_banned_tokens_are_never_drawn(batch):
    """Even where they are what the model wants most."""
    prompts, free = batch
    banned = tuple(sorted(set(free.tokens.reshape(-1).tolist())))
    for temperature in (0.0, 1.0):
        samples = run(prompts, keys(range(3)), Sampling(temperature=temperature, banned=banned))
        assert not np.isin(samples.tokens, banned).any()


def test_repetition_penalty_counts_prompt_and_completion():
    """A huge penalty never repeats a token of the prompt or of the completion."""
    prompts = tiny.prompts(CFG, [[40]])
    samples = run(prompts, keys([0]), Sampling(temperature=0.0, repetition_penalty=1e6))
    for row in samples.tokens[0]:
        assert len(set(row.tolist())) == T and not set(row.tolist()) & set(prompts.tokens[0].tolist())


# ---------------------------------------------------------------- in pieces


def test_pieces_equal_one_run(batch):
    """What streaming does: the loop is left and entered again."""
    prompts, whole = batch
    static = dict(num_generations=G, max_new_tokens=T, stop_ids=(), pad_id=599)
    state = sampler.start(PARAMS, CFG, prompts, keys(range(3)), Sampling(), **static)
    seen = 1
    for until in (1, 4, 5, 11, T, T):
        state = sampler.advance(PARAMS, CFG, state, jnp.asarray(until), Sampling(), ())
        assert int(state.step) == max(seen, until)
        np.testing.assert_array_equal(state.tokens[..., :until], whole.tokens[..., :until])
        assert (np.asarray(state.tokens)[..., until:] == 599).all()
        seen = until
    np.testing.assert_array_equal(sampler.finish(state).logps, whole.logps)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("lasting", [0, 3, 5])
def test_finished_prompts_are_left_behind(monkeypatch, options, lasting):
    """Eight prompts of which one lasts to the end: the loop goes on with four and then with two, and nothing else changes."""
    prompts = tiny.prompts(CFG, [[9], [4], [13], [7], [2], [11], [5], [8]])
    free = run(prompts, keys(range(8)), Sampling(**options))
    ends = [k % 4 for k in range(8)]  # its last completion ends at this token
    stops = tuple({int(free.tokens[b, g, ends[b]]) for b in range(8) if b != lasting for g in range(G)})
    one = run(prompts, keys(range(8)), Sampling(**options), stop_ids=stops)

    loops, leave = [], sampler._leave_finished
    monkeypatch.setattr(sampler, "WORTH", 1)
    monkeypatch.setattr(sampler, "_leave_finished", lambda state, keep: loops.append(keep) or leave(state, keep))
    thinned = run(prompts, keys(range(8)), Sampling(**options), stop_ids=stops)
    jax.tree.map(np.testing.assert_array_equal, thinned.replace(logps=0), one.replace(logps=0))
    np.testing.assert_allclose(thinned.logps, one.logps, atol=1e-5)
    open_prompts = [(one.lengths.max(1) > n).sum() for n in range(T)]  # after n tokens
    assert loops == [keep for keep in (4, 2) if any(0 < n <= keep for n in open_prompts[1:])]


def test_the_cache_is_donated(batch):
    """The loop writes its cache in place: the state it was given is gone."""
    prompts, _ = batch
    static = dict(num_generations=G, max_new_tokens=T, stop_ids=(), pad_id=599)
    state = sampler.start(PARAMS, CFG, prompts, keys(range(3)), Sampling(), **static)
    sampler.advance(PARAMS, CFG, state, jnp.asarray(T), Sampling(), ())
    assert state.cache.k.is_deleted() and state.cache.prompt_k.is_deleted()
