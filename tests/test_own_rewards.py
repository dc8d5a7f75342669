"""Rewards of a user's own: where they lie, what they return, how they fail; and scripts as users write them."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxmllm.errors import InputError
from jaxmllm.methods import GRPO
from jaxmllm.methods.grpo.rewards import Rewards
from tests.support import reward_functions

ODD = "tests.support.odd_rewards"
RECORD = {"id": "x", "task": "grounding"}
ROOT = Path(__file__).parents[1]


def test_errors_of_clients_exits_and_slow_imports_in_processes():
    """Importing takes longer than the time limit, which is the function's own; what it raises is said in its words."""
    rewards = Rewards([f"{ODD}:limited"], {}, processes=2, timeout=2.0, skip_errors=True)
    try:
        began = time.monotonic()
        table, _ = rewards(["a", "b", "a", "b"], [RECORD] * 4)
        assert time.monotonic() - began > 3
        np.testing.assert_array_equal(table[:, 0], [math.nan, 1, math.nan, 1])
        assert rewards.failed == 2
        workers = set(rewards._pool._processes)
        rewards(["a"] * 3, [RECORD] * 3)
        assert set(rewards._pool._processes) == workers  # an answer does not cost a pool
    finally:
        rewards.close()
    for name, message in (("limited", "StatusError: 429: slow down"), ("leaves", "SystemExit: 0")):
        rewards = Rewards([f"{ODD}:{name}"], {}, processes=1, timeout=2.0)
        try:
            with pytest.raises(InputError, match=f"reward {ODD}:{name} failed on record 'x': {message}"):
                rewards(["a"], [RECORD])
        finally:
            rewards.close()


def test_signals_to_the_group_leave_reward_processes_alone():
    rewards = Rewards(["tests.support.reward_functions:checksum"], {}, processes=2)
    try:
        rewards(["a"], [RECORD])
        for worker in list(rewards._pool._processes):
            os.kill(worker, signal.SIGINT)
            os.kill(worker, signal.SIGTERM)
        time.sleep(0.3)
        assert all(process.is_alive() for process in rewards._pool._processes.values())
        assert rewards(["b"], [RECORD])[0][0, 0] == reward_functions.checksum("b", None)
    finally:
        rewards.close()
    # and this process still gets its own
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


@pytest.mark.parametrize(
    ("name", "value"), [("numpy_bool", 1.0), ("numpy_array", 0.5), ("jax_scalar", 0.5), ("decimal", 0.5)]
)
def test_numbers_of_other_libraries(name, value):
    assert Rewards([f"{ODD}:{name}"], {})(["ab"], [RECORD])[0][0, 0] == value


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("named_with_text", "its part 'pred' is a str, expected a number or None"),
        ("too_large", "returned 1e.39, expected a finite number"),
        ("later", "is async; a reward is a plain function"),
        ("as_trl", r"takes \(completions, \*\*kwargs\); a reward takes \(text, record\)"),
        ("missing", "does not import .* Looked in "),
    ],
)
def test_what_is_no_reward_is_said(name, message):
    with pytest.raises(InputError, match=message):
        Rewards([f"{ODD}:{name}"], {})(["ab"], [RECORD])


def test_a_function_in_a_config_is_known_by_its_file():
    assert GRPO(reward_funcs=(reward_functions.checksum,)).reward_funcs == ("tests.support.reward_functions:checksum",)
    with pytest.raises(InputError, match="defined by `def` at the top of a file"):
        GRPO(reward_funcs=(lambda text, record: 1.0,))


SCRIPT = """
import jaxmllm
from jaxmllm.methods import GRPO
from jaxmllm.training.config import DataConfig, TrainConfig
from reward import shortness

method = GRPO(num_generations=2, max_completion_length=4, reward_funcs=(shortness, "reward.py:length"))
data = DataConfig(train=("world:grounding?size=84x84&objects=2-3&length=8",))
config = TrainConfig("run", method=method, data=data, batch_size=2, max_steps=1, export=False, report_to=())
if __name__ != "config":
    print(jaxmllm.train(config))
"""
REWARD = """
def length(text, record):
    return len(text)

def shortness(text, record):
    return -len(text)
"""


def test_a_script_without_a_main_guard_and_a_command_find_the_rewards_beside_them(tmp_path):
    """Both run rewards in processes; neither is on Python's path by itself."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text(SCRIPT)
    (tmp_path / "code" / "config.py").write_text(SCRIPT.replace('__name__ != "config"', "False"))
    (tmp_path / "code" / "reward.py").write_text(REWARD)
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = (
        "import sys; from jaxmllm.cli import main; sys.exit(main(['train', 'code/config.py', '--name', 'command']))"
    )
    for arguments in (["code/train.py"], ["-c", command]):
        done = subprocess.run(
            [sys.executable, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    for name in ("run", "command"):
        (row,) = map(json.loads, (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines())
        # one is minus the other
        assert row["rewards/reward.py:length/mean"] == -row["rewards/reward:shortness/mean"] > 0
