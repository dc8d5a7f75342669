"""Flags: what people write is what is run, and numbers that are none are refused before anything begins."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxmllm import cli, commands
from jaxmllm.commands import COMMANDS
from jaxmllm.commands.config_flags import config_of
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.flags import spelled
from jaxmllm.machine.mesh import MeshConfig
from jaxmllm.methods.optim import OptimConfig
from jaxmllm.model.lora import LoRAConfig
from jaxmllm.training.config import DataConfig, TrainConfig, load_config

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"


def config(*arguments: str) -> TrainConfig:
    return config_of([str(QUICKSTART), *arguments])


def refused(capsys, *arguments) -> str:
    assert cli.main(list(map(str, arguments))) == cli.EXIT_INPUT
    return capsys.readouterr().err


def test_a_list_keeps_every_value_that_is_given():
    separate = config("--data.train", "world:ocr", "--max_steps", "3", "--data.train=world:counting")
    together = config("--data.train", "world:ocr", "world:counting", "--max_steps", "3")
    assert separate == together and separate.data.train == ("world:ocr", "world:counting")
    assert config("--report_to", "wandb", "--report-to", "tensorboard").report_to == ("wandb", "tensorboard")
    assert config("--max_steps", "3", "--max_steps", "5").max_steps == 5  # one value: the last one, as everywhere


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--export False", False),
        ("--no-export", False),
        ("--export=true", True),
        ("--export", True),
        ("--export 0", False),
    ],
)
def test_switches_take_true_and_false(words, expected):
    assert config(*words.split()).export is expected


def test_switches_of_parts_and_of_other_commands():
    assert config("--data.thinking", "True").data.thinking and not config("--data.thinking", "no").data.thinking
    assert config("--method.kl-clip", "True").method.kl_clip
    kinds = {"thinking": bool, "data": tuple[str, ...], "limit": int | None}
    assert (
        spelled("--data a --thinking False --data b".split(), kinds)
        == "--thinking --data a b".replace("--thinking", "--no-thinking").split()
    )


def test_one_flag_of_a_part_turns_it_on():
    assert config().lora is None and config().sample_mesh is None and config() == load_config(QUICKSTART)
    assert config("--lora.r", "8").lora == LoRAConfig(r=8)
    assert config("--lora.r=8", "--lora", "None").lora is None
    assert config("--sample-mesh.fsdp", "2").sample_mesh == MeshConfig(fsdp=2)


def test_messages_say_what_to_write(capsys):
    assert "--export maybe: write true or false" in refused(capsys, "train", QUICKSTART, "--export", "maybe")
    assert "--lora.r 8" in refused(capsys, "train", QUICKSTART, "--lora", "8")


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "flag",
    ["optim.learning_rate", "optim.weight_decay", "max_seconds", "method.beta", "lora.lora_alpha", "data.weights"],
)
def test_numbers_are_finite(capsys, tmp_path, flag, value):
    message = refused(capsys, "train", QUICKSTART, f"--{flag}", value, "--output_dir", tmp_path)
    assert f"{flag} = {value}: must be a finite number" in message and not list(tmp_path.iterdir())


def test_every_number_of_a_config_is_looked_at():
    """Whatever field is added, in whatever part."""
    base = load_config(QUICKSTART)
    seen = 0
    for part in ("", "optim", "data", "evaluation", "method"):
        owner = getattr(base, part) if part else base
        for field in dataclasses.fields(owner):
            if isinstance(getattr(owner, field.name), float):
                bad = dataclasses.replace(owner, **{field.name: float("nan")})
                with pytest.raises(InputError, match=f"{field.name} = nan: must be a finite number"):
                    (dataclasses.replace(base, **{part: bad}) if part else bad).validate()
                seen += 1
    assert seen > 20


@pytest.mark.parametrize(
    "field", ["eval_steps", "completions_steps", "save_pictures", "max_seconds", "optim.warmup_steps", "optim.weight_decay",
              "optim.max_grad_norm", "data.max_bad_records", "data.eval_samples", "data.workers", "data.max_prompt_length",
              "optim.adam_beta1", "optim.adam_epsilon"]
)  # fmt: skip
def test_numbers_below_their_least_are_refused(field):
    with pytest.raises(InputError, match=f"{field} = -1"):
        config(f"--{field}=-1")


def test_zero_stays_what_it_was():
    ok = TrainConfig(
        "x", eval_steps=0, completions_steps=0, max_seconds=0, save_pictures=0, optim=OptimConfig(warmup_steps=0)
    )
    assert dataclasses.replace(ok, data=DataConfig(max_bad_records=0)).validate()


def test_numbers_of_sources_and_of_other_commands_are_finite(capsys):
    for spec in ("world:grounding?noise=nan", "world:grounding:nan", "world:grounding?weight=inf"):
        with pytest.raises(InputError):
            open_source([spec, "world:counting?weight=1"])
    assert "--fps nan: must be a finite number" in refused(capsys, "sample", "--fps", "nan")
    assert "finite" in refused(capsys, "eval", "--data", "world:ocr", "--repetition-penalty", "inf")


# ---------------------------------------------------------------- help


def test_help_has_a_line_for_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    for name in {name.partition(" ")[0] for name in COMMANDS}:
        (line,) = re.findall(rf"• {name} +(.*)", shown)
        assert len(line.split()) > 3, line


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_line_for_every_flag(capsys, monkeypatch, name):
    """Also for those of a config, without a config."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        cli.main([*name.split(), "--help"])
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert end.value.code == 0 and f"usage: jaxmllm {name}" in shown
    flags = re.split(r"\n[│ ] (?=-)", shown)[1:]
    helps = {flag.split()[0]: re.split(r" {2,}|\n", flag.replace("│", ""), maxsplit=1)[-1].strip() for flag in flags}
    assert len(helps) > 1 and not [flag for flag, line in helps.items() if line.startswith(("(default", "(required"))]


def test_every_command_is_a_file():
    """And every file that has a function `run` is a command."""
    files = {path.stem for path in Path(commands.__file__).parent.glob("*.py") if "\ndef run(" in path.read_text()}
    assert files == {name.replace(" ", "_") for name in COMMANDS} | {"parser"}


def test_nothing_is_said_about_a_missing_pytorch(tmp_path):
    """In a process that finds no torch, as after a plain install."""
    program = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        "from jaxmllm.data.chat import Processor; from jaxmllm.api import TINY\n"
        "Processor.from_pretrained(TINY); import transformers.utils as t; print(t.is_torch_available())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
    assert "PyTorch" not in done.stderr
