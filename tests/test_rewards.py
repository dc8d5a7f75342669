"""The table of rewards: values, parts, and one clear error for each way a reward function can fail."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.methods import GRPO
from jaxmllm.methods.grpo.rewards import Rewards, of_method
from jaxmllm.tasks import counting, detection, grounding
from tests.support import reward_functions, training

STYLE = {"style": "qwen2_5_vl", "thinking": False}


@pytest.fixture(scope="module")
def records():
    sources = [open_source(f"world:{task}?size=84x84&length=2") for task in ("grounding", "counting")]
    return [dict(source[0]) | {"resized": [84, 84]} for source in sources]


def test_the_record_decides_the_task_reward(records):
    texts = [grounding.answer(records[0]), counting.answer(records[1])]
    table, parts = Rewards(["task"], STYLE)([*texts, texts[0]], [*records, records[1]])
    for text, record, row, named in zip(texts, records, table, parts, strict=False):
        task = {"grounding": grounding, "counting": counting}[record["task"]]
        own = task.reward(text, record, style="qwen2_5_vl")
        assert named == own and row[0] == own["reward"]
    assert table[0, 0] == table[:2].max() > table[2, 0]  # a box is no count


def test_columns_rows_and_what_does_not_apply(records):
    rewards = Rewards(["tests.support.reward_functions:sometimes", "tests.support.reward_functions:checksum"], STYLE)
    table, parts = rewards(["a", "b"], records)
    assert table.shape == (2, 2) and table[0, 0] == 1.0 and math.isnan(table[1, 0])
    assert table[0, 1] == reward_functions.checksum("a", None) and table[1, 1] == reward_functions.checksum("b", None)
    assert parts == [{"reward": 1.0, "bonus": 0.5}, {}]


def test_processes_give_the_same_table(records):
    names = ["task", "tests.support.reward_functions:checksum"]
    texts = [grounding.answer(records[0]), "3"]
    here = Rewards(names, STYLE)(texts, records)
    there = Rewards(names, STYLE, processes=2, timeout=60)
    try:
        for _ in range(2):  # the pool is kept
            table, parts = there(texts, records)
            np.testing.assert_array_equal(table, here[0])
            assert parts == here[1]
    finally:
        there.close()


def test_a_reward_that_hangs_ends_in_time(records):
    rewards = Rewards(["tests.support.reward_functions:hangs"], STYLE, processes=1, timeout=0.5)
    with pytest.raises(
        InputError,
        match="reward tests.support.reward_functions:hangs failed on record 'world-.*': no result after 0.5 s",
    ):
        rewards(["a"], records[:1])


@pytest.mark.parametrize(
    "name, processes, why",
    [
        ("hangs_on_a", 1, "no result after 0.7 s"),
        ("fails_on_a", 1, "TimeoutError: of its own"),
        ("fails_on_a", 0, "TimeoutError: of its own"),
        ("dies_on_a", 1, "a process of the rewards died"),
    ],
)
def test_failures_can_be_left_out(records, caplog, name, processes, why):
    """A reward that hangs, raises or kills its process does not apply; those after it are computed all the same."""
    rewards = Rewards(
        [f"tests.support.reward_functions:{name}"], STYLE, processes=processes, timeout=0.7, skip_errors=True
    )
    try:
        table, _ = rewards(["b", "a", "c", "d"], [*records, *records])
    finally:
        rewards.close()
    np.testing.assert_array_equal(table[:, 0], [1, np.nan, 1, 1])
    assert rewards.failed == 1 and f"record {records[1]['id']!r}: {why}" in caplog.text
    with pytest.raises(InputError, match=why):
        Rewards([f"tests.support.reward_functions:{name}"], STYLE, processes=processes, timeout=0.7)(["a"], records[:1])


def test_processes_are_for_the_functions_of_others():
    assert Rewards(["task"], STYLE, processes=None)._processes == 0
    assert Rewards(["task", "tests.support.reward_functions:checksum"], STYLE, processes=None)._processes > 0


def test_rewards_of_the_tokens(tmp_path, records):
    """DAPO's overlong punishment and the repetition penalty, by hand (grpo.md section 8)."""
    base = training.config(tmp_path)
    names = ("repetition", "tests.support.reward_functions:checksum", "soft_overlong")
    options = dict(soft_punish_cache=4, repetition_n_grams=2, repetition_max_penalty=-0.5, reward_funcs=names)
    method = dataclasses.replace(base.method, max_completion_length=10, **options)
    dataclasses.replace(base, method=method).validate()
    tokens = [[1, 2, 3], [7] * 8, list(range(10))]
    table, _ = of_method(method, STYLE)(["x", "y", "z"], [records[0]] * 3, tokens)
    np.testing.assert_allclose(table[:, 0], [0, -0.5 * 6 / 7, 0])
    np.testing.assert_allclose(table[:, 1], [reward_functions.checksum(text, None) for text in "xyz"])
    np.testing.assert_allclose(table[:, 2], [0, -0.5, -1])


def test_the_task_reward_gets_the_options_of_the_run(tmp_path):
    """Rules, matching and the terms of detection reach the task, each where it is known."""
    record = dict(open_source("world:detection?size=84x84&objects=3-3&length=1")[0]) | {"resized": [84, 84]}
    text = detection.answer(dict(record, boxes=record["boxes"][::-1], labels=record["labels"][::-1]))
    cases = {
        "usual": (GRPO(), {}, {}),
        "in order": (GRPO(reward_matching="order"), {}, {"matching": "order"}),
        "terms": (
            GRPO(),
            {"detection.weights.f1": "0.5", "detection.weights.penalty": "true"},
            {"weights": detection.Weights(f1=0.5, penalty=True)},
        ),
    }
    found = {}
    for name, (method, of_run, options) in cases.items():
        table, _ = of_method(method, STYLE | of_run)([text], [record])
        found[name] = table[0, 0]
        assert table[0, 0] == detection.reward(text, record, style="qwen2_5_vl", **options)["reward"]
    assert found["usual"] == pytest.approx(3)
    assert found["usual"] > found["terms"] > found["in order"]
    # tasks that do not know an option are not given it
    page = dict(open_source("world:ocr?size=84x84&lines=1-1&length=1")[0])
    assert of_method(cases["terms"][0], STYLE)([page["text"]], [page])[0][0, 0] == 1


def test_a_reward_that_raises_in_a_process_is_named(records):
    rewards = Rewards(["tests.support.reward_functions:raises"], STYLE, processes=1, timeout=60)
    try:
        with pytest.raises(
            InputError, match="reward tests.support.reward_functions:raises failed on record 'world-.*': RuntimeError"
        ):
            rewards(["a"], records[:1])
    finally:
        rewards.close()


@pytest.mark.parametrize(
    "name, message",
    [
        ("tests.support.reward_functions:absent", "'tests.support.reward_functions:absent' does not import"),
        ("no_such_module:reward", "'no_such_module:reward' does not import"),
        ("grounding", "'grounding' does not import .* write module:function"),
        ("tests.support.reward_functions:NOT_A_FUNCTION", "is a int, not a function"),
    ],
)
def test_names_that_mean_nothing(name, message):
    with pytest.raises(InputError, match=message):
        Rewards([name], STYLE)


@pytest.mark.parametrize(
    "name, message",
    [
        ("wrong_type", "record 'world-.*': returned str, expected a number, a dict or None"),
        ("no_total", "record 'world-.*': its dict lacks the key 'reward'"),
        ("infinite", "record 'world-.*': returned inf, expected a finite number"),
    ],
)
def test_what_is_no_reward(records, name, message):
    with pytest.raises(InputError, match=message):
        Rewards([f"tests.support.reward_functions:{name}"], STYLE)(["a"], records[:1])


KILLED = """
import os, signal
from jaxmllm.methods.grpo.rewards import Rewards, of_method
if __name__ == "__main__":
    rewards = Rewards(["tests.support.reward_functions:checksum"], {}, processes=1)
    rewards(["a"], [{"id": "x"}])
    print(*rewards._pool._processes, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_do_not_outlive_a_killed_run(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(KILLED)
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, path], env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (worker,) = map(int, done.stdout.split())
    until = time.monotonic() + 60
    while runs(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not runs(worker)


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
