"""What a run writes, read back by the tools that users read it with; and after a kill."""

import json
import math
import os
import subprocess
import sys
import threading
import types

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from jaxmllm.errors import InputError
from jaxmllm.methods.method import Completed
from jaxmllm.runfiles import JsonLines, claim, differences, plain, read_json, read_lines, replace_file, write_json
from jaxmllm.training.metrics import MetricsWriter, git_commit, record_start, scalar


def board_values(folder):
    """(tag, step) -> value in the event files, read by TensorBoard's record format (length, crc, data, crc)."""
    values = {}
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            body = data[at + 12 : at + 12 + size]
            assert int.from_bytes(data[at + 12 + size : at + 16 + size], "little") == masked_crc32c(body)
            event = Event.FromString(body)
            values |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            at += 16 + size
    return values


def test_metrics_reach_json_lines_and_tensorboard(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log(1, {"reward": jnp.float32(0.5), "num_tokens": np.int64(7), "kl": jnp.bfloat16(0.25)})
        writer.log(2, {"reward": [0.75], "loss": math.nan, "grad_norm": math.inf})
    first, second = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (first["step"], first["reward"], first["num_tokens"], first["kl"]) == (1, 0.5, 7, 0.25)
    assert second["reward"] == 0.75 and second["loss"] is None and second["grad_norm"] is None
    board = board_values(tmp_path / "tensorboard")
    assert board["reward", 1] == 0.5 and board["num_tokens", 1] == 7 and math.isnan(board["loss", 2])


@pytest.mark.parametrize("value", ["a", None, [1, 2], np.zeros((2, 1)), {}])
def test_a_metric_must_be_one_number(value):
    with pytest.raises(TypeError, match="one number"):
        scalar(value)


def completed(prompts, texts, rewards, advantages, images=None) -> Completed:
    records = [{"images": [image]} for image in images] if images else [{} for _ in texts]
    return Completed(records, prompts, texts, rewards, advantages)


def test_going_on_removes_what_is_done_again(tmp_path):
    rows = {"task": [1.0, 0.0], "part": [None, 0.5]}
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 8):
            writer.log(step, {"reward": step})
            if step % 2 == 0:
                writer.log_completions(step, completed(["p", "p"], ["a", "b"], rows, [1, -1]))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "rew')
    with MetricsWriter(tmp_path, resume_step=4) as writer:
        writer.log(5, {"reward": 50})
    assert [(r["step"], r["reward"]) for r in read_lines(tmp_path / "metrics.jsonl")] == [
        *((s, s) for s in range(1, 5)),
        (5, 50),
    ]
    assert sorted(p.name for p in (tmp_path / "completions").iterdir()) == [
        "completions_00002.parquet",
        "completions_00004.parquet",
    ]
    MetricsWriter(tmp_path).close()
    assert read_lines(tmp_path / "metrics.jsonl") == []


def test_completions_are_trls_table(tmp_path):
    red, blue = Image.new("RGB", (640, 320), "red"), np.zeros((20, 20, 3), np.uint8)
    with MetricsWriter(tmp_path) as writer:
        args = (["p", "p", "q"], ["a", "\ud800<b>", "c"], {"task": [1, 0.5, None], "iou": [0.1, math.nan, 0.3]})
        writer.log_completions(5, None)  # a step without any
        writer.log_completions(10, completed(*args, [1.0, -1.0, 0.0], images=[red, red, blue]))
    assert len(list((tmp_path / "completions").iterdir())) == 1
    table = pq.read_table(tmp_path / "completions" / "completions_00010.parquet")
    assert table.column_names == ["step", "prompt", "completion", "task", "iou", "advantage", "image"]
    rows = table.to_pylist()
    assert [r["task"] for r in rows] == [1, 0.5, None] and [r["iou"] for r in rows] == [0.1, None, 0.3]
    assert rows[1]["completion"] == "?<b>" and rows[0]["step"] == 10
    assert [r["image"] is not None for r in rows] == [True, False, True]
    assert rows[0]["image"]["bytes"].startswith(b"\x89PNG") and len(rows[0]["image"]["bytes"]) < 3000


def test_other_processes_write_nothing(tmp_path):
    with MetricsWriter(tmp_path / "run", enabled=False) as writer:
        writer.log(1, {"a": 1})
        writer.log_completions(1, completed(["p"], ["c"], {}, [0]))
    assert not (tmp_path / "run").exists()


def test_wandb_is_used_where_installed(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="wandb is not installed"):
        MetricsWriter(tmp_path, report_to=("wandb",))
    with pytest.raises(InputError, match="'tensorbord' is unknown"):
        MetricsWriter(tmp_path, report_to="tensorbord")
    calls = []
    run = types.SimpleNamespace(log=lambda v, step: calls.append((v, step)), finish=lambda: calls.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: calls.append(k) or run))
    with MetricsWriter(tmp_path, report_to="all", config={"lr": 1}) as writer:
        writer.log(3, {"a": 1})
    assert calls[0]["config"] == {"lr": 1} and calls[1:] == [({"a": 1}, 3), "end"]
    assert (tmp_path / "tensorboard").exists()


def open_below(folder) -> set[str]:
    """Files below a folder that this process holds open. Others' files come and go with what ran before."""
    links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return {os.readlink(link) for link in links if os.path.realpath(link).startswith(str(folder))}


def test_no_thread_or_open_file_is_left(tmp_path):
    threads = set(threading.enumerate())
    for number in range(3):
        with MetricsWriter(tmp_path / str(number)) as writer:
            writer.log(1, {"a": 1})
            assert len(open_below(tmp_path)) == 2  # metrics.jsonl and TensorBoard's, which a thread writes
            assert set(threading.enumerate()) - threads
    assert not open_below(tmp_path)
    left = set(threading.enumerate()) - threads
    for thread in left:  # one that was told to end may take a moment
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in left)


def test_a_start_names_versions_seed_and_commit(tmp_path):
    device = types.SimpleNamespace(device_kind="TPU v5e")
    record_start(tmp_path, 7, [device, device])
    record_start(tmp_path, 7)
    content = read_json(tmp_path / "run.json")
    assert content["seed"] == 7 and len(content["starts"]) == 2
    start = content["starts"][0]
    assert start["devices"] == {"TPU v5e": 2} and start["versions"]["numpy"] == np.__version__
    assert start["command"] == sys.argv


def test_git_commit_is_that_of_the_checkout_or_none(tmp_path):
    def git(*words):
        user = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", *user, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    file = tmp_path / "a.py"
    file.write_text("1")
    assert git_commit(file) is None
    git("init", "-q")
    assert git_commit(file) is None  # inside a checkout, but not part of it
    git("add", "a.py")
    git("commit", "-q", "-m", "x")
    head = git("rev-parse", "HEAD").strip()
    assert git_commit(file) == {"commit": head, "changed": False}
    file.write_text("2")
    assert git_commit(file) == {"commit": head, "changed": True}


# --- run files ------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": (1, np.float32(0.5)), "b": float("inf"), "c": scalar})
    assert read_json(path) == {"a": [1, 0.5], "b": "inf", "c": "jaxmllm.training.metrics.scalar"}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert read_json(path)["b"] == "inf" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = "".join(json.dumps({"n": n, "text": "\ud800é" * 3000}) + "\n" for n in range(3)).encode()
    for cut in range(len(whole) - 9000, len(whole) + 1, 997):
        path.write_bytes(whole[:cut])
        kept = read_lines(path)
        assert [row["n"] for row in kept] == list(range(whole[:cut].count(b"\n")))
        with JsonLines(path) as file:
            file.append([{"n": "next"}])
        assert read_lines(path) == [*kept, {"n": "next"}]


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    with JsonLines(path) as file:
        file.append([{"n": 1}])
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:4]) if len(data) == 9 else _full())
        with pytest.raises(OSError, match="No space left"):
            file.append([{"n": 2}])
    assert path.read_bytes() == b'{"n": 1}\n'


def _full():
    raise OSError(28, "No space left on device")


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n[2]\n{"a": 3}\n')
    with pytest.raises(InputError, match=r"a\.jsonl: line 2"):
        read_lines(path)


def test_a_folder_keeps_its_config(tmp_path):
    config = {"name": "a", "optim": {"lr": 1e-3, "steps": 5}, "tags": ("x", "y")}
    assert claim(tmp_path / "run", config) == claim(tmp_path / "run", config) == []
    with pytest.raises(InputError) as error:
        claim(tmp_path / "run", {**config, "optim": {"lr": 1e-4, "steps": 5, "clip": 1}})
    assert "optim.lr: 0.001 -> 0.0001" in str(error.value) and "optim.clip: (absent) -> 1" in str(error.value)
    assert "steps" not in str(error.value)
    changed = {**config, "optim": {"lr": 1e-3, "steps": 9}}
    assert claim(tmp_path / "run", changed, ignore=("optim.steps",)) == ["optim.steps: 5 -> 9"]


def test_differences_of_plain_values():
    assert differences(plain({"a": None, "b": [1]}), plain({"a": 0, "b": (1,)})) == ["a: None -> 0"]
    assert differences({"a": {"b": 1}}, {"a": 1}) == ["a: {'b': 1} -> 1"]
