"""Learning curves of GRPO against TRL's GRPOTrainer: the embedded model learns to count, three seeds on each side.

    python -m tests.benchmarks.curve_vs_trl --peer-python PEERS/bin/python [--out runs/curve_vs_trl] [--save]

Both sides start from the embedded model and see the same grainy pictures and prompts in the same order (checked token by
token), the same reward function, G, learning rate, beta, loss type, clipping and number of updates; only the random numbers
of sampling differ. Per window of updates it prints the mean reward of each side with its standard error over seeds.

The curves agree within seed noise if no window's difference is significant: two-sided t-test of the seeds' means, variances
pooled over both sides and all windows, 5 % shared among the windows (Bonferroni). `allowed` is the difference that would
just be significant, so it also says what the comparison could have seen.

Every finished seed is a file in --out, and a run goes on with what is there. About ten minutes on two idle cores. With
--save the table goes to tests/benchmarks/results, with a picture of the curves. Needs the `peers` extra.
"""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.side_by_side import RESULTS, Side, options, peak_mib, report, serve

MODULE = "tests.benchmarks.curve_vs_trl"
SOURCE = "world:counting?size=84x84&objects=2-4&noise=18&length=1000000"
SIDES = ("jaxmllm", "trl")
COLUMNS = ("jaxmllm", "error", "trl", "trl's error", "difference", "allowed")
LEVEL = 0.05


def reward(text: str, record: dict[str, Any]) -> float:
    """Of both sides: the library's reward of a counting answer."""
    from jaxmllm.tasks import counting

    return counting.reward(text, record)["reward"]


def config(setup: dict):
    """Our run of `setup`."""
    from jaxmllm.training.config import OptimConfig
    from tests.benchmarks import grpo_vs_trl

    base = grpo_vs_trl.config(setup)
    optim = OptimConfig(learning_rate=setup["learning_rate"], lr_scheduler_type="constant")
    return dataclasses.replace(base, optim=optim, grpo=dataclasses.replace(base.grpo, loss_type=setup["loss_type"]))


def write(setup: dict) -> None:
    """Checkpoint for transformers, and all prompts of the seed in the order in which our run takes them."""
    from PIL import Image

    from jaxmllm import api
    from tests.benchmarks.peers_48m import write_preprocessors
    from tests.benchmarks.running import Running

    folder = Path(setup["folder"])
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(api.TINY, folder)
    kept = ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels")
    sizes = json.loads((folder / "preprocessor_config.json").read_text())
    write_preprocessors(folder, {name: sizes[name] for name in kept})
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    (folder / "chat_template.jinja").write_text(template)
    run = Running(config(setup))
    rows = []
    for _ in range(setup["max_steps"]):
        batch = next(run.work.batches)
        for record, tokens, n in zip(batch.records, batch.prompts.tokens, batch.prompts.lengths, strict=True):
            (turn,) = run.context.asking.conversation(record)
            picture, question = turn["content"]
            assert picture["type"] == "image", turn
            path = folder / f"{len(rows)}.png"
            Image.fromarray(record["images"][0]).save(path)
            known = {name: value for name, value in record.items() if name != "images"}
            row = {"question": question["text"], "image": path.name, "record": known, "tokens": tokens[:n].tolist()}
            rows.append(json.dumps(row, default=lambda x: x.tolist()))
    run.close()
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")


# ---------------------------------------------------------------- the sides


def ours(setup: dict) -> None:
    from tests.benchmarks.running import Running

    imported = peak_mib()

    def run(case: dict) -> dict:
        run = Running(config(setup))
        rows = [run.step() for _ in range(setup["max_steps"])]
        run.close()
        return {name: [row[name] for row in rows] for name in ("reward", "kl", "completions/mean_length")}

    serve(run, ("jax", "jaxlib", "flax"), imported)


def theirs(setup: dict) -> None:
    from tests.benchmarks.grpo_vs_trl import import_torchvision

    import_torchvision()
    import datasets
    from PIL import Image
    from transformers import AutoProcessor, PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    imported, folder = peak_mib(), Path(setup["folder"])
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    processor = AutoProcessor.from_pretrained(folder)

    def same_prompt(row: dict) -> None:
        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        found = processor(text=[text], images=[Image.open(folder / row["image"])])["input_ids"][0]
        if list(found) != row["tokens"]:
            raise SystemExit(f"{row['image']}: the sides' prompts differ: {list(found)}, {row['tokens']}")

    def judge(completion_ids, record, **_):
        ends = set(trainer.eos_token_ids)
        spoken = [ids[:-1] if ids and ids[-1] in ends else ids for ids in completion_ids]
        texts = processor.batch_decode(spoken, skip_special_tokens=False)
        return [reward(text, json.loads(one)) for text, one in zip(texts, record, strict=True)]

    for row in rows:
        same_prompt(row)
    table = datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "image": str(folder / row["image"]),
                "record": json.dumps(row["record"]),
            }
            for row in rows
        ]
    ).cast_column("image", datasets.Image())
    args = GRPOConfig(
        output_dir=str(folder / "trl"),
        seed=setup["seed"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=setup["prompts"] * setup["generations"],
        num_generations=setup["generations"],
        max_completion_length=setup["new_tokens"],
        temperature=1.0,
        top_k=0,
        beta=setup["beta"],
        loss_type=setup["loss_type"],
        learning_rate=setup["learning_rate"],
        lr_scheduler_type="constant",
        max_steps=setup["max_steps"],
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(setup["model"], judge, args, table, processing_class=processor)
    trainer.remove_callback(PrinterCallback)

    def run(case: dict) -> dict:
        trainer.train()
        logged = [row for row in trainer.state.log_history if "reward" in row]
        return {name: [row[name] for row in logged] for name in ("reward", "kl", "completions/mean_length")}

    serve(run, ("trl", "transformers", "torch", "torchvision"), imported)


# ---------------------------------------------------------------- comparison


def windows(curves: list[list[float]], width: int) -> np.ndarray:
    """Means [seeds, windows] of whole windows of `width` updates."""
    table = np.asarray(curves, np.float64)
    count = table.shape[1] // width
    return table[:, : count * width].reshape(len(table), count, width).mean(-1)


def agreement(ours: np.ndarray, theirs: np.ndarray) -> tuple[list[dict[str, float]], bool]:
    """A row a window, and whether the curves [seeds, windows] agree; see the head of the file."""
    from scipy import stats

    n, count = ours.shape
    pooled = math.sqrt((ours.var(0, ddof=1) + theirs.var(0, ddof=1)).mean() / 2)
    freedom = 2 * (n - 1)  # of one window: neighbouring windows of a seed are not independent
    allowed = float(stats.t.ppf(1 - LEVEL / 2 / count, freedom)) * pooled * math.sqrt(2 / n)
    errors = [table.std(0, ddof=1) / math.sqrt(n) for table in (ours, theirs)]
    columns = (ours.mean(0), errors[0], theirs.mean(0), errors[1], ours.mean(0) - theirs.mean(0))
    rows = [dict(zip(COLUMNS, [*map(float, values), allowed], strict=True)) for values in zip(*columns, strict=True)]
    return rows, all(abs(row["difference"]) <= allowed for row in rows)


def draw(curves: dict[str, list[list[float]]], width: int, path: Path) -> None:
    """Window means of each side with their standard error, every seed thin."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for (side, seeds), colour in zip(curves.items(), ("#2563eb", "#d97706"), strict=True):
        table = windows(seeds, width)
        centres = (np.arange(table.shape[1]) + 0.5) * width
        mean, error = table.mean(0), table.std(0, ddof=1) / math.sqrt(len(table))
        axes.plot(centres, table.T, color=colour, linewidth=0.7, alpha=0.4)
        axes.plot(centres, mean, color=colour, linewidth=2, label=side)
        axes.fill_between(centres, mean - error, mean + error, color=colour, alpha=0.2)
    axes.set(xlabel="update", ylabel="mean reward", title=f"Counting, {len(table)} seeds, windows of {width} updates")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------- driver


def train(setup: dict, side: str, python: str) -> dict[str, Any]:
    """The curves of a side and seed: from its file, or trained and written there."""
    path = Path(setup["folder"]).parent / f"{side}_{setup['seed']}.json"
    if not path.exists():
        if not (Path(setup["folder"]) / "prompts.jsonl").exists():
            subprocess.run([sys.executable, "-m", MODULE, "--serve", "write", json.dumps(setup)], check=True)
        function = "ours" if side == "jaxmllm" else "theirs"
        running = Side(side, MODULE, function, json.dumps(setup), python=python)
        found = running.call({}) | {"versions": running.versions}
        running.close()
        if len(found["reward"]) != setup["max_steps"]:
            raise SystemExit(f"{side}: {len(found['reward'])} updates, not {setup['max_steps']}")
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(found))
        temporary.replace(path)
    found = json.loads(path.read_text())
    print(f"{side}, seed {setup['seed']}: {found['seconds']:.0f} s, last reward {found['reward'][-1]:.3f}", flush=True)
    return found


def compare(args) -> None:
    out = Path(args.out).absolute()
    names = ("prompts", "generations", "new_tokens", "max_steps", "beta", "learning_rate", "loss_type")
    settings = {name: getattr(args, name) for name in names} | {"source": SOURCE}
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        raise SystemExit(f"{out} holds curves of other settings: choose another --out")
    kept.write_text(json.dumps(settings))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "compiled"))  # seeds share their programs
    found: dict[str, list[dict]] = {side: [] for side in SIDES}
    for seed in range(args.seeds):
        folder = str(out / f"seed{seed}")
        setup = settings | dict(seed=seed, folder=folder, model=folder, data=SOURCE, unroll=True, remat="none")
        setup |= dict(reward=f"{MODULE}:reward")
        for side, python in zip(SIDES, (sys.executable, args.peer_python), strict=True):
            found[side].append(train(setup, side, python))
    curves = {side: [one["reward"] for one in seeds] for side, seeds in found.items()}
    tables = [windows(curves[side], args.window) for side in SIDES]
    compared, agree = agreement(*tables)
    rows = {f"updates {k * args.window + 1}-{(k + 1) * args.window}": row for k, row in enumerate(compared)}
    summary: dict[str, Any] = {
        f"rise of {s}": float((t[:, -1] - t[:, 0]).mean()) for s, t in zip(SIDES, tables, strict=True)
    }
    summary |= {f"seconds of {side}": sum(one["seconds"] for one in seeds) for side, seeds in found.items()}
    summary["verdict"] = "the curves agree within seed noise" if agree else "the curves differ by more than seed noise"
    used = {name: version for seeds in found.values() for name, version in seeds[0]["versions"].items()}
    settings |= {"seeds": args.seeds, "window": args.window, "curves": curves}
    report("curve_vs_trl", rows, COLUMNS, used, settings, summary, args.save)
    if args.save:
        draw(curves, args.window, RESULTS / "curve_vs_trl.png")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--out", default="runs/curve_vs_trl", help="folder of finished seeds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--window", type=int, default=10, help="updates averaged")
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=8, help="an update")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--beta", type=float, default=0.04)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--loss_type", default="dapo")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds: noise between seeds needs at least two")
    if args.serve:
        {"write": write, "ours": ours, "theirs": theirs}[args.serve[0]](json.loads(args.serve[1]))
    else:
        compare(args)


if __name__ == "__main__":
    main()
