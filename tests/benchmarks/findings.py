"""Perception-R1's findings on the embedded model: every run that the table needs, several seeds each, against equal-compute SFT.

    python -m tests.benchmarks.findings FOLDER                    runs what FOLDER lacks; start it again any time
    python -m tests.benchmarks.findings FOLDER --only sft         one group (bccd, sft, few, matching, thinking, group, kl),
                                                                  or the cases whose names begin so
    python -m tests.benchmarks.findings FOLDER --jobs 2           two runs side by side, each on one core
    python -m tests.benchmarks.findings FOLDER --show             the table of what is there, from the runs' own evaluations

A run is `jaxmllm train` with the flags that are printed while it runs, in FOLDER/runs; its result is FOLDER/results/NAME.json
with the command, the figures before and after, and the processor time of its updates. One that was stopped goes on.

Worlds: grainy scenes (noise of 18 levels, as in configs/quickstart.py), which the embedded model has not seen. RL: 128 answers an
update (16 prompts x 8 unless the case says otherwise), rewards alone. SFT: gold answers for the same scenes, four questions a
picture, with the recipe that trained the embedded model at half its rate. Both arms start from the same weights and
have the tower frozen, and the numbers of updates are chosen for both to take about the same processor time, which the table
tells (in detection SFT gets two thirds of it). `few`: both learn from the same 64 pictures with one question each; SFT
is evaluated as it goes, and hardly moves after 40 of its 200 updates (1.4 of RL's time in grounding, .6 in counting).

The photographs (`bccd`) are blood cells in COCO JSON, ../shared/data/bccd unless BCCD names another folder; see configs/bccd.
"""

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxmllm.runfiles import read_lines

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1, 2)
QUICKSTART = "configs/quickstart.py"
SCENES = "size=84x84&objects=2-4&noise=18"
TASKS = {
    "grounding": f"world:grounding?{SCENES}",
    "counting": f"world:counting?{SCENES}",
    "detection": f"world:detection?{SCENES}",
    "ocr": "world:ocr?size=84x84&lines=1-2&words=1-1&font_sizes=14-18&noise=18",
}
RL_UPDATES = 60
VIEWS = "augment=10000"
BCCD = {"detection": ("configs/bccd/grpo.py", 380), "counting": ("configs/bccd/grpo_counting.py", 580)}
# SFT updates that take about the time of RL_UPDATES: .4 to .9 s each against .7 to 3 s
SFT_UPDATES = {"grounding": 130, "counting": 150, "detection": 150, "ocr": 130}
SFT_RATE = "5e-4"
QUESTIONS = 4  # of SFT about a picture, which they share
FEW = 64  # pictures of the arms that have no more
FEW_TASKS, FEW_UPDATES = ("grounding", "counting"), 200  # of their SFT
TOKENS = {"grounding": 32, "counting": 64, "detection": 96, "ocr": 32}  # of the longest answer, and to spare
THOUGHT = 16  # tokens more for the tags of a thinking format


@dataclasses.dataclass(frozen=True)
class Case:
    """One run for each seed, or with `once` of seed 0 alone. `after`: the case whose weights it starts from, of its own seed."""

    group: str
    config: str
    flags: tuple[str, ...]
    after: str = ""
    once: bool = False


# ---------------------------------------------------------------- cases


def world(task: str, tokens: int, options: str = "") -> tuple[str, ...]:
    source = TASKS[task]
    return (
        *("--data.train", f"{source}{options}&length=1000000", "--data.eval", f"{source}&split=val"),
        *("--data.eval_samples", "512", "--evaluation.max_new_tokens", str(tokens)),
    )


def rl(group: str, task: str, *flags: str, updates: int = RL_UPDATES, thought: int = 0, after: str = "") -> Case:
    tokens = TOKENS[task] + thought
    common = (*world(task, tokens), "--method.max_completion_length", str(tokens), "--max_steps", str(updates))
    return Case(group, QUICKSTART, (*common, *flags), after)


def sft(group: str, task: str, *flags: str, updates: int, thought: int = 0) -> Case:
    recipe = (
        *("--method", "sft", "--method.questions_per_image", str(QUESTIONS)),
        *("--method.first_corner_weight", "3", "--method.label_weight", "4"),
        *("--optim.learning_rate", SFT_RATE, "--optim.lr_scheduler_type", "linear", "--optim.warmup_steps", "10"),
    )
    common = (*world(task, TOKENS[task] + thought, f"&questions={QUESTIONS}"), "--max_steps", str(updates))
    return Case(group, QUICKSTART, (*common, *recipe, *flags))


def few(task: str) -> tuple[str, ...]:
    """Few pictures with one question each, again and again. After the flags of `world`: the last of a name counts."""
    return ("--data.train", f"{TASKS[task]}&length={FEW}")


def group_size(g: int) -> tuple[str, ...]:
    return ("--method.num_generations", str(g), "--batch_size", str(128 // g))


ONE_QUESTION = ("--method.questions_per_image", "1")  # of a picture; the last of a flag counts
CASES: dict[str, Case] = {
    **{f"{task}_rl": rl("sft", task) for task in TASKS},
    **{f"{task}_sft": sft("sft", task, updates=SFT_UPDATES[task]) for task in TASKS},
    # the paper's case: answers are few. SFT is evaluated as it goes, to see whether it should have stopped
    **{f"{task}_few_rl": rl("few", task, *few(task)) for task in FEW_TASKS},
    **{
        f"{task}_few_sft": sft("few", task, *few(task), *ONE_QUESTION, "--eval_steps", "20", updates=FEW_UPDATES)
        for task in FEW_TASKS
    },
    **{
        f"{task}_in_order": rl("matching", task, "--method.reward_matching", "order")
        for task in ("counting", "detection")
    },
    # the embedded model never wrote <think>: a short SFT teaches the form, with nothing in the thought, and the other arm the
    # same answers without it
    **{
        f"{task}_{name}": sft("thinking", task, *flags, updates=60, thought=THOUGHT)
        for task in ("grounding", "counting")
        for name, flags in (("taught", ()), ("taught_thinking", ("--data.thinking",)))
    },
    **{
        f"{task}_{name}_rl": rl("thinking", task, *flags, thought=THOUGHT, after=f"{task}_{name}")
        for task in ("grounding", "counting")
        for name, flags in (("taught", ()), ("taught_thinking", ("--data.thinking",)))
    },
    **{f"{task}_g{g}": rl("group", task, *group_size(g)) for task in ("grounding", "counting") for g in (2, 4, 16)},
    **{f"{task}_kl": rl("kl", task, "--method.beta", "0.04") for task in ("grounding", "counting")},
}


def photographs() -> dict[str, Case]:
    """Vision and first SFT are run once, the arms that start from them once for each seed, both on the same questions."""
    folder = os.environ.get("BCCD", "../shared/data/bccd")
    asked = {
        task: (cells(folder, "train", f"task={task}", VIEWS), cells(folder, "train", f"task={task}")) for task in BCCD
    }
    both = tuple(cells(folder, "train", f"task={task}", VIEWS) for task in BCCD)
    held_out = ("--data.eval", *(cells(folder, "val", f"task={task}") for task in asked))
    found = {
        "bccd_vision": Case(
            "bccd", "configs/bccd/vision.py", ("--data.train", cells(folder, "train", VIEWS)), once=True
        ),
        "bccd_sft": Case("bccd", "configs/bccd/sft.py", ("--data.train", *both, *held_out), "bccd_vision", once=True),
    }
    for task, (config, updates) in BCCD.items():
        data = ("--data.train", *asked[task], "--data.weights", "1", "1", *held_out)
        more = ("--max_steps", str(updates), "--optim.learning_rate", SFT_RATE)
        found[f"bccd_{task}_rl"] = Case("bccd", config, data, "bccd_sft")
        found[f"bccd_{task}_sft"] = Case("bccd", "configs/bccd/sft.py", (*data, *more), "bccd_sft")
    return found


def cells(folder: str, split: str, *options: str) -> str:
    return "&".join((f"coco:{folder}/{split}.json?order=left", *options))


# ---------------------------------------------------------------- runs


@dataclasses.dataclass(frozen=True)
class Job:
    name: str
    seed: int
    case: Case

    @property
    def key(self) -> str:
        return f"{self.name}_{self.seed}"

    @property
    def start(self) -> str:
        """Key of the run that it starts from; empty for none."""
        after = self.case.after
        return f"{after}_{0 if cases()[after].once else self.seed}" if after else ""

    def command(self, folder: Path) -> list[str]:
        start = ("--model", str(folder / "runs" / self.start / "export")) if self.start else ()
        return [
            *("jaxmllm", "train", self.case.config, "--name", self.key, "--output_dir", str(folder / "runs")),
            *("--seed", str(self.seed), *self.case.flags, *start),
            *("--logging_steps", "1", "--save_steps", "50", "--completions_steps", "1000", "--save_pictures", "0"),
            # the arms of one start share their figures before: seed 0 tells them
            *(("--no-eval_on_start",) if self.seed else ()),
            *(() if any(other.after == self.name for other in cases().values()) else ("--no-export",)),
        ]


def cases() -> dict[str, Case]:
    return photographs() | CASES


def jobs(only: str, seeds: Sequence[int]) -> Iterator[Job]:
    """Seed by seed, so that a table that is not full yet has whole rows; a run after those it starts from."""
    for seed in seeds:
        for name, case in cases().items():
            if (only == case.group or name.startswith(only)) and not (case.once and seed):
                yield Job(name, seed, case)


def train(job: Job, folder: Path, core: int, before: Sequence[str]) -> None:
    """Runs a job on one core and writes its result. Raises CalledProcessError."""
    line = job.command(folder)
    print(shlex.join(line), flush=True)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    with open(folder / "logs" / f"{job.key}.txt", "a") as log:
        subprocess.run(
            [*before, sys.executable, "-m", "jaxmllm.cli", *line[1:]],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
    run = folder / "runs" / job.key
    steps = [row["processor_time"] for row in read_lines(run / "metrics.jsonl") if "processor_time" in row]
    result = {
        "case": job.name,
        "seed": job.seed,
        "command": shlex.join(line),
        "updates": len(steps),
        # processor time, of the median update: the first ones compile, and other programs may slow a machine down
        "seconds": statistics.median(steps) * len(steps),
        **{path.parent.name: json.loads(path.read_text())["sources"] for path in run.glob("eval/*/metrics.json")},
    }
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / f"{job.key}.json").write_text(json.dumps(result, indent=1) + "\n")


def run_all(folder: Path, only: str, seeds: Sequence[int], workers: int, before: Sequence[str]) -> None:
    """Each worker takes the next job whose start is ready; one that fails is told and left."""
    waiting, running, lock = list(jobs(only, seeds)), set[str](), threading.Lock()
    cores = sorted(os.sched_getaffinity(0))

    def finished(key: str) -> bool:
        return (folder / "results" / f"{key}.json").exists()

    def take() -> Job | None:
        for job in waiting:
            if not job.case.after or finished(job.start):
                waiting.remove(job)
                return job
        return None

    def work(number: int) -> None:
        while True:
            with lock:
                waiting[:] = [job for job in waiting if not finished(job.key)]
                job = take()
                if job is None and not (waiting and running):
                    return  # what still waits has lost its start
                if job is not None:
                    running.add(job.key)
            if job is None:
                time.sleep(1)
                continue
            try:
                train(job, folder, cores[-1 - number % len(cores)], before)
            except subprocess.CalledProcessError as error:
                print(f"{job.key}: exit status {error.returncode}, see {folder}/logs/{job.key}.txt", flush=True)
            finally:
                with lock:
                    running.discard(job.key)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def results(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Results by case and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((folder / "results").glob("*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["case"], {})[result["seed"]] = result
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="group of cases, or how their names begin")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--before", default="", help="words put before each command, such as 'nice -n 5'")
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    folder = options.folder.absolute()
    if not options.show:
        run_all(folder, options.only, options.seeds, options.jobs, shlex.split(options.before))
    from tests.benchmarks.findings_table import table

    print(table(folder))


if __name__ == "__main__":
    main()
