"""From pictures and answers to a model that transformers runs, with the installed wheel, from an empty folder."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxmllm.data.sources import open_source

ROOT = Path(__file__).parents[1]
QUESTION = "How many shapes are in the image?"
CONFIG = """
from jaxmllm.methods import GRPO, SFT
from jaxmllm.training.config import DataConfig, OptimConfig, TrainConfig

config = TrainConfig(
    name="{name}", method={method}, model="{model}", batch_size=8, max_steps={steps}, unroll=True, trainable=r"text/.*",
    data=DataConfig(train=("chat:train.jsonl",), eval=("chat:val.jsonl",), eval_samples=8),
    optim=OptimConfig(learning_rate=1e-3, lr_scheduler_type="constant"), save_steps=100, save_pictures=2,
)
"""
REWARD = """
def f(text, record):
    return float(text.strip() == record["answer"])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """The environment of a shell in which the wheel is installed, and nothing of the repository is in sight."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "jaxmllm", source / "jaxmllm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)], check=True, timeout=300
    )
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=300)
    shutil.rmtree(source)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XLA", "PYTHON"))}
    return kept | {"PYTHONPATH": str(site), "PATH": f"{site / 'bin'}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}


def data(folder: Path) -> None:
    """A CSV file of pictures and answers beside the pictures, and the same rows as the JSON lines that `chat:` reads."""
    for split, start, stop in (("train", 0, 32), ("val", 100, 108)):
        scenes = open_source("world:counting?size=84x84&objects=1-4&seed=5")
        rows = []
        for k in range(start, stop):
            Image.fromarray(np.asarray(scenes[k]["images"][0])).save(folder / f"{split}{k}.png")
            rows.append({"image": f"{split}{k}.png", "question": QUESTION, "answer": str(scenes[k]["count"])})
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        with (folder / f"{split}.csv").open(newline="") as file, (folder / f"{split}.jsonl").open("w") as lines:
            for row in csv.DictReader(file):
                print(json.dumps({"prompt": row["question"], "completion": row["answer"], **row}), file=lines)


def transformers_says(folder: Path, picture: Path, tokens: int) -> str:
    """The greedy answer of transformers' own model, template, tokenizer and picture processor."""
    torch = pytest.importorskip("torch")
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with Image.open(picture) as image:
        seen = Qwen2VLImageProcessorPil.from_pretrained(folder)(image.convert("RGB"), return_tensors="pt")
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    places = int(seen["image_grid_thw"].prod()) // 4
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * places), return_tensors="pt")["input_ids"]
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    kinds = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, do_sample=False,
            max_new_tokens=tokens, **seen,
        )  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_from_pictures_and_answers_to_transformers(tmp_path, installed):
    data(tmp_path)
    (tmp_path / "reward.py").write_text(REWARD)

    def jaxmllm(*arguments: str) -> subprocess.CompletedProcess:
        command = ["jaxmllm", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, (arguments, done.stdout[-2000:], done.stderr[-4000:])
        return done

    def train(name: str, method: str, model: str, steps: int, *flags: str) -> list[dict]:
        (tmp_path / f"{name}.py").write_text(CONFIG.format(name=name, method=method, model=model, steps=steps))
        jaxmllm("train", f"{name}.py", *flags)
        run = tmp_path / "runs" / name
        assert (run / "report.html").exists() and (run / "export" / "model.safetensors").exists()
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    where = [sys.executable, "-c", "import jaxmllm; print(jaxmllm.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=installed, capture_output=True, text=True, check=True).stdout
    assert found.startswith(installed["PYTHONPATH"])  # not the repository's

    said = jaxmllm("data", "check", "chat:train.jsonl", "--eval", "chat:val.jsonl").stdout
    assert "32 records, 0 of them bad" in said and "no record of the evaluation is among the training's" in said

    rows = train("sft", "SFT()", "tiny", 40)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 40 and np.mean(losses[-5:]) < 0.5 * losses[0]

    method = "GRPO(num_generations=4, max_completion_length=8, reward_funcs=('reward.py:f',))"
    rewards = [row["reward"] for row in train("grpo", method, "runs/sft/export", 4) if "reward" in row]
    assert len(rewards) == 4 and max(rewards) > 0 and all(reward * 32 == int(reward * 32) for reward in rewards)

    jaxmllm("eval", "--data", "chat:val.jsonl", "--model", "runs/grpo/export", "--out", "held", "--max-new-tokens", "8")
    assert len((tmp_path / "held" / "predictions.jsonl").read_text().splitlines()) == 8
    jaxmllm("report", "runs/grpo", "--out", "again.html")
    assert (tmp_path / "again.html").stat().st_size > 10_000

    train("lora", "SFT()", "runs/grpo/export", 3, "--lora.r", "4")
    adapter = json.loads((tmp_path / "runs" / "lora" / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 4

    export = tmp_path / "runs" / "lora" / "export"
    for picture in ("val100.png", "val101.png"):
        flags = ["--image", picture, "--prompt", QUESTION, "--temperature", "0", "--max-new-tokens", "8"]
        ours = jaxmllm("sample", "--model", str(export), *flags).stdout.removesuffix("\n")
        assert ours and ours == transformers_says(export, tmp_path / picture, 8)


def test_the_csv_file_itself_is_read(tmp_path):
    data(tmp_path)
    record = open_source(f"chat:{tmp_path / 'train.csv'}")[0]
    assert record["messages"][0]["content"][-1]["text"] == QUESTION
