"""Every file under configs/ loads, validates, and does what its docstring says: command, variants, data layout."""

import ast
import contextlib
import dataclasses
import json
import os
import re
import shlex
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxmllm import tasks
from jaxmllm.commands.config_flags import config_of
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.machine.targets import check_layout, known_meshes, load_mesh
from jaxmllm.methods.grpo.rewards import of_method
from jaxmllm.plan.placing import check_layouts
from jaxmllm.plan.programs import architecture
from jaxmllm.tasks import ocr
from jaxmllm.tasks.detection import Weights
from jaxmllm.training.config import MeshConfig, TrainConfig, load_config
from jaxmllm.training.setup import asking_of, eval_asking, task_options

ROOT = Path(__file__).parents[1]
RUNS = sorted(p for p in (ROOT / "configs").rglob("*.py") if p.parent.name != "meshes")
RECIPES = sorted((ROOT / "configs" / "perception_r1").glob("*.py"))
# heads of the decoder, of its keys and values, of the tower: config.json of the checkpoints
SIZES = {"2B": (12, 2, 16), "3B": (16, 2, 16), "7B": (28, 4, 16), "32B": (40, 8, 16), "72B": (64, 8, 16)}
MESHES = "cpu h100_1 h100_8 h100_8x4 v5e_16 v5e_16x2 v5e_256 v5e_64 v5p_64 v6e_16 v6e_256".split()


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def model(size: str) -> SimpleNamespace:
    heads, groups, tower = SIZES[size]
    names = ("num_attention_heads", "num_key_value_heads", "vision_config.num_heads")
    return SimpleNamespace(heads=dict(zip(names, (heads, groups, tower), strict=True)))


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text()), clean=True) or ""


def overridden(path: Path, arguments: list[str]) -> TrainConfig:
    return config_of([str(path), *arguments])


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_loads_and_validates(path):
    config = load_config(path)
    assert config.validate() is config
    assert f"./launch/local.sh jaxmllm train {path.relative_to(ROOT)}" in docstring(path)


def test_run_folders_are_apart():
    names = [load_config(path).name for path in RUNS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_documented_variants(path):
    """Flags exist, values fit, and every variant with a name differs from the recipe in more than that."""
    lines = re.findall(r"^    (--.+)$", docstring(path), re.MULTILINE)
    variants = [shlex.split(re.split(r"\s{2,}", line)[0]) for line in lines if not line.startswith("--data ")]
    configs = {}
    for arguments in variants:
        found = overridden(path, arguments)
        assert found != dataclasses.replace(load_config(path), name=found.name)
        configs[found.name.removeprefix(path.stem)] = found
    assert configs["_thinking"].data.thinking and not load_config(path).data.thinking
    assert configs["_g16"].method.num_generations == 16
    assert configs["_sft"].method.name == "sft"
    assert configs["_sft_rl"].method.name == "grpo" and configs["_sft_rl"].model == f"runs/{path.stem}_sft/export"
    usual = load_config(path).method
    assert (usual.reward_rules, usual.reward_matching) == ("corrected", "hungarian")
    if path.stem != "ocr_2b":  # of pages there is no released reward of the paper's
        assert configs["_released"].method.reward_rules == "released"
    if path.stem in ("counting_2b", "detection_3b"):  # several objects: something to match
        assert configs["_in_order"].method.reward_matching == "order"
    if path.stem == "detection_3b":
        weights = {
            name: tasks.of({"task": "detection"}, task_options(configs[name])).weights
            for name in ("_penalty", "_no_f1")
        }
        assert weights == {"_penalty": Weights(penalty=True), "_no_f1": Weights(f1=0)}


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_published_hyperparameters(path):
    """perception_r1.md, table of section 3."""
    config = load_config(path)
    optim, data, method = config.optim, config.data, config.method
    assert (method.num_generations, method.beta, method.loss_type) == (8, 0.04, "grpo")
    assert (optim.learning_rate, optim.lr_scheduler_type, optim.warmup_steps) == (1e-6, "linear", 0)
    assert (optim.adam_beta1, optim.adam_beta2, optim.adam_epsilon, optim.weight_decay) == (0.9, 0.999, 1e-8, 0)
    assert (optim.max_grad_norm, optim.gradient_accumulation_steps) == (1.0, 2)
    assert (data.min_pixels, data.max_pixels) == (3136, 1_000_000)
    assert method.temperature == 1.0 and method.num_iterations == 1
    assert config.trainable == r".*" and config.lora is None
    # prompts are never cut: the largest image and the list of 80 names fit
    assert data.max_prompt_length >= data.max_pixels // 28**2 + 400
    tokens = {"grounding_2b": 768, "counting_2b": 768, "ocr_2b": 2048, "detection_3b": 2048}
    records = {"grounding_2b": 5_000, "counting_2b": 10_000, "ocr_2b": 5_000, "detection_3b": 110_000}
    assert method.max_completion_length == tokens[config.name]
    assert 0 <= records[config.name] - config.max_steps * config.batch_size < config.batch_size
    assert data.style == ("qwen2_5_vl" if "2.5" in config.model else "qwen2_vl")
    # section 2: a system turn in training alone; section 5: greedy, so many new tokens
    assert data.system == (ocr.SYSTEM if config.name == "ocr_2b" else "You are a helpful assistant. ")
    assert config.evaluation.system is None
    limits = {"grounding_2b": 512, "counting_2b": 512, "ocr_2b": 2048, "detection_3b": 4096}
    assert config.evaluation.max_new_tokens == limits[config.name]
    assert config.evaluation.repetition_penalty == (1.05 if config.name == "grounding_2b" else 1.0)


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in RECIPES])
def test_how_recipes_ask(path):
    """Training and evaluation as section 2 words them; thinking puts R1's system turn and suffix into both."""
    record = {
        "images": ["x.png"], "expression": "red cup", "label": "cups", "categories": ["cup", "cat"],
        "task": path.stem.partition("_")[0],
    }  # fmt: skip
    config = load_config(path)
    trained, evaluated = (f(config).conversation(record) for f in (asking_of, eval_asking))
    assert [turn["role"] for turn in trained] == ["system", "user"] and trained[0]["content"] == config.data.system
    assert [turn["role"] for turn in evaluated] == ["user"]
    asked = {
        "grounding": ("Output the bounding box of the red cup in the image.",) * 2,
        "counting": ("Output all the bounding boxes of the cups",) * 2,
        "ocr": ("OCR this image.", "<image>\nOCR this image: "),
        "detection": (
            "Please output bbox coordinates and names of cup, cat.",
            "Locate every item from the category list in the image and output the coordinates in JSON format. "
            "The category set includes cup, cat.",
        ),
    }[record["task"]]
    assert (trained[1]["content"][-1]["text"], evaluated[0]["content"][-1]["text"]) == asked
    thinking = overridden(path, ["--data.thinking"])
    for asking in (asking_of(thinking), eval_asking(thinking)):
        system, user = asking.conversation(record)
        assert "<think>" in system["content"] and user["content"][-1]["text"].endswith("<answer> </answer> tags.")


@pytest.fixture
def layout(tmp_path, monkeypatch):
    """Two records of each recipe's data, in the files that its docstring names."""
    monkeypatch.chdir(tmp_path)

    def image(path: str, size=(200, 100)) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(path)

    for folder in ("pr1", "pr1/images", "refcoco/images", "pixmo_count/images", "pages/images"):
        for k in range(2):
            image(f"data/{folder}/{k}.png")
    data = Path("data")
    rows = [{"problem": "the dog", "image": f"{k}.png", "solution": [100, 200, 500, 600]} for k in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), data / "pr1" / "grounding.parquet")
    rows = [{"problem": "birds", "image": f"{k}.png", "clicks": [[100, 200], [300, 400]]} for k in range(2)]
    (data / "pr1" / "pr1_counting_10k.json").write_text(json.dumps(rows))
    rows = [{"image": f"{k}.png", "expression": "the cat", "box": [10, 20, 50, 60]} for k in range(2)]
    (data / "refcoco" / "refcoco_val.json").write_text(json.dumps(rows))
    rows = [{"label": "cups", "count": 1, "points": [{"x": 20.0, "y": 30.0}], "image": f"{k}.png"} for k in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), data / "pixmo_count" / "validation.parquet")
    lines = "".join(json.dumps({"image": f"{k}.png", "text": "A page\nof text."}) + "\n" for k in range(2))
    for split in ("train", "val"):
        (data / "pages" / f"{split}.jsonl").write_text(lines)
        image(f"data/coco/{split}2017/1.jpg")
        coco = {
            "images": [{"id": 1, "file_name": "1.jpg", "width": 200, "height": 100}],
            "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 18, "bbox": [10, 20, 30, 40], "area": 1200, "iscrowd": 0}
            ],
        }
        (data / "coco" / "annotations").mkdir(exist_ok=True)
        (data / "coco" / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(coco))


BEST = {"grounding": 2.0, "counting": 1.0, "ocr": 1.0, "detection": 3.0}  # perception_r1.md section 2


@pytest.mark.parametrize(
    "flags",
    [(), ("--data.thinking",), ("--method.reward_rules", "released"), ("--method.reward_matching", "order")],
    ids=lambda flags: "_".join(flags) or "usual",
)
@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in RECIPES])
def test_documented_data(path, flags, layout):
    """The documented files are read as the recipe's task, and the gold answer in its style has the best reward."""
    config = overridden(path, list(flags))
    asking = asking_of(config)
    rewards = of_method(config.method, {"style": config.data.style, "thinking": config.data.thinking})
    # the released rewards are given the text with its end token
    end = "<|im_end|>" if config.method.reward_rules == "released" else ""
    for spec in (*config.data.train, *config.data.eval):
        record = {"id": spec, "size": [200, 100], **open_source(spec)[0]}
        assert record["task"] == path.stem.partition("_")[0]
        table, _ = rewards([asking.answer(record) + end], [record])
        assert table[0, 0] == pytest.approx(BEST[record["task"]], abs=0.12)  # whole numbers on the grid


# ---------------------------------------------------------------- meshes


def test_meshes_are_complete():
    assert list(known_meshes()) == MESHES


@pytest.mark.parametrize("name", MESHES)
def test_mesh(name):
    mesh = load_mesh(name)
    digits = re.fullmatch(r"(?:[a-z]+\d+[a-z]*|cpu)(?:_(\d+)(?:x(\d+))?)?", name).groups()
    assert mesh.devices == int(digits[0] or 1) * int(digits[1] or 1)
    assert mesh.devices % mesh.hosts == 0
    if mesh.chip.platform == "tpu":
        chips = np.prod([int(n) for n in mesh.topology.partition(":")[2].split("x")])
        assert (chips * mesh.slices, mesh.slices) == (mesh.devices, int(digits[1] or 1))
    elif mesh.chip.platform == "cuda":
        assert [int(n) for n in mesh.topology.split("x")] == [1, mesh.hosts, mesh.devices // mesh.hosts]
    # no step of the decode loop may have to gather parameters
    assert mesh.devices == 1 or mesh.sample.fsdp == 1
    text = (ROOT / "configs" / "meshes" / f"{name}.py").read_text()
    assert re.search(rf"--mesh {name}( \\\\)?\n", text)
    for size in SIZES:
        for axes in mesh.layouts(model(size)):
            sizes = check_layout(axes, mesh.devices, model=model(size))
            assert np.prod(list(sizes.values())) == mesh.devices


def test_layouts_keep_what_fits():
    mesh = load_mesh("v5e_256")
    assert mesh.layouts(model("32B")) == (mesh.train, mesh.sample)
    train, sample = mesh.layouts(model("3B"))  # two key/value heads
    assert train == MeshConfig(replica=1, fsdp=128, tensor=2)
    assert sample == MeshConfig(replica=128, fsdp=1, tensor=2)


@pytest.mark.parametrize(
    "axes, devices, options, words",
    [
        (MeshConfig(fsdp=3), 8, {}, ["fsdp 3", "8 devices", "1, 2, 4, 8"]),
        (MeshConfig(replica=-1, fsdp=-1), 8, {}, ["one axis may be -1"]),
        (MeshConfig(fsdp=2, tensor=0), 8, {}, ["at least 1"]),
        (
            MeshConfig(fsdp=2, tensor=4),
            8,
            {"model": model("3B")},
            ["tensor = 4", "num_key_value_heads = 2", "1, 2 would"],
        ),
        (MeshConfig(fsdp=1, tensor=8), 8, {"model": model("7B")}, ["num_attention_heads = 28", "1, 2, 4 would"]),
        (MeshConfig(replica=2, fsdp=4), 8, {"rows": 12}, ["replica x fsdp = 2 x 4", "12 prompts", "1, 2, 4 would"]),
    ],
)
def test_unsuitable_layout(axes, devices, options, words):
    with pytest.raises(InputError) as refused:
        check_layout(axes, devices, "mesh.train", **options)
    assert str(refused.value).startswith("mesh.train:")
    for word in words:
        assert word in str(refused.value)


def test_free_axis_takes_the_rest():
    assert check_layout(MeshConfig(replica=2), 8) == {"replica": 2, "fsdp": 4, "tensor": 1}


def test_load_mesh_refuses(tmp_path):
    with pytest.raises(InputError, match="'v9_1': no such config; known are cpu, h100_1"):
        load_mesh("v9_1")
    broken = tmp_path / "broken.py"
    broken.write_text("mesh = 1 / 0")
    with pytest.raises(InputError, match=r"broken\.py: ZeroDivisionError"):
        load_mesh(broken)
    broken.write_text("mesh = {'devices': 8}")
    with pytest.raises(InputError, match="must define `mesh`"):
        load_mesh(broken)
    text = (ROOT / "configs" / "meshes" / "v5e_16.py").read_text()
    broken.write_text(text.replace("devices=16", "devices=24"))
    with pytest.raises(InputError, match=r"broken\.py: train: .*does not make 24 devices"):
        load_mesh(broken)


@pytest.mark.parametrize("name", ["v5e_16", "v5e_16x2", "h100_8x4"])
def test_compile_devices(name):
    """With the compiler at hand the topology has the devices and hosts the config says; without, the error names it."""
    mesh = load_mesh(name)
    try:
        devices = mesh.compile_devices()
    except InputError as error:
        assert "install the extra" in str(error)
        return
    assert len(devices) == mesh.devices
    assert len({device.process_index for device in devices}) == mesh.hosts


def commands_of(path: Path) -> list[list[str]]:
    """The words after `jaxmllm` of every command in a config's docstring, lines that end in a backslash joined."""
    text = docstring(path).replace("\\\n", " ")
    found = [
        shlex.split(line.partition("jaxmllm ")[2], comments=True) for line in text.splitlines() if "jaxmllm " in line
    ]
    return [words for words in found if words and words[0] in ("plan", "train")]


@pytest.mark.parametrize("name", MESHES)
def test_the_command_of_a_mesh_fits_its_devices(name):
    """Up to compilation: the config is valid, and its layouts divide model and batch."""
    (command,) = commands_of(ROOT / "configs" / "meshes" / f"{name}.py")
    words = command[2:]
    at = words.index("--mesh")
    config, target = config_of([str(ROOT / command[1]), *words[:at], *words[at + 2 :]]), load_mesh(words[at + 1])
    cfg = architecture(config.model)
    check_layouts(config, cfg, *target.layouts(cfg), target.devices)


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
@pytest.mark.parametrize("name", [mesh for mesh in MESHES if mesh != "cpu"])
def test_what_a_recipe_is_told_about_a_mesh_cures_it(recipe, name):
    config, target = load_config(recipe), load_mesh(name)
    cfg = architecture(config.model)
    try:
        check_layouts(config, cfg, *target.layouts(cfg), target.devices)
    except InputError as error:
        flags = re.search(r"(--batch_size \d+) (--optim.gradient_accumulation_steps \d+)", str(error)).group().split()
        cured = config_of([str(recipe), *flags])
        check_layouts(cured, cfg, *target.layouts(cfg), target.devices)
        assert cured.batch_size < config.batch_size + target.devices


def test_meshes_come_with_an_installed_package(tmp_path):
    build = pytest.importorskip("setuptools.build_meta")
    source = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = ("jaxmllm/__init__.py", "jaxmllm/machine", "configs/meshes", "pyproject.toml", "README.md", "LICENSE")
    for file in (name for name in listed if name.startswith(wanted)):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / file).is_symlink():
            (source / file).symlink_to((ROOT / file).readlink())
        else:
            (source / file).write_bytes((ROOT / file).read_bytes())
    with monkeypatched_folder(source):
        wheel = build.build_wheel(str(tmp_path))
    names = set(zipfile.ZipFile(tmp_path / wheel).namelist())
    assert {f"jaxmllm/machine/meshes/{name}.py" for name in MESHES} <= names


@contextlib.contextmanager
def monkeypatched_folder(folder: Path):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
