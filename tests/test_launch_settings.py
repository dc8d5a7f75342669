"""What launchers take along to a host: files that git has not seen yet, settings of the shell, and where data are found there."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.test_launch import GCLOUD, LAUNCH, environment, stand_in

SETTINGS = {"HF_TOKEN": "hf_a b'c", "WANDB_API_KEY": "key", "PYTHONPATH": "/my/packages"}
REPORT = """
import os, pathlib, stat, sys
names = ("HF_TOKEN", "WANDB_API_KEY", "PYTHONPATH", "HF_HOME")
print([os.environ.get(name) for name in names], os.path.exists("my_reward.py"), os.path.exists("secret.txt"))
"""
EXPECTED = f"{[*SETTINGS.values(), None]} True False"


@pytest.fixture
def project(tmp_path) -> Path:
    """A repository with the launchers, a reward that is not committed, and a file that git ignores."""
    folder = tmp_path / "project"
    shutil.copytree(LAUNCH, folder / "launch")
    (folder / ".gitignore").write_text("secret.txt\n/data/\n")
    for command in (["init", "-q"], ["add", "launch", ".gitignore"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    (folder / "my_reward.py").write_text("def f(text, record): return 1.0\n")
    (folder / "secret.txt").write_text("x")
    (folder / "report.py").write_text(REPORT)
    stand_in(folder / "launch", "local.sh", f"exec {sys.executable} report.py")
    return folder


def without(variables: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name != "HF_HOME"}


def test_tpu_vm(project, tmp_path):
    fake, bin_ = tmp_path / "fake", tmp_path / "bin"
    for host in ("host0", "host1"):
        (fake / host / "jaxmllm" / "runs" / "data").mkdir(parents=True)
    (fake / "slice").write_text("READY\n")
    # on the hosts the shell's own settings are not there
    stand_in(
        bin_,
        "gcloud",
        GCLOUD.replace('HOME="$h" bash', 'env -u HF_TOKEN -u WANDB_API_KEY -u PYTHONPATH HOME="$h" bash'),
    )
    for name in ("sleep", "mountpoint"):
        stand_in(bin_, name, "exit 0")
    stand_in(bin_, "uv", 'case "$1 $2" in "python find") command -v python3 ;; esac')
    given = {"FAKE": fake, "TYPE": "v6e-16", "TMPDIR": tmp_path, **SETTINGS}
    ran = subprocess.run(
        [project / "launch" / "tpu_vm.sh", "x"], env=without(environment(bin_, **given)), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    for host in ("host0", "host1"):
        assert (fake / host / "run.log").read_text().strip() == EXPECTED
        assert (fake / host / "jaxmllm" / "data").readlink() == Path("runs/data")
        assert (fake / host / "jaxmllm" / ".settings.sh").stat().st_mode & 0o777 == 0o600
    assert SETTINGS["HF_TOKEN"] not in (fake / "calls").read_text()  # command lines are no secret
    with tarfile.open(fake / "host0" / "code.tgz") as archive:
        assert "./my_reward.py" in archive.getnames()


def test_xpk(project, tmp_path):
    seen = f'for a in "$@"; do case $a in --script-dir=*) ls -A "${{a#*=}}" >{tmp_path}/files ;; esac; done'
    stand_in(tmp_path / "bin", "xpk", f"printf '%s\\0' \"$@\" >{tmp_path}/argv; {seen}")
    subprocess.run(
        [project / "launch" / "xpk.sh", "x"], env=without(environment(tmp_path / "bin", **SETTINGS)), check=True
    )
    argv = (tmp_path / "argv").read_text().split("\0")
    assert [a for a in argv if a.startswith("--env=")] == [
        f"--env={k}={v}" for k, v in sorted(SETTINGS.items(), key=_at)
    ]
    files = (tmp_path / "files").read_text().split()
    assert "my_reward.py" in files and "secret.txt" not in files
    assert "ln -sfn /runs/data data" in next(a for a in argv if a.startswith("--command="))


def _at(item: tuple[str, str]) -> int:
    return ("HF_TOKEN", "HF_HOME", "WANDB_API_KEY", "PYTHONPATH").index(item[0])


def test_skypilot(project, tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert {name: task["envs"][name] for name in (*SETTINGS, "HF_HOME")} == dict.fromkeys((*SETTINGS, "HF_HOME"), "")
    for name in ("ln", "uv"):
        stand_in(tmp_path / "bin", name, "exit 0")
    given = {"SKYPILOT_NODE_IPS": "a", "SKYPILOT_NUM_NODES": 1, "SKYPILOT_NODE_RANK": 0, "COMMAND": "x"}
    env = environment(tmp_path / "bin", **{**task["envs"], **SETTINGS, **given})
    ran = subprocess.run(["bash", "-c", task["run"]], cwd=project, env=env, capture_output=True, text=True)
    assert EXPECTED.split("]")[0] in ran.stdout, ran.stderr  # HF_HOME was empty, so it is not set
    assert "ln -sfn /runs/data data" in task["run"]


def test_jobset():
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "jaxmllm", "optional": True}}]
    assert {"name": "runs", "mountPath": "/app/data", "subPath": "data"} in container["volumeMounts"]


def test_slurm():
    assert "--export=ALL" in (LAUNCH / "slurm.sbatch").read_text()


@pytest.mark.parametrize("name", ["tpu_vm.sh", "xpk.sh", "slurm.sbatch", "jobset.yaml", "skypilot.yaml"])
def test_headers_say_it(name):
    text = (LAUNCH / name).read_text()
    header = text[: text.index("wo lines to edit")]
    assert "data/" in header and "HF_TOKEN" in header and "WANDB_API_KEY" in header and "reward" in header
