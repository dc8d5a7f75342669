"""Eight devices give what one gives, parameters lie where the rules say, and rows never leave their device."""

import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmllm.errors import InputError
from jaxmllm.machine import layout
from jaxmllm.machine.mesh import RULES, make_mesh, param_shardings, shard_batch, spec_for, tree_paths
from jaxmllm.model import family, hf, lora
from jaxmllm.model.logprobs import Sampling
from jaxmllm.rollout import sampler
from jaxmllm.rollout.scorer import score, score_halves
from tests.support import tiny

P = PartitionSpec
CFG = tiny.config()
PARAMS = tiny.params(CFG)
ROWS = [*tiny.MIXED, [3, (2, 2)], [1], [8, tiny.video(1, 4, 4), 2], [5, (6, 2), 1]]
G, T = 2, 4
MESHES = [{"fsdp": 4, "tensor": 2}, pytest.param({"replica": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def batch():
    return tiny.prompts(CFG, ROWS), tiny.completions(len(ROWS), G, T)


def placed(mesh, batch):
    return jax.device_put(PARAMS, param_shardings(PARAMS, mesh)), *(shard_batch(part, mesh) for part in batch)


def loss(params, prompts, completions):
    logps, _ = score(params, CFG, prompts, completions, Sampling())
    return jnp.sum(logps * completions.weights) / 50, logps


GRADIENT = jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def single(batch):
    """(log-probabilities, gradient, greedy and drawn samples) on one device."""
    (_, logps), grads = GRADIENT(PARAMS, *batch)
    return logps, grads, [draw(PARAMS, batch[0], temperature) for temperature in (0.0, 1.0)]


def draw(params, prompts, temperature):
    keys = sampler.row_keys(jax.random.key(0), jnp.arange(len(ROWS)), G)
    options = dict(max_new_tokens=6, stop_ids=(7,), pad_id=0)
    return jax.device_get(sampler.sample(params, CFG, prompts, keys, Sampling(temperature=temperature), **options))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_sharded_equals_unsharded(sizes, batch, single):
    """Forward, gradient of every parameter, and sampling."""
    mesh = make_mesh(**sizes)
    params, prompts, completions = placed(mesh, batch)
    (_, logps), grads = GRADIENT(params, prompts, completions)
    real = batch[1].weights > 0
    np.testing.assert_allclose(np.asarray(logps)[real], np.asarray(single[0])[real], atol=1e-5)
    for path, a, b in zip(*map(jax.tree.leaves, (tree_paths(PARAMS), grads, single[1])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, float(jnp.abs(b).max())), err_msg=path)
    for temperature, expected in zip((0.0, 1.0), single[2], strict=True):
        got = draw(params, prompts, temperature)
        np.testing.assert_array_equal(got.tokens, expected.tokens)
        np.testing.assert_array_equal(got.lengths, expected.lengths)
        np.testing.assert_allclose(got.logps, expected.logps, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"fsdp": 1}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_short_completions_are_scored_by_themselves(sizes, batch):
    """Values and gradient, as if all were padded to the longest."""
    short, (prompts, completions) = 2, batch
    mesh = make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    first = np.arange(len(ROWS)).reshape(sizes["fsdp"], 2, -1)[:, 0].reshape(-1)  # half of each device's
    lengths, weights = np.array(completions.lengths), np.array(completions.weights)
    lengths[first] = np.minimum(lengths[first], short)
    weights[first, :, short:] = 0
    whole = completions.replace(lengths=lengths, weights=weights)

    def run(params, prompts, completions, short):
        def loss(params):
            logps, entropies = score_halves(params, CFG, prompts, completions, Sampling(), None, short)
            return jnp.sum(logps * completions.weights) / 50, (logps, entropies)

        return jax.value_and_grad(loss, has_aux=True)(params)

    run = jax.jit(run, static_argnums=3)
    (_, outputs), grads = run(*placed(mesh, (prompts, whole)), short)
    (_, expected), expected_grads = run(*placed(mesh, (prompts, whole)), 0)
    real = weights > 0
    for a, b in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a)[real], np.asarray(b)[real], atol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (grads, expected_grads)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, float(jnp.abs(b).max())))


# ---------------------------------------------------------------- the order of rows


@pytest.mark.parametrize("blocks, cuts, microbatches", [(1, 1, 2), (2, 1, 4), (4, 2, 2), (1, 3, 4)])
def test_rows_that_teach_nothing_share_the_last_microbatches(blocks, cuts, microbatches):
    rng = np.random.default_rng(blocks)
    rows = blocks * cuts * microbatches * 3
    for share in (0.0, 0.3, 0.7, 1.0):
        teaches = rng.random(rows) < share
        order = layout.idle_last(teaches, blocks, cuts, microbatches)
        where = np.arange(rows).reshape(blocks, -1)
        moved = order.reshape(blocks, -1)
        for cut in range(cuts):
            before, after = where[:, cut::cuts], moved[:, cut::cuts]
            np.testing.assert_array_equal(np.sort(after, axis=1), before)  # every row stays in its block and cut
            needed = -(-teaches[before].sum(1) // (before.shape[1] // microbatches))  # microbatches, by block
            for k in range(microbatches):
                assert (teaches[after[:, k::microbatches]].any(1) == (k < needed)).all()


@pytest.mark.parametrize("blocks, rows", [(1, 6), (2, 5), (4, 2)])
def test_the_shorter_half_of_each_block_comes_first(blocks, rows):
    longest = np.random.default_rng(rows).permutation(blocks * rows) + 1
    order, short = layout.shortest_first(longest, blocks)
    halves = longest[order].reshape(blocks, rows)
    for block, before in zip(halves, longest.reshape(blocks, rows), strict=True):
        assert sorted(block) == sorted(before) and max(block[: rows // 2]) <= min(block[rows // 2 :])
    assert short == halves[:, : rows // 2].max()


def test_rows_are_taken_where_they_lie():
    mesh = make_mesh(fsdp=4, tensor=2)
    x, order = np.arange(24.0).reshape(8, 3), np.array([1, 0, 0, 1, 1, 1, 0, 0], np.int32)
    taken = layout.take_rows.lower(*shard_batch(((x, None), order), mesh), mesh).compile()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", taken.as_text())
    out = layout.take_rows(*shard_batch(((x, None), order), mesh), mesh)
    np.testing.assert_array_equal(out[0], x[order + np.arange(8) // 2 * 2])


# ---------------------------------------------------------------- collectives

COLLECTIVE = re.compile(
    r"= (.+?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast)[-\w.]*\("
)


def collectives(lowered) -> list[tuple[str, str]]:
    """(shape, kind) of every collective in the compiled program."""
    return COLLECTIVE.findall(lowered.compile().as_text())


def replicated(mesh):
    """Parameters whole on every device: what remains to be communicated is the batch's."""
    return jax.device_put(PARAMS, NamedSharding(mesh, P()))


def test_scoring_moves_no_rows(batch):
    """Fan-out of prompts to completions, merge of vision tokens, vocabulary chunks: no collective at all."""
    mesh = make_mesh(fsdp=8)
    prompts, completions = (shard_batch(part, mesh) for part in batch)
    for sampling in (Sampling(), Sampling(repetition_penalty=1.2, top_p=0.9, banned=(1,))):
        function = jax.jit(score, static_argnums=(1, 4))
        assert collectives(function.lower(replicated(mesh), CFG, prompts, completions, sampling)) == []


def moved(found) -> set[str]:
    """Kinds of collectives on floats. The embedding's gradient is cut by width instead of summed: an all-to-all of its rows."""
    return {kind for shape, kind in found if not re.match(r"[su]\d+\[", shape)} - {"all-to-all"}


def test_its_gradient_only_sums(batch):
    mesh = make_mesh(fsdp=8)
    prompts, completions = (shard_batch(part, mesh) for part in batch)
    assert moved(collectives(GRADIENT.lower(replicated(mesh), prompts, completions))) == {"all-reduce"}


def test_parameters_are_gathered_and_nothing_else(batch):
    """Split over `fsdp`: each matrix is gathered where it is used, at most once in each pass; activations stay."""
    mesh = make_mesh(fsdp=8)
    params, prompts, completions = placed(mesh, batch)
    found = collectives(GRADIENT.lower(params, prompts, completions))
    assert moved(found) == {"all-gather", "all-reduce"}
    gathered = Counter(
        int(np.prod([int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",")]))
        for shape, kind in found
        if kind == "all-gather" and shape.startswith("f32")
    )
    matrices = Counter(
        int(np.prod(leaf.shape[1:] if "/layers/" in path or "/blocks/" in path else leaf.shape))
        for path, leaf in zip(*map(jax.tree.leaves, (tree_paths(PARAMS), PARAMS)), strict=True)
        if leaf.ndim > 1 and not path.endswith(("scale", "bias"))
    )
    # the loop over layers holds one for all of them, in each of the two passes
    assert gathered and all(times <= 2 * matrices[size] for size, times in gathered.items()), (gathered, matrices)


@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.3, "top_k": 5, "top_p": 0.9, "banned": (1, 2)}], ids=str
)
def test_sampling_moves_no_rows(batch, options):
    """Prefill and decode loop: only the end of the loop is agreed on, one number. Nor does leaving finished prompts behind."""
    mesh = make_mesh(fsdp=4, devices=jax.devices()[:4])
    prompts, sampling = shard_batch(batch[0], mesh), Sampling(**options)
    keys = jax.device_put(sampler.row_keys(jax.random.key(0), jnp.arange(len(ROWS)), G), NamedSharding(mesh, P("fsdp")))
    static = dict(num_generations=G, max_new_tokens=T, stop_ids=(7,), pad_id=0)
    params = replicated(mesh)
    assert collectives(sampler.start.lower(params, CFG, prompts, keys, sampling, **static)) == []
    state = sampler.start(params, CFG, prompts, keys, sampling, **static)
    found = collectives(sampler.advance.lower(params, CFG, state, jnp.asarray(T), sampling, (7,)))
    assert all(shape.startswith("s32[]") and kind == "all-reduce" for shape, kind in found), found
    assert collectives(sampler._leave_finished.lower(state, 1)) == []


def test_finished_prompts_are_left_behind_on_every_device(monkeypatch, batch):
    """Two prompts a device, and the devices go on with one each."""
    mesh = make_mesh(fsdp=4, devices=jax.devices()[:4])
    keys = sampler.row_keys(jax.random.key(0), jnp.arange(len(ROWS)), G)
    free = jax.device_get(
        sampler.sample(PARAMS, CFG, batch[0], keys, Sampling(), max_new_tokens=9, stop_ids=(), pad_id=0)
    )
    stops = tuple({int(token) for token in free.tokens[[1, 2, 4, 7], :, 2].reshape(-1)})
    options = dict(max_new_tokens=9, stop_ids=stops, pad_id=0)
    expected = jax.device_get(sampler.sample(PARAMS, CFG, batch[0], keys, Sampling(), **options))
    left, leave = [], sampler._leave_finished
    monkeypatch.setattr(sampler, "WORTH", 1)
    monkeypatch.setattr(sampler, "_leave_finished", lambda state, keep: left.append(keep) or leave(state, keep))
    params = jax.device_put(PARAMS, param_shardings(PARAMS, mesh))
    found = jax.device_get(sampler.sample(params, CFG, shard_batch(batch[0], mesh), keys, Sampling(), **options))
    assert left == [1] and 3 < expected.lengths.max()
    jax.tree.map(np.testing.assert_array_equal, found.replace(logps=0), expected.replace(logps=0))
    np.testing.assert_allclose(found.logps, expected.logps, atol=1e-5)


def test_the_search_for_collectives_finds_them():
    """The pattern is not blind: a sum over the sharded axis needs one."""
    mesh = make_mesh(fsdp=8)
    x = jax.device_put(np.ones((8, 4), np.float32), NamedSharding(mesh, P("fsdp")))
    assert [kind for _, kind in collectives(jax.jit(lambda x: x.sum(0)).lower(x))] == ["all-reduce"]
    whole = jax.jit(lambda x: x * 2, out_shardings=NamedSharding(mesh, P()))
    assert [kind for _, kind in collectives(whole.lower(x))] == ["all-gather"]


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_parameter_has_a_rule_and_matrices_are_split(kind, sizes):
    cfg, mesh = tiny.config(kind), make_mesh(**sizes)
    shapes = hf.abstract_params(cfg)
    adapters = jax.eval_shape(
        lambda p: lora.add(jax.random.key(0), p, lora.LoRAConfig(r=2, targets=".*"), family.of(cfg)), shapes
    )
    paths = jax.tree.leaves(tree_paths(adapters))
    for path, leaf, sharding in zip(
        paths, *map(jax.tree.leaves, (adapters, param_shardings(adapters, mesh))), strict=True
    ):
        local = sharding.shard_shape(leaf.shape)
        if path.endswith(("scale", "bias")):
            assert local == leaf.shape
        elif not path.startswith("lora/"):
            split = leaf.size // np.prod(local)
            assert split == mesh.shape["fsdp"] * (1 if "patch_embed" in path else mesh.shape["tensor"]), path


def test_specs():
    mesh = make_mesh(fsdp=4, tensor=2)
    assert spec_for("text/layers/mlp/up_proj/kernel", (2, 32, 48), mesh) == P(None, "fsdp", "tensor")
    assert spec_for("text/layers/mlp/down_proj/kernel", (2, 48, 32), mesh) == P(None, "tensor", "fsdp")
    assert spec_for("embed", (600, 32), mesh) == P("tensor", "fsdp")
    assert spec_for("text/norm/scale", (32,), mesh) == P()
    # an axis that does not divide moves to the largest free dimension that it divides, or is dropped
    assert spec_for("x/up_proj/kernel", (30, 8), mesh) == P(None, "tensor")
    assert spec_for("x/up_proj/kernel", (4, 30, 9), mesh) == P("fsdp", "tensor")
    assert spec_for("x/up_proj/kernel", (3, 5), mesh) == P()


def test_an_axis_that_does_not_divide_is_logged(caplog):
    with caplog.at_level("INFO", logger="jaxmllm.machine.mesh"):
        spec_for("x/up_proj/kernel", (30, 8), make_mesh(fsdp=4, tensor=2))
    assert "x/up_proj/kernel" in caplog.text and "fsdp" in caplog.text


def test_bad_rules():
    mesh = make_mesh(fsdp=8)
    with pytest.raises(ValueError, match="no sharding rule matches 'nowhere'"):
        spec_for("nowhere", (8,), mesh)
    with pytest.raises(ValueError, match="uses an axis twice"):
        spec_for("a", (8, 8), mesh, ((r"a", P("fsdp", "fsdp")),))
    with pytest.raises(ValueError, match="more dimensions than"):
        spec_for("a", (8,), mesh, ((r"a", P(None, "fsdp")),))


def test_the_first_rule_wins():
    assert spec_for("embed", (8, 8), make_mesh(fsdp=8), ((r"em.*", P("fsdp")), *RULES)) == P(None, "fsdp")


# ---------------------------------------------------------------- mesh and batch


def test_mesh_sizes():
    assert dict(make_mesh().shape) == {"replica": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(tensor=-1, fsdp=2).shape) == {"replica": 1, "fsdp": 2, "tensor": 4}
    assert dict(make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4]).shape) == {"replica": 1, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(fsdp=3), "fsdp 3 x tensor 1 needs 3 devices, there are 8"),
        (dict(tensor=3), "needs a multiple of 3 devices, there are 8"),
        (dict(fsdp=-1, tensor=-1), "at most one axis may be -1"),
        (dict(fsdp=0), "at least 1"),
        (dict(fsdp=-2, tensor=-4), "at least 1"),
        (dict(fsdp=16), "needs 16 devices, there are 8"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_divide(sizes, message):
    with pytest.raises(InputError, match=message):
        make_mesh(**sizes)


def test_rows_that_do_not_divide():
    with pytest.raises(InputError, match="batch of 6 rows does not divide over replica x fsdp = 4"):
        shard_batch({"x": np.zeros((6, 2))}, make_mesh(replica=2, fsdp=2, tensor=2))


def test_rows_are_split_and_keep_their_order():
    mesh = make_mesh(replica=2, fsdp=2, tensor=2)
    x = shard_batch(np.arange(16).reshape(8, 2), mesh)
    np.testing.assert_array_equal(x, np.arange(16).reshape(8, 2))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 2)}
