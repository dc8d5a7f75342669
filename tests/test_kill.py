"""Twenty kill -9 at random moments of a run of the quickstart: it resumes each time and ends with the same bits."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxmllm.runfiles import read_json
from tests.support.training import numbers

ROOT = Path(__file__).parents[1]
KILLS = 20
OPTIONS = (
    *("--max_steps", "24", "--save_steps", "2", "--eval_steps", "6", "--data.eval_samples", "32"),
    *("--completions_steps", "4", "--method.max_completion_length", "24"),
)


def start(folder: Path) -> subprocess.Popen:
    """`jaxmllm train configs/quickstart.py`, small, in a process group of its own."""
    command = [sys.executable, "-m", "jaxmllm.cli", "train", "configs/quickstart.py", *OPTIONS, "--output_dir", folder]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"), "XLA_FLAGS": ""}
    log = open(folder.with_suffix(".log"), "ab")
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=os.environ | cache, start_new_session=True, stdout=log, stderr=log
    )


def finish(folder: Path) -> float:
    """Runs to the end; the seconds it took."""
    began = time.monotonic()
    assert start(folder).wait(timeout=1800) == 0, folder.with_suffix(".log").read_text()[-2000:]
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_random_moments(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(tmp_path / "warm")  # compiles
    seconds = finish(whole)
    draw, kills = random.Random(0), 0
    while kills < KILLS:
        process = start(cut)
        time.sleep(draw.uniform(0.2, 0.9) * seconds)
        if process.poll() is not None:  # it reached its end first
            assert process.returncode == 0, cut.with_suffix(".log").read_text()[-2000:]
            assert_same_run(whole / "quickstart", cut / "quickstart")
            done = len(list(tmp_path.glob("done_*")))
            (cut / "quickstart").rename(tmp_path / f"done_{done}")
            continue
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    finish(cut)
    assert_same_run(whole / "quickstart", cut / "quickstart")


def assert_same_run(a: Path, b: Path) -> None:
    """Metrics, figures of every evaluation and exported weights, bit for bit."""
    assert numbers(a) == numbers(b)
    for path in sorted((a / "eval").iterdir()):
        assert (
            read_json(path / "metrics.json")["sources"] == read_json(b / "eval" / path.name / "metrics.json")["sources"]
        )
    weights = "export/model.safetensors"
    np.testing.assert_array_equal(np.fromfile(a / weights, np.uint8), np.fromfile(b / weights, np.uint8))
