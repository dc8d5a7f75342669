"""Plans for GPUs on a machine without one: cuDNN's attention is compiled ahead of time and its products are counted."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from jaxmllm.machine.targets import load_mesh
from jaxmllm.model import attention
from jaxmllm.plan import hlo
from jaxmllm.plan.flops import count

B, X, N, K, H = 2, 512, 8, 2, 64
QUERY, KEYS = jax.ShapeDtypeStruct((B, X, N, H), jnp.bfloat16), jax.ShapeDtypeStruct((B, X, K, H), jnp.bfloat16)
PRODUCT = 2 * B * N * X * X * H  # every query with every key, once

# what XLA compiles for an H100 of jax.nn.dot_product_attention and its gradient, notes shortened
PROGRAM = """HloModule jit_f, entry_computation_layout={()->()}

ENTRY %main (q: bf16[2,512,8,64], k: bf16[2,512,2,64], v: bf16[2,512,2,64]) -> bf16[2,8,512,64] {
  %q = bf16[2,512,8,64]{3,2,1,0} parameter(0)
  %k = bf16[2,512,2,64]{3,2,1,0} parameter(1)
  %v = bf16[2,512,2,64]{3,2,1,0} parameter(2)
  %fwd = (bf16[2,8,512,64]{3,1,2,0}, f32[2,8,512]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(f)/dot_product_attention_fwd"}, backend_config={"cudnn_fmha_backend_config":{"mask_type":"MASK"}}
  %out = bf16[2,8,512,64]{3,1,2,0} get-tuple-element(%fwd), index=0
  %sums = f32[2,8,512]{2,1,0} get-tuple-element(%fwd), index=1
  %bwd = (bf16[2,8,512,64]{3,1,2,0}, bf16[2,2,512,64]{3,1,2,0}, bf16[2,2,512,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %v, %sums, %out, /*index=5*/%out), custom_call_target="__cudnn$fmhaSoftmaxBackward", metadata={op_name="jit(f)/dot_product_attention_bwd"}, backend_config={"cudnn_fmha_backend_config":{"mask_type":"MASK"}}
  ROOT %dq = bf16[2,8,512,64]{3,1,2,0} get-tuple-element(%bwd), index=0
}
"""  # noqa: E501


@pytest.fixture
def traced(monkeypatch):
    """cuDNN's primitives without cuDNN: they are traced and not run."""
    inside = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(inside, "check_cudnn_version", lambda: 91000)


def loss(q, k, v, kernel, causal):
    if causal:
        return jnp.sum(attention.causal(q, k, v, kernel).astype(jnp.float32))
    valid = jnp.ones(q.shape[:2], bool)
    return jnp.sum(attention.full(q, k, v, valid, kernel).astype(jnp.float32))


def test_traced_products_are_those_of_dense_attention(traced):
    """The backward kernel computes the scores again, which dense attention keeps: one product more."""
    same = QUERY, QUERY, QUERY  # the tower has as many key heads as queries'
    grad = jax.grad(loss, (0, 1, 2))
    assert count(lambda *a: loss(*a, "cudnn", False), *same) == count(lambda *a: loss(*a, "dense", False), *same)
    dense, fused = (count(lambda *a, k=kernel: grad(*a, k, False), *same) for kernel in ("dense", "cudnn"))
    assert fused == dense + PRODUCT


def test_of_a_causal_one_half_is_computed(traced):
    pairs = sum(i + 1 for i in range(X))
    assert count(lambda *a: loss(*a, "cudnn", True), QUERY, KEYS, KEYS) == 2 * PRODUCT * pairs / X**2


def test_compiled_products_are_the_traced_ones(traced):
    found = hlo.Program(PROGRAM).cost
    assert found.flops == 7 * PRODUCT
    assert hlo.Program(PROGRAM.replace("MASK", "CAUSAL")).cost.flops == 7 * PRODUCT * (X + 1) / (2 * X)
    assert count(lambda *a: jax.grad(loss, (0, 1, 2))(*a, "cudnn", True), QUERY, KEYS, KEYS) == 7 * PRODUCT * (
        X + 1
    ) / (2 * X)
    query, keys = 2 * B * X * N * H, 2 * B * X * K * H
    sums = 4 * B * N * X
    assert found.bytes == (query + 2 * keys + query + sums) + (query + 2 * keys + sums + 2 * query + query + 2 * keys)


@pytest.mark.parametrize("before", [None, "0"])
def test_the_plugin_does_not_ask_for_a_driver(monkeypatch, before):
    """Its version check fails where there is no GPU; around the first use alone it is left out."""
    name, seen = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", []
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)

    def topology(*_, **__):
        seen.append(os.environ.get(name))
        return type("Topology", (), {"devices": []})

    monkeypatch.setattr(topologies, "get_topology_desc", topology)
    load_mesh("h100_8").compile_devices()
    assert seen == ["1"] and os.environ.get(name) == before
