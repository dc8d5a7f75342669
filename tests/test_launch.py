"""Launchers and the start of several processes: real shells on stand-ins for the clusters' tools, real processes on loopback."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from jaxmllm import cli
from jaxmllm.errors import InputError
from jaxmllm.machine import processes
from jaxmllm.machine.targets import load_mesh
from jaxmllm.training.stopping import EXIT_INTERRUPTED

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SHELL = ["local.sh", "tpu_vm.sh", "xpk.sh", "slurm.sbatch"]
LAUNCHERS = [*SHELL, "jobset.yaml", "skypilot.yaml"]
COMMAND = ["jaxmllm", "train", "configs/quickstart.py", "--name", "a b; c"]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", SHELL)
def test_syntax(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    assert os.access(LAUNCH / name, os.X_OK)


@pytest.mark.parametrize("name", SHELL)
def test_shellcheck(name):
    found = subprocess.run([tool("shellcheck"), LAUNCH / name], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", LAUNCHERS)
def test_header(name):
    """The same command everywhere; the header shows it and says which two lines to edit."""
    text = (LAUNCH / name).read_text()
    header = text[: re.search(r"^[^#\n]", text, re.MULTILINE).start()]
    assert "wo lines to edit" in header
    assert "./launch/local.sh" in text
    shown = header if name != "jobset.yaml" else text.replace("[", "").replace(",", "")
    assert "jaxmllm train configs/quickstart.py" in shown
    if name.endswith(".yaml"):
        assert len(re.findall(r"# EDIT$", text, re.MULTILINE)) == 2


def stand_in(folder: Path, name: str, body: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("#!/usr/bin/env bash\n" + textwrap.dedent(body))
    (folder / name).chmod(0o755)


def tool(name: str) -> Path:
    """A program of somebody else's, usually in an environment of its own: put its folder on PATH to run these tests."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return Path(found)


def environment(*folders: Path, **variables) -> dict[str, str]:
    path = os.pathsep.join([*map(str, folders), os.environ["PATH"]])
    return {**os.environ, "PATH": path, **{k: str(v) for k, v in variables.items()}}


# ---------------------------------------------------------------- SLURM


@pytest.mark.parametrize(
    "status, restarts, state, requeued",
    [
        (0, 0, "RUNNING", False),
        (2, 0, "RUNNING", False),
        (75, 0, "RUNNING", True),
        (134, 3, "RUNNING", True),
        (137, 0, "RUNNING", True),
        (75, 50, "RUNNING", False),
        (75, 0, "COMPLETING", False),  # cancelled by its user
    ],
)
def test_slurm(tmp_path, status, restarts, state, requeued):
    log = tmp_path / "log"
    stand_in(tmp_path / "launch", "local.sh", f'printf \'%s\\n\' local "$JAXMLLM_EXTRAS" "$@" >>{log}; [ "$1" = true ]')
    stand_in(tmp_path / "bin", "srun", f'while [[ $1 == --* ]]; do shift; done; "$@"; exit {status}')
    stand_in(tmp_path / "bin", "squeue", f"echo {state}")
    stand_in(tmp_path / "bin", "scontrol", f'echo scontrol "$@" >>{log}')
    given = {"SLURM_SUBMIT_DIR": tmp_path, "SLURM_JOB_ID": 7, "SLURM_RESTART_COUNT": restarts}
    given |= {"JAXMLLM_EXTRAS": "cuda"}
    ran = subprocess.run(["bash", LAUNCH / "slurm.sbatch", *COMMAND], env=environment(tmp_path / "bin", **given))
    assert ran.returncode == status
    lines = log.read_text().splitlines()
    assert lines[:3] == ["local", "cuda", "true"]  # installed once, outside of srun
    assert lines[3 : 5 + len(COMMAND)] == ["local", "cuda", *COMMAND]
    assert ("scontrol requeue 7" in lines) == requeued


# ---------------------------------------------------------------- Cloud TPU

GCLOUD = """
set -u
echo "$*" >>"$FAKE/calls"
case "$*" in
  *"tpu-vm describe"*) cat "$FAKE/slice" 2>/dev/null ;;
  *"queued-resources describe"*) cat "$FAKE/queue" 2>/dev/null ;;
  *"queued-resources create"*)
    echo ACTIVE >"$FAKE/queue"; echo READY >"$FAKE/slice"
    rm -rf "$FAKE"/host*; mkdir "$FAKE"/host{0,1} ;;
  *"queued-resources delete"*) rm -f "$FAKE/queue" "$FAKE/slice" ;;
  *"tpu-vm scp"*) for h in "$FAKE"/host*; do cp "$5" "$h/code.tgz"; done ;;
  *"tpu-vm ssh"*)
    for h in "$FAKE"/host*; do
      case "$*" in *--worker=0*) [ "$h" = "$FAKE/host0" ] || continue ;; esac
      for a in "$@"; do case "$a" in --command=*) (cd "$h" && HOME="$h" bash -c "${a#--command=}") ;; esac; done
    done ;;
esac
"""


def test_tpu_vm_gets_a_slice_starts_all_hosts_and_survives_preemption(tmp_path):
    """Two hosts. The first start is told to stop (75) while the slice is preempted, the second is done."""
    fake, bin_ = tmp_path / "fake", tmp_path / "bin"
    fake.mkdir()
    stand_in(bin_, "gcloud", GCLOUD)
    stand_in(bin_, "sleep", "exit 0")
    stand_in(bin_, "mountpoint", "exit 0")
    # an environment without anything in it: what is tested is the launcher
    stand_in(bin_, "uv", 'case "$1 $2" in "venv "*) mkdir -p .venv/bin ;; "python find") command -v python3 ;; esac')
    run = f"""
    printf '%s\\n' "$JAXMLLM_EXTRAS" "$@" >>{fake}/ran
    [ -e {fake}/once ] && exit 0
    if [[ $HOME == */host1 ]]; then touch {fake}/once; echo PREEMPTED >{fake}/slice; echo SUSPENDED >{fake}/queue; fi
    exit 75
    """
    stand_in(bin_, "pretend", run)
    given = {"FAKE": fake, "PROJECT": "p", "ZONE": "z", "BUCKET": "b", "TYPE": "v5litepod-8", "PYTHON": sys.executable}
    ran = subprocess.run(
        [LAUNCH / "tpu_vm.sh", "pretend", "a b; c"],
        env=environment(bin_, **given),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert "done" in ran.stderr
    assert (fake / "ran").read_text().splitlines() == ["tpu", "a b; c"] * 4  # two hosts, twice
    calls = (fake / "calls").read_text()
    assert calls.count("queued-resources create jaxmllm-v5litepod-8") == 2
    assert "--accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite --spot --project=p --zone=z" in calls
    assert calls.count("queued-resources delete") == 1


def test_tpu_vm_stops_at_a_mistake(tmp_path):
    fake, bin_ = tmp_path / "fake", tmp_path / "bin"
    for host in ("host0", "host1"):
        (fake / host).mkdir(parents=True)
    (fake / "slice").write_text("READY\n")  # reused
    stand_in(bin_, "gcloud", GCLOUD)
    stand_in(bin_, "sleep", "exit 0")
    stand_in(bin_, "mountpoint", "exit 0")
    stand_in(bin_, "uv", 'case "$1 $2" in "venv "*) mkdir -p .venv/bin ;; "python find") command -v python3 ;; esac')
    stand_in(bin_, "pretend", "echo 'error: no such config'; exit 2")
    given = {"FAKE": fake, "TYPE": "v6e-16", "PYTHON": sys.executable}
    ran = subprocess.run(
        [LAUNCH / "tpu_vm.sh", "pretend"], env=environment(bin_, **given), capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 2
    assert "error: no such config" in ran.stdout and "stopped by a mistake" in ran.stderr
    assert "create" not in (fake / "calls").read_text()


# ---------------------------------------------------------------- Kubernetes


def test_xpk(tmp_path):
    stand_in(tmp_path, "xpk", f"printf '%s\\0' \"$@\" >{tmp_path}/argv")
    given = {"PROJECT": "p", "ZONE": "z", "CLUSTER": "c", "XPK_FLAGS": "--num-slices=2 --dry-run"}
    subprocess.run([LAUNCH / "xpk.sh", *COMMAND], env=environment(tmp_path, **given), check=True)
    argv = (tmp_path / "argv").read_text().split("\0")[:-1]
    assert argv[:2] == ["workload", "create"]
    assert {"--project=p", "--zone=z", "--cluster=c", "--num-slices=2", "--dry-run"} <= set(argv)
    assert f"--restart-on-exit-codes={EXIT_INTERRUPTED}" in argv
    command = next(a for a in argv if a.startswith("--command=")).removeprefix("--command=")
    started = command.partition("exec ")[2]
    assert shlex.split(started) == ["./launch/local.sh", *COMMAND]


def test_xpk_dry_run(tmp_path):
    """xpk itself makes a workload of it that runs the command, restarts, and hands the exit status on."""
    tool("xpk")
    stand_in(tmp_path, "gcloud", "exit 0")
    given = {"HOME": tmp_path, "PROJECT": "p", "ZONE": "us-west4-a", "CLUSTER": "c", "XPK_FLAGS": "--dry-run"}
    ran = subprocess.run(
        [LAUNCH / "xpk.sh", *COMMAND], env=environment(tmp_path, **given), capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    workload = ran.stdout[ran.stdout.index("apiVersion: jobset") :].split("\n[XPK]")[0]
    spec = yaml.safe_load(workload)["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 100
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["backoffLimit"]) == (4, 0)
    policy = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"]]
    assert any(EXIT_INTERRUPTED in rule["values"] for rule in policy)
    assert not any(rule["operator"] == "In" and cli.EXIT_INPUT in rule["values"] for rule in policy)
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 180
    started = re.search(r"exec (./launch/local.sh .+?) ?\) &", pod["containers"][0]["command"][-1])
    assert started and shlex.split(started[1]) == ["./launch/local.sh", *COMMAND]


def test_kubernetes_schema(tmp_path):
    """The Job inside of the JobSet by Kubernetes' own schema, which knows no field that is not in it."""
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]
    for name, extra, status in (("good", {}, 0), ("bad", {"completion": 4}, 1)):  # it does refuse
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": job["spec"] | extra}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(whole))
        command = [tool("kubernetes-validate"), "--strict", tmp_path / f"{name}.yaml"]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == status, ran.stdout + ran.stderr


def test_jobset():
    """Agrees with the mesh config of the slice that it names, and tells mistakes from interruptions."""
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]
    mesh = load_mesh("v5e_16")
    (replicated,) = job["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert spec["completions"] == spec["parallelism"] == mesh.hosts
    pod = spec["template"]["spec"]
    assert f"v5e:{pod['nodeSelector']['cloud.google.com/gke-tpu-topology']}" == mesh.topology
    (container,) = pod["containers"]
    for kind in ("requests", "limits"):
        assert container["resources"][kind]["google.com/tpu"] == mesh.devices // mesh.hosts
    assert container["command"] + container["args"] == ["./launch/local.sh", *COMMAND[:3]]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [1, cli.EXIT_INPUT]}
    assert (spec["backoffLimit"], pod["restartPolicy"]) == (0, "Never")  # the set restarts, not a pod alone
    assert job["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]


# ---------------------------------------------------------------- SkyPilot


def test_skypilot(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert EXIT_INTERRUPTED in task["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert cli.EXIT_INPUT not in task["resources"]["job_recovery"]["recover_on_exit_codes"]
    names = " ".join(f'"${name}"' for name in processes.EXPLICIT)
    stand_in(tmp_path / "launch", "local.sh", f"printf '%s\\n' {names} \"$@\"; exit 75")
    stand_in(tmp_path / "bin", "uv", "echo python3")
    stand_in(tmp_path / "bin", "ln", "exit 0")
    given = {"SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6", "SKYPILOT_NUM_NODES": 2, "SKYPILOT_NODE_RANK": 1}
    given |= {"COMMAND": shlex.join(COMMAND)}
    ran = subprocess.run(
        ["bash", "-c", task["run"]],
        cwd=tmp_path,
        env=environment(tmp_path / "bin", **given),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 75
    address, count, number, *command = ran.stdout.splitlines()
    assert (address, count, number, command) == ("10.0.0.5:8476", "2", "1", COMMAND)
    found = processes.explicit_processes({}, dict(zip(processes.EXPLICIT, (address, count, number), strict=True)))
    assert found == {"coordinator_address": "10.0.0.5:8476", "num_processes": 2, "process_id": 1}


PARSED = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
(one,) = task.resources
print(json.dumps([task.num_nodes, one.accelerators, one.use_spot, one.job_recovery, list(task.storage_mounts), task.envs]))
"""


def test_skypilot_parser(tmp_path):
    """Read by SkyPilot itself."""
    python = tool("sky").with_name("python")
    env = {**os.environ, "HOME": str(tmp_path)}
    ran = subprocess.run([python, "-c", PARSED, LAUNCH / "skypilot.yaml"], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    nodes, accelerators, spot, recovery, mounts, envs = json.loads(ran.stdout.splitlines()[-1])
    assert (nodes, accelerators, spot, mounts) == (1, {"H100": 8}, True, ["/runs"])
    assert recovery["recover_on_exit_codes"] == [EXIT_INTERRUPTED, 134, 137]
    assert envs["COMMAND"] == shlex.join(COMMAND[:3])


# ---------------------------------------------------------------- who the processes are


def test_statuses_are_the_documented_ones():
    table = dict(re.findall(r"^\| (\d+) +\| (.+?) +\|", processes.__doc__, re.MULTILINE))
    assert "mistake" in table[str(cli.EXIT_INPUT)]
    assert "saved" in table[str(EXIT_INTERRUPTED)]
    assert set(processes.TOGETHER) == {0, EXIT_INTERRUPTED}
    assert table[str(128 + signal.SIGABRT)].startswith("SIGABRT")


def variables(address=None, count=None, number=None) -> dict[str, str]:
    given = dict(zip(processes.EXPLICIT, (address, count, number), strict=True))
    return {name: str(value) for name, value in given.items() if value is not None}


def test_explicit():
    assert processes.explicit_processes({}, {}) is None
    assert processes.explicit_processes({}, variables(count=1)) == {"num_processes": 1}
    both = {"JAX_PROCESS_ID": 2}, variables("h:1", 4, 3)  # an argument wins over a variable
    assert processes.explicit_processes(*both) == {"coordinator_address": "h:1", "num_processes": 4, "process_id": 2}
    assert processes.explicit_processes({}, variables("[::1]:80", 2, 0))["coordinator_address"] == "[::1]:80"


@pytest.mark.parametrize(
    "given, words",
    [
        (variables(count=2), "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID missing beside JAX_NUM_PROCESSES=2"),
        (variables("h:1", 2), "JAX_PROCESS_ID missing"),
        (variables("h:1", 2, 2), "JAX_PROCESS_ID = 2: must be from 0 to JAX_NUM_PROCESSES - 1 = 1"),
        (variables("h:1", 2, -1), "JAX_PROCESS_ID = -1"),
        (variables("h:1", 0, 0), "JAX_NUM_PROCESSES = 0: must be at least 1"),
        (variables("h:1", "two", 0), "JAX_NUM_PROCESSES = 'two': not a whole number"),
        (variables("host", 2, 0), "JAX_COORDINATOR_ADDRESS = 'host': write HOST:PORT"),
        (variables("host:http", 2, 0), "write HOST:PORT"),
    ],
)
def test_explicit_refused(given, words):
    with pytest.raises(InputError, match=re.escape(words)):
        processes.explicit_processes({}, given)


def test_slurm_tasks(caplog):
    task = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    assert processes.slurm_tasks({}) == 0
    assert processes.slurm_tasks(task) == 2
    assert processes.slurm_tasks(task | {"SLURM_NTASKS": "1"}) == 0
    assert not caplog.records
    # in an allocation, but not under srun
    assert processes.slurm_tasks({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}) == 0
    assert "not started by srun" in caplog.text
    with pytest.raises(InputError, match="SLURM_NTASKS = '2x'"):
        processes.slurm_tasks(task | {"SLURM_NTASKS": "2x"})
    # one task a node has all of the node's GPUs, several tasks a node have one each (jax's own choice)
    assert processes.slurm_gpus(task | {"SLURM_GPUS_ON_NODE": "8"}, 2) == list(range(8))
    assert processes.slurm_gpus(task | {"CUDA_VISIBLE_DEVICES": "4,5,6"}, 2) == [0, 1, 2]
    assert processes.slurm_gpus(task | {"SLURM_GPUS_ON_NODE": "8"}, 16) is None
    assert processes.slurm_gpus(task, 2) is None


def test_on_cloud_tpu(tmp_path, monkeypatch):
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: object())
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()
    assert not processes.on_cloud_tpu({}, tmp_path)
    (tmp_path / "vfio" / "0").touch()
    assert processes.on_cloud_tpu({}, tmp_path)
    assert processes.on_cloud_tpu({"JAX_PLATFORMS": "tpu,cpu"}, tmp_path)
    assert not processes.on_cloud_tpu({"JAX_PLATFORMS": "cpu"}, tmp_path)
    (tmp_path / "vfio" / "0").unlink()
    (tmp_path / "accel0").touch()
    assert processes.on_cloud_tpu({}, tmp_path)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    assert not processes.on_cloud_tpu({}, tmp_path)


# ---------------------------------------------------------------- processes

PROGRAM = """
import os, signal, sys, time
from jaxmllm.machine import processes
mode = sys.argv[1]
print("source", processes.start(timeout=60), processes.start(), flush=True)
import jax
print("processes", jax.process_count(), flush=True)
me = jax.process_index()
for step in range(3000):
    time.sleep(0.05)
    if me == 1 and step == 5 and mode == "preempted":
        os.kill(os.getpid(), signal.SIGTERM)
    if me == 1 and step == 5 and mode == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if me == 0 and step == 5 and mode == "mistake":
        processes.leave(2)
    if processes.told_to_stop(step):
        print("stop", step, flush=True)
        processes.leave(75)
        sys.exit(75)
"""


def started(mode: str, count: int = 2) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, mode],
            env={**os.environ, "JAX_PLATFORMS": "cpu", **variables(address, count, number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(count)
    ]


def ends(started: list[subprocess.Popen], timeout: float) -> list[tuple[int, str]]:
    try:
        texts = [one.communicate(timeout=timeout)[0] for one in started]
    finally:
        for one in started:
            one.kill()
    return [(one.returncode, text) for one, text in zip(started, texts, strict=True)]


def test_sigterm_stops_all_at_the_same_update():
    (first, text0), (second, text1) = ends(started("preempted"), 240)
    assert (first, second) == (75, 75), text0 + text1
    for text in (text0, text1):
        assert "source explicit running" in text and "processes 2" in text
    assert re.findall(r"stop (\d+)", text0) == re.findall(r"stop (\d+)", text1) != []


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, statuses", [("killed", (-signal.SIGABRT, -signal.SIGKILL)), ("mistake", (2, -signal.SIGABRT))]
)
def test_a_lost_process_stops_the_others(mode, statuses):
    (first, text0), (second, text1) = ends(started(mode), 240)
    assert (first, second) == statuses, text0 + text1
    assert "another task died" in (text0 if mode == "killed" else text1)


def test_one_process_needs_nothing(monkeypatch):
    for name in [*processes.EXPLICIT, "SLURM_JOB_ID"]:
        monkeypatch.delenv(name, raising=False)
    assert processes.start() == "single"
    assert not processes.told_to_stop(0)
    processes.leave(2)  # returns


def test_unreachable_coordinator_is_named():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        code = "from jaxmllm.machine import processes; processes.start(timeout=4)"
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "JAX_PLATFORMS": "cpu", **variables(address, 2, 1)},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert ran.returncode == -signal.SIGABRT
    assert f"still waiting for the other processes after 2 s (explicit: {address})" in ran.stderr
