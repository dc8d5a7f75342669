"""The table of rewards: values, parts, and one clear error for each way a reward function can fail."""

import math

import numpy as np
import pytest

from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.tasks import counting, grounding
from jaxmllm.train.rewards import Rewards
from tests import training

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
    rewards = Rewards(["tests.training:sometimes", "tests.training:checksum"], STYLE)
    table, parts = rewards(["a", "b"], records)
    assert table.shape == (2, 2) and table[0, 0] == 1.0 and math.isnan(table[1, 0])
    assert table[0, 1] == training.checksum("a", None) and table[1, 1] == training.checksum("b", None)
    assert parts == [{"reward": 1.0, "bonus": 0.5}, {}]


def test_processes_give_the_same_table(records):
    names = ["task", "tests.training:checksum"]
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
    rewards = Rewards(["tests.training:hangs"], STYLE, processes=1, timeout=0.5)
    with pytest.raises(InputError, match="reward tests.training:hangs failed on record 'world-.*': no result after 0.5 s"):
        rewards(["a"], records[:1])


def test_a_reward_that_raises_in_a_process_is_named(records):
    rewards = Rewards(["tests.training:raises"], STYLE, processes=1)
    try:
        with pytest.raises(InputError, match="reward tests.training:raises failed on record 'world-.*': RuntimeError"):
            rewards(["a"], records[:1])
    finally:
        rewards.close()


@pytest.mark.parametrize(
    "name, message",
    [
        ("tests.training:absent", "'tests.training:absent' does not import"),
        ("no_such_module:reward", "'no_such_module:reward' does not import"),
        ("grounding", "'grounding' does not import .* write module:function"),
        ("tests.training:NOT_A_FUNCTION", "is a int, not a function"),
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
        Rewards([f"tests.training:{name}"], STYLE)(["a"], records[:1])
