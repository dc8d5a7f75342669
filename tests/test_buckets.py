"""Addresses of buckets are refused before a model is loaded or a folder made, with what to do instead."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxmllm import api
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.training.config import TrainConfig

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("field", ["output_dir", "model", "resume_from"])
def test_fields_of_a_run(field):
    with pytest.raises(InputError, match=rf"{field} = 'gs://b/x'.*gcsfuse --implicit-dirs"):
        TrainConfig("a", **{field: "gs://b/x"}).validate()


@pytest.mark.parametrize(
    "spec", ["chat:gs://b/rows.jsonl", "coco:s3://b/a.json?task=detection", "pr1:rows.json?images=gs://b/images"]
)
def test_data(spec):
    with pytest.raises(InputError, match="addresses of buckets"):
        open_source(spec)


def test_checkpoint():
    with pytest.raises(InputError, match="model = 'gs://b/model'"):
        api.resolve("gs://b/model")


def test_by_the_command(tmp_path):
    """Nothing is made: a Path of such an address would be a folder named gs: here."""
    commands = (
        ["train", str(ROOT / "configs" / "quickstart.py"), "--output_dir", "gs://b/runs"],
        ["eval", "--data", "world:grounding", "--out", "gs://b/eval"],
    )
    script = f"import sys; from jaxmllm.cli import main\nfor a in {commands!r}: print(main(a))"
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["2", "2"] and ran.stderr.count("addresses of buckets") == 2, ran.stderr
    assert not list(tmp_path.iterdir())
