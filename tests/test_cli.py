"""The command line: what its commands print and write, and one line for each mistake."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxmllm import api, cli
from jaxmllm.data.sources import open_source

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(open_source("world:grounding?size=84x84&length=1")[0]["images"][0]).save(path)
    return path


def refused(capsys, *arguments) -> str:
    """The one message of a command that was refused."""
    assert cli.main(list(map(str, arguments))) == cli.EXIT_INPUT
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and "Traceback" not in err and not out
    return err


def test_sample_writes_what_generate_gives(capsys, photo):
    question = "Output the bounding box of the red circle in the image. Report the bbox coordinates in JSON format."
    options = ["--prompt", question, "--image", str(photo), "--max-new-tokens", "8", "--temperature", "0"]
    assert cli.main(["sample", *options]) == 0
    out, err = capsys.readouterr()
    content = [{"type": "image", "image": str(photo)}, {"type": "text", "text": question}]
    expected = api.generate(api.load("tiny"), [[{"role": "user", "content": content}]], max_new_tokens=8, temperature=0)
    assert out == expected[0][0].text + "\n"
    assert "tokens/s" in err
    assert cli.main(["sample", *options, "--num-generations", "2"]) == 0
    assert capsys.readouterr().out.count(expected[0][0].text) == 2


def test_score(tmp_path, capsys, photo):
    message = {"role": "user", "content": [{"type": "image", "image": str(photo)}, {"type": "text", "text": "Count."}]}
    rows = [{"messages": [message], "completions": ["3", "three"]}, {"messages": [message], "completions": ["4"]}]
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["score", str(path), "--out", str(out)]) == 0
    found = [json.loads(line)["logprobs"] for line in out.read_text().splitlines()]
    direct = api.score(api.load("tiny"), [r["messages"] for r in rows], [r["completions"] for r in rows])
    for group, expected in zip(found, direct, strict=True):
        for a, b in zip(group, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    path.write_text('{"messages": "x"}\n')
    assert "in.jsonl, line 1: field 'messages' must be a list" in refused(capsys, "score", path)
    path.write_text("")
    assert "no rows" in refused(capsys, "score", path)


def test_convert_there_and_back(tmp_path, capsys):
    tiny = api.resolve("tiny")
    assert cli.main(["convert", str(tiny), str(tmp_path / "orbax")]) == 0
    assert cli.main(["convert", str(tmp_path / "orbax"), str(tmp_path / "hf")]) == 0
    a, b = (api.load(folder).params for folder in (tiny, tmp_path / "hf"))
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)
    capsys.readouterr()
    assert "exists already" in refused(capsys, "convert", tiny, tmp_path / "hf")


def test_data_draws_a_sheet(tmp_path):
    path = tmp_path / "sheet.png"
    assert cli.main(["data", "preview", "world:detection?size=84x84", "--out", str(path), "--n", "4"]) == 0
    with Image.open(path) as sheet:
        assert min(sheet.size) > 84 and len(np.unique(np.asarray(sheet.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_data_writes_a_slice(tmp_path, capsys):
    spec = "world:grounding?size=56x56&seed=3"
    assert cli.main(["data", "materialise", spec, "--out", str(tmp_path), "--start", "2", "--stop", "5"]) == 0
    (folder,) = re.findall(r"read it as (tfds:\S+)", "".join(capsys.readouterr()))
    written, drawn = open_source(folder), open_source(spec)
    assert [record["id"] for record in written] == [drawn[k]["id"] for k in (2, 3, 4)]
    np.testing.assert_array_equal(written[1]["images"][0], drawn[3]["images"][0])
    assert "only sources of the world" in refused(capsys, "data", "materialise", f"tfds:{tmp_path}", "--out", tmp_path)


def test_eval_and_report(tmp_path, capsys):
    spec = "world:counting?size=84x84&split=val&length=4"
    assert cli.main(["eval", "--data", spec, "--out", str(tmp_path), "--max-new-tokens", "8"]) == 0
    figures = json.loads((tmp_path / "metrics.json").read_text())["sources"][spec]
    assert figures["n"] == 4 and "accuracy" in json.dumps(figures).lower()
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 4
    assert "counting" in "".join(capsys.readouterr())


# ---------------------------------------------------------------- mistakes


def test_mistakes_get_one_line(tmp_path, capsys, photo):
    missing, config = tmp_path / "missing", tmp_path / "config.py"
    assert "no such config file" in refused(capsys, "train", missing)
    config.write_text("x = 1")
    assert "must define `config`" in refused(capsys, "train", config)
    config.write_text("1 / 0")
    assert "ZeroDivisionError" in refused(capsys, "train", config)
    assert str(missing) in refused(capsys, "sample", "--model", missing)
    assert str(missing) in refused(capsys, "sample", "--image", missing)
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:200])
    assert str(broken) in refused(capsys, "sample", "--image", broken)
    assert "unknown" in refused(capsys, "data", "preview", "world:nonsense")
    assert str(missing) in refused(capsys, "data", "preview", f"coco:{missing}")
    assert str(missing) in refused(capsys, "report", missing)


def test_mistakes_of_a_config_come_together(tmp_path, capsys):
    quickstart = ROOT / "configs" / "quickstart.py"
    message = refused(
        capsys, "train", quickstart, "--batch_size", "3", "--method.num_generations", "1", "--optim.learning_rate", "-1",
        "--optim.gradient_accumulation_steps", "2", "--output_dir", tmp_path,
    )  # fmt: skip
    for part in ("batch_size = 3", "num_generations", "learning_rate"):
        assert part in message
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(api.resolve("tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))
    assert "mlp" in refused(capsys, "sample", "--model", folder)


def test_as_a_program(tmp_path):
    """The exit status and the message as a shell sees them; the traceback on request."""
    command = [sys.executable, "-m", "jaxmllm.cli", "train", str(tmp_path / "missing.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    done = subprocess.run([*command, "--debug"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_kept():
    """Pages faulted in by 20 blocks of 64 MB, taken and freed one after the other: one block's worth instead of twenty."""
    program = (
        "import resource, sys, numpy as np\n"
        "from jaxmllm import cli\n"
        "if sys.argv[1] == 'kept': cli._keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "before = faults()\n"
        "for _ in range(20): np.ones(2**23)\n"
        "print(faults() - before)"
    )
    kept, plain = (
        int(subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "plain")
    )
    assert kept < plain / 3
