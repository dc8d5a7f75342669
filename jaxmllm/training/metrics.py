"""What a run leaves to read: metrics as JSON lines and in TensorBoard or W&B, sampled completions, versions and seed.

| file in the run folder                | content                                                                     |
|---------------------------------------|-----------------------------------------------------------------------------|
| `config.json`                         | resolved config                                                             |
| `run.json`                            | seed, and for each start: time, command, versions, devices, git commit      |
| `metrics.jsonl`                       | one object a logged step: `step`, `time` (Unix seconds), metrics            |
| `tensorboard/`                        | the same for TensorBoard                                                    |
| `completions/completions_00010.parquet` | TRL's table: step, prompt, completion, one column a reward, advantage     |

Metric names are TRL's (grpo.md section 10). A value that is no finite number is written as null in JSON.
"""

import importlib.metadata
import importlib.util
import io
import json
import math
import platform
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jaxmllm.data.images import load_image
from jaxmllm.errors import InputError
from jaxmllm.methods.method import Completed
from jaxmllm.runfiles import JsonLines, plain, read_json, read_lines, replace_file, write_json

REPORT_TO = ("tensorboard", "wandb")
PACKAGES = (
    *("jaxmllm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers"),
    *("tokenizers", "numpy", "pillow", "pycocotools"),
)
PICTURE_SIDE = 160  # pixels of a picture in the completions table
_COMPLETIONS = re.compile(r"completions_(\d+)\.parquet")


def scalar(value: Any) -> float | int:
    """A Python number from a number or an array with one element, on any device. TypeError for anything else."""
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"a metric must be one number, got {type(value).__name__} of shape {array.shape}")
    return int(array.item()) if array.dtype.kind in "biu" else float(array.item())


class MetricsWriter:
    """Writes the metrics and completions of one run; one process of a multi-process run has `enabled`."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        resume_step: int | None = None,
        report_to: Sequence[str] = ("tensorboard",),
        enabled: bool = True,
        config: Any = None,
    ):
        """Opens the files of the run folder.

        Args:
            run_dir: run folder, made if needed.
            resume_step: last step of the checkpoint that the run goes on from: what was written about later steps is
                removed, since these are done again. None: a fresh run.
            report_to: of "tensorboard" and "wandb", besides the JSON lines; "all" for those installed.
            enabled: False makes every method do nothing.
            config: shown in W&B.

        Raises InputError for an unknown or uninstalled name in `report_to`.
        """
        self.run_dir, self.enabled = Path(run_dir), enabled
        self._board: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        chosen = chosen_trackers(report_to)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "metrics.jsonl"
        _forget_after(self.run_dir, -1 if resume_step is None else resume_step)
        self._lines = JsonLines(path)
        if "tensorboard" in chosen:
            from tensorboardX import SummaryWriter

            # purge_step hides what the event files of an earlier start hold about the steps that are done again
            purge = 0 if resume_step is None else resume_step + 1
            self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=purge, flush_secs=10)
        if "wandb" in chosen:
            import wandb

            self._wandb = wandb.init(
                dir=str(self.run_dir),
                name=self.run_dir.name,
                id=run_id(self.run_dir),
                resume="allow",
                config=plain(config),
            )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step: numbers, or arrays of one element (which are fetched from the device here)."""
        if not self.enabled:
            return
        values = {name: scalar(value) for name, value in metrics.items()}
        shown = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.append([{"step": int(step), "time": round(time.time(), 3), **shown}])
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=int(step))

    def has_evaluation(self, step: int) -> bool:
        """Whether an evaluation of this step is logged already."""
        rows = read_lines(self.run_dir / "metrics.jsonl") if self.enabled else []
        return any(row["step"] == step and any(name.startswith("eval_") for name in row) for row in rows)

    def log_completions(self, step: int, table: Completed | None) -> None:
        """Writes the completions of a step; None: it had none."""
        if table is None or not self.enabled:
            return
        images = [record["images"][0] if record.get("images") else None for record in table.records]
        self._write_completions(step, table.prompts, table.texts, table.rewards, table.advantages, images)

    def _write_completions(
        self,
        step: int,
        prompts: Sequence[str],
        completions: Sequence[str],
        rewards: Mapping[str, Sequence[float | None]],
        advantages: Sequence[float],
        images: Sequence[Any] | None = None,
    ) -> None:
        """Writes the completions of a step. Rows of a group follow each other.

        Args:
            prompts, completions: texts, one a row.
            rewards: column name -> one value a row; None or NaN where a reward does not apply.
            advantages: one a row.
            images: first picture of each row or None; stored small, once a group, as Hugging Face's {"bytes", "path"}.
        """
        rows = len(completions)
        columns: dict[str, Any] = {
            "step": pa.array([int(step)] * rows, pa.int64()),
            "prompt": pa.array(_texts(prompts), pa.string()),
            "completion": pa.array(_texts(completions), pa.string()),
        }
        for name, values in {**rewards, "advantage": advantages}.items():
            numbers = [math.nan if value is None else float(value) for value in values]
            columns[name] = pa.array([None if math.isnan(n) else n for n in numbers], pa.float64())
        if images is not None:
            first = [
                row == 0 or prompts[row] != prompts[row - 1] or images[row] is not images[row - 1]
                for row in range(rows)
            ]
            cells = [_cell(image) if new else None for image, new in zip(images, first, strict=True)]
            columns["image"] = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file)
        folder = self.run_dir / "completions"
        folder.mkdir(exist_ok=True)
        replace_file(folder / f"completions_{step:05d}.parquet", file.getvalue())

    def close(self) -> None:
        """Closes all files; later calls do nothing."""
        if not self.enabled:
            return
        self.enabled = False
        self._lines.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def chosen_trackers(report_to: Sequence[str]) -> list[str]:
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    if names == ["all"]:
        return [name for name in REPORT_TO if _installed(name)]
    for name in names:
        if name not in REPORT_TO:
            raise InputError(f"report_to: {name!r} is unknown; use {', '.join(REPORT_TO)} or all")
        if not _installed(name):
            raise InputError(f"report_to: {name} is not installed; install it or leave it out")
    return names


def _installed(name: str) -> bool:
    package = {"tensorboard": "tensorboardX"}.get(name, name)
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _forget_after(run_dir: Path, step: int) -> None:
    """Removes metrics and completions of steps later than `step`."""
    path = run_dir / "metrics.jsonl"
    rows = read_lines(path)
    kept = [row for row in rows if row["step"] <= step]
    if len(kept) < len(rows):
        replace_file(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    for file in (run_dir / "completions").glob("completions_*.parquet"):
        found = _COMPLETIONS.fullmatch(file.name)
        if found and int(found[1]) > step:
            file.unlink()


def _texts(texts: Sequence[str]) -> list[str]:
    """Texts as valid UTF-8: a lone surrogate becomes a question mark."""
    return [text.encode("utf-8", "replace").decode() for text in texts]


def _cell(image: Any) -> dict[str, Any] | None:
    if image is None:
        return None
    small = load_image(image)
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


# --- what produced the run ------------------------------------------------------------------------------------------


def _run_json(run_dir: Path, seed: int | None = None) -> dict[str, Any]:
    path = run_dir / "run.json"
    return read_json(path) if path.exists() else {"id": uuid.uuid4().hex[:12], "seed": seed, "starts": []}


def run_id(run_dir: Path) -> str:
    """A name of this run that no other has, the same at every start."""
    return str(_run_json(run_dir).get("id") or run_dir.name)


def record_start(
    run_dir: str | Path, seed: int, devices: Sequence[Any] = (), changed: Sequence[str] = ()
) -> dict[str, Any]:
    """Adds this start to `run.json` and returns its entry.

    `devices`: those of the run, e.g. `jax.devices()`. `changed`: fields that differ from the first start's config.
    """
    path = Path(run_dir) / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _run_json(Path(run_dir), seed)
    start: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "git": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "devices": _device_names(devices),
        **({"changed": list(changed)} if changed else {}),
    }
    content["starts"].append(start)
    write_json(path, content)
    return start


def _device_names(devices: Sequence[Any]) -> dict[str, int]:
    """How many devices of each kind, over all processes."""
    names = [getattr(device, "device_kind", str(device)) for device in devices]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def versions() -> dict[str, str | None]:
    """Versions of the packages that decide a run's numbers; None where one is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_commit(file: str | Path = __file__) -> dict[str, Any] | None:
    """Commit of the checkout this library runs from and whether tracked files were changed; None outside of one."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=Path(file).resolve().parent, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if (
        git("ls-files", "--error-unmatch", Path(file).name) is None
    ):  # an installed copy may lie inside a foreign checkout
        return None
    return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
