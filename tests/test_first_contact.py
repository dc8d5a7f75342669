"""What somebody sees who tries it for the first time."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxmllm import api
from jaxmllm.data.sources import open_source
from jaxmllm.geometry import box_iou

ROOT = Path(__file__).parents[1]


def test_the_readme_s_example_shows_something_that_tiny_can_do(tmp_path):
    """As it stands, in an empty folder: the box that it prints lies on the object."""
    (program,) = re.findall(r"```python\n(import jaxmllm\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    gold, found = (
        [float(n) for n in numbers.split(",")] for numbers in re.findall(r"\[(\d+(?:, \d+){3})\]", done.stdout)[:2]
    )
    assert float(np.asarray(box_iou(np.array([gold]), np.array([found]))).squeeze()) > 0.8
    assert "made for" not in done.stderr and "PyTorch" not in done.stderr


@pytest.mark.parametrize(("size", "said"), [((84, 84), False), ((112, 112), False), ((640, 480), True)])
def test_a_photograph_given_to_tiny_is_told_what_it_was_made_for(caplog, size, said):
    api._say_what_tiny_is_for.cache_clear()
    content = [{"type": "image", "image": Image.new("RGB", size)}, {"type": "text", "text": "Describe this image."}]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # once, however often
            api._encoded(api.load("tiny"), [[{"role": "user", "content": content}]])
    assert [("drawings" in record.message) for record in caplog.records if record.name == api.__name__] == [True] * said


def test_worlds_of_the_usual_size_are_what_tiny_was_made_for(caplog):
    api._say_what_tiny_is_for.cache_clear()
    for task in ("grounding", "tracks"):
        record = open_source(f"world:{task}")[0]
        kind = "video" if record.get("videos") else "image"
        content = [{"type": kind, kind: record[f"{kind}s"][0]}, {"type": "text", "text": "What?"}]
        api._encoded(api.load("tiny"), [[{"role": "user", "content": content}]])
    assert not [record for record in caplog.records if record.name == api.__name__]
