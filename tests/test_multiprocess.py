"""Real processes on loopback: the same numbers as one, a checkpoint that any number of them goes on from, and a lost one."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxmllm import api
from jaxmllm.machine import processes
from tests.support.multiprocess_job import records

ROOT = Path(__file__).parents[1]
TINY = json.loads((api.TINY / "config.json").read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The embedded model's tokenizer with a smaller architecture: what is tested is who computes what."""
    folder = tmp_path_factory.mktemp("model")
    for file in api.TINY.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, folder)
    vision = TINY["vision_config"] | {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
    vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [1]}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(TINY | text))
    return folder


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_left():
    """A test that fails leaves no process behind."""
    yield
    for one in STARTED:
        one.kill()
    STARTED.clear()


class Job:
    """`count` processes of `devices` devices each; their output goes to files in `folder`."""

    def __init__(self, folder: Path, model: Path, count: int, devices: int, **changes):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        changes = {"model": str(model), "from_scratch": True, **changes}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.logs = [folder / f"log_{number}" for number in range(count)]
        self.processes = []
        for number, log in enumerate(self.logs):
            given = dict(zip(processes.EXPLICIT, (address, str(count), str(number)), strict=True)) if count > 1 else {}
            env = {**os.environ, **given, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            env["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
            command = [sys.executable, "-m", "tests.support.multiprocess_job", str(folder), json.dumps(changes)]
            with open(log, "w") as out:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
                )
        STARTED.extend(self.processes)

    def wait(self, timeout: float = 1800) -> list[int]:
        try:
            return [one.wait(timeout) for one in self.processes]
        finally:
            for one in self.processes:
                one.kill()

    def text(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)

    def until(self, updates: int, timeout: float = 1200) -> None:
        """Returns when so many updates have begun."""
        end = time.monotonic() + timeout
        while not (self.folder / "records.jsonl").exists() or len(records(self.folder)) < updates:
            assert time.monotonic() < end and all(one.poll() is None for one in self.processes), self.text()
            time.sleep(0.05)


def finished(job: Job) -> tuple[list[dict], dict[str, np.ndarray], list]:
    """(metrics, parameters, records of each update) of a run that went through."""
    assert set(job.wait()) == {0}, job.text()
    rows = [json.loads(line) for line in (job.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    with np.load(job.folder / "params.npz") as file:
        params = {name: file[name] for name in file.files}
    return rows, params, records(job.folder)


def ids(seen: list) -> dict[int, list[str]]:
    """Ids of the records of each update, sorted: processes hold blocks of them."""
    return {step: sorted(one for block in blocks for one in block) for step, blocks in seen}


def assert_equal(found, expected) -> None:
    for row, other in zip(found[0], expected[0], strict=True):
        for name in ("loss", "reward", "reward_std", "kl", "entropy", "completions/mean_length", "rewards/length/mean"):
            assert row[name] == pytest.approx(other[name], abs=1e-5), (row["step"], name)
        assert row["num_tokens"] == other["num_tokens"]
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, atol=1e-5)
    assert ids(found[2]) == ids(expected[2])


def test_two_processes(tmp_path, model):
    """Two processes of two devices, sampling in a layout of its own, and one of one device: the same run."""
    options = {"max_steps": 2, "mesh": {"fsdp": 2, "tensor": 2}, "sample_mesh": {"replica": 4, "fsdp": 1}}
    one = Job(tmp_path / "one", model, 1, 1, max_steps=2)
    two = Job(tmp_path / "two", model, 2, 2, **options)
    expected = finished(one)
    assert_equal(finished(two), expected)
    blocks = records(tmp_path / "two")[0][1]
    assert len(blocks) == 2 and all(len(block) == 4 for block in blocks)  # each loaded its own half
    assert max(np.abs(value).max() for value in expected[1].values()) > 0


def test_two_processes_with_completions_of_several_lengths(tmp_path, model):
    """Sampling leaves finished prompts behind, and updates cut short ones apart: on every device by itself, the same run."""
    short = shutil.copytree(model, tmp_path / "model")
    told = json.loads((short / "config.json").read_text())
    ends = {"eos_token_id": list(range(0, told["vocab_size"], 6))}  # one token in six ends a completion
    (short / "config.json").write_text(json.dumps(told | ends))
    options = {"mesh": {"fsdp": 2, "tensor": 2}, "sample_mesh": {"replica": 4, "fsdp": 1}}
    one = Job(tmp_path / "one", short, 1, 1, max_steps=2, uneven=True)
    two = Job(tmp_path / "two", short, 2, 2, max_steps=2, uneven=True, **options)
    expected = finished(one)
    assert_equal(finished(two), expected)
    assert all(row["completions/min_length"] < 4 and row["completions/max_length"] > 8 for row in expected[0])


MESHES = {
    "8x1": {"fsdp": 8},
    "4x2": {"fsdp": 4, "tensor": 2},
    "2x2x2": {"replica": 2, "fsdp": 2, "tensor": 2},
}


@pytest.fixture(scope="module")
def single(tmp_path_factory, model):
    """Five updates in one process on one device."""
    return finished(Job(tmp_path_factory.mktemp("single"), model, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("mesh", MESHES)
def test_processes_and_meshes(count, mesh, tmp_path, model, single):
    """Five updates, against those of one device."""
    assert_equal(finished(Job(tmp_path, model, count, 8 // count, mesh=MESHES[mesh])), single)


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_other_processes(tmp_path, model, single):
    """Four processes are told to stop; one and two go on from what they saved, with the records that come next."""
    four = Job(tmp_path / "four", model, 4, 2, mesh=MESHES["4x2"], pause=1.0)
    four.until(2)
    four.processes[2].send_signal(signal.SIGTERM)
    assert set(four.wait()) == {75}, four.text()
    done = len(records(tmp_path / "four"))
    assert 2 <= done < 5 and f"saved update {done}" in four.text()
    for count in (1, 2):
        folder = tmp_path / f"on_{count}"
        shutil.copytree(tmp_path / "four", folder)
        mesh = {"fsdp": count} if count == 1 else {"replica": 2, "fsdp": 2}
        assert_equal(finished(Job(folder, model, count, count, mesh=mesh)), single)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_killed_processes(tmp_path, model):
    """kill -9 of one of four at ten random moments of a run: each time the others end within a minute and say why, all of
    them go on from the last checkpoint, and the numbers are those of a run that nobody disturbed."""
    draw = random.Random(0)
    options = {"mesh": MESHES["8x1"], "save_steps": 1, "max_steps": 40}
    whole = finished(Job(tmp_path / "whole", model, 4, 2, **options))
    folder = tmp_path / "cut"
    before: list[int] = []  # updates done when each update began
    for _ in range(10):
        job = Job(folder, model, 4, 2, **options, pause=0.3)
        job.until(len(before) + draw.randint(1, 3))
        time.sleep(draw.random())
        lost = draw.randrange(4)
        job.processes[lost].kill()
        began = time.monotonic()
        statuses = job.wait(90)
        assert time.monotonic() - began < 60, job.text()
        assert statuses[lost] == -signal.SIGKILL
        for number in {0, 1, 2, 3} - {lost}:
            log = job.logs[number].read_text()
            assert statuses[number] in (processes.EXIT_LOST, -signal.SIGABRT), (number, statuses, log)
            assert "another process was lost" in log or "another task died" in log, (number, log)
        seen = [step for step, _ in records(folder)]
        if before:  # an update is saved before the next but one begins
            assert seen[len(before)] >= max(before) - 1
        before = seen
    found = finished(Job(folder, model, 4, 2, **options))
    assert [step for step, _ in found[2]][len(before)] >= max(before) - 1
    assert_equal(found, whole)
