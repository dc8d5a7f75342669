"""The benchmark scripts at their smallest sizes: what they print and save is what they claim to measure."""

import contextlib
import io
import json
import os
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from tests.benchmarks import accelerator, curve_vs_trl, roofline, scaling, side_by_side, soak
from tests.benchmarks.phases import STEP, Phases, Size, architecture

pytestmark = pytest.mark.usefixtures("one_device")
SIZE = Size(prompts=1, generations=2, new_tokens=4, side=56, text=8)
SIZES = [f"--{name}={getattr(SIZE, name)}" for name in Size.__dataclass_fields__]
PHASES = {*STEP, "sft"}


@pytest.fixture(scope="module")
def cfg():
    return architecture("48M", dtype="float32", remat="full", **accelerator.TINY)


@pytest.fixture(scope="module")
def phases(cfg):
    """With the arrays that later phases take from earlier ones."""
    made = Phases(cfg, SIZE)
    made.call("encode")
    made.call("prefill")
    return made


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory):
    """(printed, saved) of accelerator.py; transformers' rows have a test of their own."""
    folder, printed = tmp_path_factory.mktemp("results"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(side_by_side, "RESULTS", folder)
        patch.setattr(accelerator, "transformers_rows", lambda *_: {})
        patch.setattr(sys, "argv", ["accelerator", "--model=tiny", "--dtype=float32", "--repeats=2", "--save", *SIZES])
        accelerator.main()
    (path,) = folder.iterdir()
    assert path.name == "accelerator_cpu.json"
    return printed.getvalue(), json.loads(path.read_text())


def test_every_phase_is_timed(accelerated):
    printed, saved = accelerated
    assert saved["rows"].keys() == {"data", "reward"} | PHASES
    for name, row in saved["rows"].items():
        columns = accelerator.COLUMNS if name in PHASES else ("seconds",)
        assert row.keys() == set(columns), name
        # on CPU a program may compile in no time, from the cache
        assert all(value > 0 for column, value in row.items() if column != "compile"), name
        assert any(line.startswith(f"{name} ") for line in printed.splitlines())
    assert "left out for time" not in saved["summary"]
    assert saved["settings"]["new_tokens"] == SIZE.new_tokens and saved["settings"]["dtype"] == "float32"


def test_step_is_the_sum_of_its_phases(accelerated):
    _, saved = accelerated
    assert saved["summary"]["step"] == pytest.approx(sum(saved["rows"][name]["seconds"] for name in STEP))


def test_mfu_is_flops_over_seconds_and_the_measured_peak(accelerated, phases):
    _, saved = accelerated
    peak = saved["summary"]["measured float32 FLOP/s"]
    completions = SIZE.prompts * SIZE.generations * SIZE.new_tokens
    for name in PHASES:
        row = saved["rows"][name]
        assert row["MFU"] == pytest.approx(row["TFLOP/s"] * 1e12 / peak)
        assert row["TFLOP/s"] * 1e12 == pytest.approx(phases.flops(name) / row["seconds"])
        assert row["tokens/s"] == pytest.approx(completions / row["seconds"])
        assert row["MFU"] < 1


def test_flops_of_decoding_are_those_of_its_products(phases):
    text = phases.cfg.text
    heads = text.hidden_size * text.head_dim * (2 * text.num_attention_heads + 2 * text.num_key_value_heads)
    a_layer = heads + 3 * text.hidden_size * text.intermediate_size
    a_token = 2 * (text.num_hidden_layers * a_layer + text.hidden_size * text.vocab_size)
    products = a_token * SIZE.generations * (SIZE.new_tokens - 1)
    assert products < phases.flops("decode") < 1.2 * products  # the rest is attention
    # forward, forward again and twice as much backward, under full rematerialisation
    assert 3 < phases.flops("update") / phases.flops("score") < 4.5


def test_phases_beyond_the_time_limit_are_named(phases):
    rows, left = accelerator.measure(phases, repeats=1, limit=-1, peak=1.0)
    assert rows.keys() == {"data", "reward"} and set(left) == PHASES


def test_kernels_of_both_parts(cfg, phases):
    assert accelerator.kernels(cfg, phases) == {"prompt": "dense", "tower": "dense"}


def test_transformers_runs_the_same_sizes(cfg):
    pytest.importorskip("torch")
    rows = accelerator.transformers_rows(cfg, SIZE, repeats=1)
    assert rows.keys() == {"transformers generate", "transformers sft"}
    assert all(row["seconds"] > 0 and row["memory_gib"] > 0 for row in rows.values())


def test_roofline_shares(phases):
    peak = {"float32 FLOP/s": 1e11, "copy bytes/s": 1e10}
    rows = roofline.measure(phases, peak, repeats=1)
    assert list(rows) == list(STEP)
    for name, row in rows.items():
        assert row["share of FLOP/s"] == pytest.approx(row["GFLOP/s"] * 1e9 / 1e11)
        assert row["share of bytes/s"] == pytest.approx(row["GB/s"] * 1e9 / 1e10)
        assert row["of peak"] == max(row["share of FLOP/s"], row["share of bytes/s"])
        assert row["GFLOP"] == pytest.approx(phases.flops(name) / 1e9)
    # one pass over the text's weights for every token after the first
    assert roofline.least_bytes(phases, "decode") == 3 * roofline.least_bytes(phases, "prefill")


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_exponent(power):
    assert scaling.exponent([2, 8, 64], [3 * n**power for n in (2, 8, 64)]) == pytest.approx(power)


@pytest.mark.parametrize("axis", list(scaling.AXES))
def test_scaling_changes_one_thing(axis):
    """Points of an axis differ in nothing but what it names."""
    points = [scaling.case(axis, value) for value in scaling.AXES[axis]]
    fields = {"G": "generations", "prompt": "text", "completion": "new_tokens", "picture": "side"}
    if axis in fields:
        assert [getattr(size, fields[axis]) for _, size in points] == list(scaling.AXES[axis])
        assert len({cfg for cfg, _ in points}) == 1
    else:
        name = {"depth": "num_hidden_layers", "vocabulary": "vocab_size"}[axis]
        assert [getattr(cfg.text, name) for cfg, _ in points] == list(scaling.AXES[axis])
        assert len({size for _, size in points}) == 1
        assert all(max(cfg.vision_token_ids) < cfg.text.vocab_size for cfg, _ in points)


def test_windows_are_whole():
    assert curve_vs_trl.windows([[1, 3, 5, 7, 100], [0, 0, 2, 2, 100]], 2).tolist() == [[2, 6], [0, 2]]


def test_curves_differ_only_beyond_their_noise():
    """Seeds of one distribution are told apart as rarely as promised, a shift of six standard errors nearly always."""
    rng = np.random.default_rng(0)

    def share(shift: float) -> float:
        pairs = (rng.normal(size=(2, 3, 4)) for _ in range(400))
        return float(np.mean([not curve_vs_trl.agreement(a, b + shift)[1] for a, b in pairs]))

    assert share(0) < curve_vs_trl.LEVEL
    assert share(6 * (2 / 3) ** 0.5) > 0.9
    rows, agree = curve_vs_trl.agreement(np.array([[1.0, 2], [1, 4]]), np.array([[1.0, 3], [1, 5]]))
    assert agree and [row["difference"] for row in rows] == [0, -1]
    assert [row["error"] for row in rows] == [0, 1] and rows[0]["allowed"] == rows[1]["allowed"] > 1


def test_soak_sees_what_a_run_holds(caplog):
    before, stop = soak.look(os.getpid()), threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    child = subprocess.Popen(["sleep", "60"])
    try:
        with open(os.devnull) as _, open(os.devnull) as _:
            after = soak.look(os.getpid())
        assert child.pid in soak.family(os.getpid())
    finally:
        child.kill()
        child.wait()
        stop.set()
        thread.join()
    assert after["threads"] - before["threads"] >= 2 and after["files"] - before["files"] >= 5  # the child has three
    assert after["memory_mib"] > before["memory_mib"] > 10
    with jax.log_compiles():
        jax.jit(lambda x: 3 * x + 41)(1.0)
    assert soak.COMPILED.findall(caplog.text)


def test_soak_quarters():
    looks = [{"second": k, "memory_mib": 100 + k, "threads": 7, "files": 3 + (k == 2)} for k in range(8)]
    row = soak.quarter(looks, [(1.0, "a"), (5.0, "b")], [0.5, 1.5, 3.9, 4.0], 0, 4)
    assert row == {
        **{"memory_mib": 101.5, "largest_mib": 103, "threads": 7, "files": 3, "most_files": 4},
        **{"compiled": 1, "updates": 3, "seconds_an_update": 4 / 3},
    }
