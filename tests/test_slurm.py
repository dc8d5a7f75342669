"""launch/slurm.sbatch on a real SLURM of two nodes on loopback: trained over two processes, cancelled, requeued, resumed.

Needs slurmctld, slurmd and their commands (Debian: slurm-wlm); starts its own and touches none that is there.
"""

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxmllm.runfiles import read_lines

ROOT = Path(__file__).parents[1]
UPDATES = 16
TRAIN = (
    *("jaxmllm", "train", str(ROOT / "configs/quickstart.py"), "--max_steps", str(UPDATES), "--save_steps", "2"),
    *("--batch_size", "4", "--method.num_generations", "4", "--method.max_completion_length", "16"),
    *("--data.eval", "--completions_steps", "100", "--no-export"),
)
# Nodes differ by name and port alone. Accounts, MPI and containers are left out; cred_expire is how long a requeued job waits.
CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=15
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/ctld.pid
SlurmdLogFile={folder}/%n.log
SlurmctldLogFile={folder}/ctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName={host}-2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=loop Nodes={host},{host}-2 Default=YES State=UP
"""


class Cluster:
    """slurmctld and two slurmd; `ask` runs a command of SLURM against them."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "state").mkdir(parents=True)
        ports = []
        for _ in range(3):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                ports.append(free.getsockname()[1])
        host = socket.gethostname().partition(".")[0]
        conf = folder / "slurm.conf"
        conf.write_text(CONF.format(host=host, user=getpass.getuser(), folder=folder, ports=ports))
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.env |= {"SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        # a slurmd knows its node by the name of its host: the second gets one of its own, which resolves
        hosts = folder / "hosts"
        hosts.write_text(Path("/etc/hosts").read_text() + f"127.0.0.1 {host}-2\n")
        script = f"hostname {host}-2 && mount --bind {hosts} /etc/hosts && exec slurmd -D"
        second = ["unshare", "--uts", "--mount", "sh", "-c", script]
        daemons = [["slurmctld", "-D"], ["slurmd", "-D"], second]
        self.daemons = [
            subprocess.Popen(one, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for one in daemons
        ]
        self.until(lambda: self.ask("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 2, 60, "nodes are up")

    def ask(self, *command: str, **options) -> str:
        ran = subprocess.run(command, env=self.env, capture_output=True, text=True, **options)
        return ran.stdout

    def until(self, true, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                logs = "\n".join(path.read_text()[-1500:] for path in sorted(self.folder.glob("*.log")))
                raise AssertionError(f"not so after {seconds} s: {what}\n{logs}")
            time.sleep(0.5)

    def state(self, job: str) -> str:
        return re.search(r"JobState=(\w+)", self.ask("scontrol", "show", "job", job))[1]

    def close(self) -> None:
        self.ask("scancel", "--state=RUNNING")
        for one in reversed(self.daemons):
            one.terminate()
        for one in self.daemons:
            try:
                one.wait(20)
            except subprocess.TimeoutExpired:
                one.kill()


@pytest.fixture
def cluster(tmp_path):
    if any(
        shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None for name in ("slurmctld", "slurmd", "sbatch")
    ):
        pytest.skip("SLURM is not installed")
    if os.geteuid():
        pytest.skip("a second node on this machine needs root")
    started = Cluster(tmp_path / "slurm")
    yield started
    started.close()


def project(folder: Path) -> Path:
    """The launchers as they are, the two lines edited as their header says, and this environment as the installed one."""
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copy(ROOT / "pyproject.toml", folder)
    venv = folder / ".venv"
    venv.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if not entry.name.startswith(".installed"):
            (venv / entry.name).symlink_to(entry)
    crc = subprocess.run("cksum <pyproject.toml", shell=True, cwd=folder, capture_output=True, text=True, check=True)
    (venv / f".installed-{crc.stdout.split()[0]}-test").touch()
    script = folder / "launch" / "slurm.sbatch"
    text = script.read_text()
    for line, edited in (
        ("#SBATCH --nodes=4 --gpus-per-node=8 --cpus-per-task=64", "#SBATCH --nodes=2 --cpus-per-task=1"),
        ("#SBATCH --partition=gpu --time=24:00:00", "#SBATCH --partition=loop --time=0:30:00"),
    ):
        assert text.count(line) == 1
        text = text.replace(line, edited)
    script.write_text(text)
    return folder


def updates(folder: Path) -> int:
    path = folder / "runs" / "quickstart" / "metrics.jsonl"
    return max((json.loads(line)["step"] for line in path.read_text().splitlines()), default=0) if path.exists() else 0


def task(cluster: Cluster, number: int) -> int:
    """Process id of the training that is task `number` of the running job."""
    mine = {f"SLURM_CONF={cluster.env['SLURM_CONF']}", f"SLURM_PROCID={number}"}
    for entry in Path("/proc").iterdir():
        try:
            if mine <= set((entry / "environ").read_text().split("\0")) and "python" in (entry / "exe").readlink().name:
                return int(entry.name)
        except (OSError, UnicodeDecodeError):
            continue
    raise AssertionError(f"task {number} does not run")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_cancelled_requeued_resumed(tmp_path, cluster):
    """Cancelled by its user and put back by hand, told to stop, and bereft of a task: it goes on each time."""
    folder = project(tmp_path / "project")
    cluster.env |= {"JAXMLLM_EXTRAS": "test", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    cluster.env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles quickly
    cluster.env |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    job = cluster.ask("sbatch", "--parsable", "launch/slurm.sbatch", *TRAIN, cwd=folder).strip()
    log = folder / f"slurm-{job}.log"

    def trained(count: int) -> None:
        def there() -> bool:
            assert cluster.state(job) not in ("FAILED", "TIMEOUT", "COMPLETED"), log.read_text()
            return updates(folder) >= count

        cluster.until(there, 900, f"{count} updates")

    trained(3)
    cluster.ask("scancel", job)
    cluster.until(lambda: cluster.state(job) == "CANCELLED", 120, "cancelled")
    assert "back into the queue" not in log.read_text()
    cluster.ask("scontrol", "requeue", job)
    trained(7)
    cluster.ask("scancel", "--signal=TERM", job)  # as SLURM does before the time limit and at preemption
    cluster.until(lambda: "status 75, back into the queue" in log.read_text(), 120, "requeued by itself")
    trained(11)
    os.kill(task(cluster, 1), signal.SIGKILL)
    lost = "status 13[47], back into the queue"
    cluster.until(lambda: re.search(lost, log.read_text()), 120, "requeued without a task")
    cluster.until(lambda: cluster.state(job) == "COMPLETED", 900, "completed")

    text = log.read_text()
    assert "another process was lost" in text or "another task died" in text
    steps = [row["step"] for row in read_lines(folder / "runs" / "quickstart" / "metrics.jsonl")]
    assert steps == list(range(1, UPDATES + 1))
    assert re.search(r"Restarts=3\b", cluster.ask("scontrol", "show", "job", job))
