"""What is read from compiled programs: against hand counts, XLA's analysis of programs without loops, real collectives."""

# ruff: noqa: E501 (programs as the compiler prints them)

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmllm import cli
from jaxmllm.errors import InputError
from jaxmllm.machine.mesh import make_mesh
from jaxmllm.machine.targets import CPU, H100, V5E, MeshTarget, load_mesh, same_devices
from jaxmllm.methods import DPO, GRPO, SFT, shapes
from jaxmllm.methods.shapes import Sizes
from jaxmllm.model import attention, hf
from jaxmllm.model.logprobs import Sampling
from jaxmllm.plan import advise, architecture, hlo, plan, report
from jaxmllm.plan.flops import count
from jaxmllm.plan.hlo import Message
from jaxmllm.plan.roofline import Links, Times
from jaxmllm.rollout.scorer import score
from jaxmllm.training.config import MeshConfig, OptimConfig, TrainConfig
from tests.support import tiny

N = 64


def layers(x, kernels, unroll=1):
    return jax.lax.scan(lambda c, k: (jnp.tanh(c @ k), None), x, kernels, unroll=unroll)[0]


SHAPES = jax.ShapeDtypeStruct((8, N), jnp.float32), jax.ShapeDtypeStruct((12, N, N), jnp.float32)
PRODUCTS = 12 * 2 * 8 * N * N


def compiled(function, *shapes, **options):
    return jax.jit(function, **options).lower(*shapes).compile()


# ---------------------------------------------------------------- FLOPs of the traced program


def test_a_loop_counts_as_often_as_it_runs():
    assert count(layers, *SHAPES) == count(lambda x, k: layers(x, k, 12), *SHAPES) == PRODUCTS


def test_backward_and_rematerialised():
    def loss(x, kernels, block):
        return jnp.sum(jax.lax.scan(lambda c, k: (block(c, k), None), x, kernels)[0])

    def block(c, k):
        return jnp.tanh(c @ k)

    grad = jax.grad(loss, (0, 1))
    assert count(lambda x, k: grad(x, k, block), *SHAPES) == 3 * PRODUCTS
    again = jax.checkpoint(block, policy=jax.checkpoint_policies.nothing_saveable)
    assert count(lambda x, k: grad(x, k, again), *SHAPES) == 4 * PRODUCTS


def test_loops_without_an_end_and_branches():
    def until(x, k):
        return jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ k, x)

    x, k = jax.ShapeDtypeStruct((N, N), jnp.float32), jax.ShapeDtypeStruct((N, N), jnp.float32)
    assert count(until, x, k, steps=7) == 7 * 2 * N**3

    def either(x, k):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ k @ k @ k, lambda: x @ k)

    assert count(either, x, k, chosen=0.25) == 2 * N**3 * (0.25 * 3 + 0.75 * 1)


def test_the_model_by_formula():
    """A scored batch, by the sizes in its config: products with every matrix, and two products an attended pair."""
    cfg = tiny.config()
    t, v = cfg.text, cfg.vision
    b, g, s, n, frames, windows = 2, 3, 24, 8, 1, 2
    patches, merged = frames * windows * v.window_patches, v.spatial_merge_size**2
    half = t.hidden_size // t.num_attention_heads * t.num_key_value_heads
    layer = 2 * t.hidden_size**2 + 2 * t.hidden_size * half + 3 * t.hidden_size * t.intermediate_size
    tokens = s + g * n
    pairs = s * s + g * n * (s + n)
    decoder = t.num_hidden_layers * (2 * tokens * layer + 4 * pairs * t.hidden_size)
    head = 2 * g * n * t.hidden_size * t.vocab_size
    block = 4 * v.hidden_size**2 + 3 * v.hidden_size * v.intermediate_size
    seen = np.array([v.window_patches, windows * v.window_patches])  # by a windowed block, by a full one
    tower = sum(2 * patches * block + 4 * patches * one * v.hidden_size for one in seen)
    wide = v.hidden_size * merged
    tower += 2 * patches * v.patch_pixels * v.hidden_size + 2 * patches / merged * wide * (wide + t.hidden_size)
    expected = b * (decoder + head + tower)

    mesh = make_mesh(devices=jax.devices()[:1])
    sizes = Sizes(b, g, frames, windows, s, n)
    prompts, completions = shapes.prompts(sizes, cfg, mesh), shapes.completions(sizes, mesh)
    flops = count(
        lambda p, x, c: score(p, cfg, x, c, Sampling()), hf.abstract_params(cfg), prompts, completions, chosen=0.5
    )
    assert flops == pytest.approx(expected, rel=1e-6)


def test_fused_attention_by_the_body_of_its_kernels():
    """The products of one block of scores, as the kernels' own programs have them, times the blocks that hold a visible pair."""
    b, x, n, heads, width, prompt, groups = 2, 2048, 4, 2, 128, 1024, 4
    q, k = (jax.ShapeDtypeStruct((b, x, m, width), jnp.bfloat16) for m in (n, heads))

    def loss(q, k, v):
        out = attention.shared(q, k, v, jnp.full(b, prompt), prompt, groups, "splash")
        return jnp.sum(out.astype(jnp.float32))

    grad = jax.grad(loss, (0, 1, 2))
    own = (x - prompt) // groups
    place = np.arange(x)
    run = np.where(place < prompt, 0, 1 + (place - prompt) // own)
    seen = (place[:, None] >= place) & ((run == 0) | (run[:, None] == run))
    visible = seen.reshape(4, 512, 4, 512).any((1, 3)).sum()

    def products(jaxpr):
        for one in jaxpr.eqns:
            if one.primitive.name == "pallas_call":
                yield sum(map(dots, jaxprs_in_params(one.params)))
            else:
                for inner in jaxprs_in_params(one.params):
                    yield from products(inner)

    def dots(jaxpr):
        return sum(one.primitive.name == "dot_general" for one in jaxpr.eqns) + sum(
            dots(inner) for one in jaxpr.eqns for inner in jaxprs_in_params(one.params)
        )

    per_block = list(products(jax.make_jaxpr(grad)(q, k, k).jaxpr))
    assert len(per_block) == 3  # forward, gradient of queries, gradient of keys and values
    expected = int(sum(per_block) * visible) * 2 * 512 * 512 * width * b * n
    assert count(grad, q, k, k) == pytest.approx(expected, rel=1e-3)  # and a sum over the heads' width


# ---------------------------------------------------------------- the compiled program


def test_compiled_loops():
    """The scanned program as the unrolled one, and that as XLA's own analysis of it (which also counts tanh)."""
    scanned, unrolled = compiled(layers, *SHAPES), compiled(lambda x, k: layers(x, k, 12), *SHAPES)
    analysis = unrolled.cost_analysis()
    for program in (scanned, unrolled):
        read = hlo.Program(program.as_text())
        assert read.cost.flops == PRODUCTS
        assert read.unknown_loops == 0
        assert read.cost.bytes == pytest.approx(analysis["bytes accessed"], rel=0.35)
    assert analysis["flops"] == pytest.approx(PRODUCTS, rel=0.02)
    assert scanned.cost_analysis()["flops"] < PRODUCTS / 6  # why this is needed


def test_memory_traffic_without_loops():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    program = compiled(lambda a, b: jnp.sin(a @ b) + 1, x, x)
    cost = hlo.Program(program.as_text()).cost
    assert cost.flops == 2 * 256**3
    assert cost.bytes == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.01)


def test_a_loop_of_unknown_length():
    x = jax.ShapeDtypeStruct((N, N), jnp.float32)
    program = compiled(lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ c, x), x)
    read = hlo.Program(program.as_text(), steps=5)
    assert (read.cost.flops, read.unknown_loops) == (5 * 2 * N**3, 1)


def test_messages():
    """Parameters split over eight devices: gathered once in each of 12 turns; a sum over rows: one reduction."""
    mesh = make_mesh(fsdp=4, tensor=2)
    x = jax.ShapeDtypeStruct((8, N), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    k = jax.ShapeDtypeStruct((12, N, N), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    program = compiled(layers, x, k, out_shardings=NamedSharding(mesh, P("fsdp")))
    messages = hlo.Program(program.as_text()).cost.messages
    assert messages == {Message("all-gather", N * N * 4.0, (0, 2, 4, 6)): 12}
    whole = compiled(lambda x: x.sum(0), x, out_shardings=NamedSharding(mesh, P()))
    (message,) = hlo.Program(whole.as_text()).cost.messages
    assert (message.kind, message.size, len(message.group)) == ("all-reduce", N * 4.0, 4)


TPU = """HloModule jit_f

%wide.cond (wide.param: (s32[], bf16[4,128])) -> pred[] {
  %wide.param = (s32[]{:T(128)}, bf16[4,128]{1,0:T(4,128)(2,1)}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%wide.param), index=0
  %constant.5 = s32[]{:T(128)} constant(36)
  ROOT %lt.3 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.5), direction=LT, metadata={op_name="jit(f)/while/cond/lt"}
}

%wide.body (wide.param.1: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %wide.param.1 = (s32[]{:T(128)}, bf16[4,128]{1,0:T(4,128)(2,1)}) parameter(0)
  %get-tuple-element.2 = bf16[4,128]{1,0:T(4,128)(2,1)} get-tuple-element(%wide.param.1), index=1
  %gathered = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%get-tuple-element.2), channel_id=3, replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}, dimensions={0}
  %convolution.5 = bf16[4,128]{1,0:T(4,128)(2,1)} convolution(%get-tuple-element.2, %gathered), dim_labels=bf_io->bf
  %get-tuple-element.3 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[4,128]{1,0:T(4,128)(2,1)}) tuple(%get-tuple-element.3, %convolution.5)
}

ENTRY %main (p0: bf16[4,128], p1: bf16[2,16,64], p2: bf16[2,64,32]) -> bf16[4,128] {
  %p0 = bf16[4,128]{1,0:T(4,128)(2,1)} parameter(0)
  %p1 = bf16[2,16,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %p2 = bf16[2,64,32]{2,1,0:T(8,128)(2,1)S(1)} parameter(2)
  %constant.1 = s32[]{:T(128)} constant(0)
  %batched = bf16[2,16,32]{2,1,0:T(8,128)(2,1)S(1)} convolution(%p1, %p2), window={size=2 stride=1 lhs_dilate=2}, dim_labels=0bf_0io->0bf
  %tuple.2 = (s32[]{:T(128)}, bf16[4,128]{1,0:T(4,128)(2,1)}) tuple(%constant.1, %p0)
  %while.1 = (s32[]{:T(128)}, bf16[4,128]{1,0:T(4,128)(2,1)}) while(%tuple.2), condition=%wide.cond, body=%wide.body, metadata={op_name="jit(f)/while"}
  ROOT %out = bf16[4,128]{1,0:T(4,128)(2,1)} get-tuple-element(%while.1), index=1
}
"""


def test_the_text_of_a_tpu_program():
    """Products are convolutions, a batch is a window of which the diagonal counts, S(1) is the chip's own memory."""
    read = hlo.Program(TPU)
    assert read.unknown_loops == 0
    assert read.cost.flops == 2 * 2 * 16 * 64 * 32 + 36 * 2 * 4 * 128 * 128
    gathered = Message("all-gather", 128 * 128 * 2.0, tuple(range(0, 16, 2)))
    assert read.cost.messages == {gathered: 36}
    # a turn: the product reads and writes 4 x 128, what was gathered lies in the chip; the message is counted twice
    assert read.cost.bytes == 36 * (2 * 4 * 128 * 2 + 2 * gathered.size)


NESTED = """%cut (p: bf16[36,128,128], i: s32[]) -> bf16[1,128,128] {
  %p = bf16[36,128,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,128,128]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,128,128}
}

%same (p.1: bf16[8,128]) -> bf16[8,128] {
  %p.1 = bf16[8,128]{1,0} parameter(0)
  ROOT %bitcast.1 = bf16[8,128]{1,0} bitcast(%p.1)
}

%product (a: bf16[8,128], all: bf16[36,128,128], n: s32[]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %all = bf16[36,128,128]{2,1,0} parameter(1)
  %n = s32[] parameter(2)
  %left = bf16[8,128]{1,0} fusion(%a), kind=kLoop, calls=%same
  %one = bf16[1,128,128]{2,1,0} fusion(%all, %n), kind=kLoop, calls=%cut
  %right = bf16[128,128]{1,0} bitcast(%one)
  ROOT %out = bf16[8,128]{1,0} convolution(%left, %right), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[8,128], w: bf16[36,128,128], k: s32[]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %w = bf16[36,128,128]{2,1,0} parameter(1)
  %k = s32[] parameter(2)
  ROOT %y = bf16[8,128]{1,0} fusion(%x, %w, %k), kind=kOutput, calls=%product
}
"""


def test_a_fusion_in_a_fusion_reads_one_layer():
    cost = hlo.Program(NESTED).cost
    assert cost.flops == 2 * 8 * 128 * 128
    assert cost.bytes == 2 * (8 * 128) * 2 + 128 * 128 * 2 + 4  # rows in and out, one layer's weights, its number


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("reduce-scatter", "bf16[8,16]{1,0}"),
        ("reduce-scatter-start", "((bf16[64,16]{1,0}), bf16[8,16]{1,0})"),
        ("all-gather", "bf16[64,16]{1,0}"),
        ("all-gather-start", "((bf16[8,16]{1,0}), bf16[64,16]{1,0})"),
    ],
)
def test_what_a_message_moves(kind, shape):
    """The whole array, split over a group of eight; an asynchronous one names what is given and what is received."""
    text = f"""ENTRY %main (p: bf16[8,16]) -> bf16[8,16] {{
  %p = bf16[8,16]{{1,0}} parameter(0)
  %sent = {shape} {kind}(%p), replica_groups={{{{0,1,2,3,4,5,6,7}}}}, dimensions={{0}}
}}
"""
    (message,) = hlo.Program(text).cost.messages
    assert message == Message(kind.removesuffix("-start"), 64 * 16 * 2.0, tuple(range(8)))


@pytest.mark.parametrize(("step", "turns"), [(1, 36), (2, 18), (5, 8)])
def test_a_counter_that_steps(step, turns):
    """What the compiler overlaps with messages it unrolls by two: the counter then steps by two."""
    last = "ROOT %tuple.1 = (s32[]{:T(128)}, bf16[4,128]{1,0:T(4,128)(2,1)}) tuple(%get-tuple-element.3,"
    assert last in TPU
    counted = f"""%constant.7 = s32[]{{:T(128)}} constant({step})
  %add.1 = s32[]{{:T(128)}} add(%get-tuple-element.3, %constant.7)
  {last.replace("%get-tuple-element.3", "%add.1")}"""
    cost = hlo.Program(TPU.replace(last, counted)).cost
    assert cost.flops == 2 * 2 * 16 * 64 * 32 + turns * 2 * 4 * 128 * 128
    assert list(cost.messages.values()) == [turns]


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,1},{2,3}}", (0, 1)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
        ("source_target_pairs={{3,0},{0,3}}", (3, 0)),
    ],
)
def test_groups(text, group):
    assert hlo._group(f", channel_id=1, {text}, use_global_device_ids=true") == group


# ---------------------------------------------------------------- seconds


def test_seconds_of_messages():
    node = Links(H100, (0,) * 8, 1)
    everyone = tuple(range(8))
    assert node.seconds(Message("all-gather", 450e9, everyone)) == pytest.approx(7 / 8)
    assert node.seconds(Message("all-reduce", 450e9, everyone)) == pytest.approx(2 * 7 / 8)
    assert node.seconds(Message("all-reduce", 450e9, (0,))) == 0
    # four nodes: a GPU takes 31/32 in over its links, a node 3/4 over its eight adapters of 50 GB/s; the slower counts
    cluster = Links(H100, tuple(i // 8 for i in range(32)), 1)
    slow = Links(dataclasses.replace(H100, dcn_gb_s=25.0), cluster.nodes, 1)
    assert cluster.seconds(Message("all-gather", 400e9, tuple(range(32)))) == pytest.approx(31 / 32 * 400 / 450)
    assert slow.seconds(Message("all-gather", 400e9, tuple(range(32)))) == pytest.approx(3 / 4 * 400 / 200)
    assert cluster.seconds(Message("all-reduce", 50e9, (0, 8))) == pytest.approx(2 / 2)
    assert cluster.seconds(Message("all-gather", 450e9, everyone)) == pytest.approx(7 / 8)
    # two of sixteen chips on a line have one of two dimensions' links
    torus = Links(V5E, (0,) * 16, 2)
    assert torus.seconds(Message("all-gather", 100e9, (0, 1))) == pytest.approx(1 / 2)
    # two slices: 16 chips of each take half of the bytes in over their shares of the network
    pair = Links(V5E, tuple(i // 16 for i in range(32)), 2)
    assert pair.seconds(Message("all-gather", 100e9, tuple(range(32)))) == pytest.approx(50 / (16 * 3.125))
    assert pair.seconds(Message("all-gather", 200e9, tuple(range(16)))) == pytest.approx(15 / 16)
    assert torus.seconds(Message("all-gather", 200e9, tuple(range(16)))) == pytest.approx(15 / 16)


def test_the_slowest_resource_decides():
    times = Times(products=1.0, memory=3.0, messages=2.0)
    assert (times.seconds, times.bound) == (3.0, "memory")


# ---------------------------------------------------------------- whole plans


def small(**changes) -> TrainConfig:
    options = GRPO(num_generations=4, max_completion_length=16, beta=0.04)
    return TrainConfig(name="small", batch_size=8, remat="full", **{"method": options, **changes})


def machine(gib: float = 8.0) -> MeshTarget:
    """The eight CPU devices that are here."""
    chip = dataclasses.replace(CPU, hbm_gib=gib)
    return MeshTarget(chip, "", 8, 1, MeshConfig(fsdp=4, tensor=2), MeshConfig(replica=4, fsdp=1, tensor=2))


SIZES = dict(vision_tokens=16, prompt_tokens=64)


@pytest.fixture(scope="module")
def whole():
    return plan(small(), machine(), cfg=tiny.config(), mesh_name="here", **SIZES)


def test_plan(whole):
    assert [phase.name for phase in whole.phases] == ["relayout", "prefill", "decode", "score", "update"]
    assert whole.fits and whole.devices == 8 and whole.microbatch == 8
    params = hf.abstract_params(tiny.config())
    assert whole.parameters == sum(x.size for x in jax.tree.leaves(params))
    # parameters, two moments and the reference are float32, split over eight but for the vectors
    assert whole.memory["parameters"] == pytest.approx(4 * whole.parameters / 8, rel=0.1)
    assert whole.memory["optimiser"] == pytest.approx(2 * whole.memory["parameters"], rel=0.01)
    assert whole.memory["reference"] == pytest.approx(whole.memory["parameters"], rel=0.01)
    assert whole.memory["sampler's copy"] == pytest.approx(4 * whole.parameters / 2, rel=0.1)
    cfg = tiny.config().text
    rows, tokens = 8 // 4, 64 + 4 * 16
    assert whole.memory["cache"] == pytest.approx(
        2 * 4 * cfg.num_hidden_layers * rows * tokens * cfg.num_key_value_heads // 2 * cfg.head_dim, rel=0.01
    )
    for phase in whole.phases:
        assert phase.peak > sum(whole.memory[kind] for kind in ("parameters", "optimiser", "reference"))
        if phase.name != "relayout":
            assert phase.flops == pytest.approx(phase.traced_flops, rel=0.35), phase.name
    assert whole.phase("update").traced_flops > 1.2 * whole.phase("update").useful_flops  # remat
    assert whole.phase("update").useful_flops == pytest.approx(3 * whole.phase("score").useful_flops)
    assert whole.seconds == pytest.approx(sum(phase.seconds for phase in whole.phases))


def test_sampling_gathers_no_parameters(whole):
    """A decode step gathers its logits, for the draw; the update gathers parameters for the forward and the backward pass."""
    logits = 8 // 4 * 4 * tiny.VOCAB * 4
    assert whole.phase("decode").collectives["all-gather"] < 15 * logits * 1.1
    split_by_tensor = 4 * whole.parameters / 2
    assert split_by_tensor < whole.phase("update").collectives["all-gather"] < 3.5 * split_by_tensor


def test_preferences():
    """Two answers of each prompt: the reference scores them, and the update makes the products of SFT on as many answers."""
    dpo = plan(small(method=DPO()), machine(), cfg=tiny.config(), mesh_name="here", **SIZES)
    assert [phase.name for phase in dpo.phases] == ["score", "update"]
    assert dpo.memory["reference"] == pytest.approx(dpo.memory["parameters"], rel=0.01)
    twice = small(method=SFT(questions_per_image=2))
    sft = plan(twice, machine(), cfg=tiny.config(), mesh_name="here", **SIZES).phase("update")
    assert dpo.phase("update").traced_flops == sft.traced_flops == pytest.approx(dpo.phase("update").flops, rel=0.35)
    assert dpo.phase("update").useful_flops == 3 * dpo.phase("score").useful_flops


def test_what_is_printed(whole, capsys):
    from rich.console import Console

    report.show(whole, Console(width=200))
    text = capsys.readouterr().out
    for word in ("8 x CPU", "fsdp 4 x tensor 2", "relayout", "decode", "update", "MFU", "all-gather", "fits;"):
        assert word.lower() in text.lower(), word
    found = json.loads(json.dumps(report.as_json(whole)))
    assert found["fits"] and found["phases"][4]["name"] == "update"
    assert report.markdown([report.as_json(whole)]).splitlines()[2].startswith("| tiny | here | 8 | yes |")


def test_what_does_not_fit(whole):
    config = small(optim=OptimConfig(gradient_accumulation_steps=1))
    needs = whole.phase("update").peak
    assert advise(whole.phases, whole.memory, needs, config, whole.train, whole.sample) == []
    lines = advise(whole.phases, whole.memory, needs * 0.99, config, whole.train, whole.sample)
    (line,) = lines
    assert line.startswith("update needs ") and "a smaller microbatch (2 prompts a device now)" in line
    *_, line = advise(whole.phases, whole.memory, needs / 10, config, whole.train, whole.sample)
    assert "--optim.moment_dtype bfloat16" in line and "more chips" in line
    refused = dataclasses.replace(whole, advice=lines)
    assert not refused.fits and whole.fits


def test_command(capsys, tmp_path):
    arguments = ["plan", "configs/quickstart.py", "--mesh", "cpu", "--phases", "encode", "--json"]
    assert cli.main([*arguments, "--data.max_pixels", "7056", "--data.max_prompt_length", "128"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == "cpu" and [phase["name"] for phase in found["phases"]] == ["encode"]
    text = tmp_path / "small.py"
    text.write_text(
        "import dataclasses\nfrom jaxmllm.machine.targets import load_mesh\nmesh = load_mesh('cpu')\n"
        "mesh = dataclasses.replace(mesh, chip=dataclasses.replace(mesh.chip, hbm_gib=1e-6))\n"
    )
    arguments[3] = str(text)
    assert cli.main([*arguments[:-1], "--data.max_pixels", "7056", "--data.max_prompt_length", "128"]) == 1
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mesh", "cpu"], "name a config first"),
        (["configs/quickstart.py", "--mesh", "nowhere"], "no such config; known are cpu"),
        (["configs/quickstart.py", "--mesh", "cpu", "--vision_tokens", "0"], "--vision_tokens 0: must be at least 1"),
        (["configs/quickstart.py", "--mesh", "cpu", "--batch_size", "12"], "does not divide the 12 prompts"),
        (["configs/quickstart.py", "--mesh", "cpu", "--model", "Nobody/Unknown"], "its sizes are not known here"),
    ],
)
def test_refused(arguments, words, capsys):
    assert cli.main(["plan", *arguments]) == cli.EXIT_INPUT
    assert words in capsys.readouterr().err


def test_known_architectures():
    """Parameters of the published checkpoints, as their safetensors say."""
    known = {"Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976, "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656}
    known |= {"Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600, "Qwen/Qwen2-VL-7B-Instruct": 8_291_375_616}
    for name, expected in known.items():
        assert sum(x.size for x in jax.tree.leaves(hf.abstract_params(architecture(name)))) == expected


# ---------------------------------------------------------------- with the compilers of the accelerators


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e_16", "h100_8"])
def test_for_an_accelerator(name):
    """A small model on a real topology; skipped where its compiler is not installed."""
    target = load_mesh(name)
    try:
        devices = target.compile_devices()
    except InputError as error:
        pytest.skip(str(error))
    assert len(devices) == target.devices
    config = dataclasses.replace(small(dtype="bfloat16"), batch_size=16)
    found = plan(config, target, cfg=tiny.config(), mesh_name=name, **SIZES)
    assert found.fits
    for phase in found.phases[1:]:
        assert phase.flops == pytest.approx(phase.traced_flops, rel=0.5), phase.name
    assert same_devices(make_mesh(devices=devices), target.sample).shape["tensor"] == target.sample.tensor
