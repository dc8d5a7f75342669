"""A GRPO step on pictures against TRL's GRPOTrainer: same weights, pictures, prompts, reward, G and lengths, one run.

    python -m tests.benchmarks.grpo_vs_trl --peer-python PEERS/bin/python [--save]

48M configuration, 2 prompts of one 448 px image, G 8, 32 new tokens, beta 0.04, AdamW, everything trained. The step is
whole: pictures are read and prepared, completions drawn, rewarded, scored under the reference, and the weights updated.
Random weights write an end token about once in 100,000 tokens, so all completions have full length; that is checked.
Needs the `peers` extra; PEERS may be another environment.
"""

import json
import tempfile
import threading
import time
from pathlib import Path

from tests.benchmarks.side_by_side import Side, all_versions, compare, options, peak_mib, ratios, report, serve

MODULE = "tests.benchmarks.grpo_vs_trl"
COLUMNS = (
    "seconds",
    "processor",
    "rollout",
    "update",
    "fastest",
    "slowest",
    "first",
    "imports_mib",
    "ready_mib",
    "peak_mib",
)


# ---------------------------------------------------------------- ours


def config(setup: dict):
    """The run of `setup`."""
    from jaxmllm.methods import GRPO
    from jaxmllm.training.config import DataConfig, OptimConfig, TrainConfig

    return TrainConfig(
        name="benchmark",
        model=setup["model"],
        seed=setup["seed"],
        batch_size=setup["prompts"],
        max_steps=setup["max_steps"],
        unroll=setup["unroll"],
        remat=setup["remat"],
        data=DataConfig(train=(setup["data"],)),
        optim=OptimConfig(learning_rate=setup["learning_rate"], lr_scheduler_type="constant"),
        method=GRPO(
            num_generations=setup["generations"],
            max_completion_length=setup["new_tokens"],
            beta=setup["beta"],
            reward_funcs=(setup["reward"],),
            reward_processes=0,
        ),
    )


def whole_step(run) -> dict[str, float]:
    """One GRPO step of `run`: seconds of its parts (`rollout` is all but the update), mean length and mean reward."""
    metrics = run.step()
    update, sampling = metrics["seconds/update"], metrics["seconds/sample"]
    spent = sum(value for name, value in metrics.items() if name.startswith("seconds/"))
    length, reward = metrics["completions/mean_length"], metrics["reward"]
    return {"rollout": spent - update, "sampling": sampling, "update": update, "length": length, "reward": reward}


def ours(setup: dict) -> None:
    from tests.benchmarks.running import Running

    imported = peak_mib()
    run = Running(config(setup))
    serve(lambda case: whole_step(run), ("jax", "flax"), imported)


# ---------------------------------------------------------------- TRL


def import_torchvision() -> None:
    """torchvision's wheel has CUDA kernels, which do not load beside a CPU build of torch; preprocessing needs none."""
    from unittest import mock

    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        with (
            mock.patch("torch.library.register_fake", lambda name: lambda function: function),
            mock.patch("torch.library.Library.impl"),
        ):
            import torchvision  # noqa: F401
    assert torch


def records(setup: dict) -> list[dict]:
    """TRL's columns, in the order in which our run takes its records."""
    from PIL import Image

    folder = Path(setup["folder"])
    rows = [json.loads(line) for line in (folder / "chat.jsonl").read_text().splitlines()]
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "image": Image.open(folder / row["image"]).convert("RGB"),
        }
        for row in rows
    ]


def theirs(setup: dict) -> None:
    import_torchvision()
    import datasets
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from tests.benchmarks.peers_48m import checksum

    imported = peak_mib()
    go, done = threading.Semaphore(0), threading.Semaphore(0)
    clock: dict[str, float] = {}

    class Stepwise(TrainerCallback):
        """Lets the trainer's own loop take one step a request."""

        def on_step_begin(self, *_, **__):
            go.acquire()

        def on_step_end(self, *_, **__):
            seen = trainer._metrics["train"]
            clock.update(length=seen["completions/mean_length"][-1], reward=seen["reward"][-1])
            done.release()

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            started = time.perf_counter()
            output = super()._generate_and_score_completions(inputs)
            clock["rollout"] = time.perf_counter() - started
            return output

    def reward(completions, **_):
        texts = [completion[0]["content"] for completion in completions]
        return [checksum(text) for text in texts]

    new_tokens = setup["new_tokens"]
    args = GRPOConfig(
        output_dir=str(Path(setup["folder"]) / "trl"),
        seed=setup["seed"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=setup["checkpointing"],
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=setup["prompts"] * setup["generations"],
        num_generations=setup["generations"],
        max_completion_length=new_tokens,
        beta=setup["beta"],
        learning_rate=setup["learning_rate"],
        lr_scheduler_type="constant",
        max_steps=setup["max_steps"],
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    data = datasets.Dataset.from_list(records(setup)).cast_column("image", datasets.Image())
    trainer = Timed(setup["model"], reward, args, data, callbacks=[Stepwise()])
    threading.Thread(target=trainer.train, daemon=True).start()

    def step(case: dict) -> dict:
        started = time.perf_counter()
        go.release()
        done.acquire()
        return clock | {"update": time.perf_counter() - started - clock["rollout"]}

    serve(step, ("trl", "transformers", "torch", "torchvision"), imported)


# ---------------------------------------------------------------- driver


def clock(args) -> None:
    from tests.benchmarks import peers_48m

    with tempfile.TemporaryDirectory() as folder:
        peers_48m.make(folder, args.prompts, args.side)
        setup = dict(folder=folder, model=folder, data=f"chat:{folder}/chat.jsonl", seed=0, prompts=args.prompts)
        setup |= dict(generations=args.generations, new_tokens=args.new_tokens, beta=args.beta, learning_rate=1e-6)
        setup |= dict(
            max_steps=10_000, unroll=args.unroll, remat=args.remat, reward="tests.benchmarks.peers_48m:checksum"
        )
        setup |= dict(checkpointing=not args.no_checkpointing)
        sides = [
            Side("jaxmllm", MODULE, "ours", json.dumps(setup)),
            Side("trl", MODULE, "theirs", json.dumps(setup), python=args.peer_python),
        ]
        rows = compare(sides, {}, args.repeats, args.warmup)
        for side in sides:
            side.close()
    if any(row["length"] != args.new_tokens for row in rows.values()):
        raise SystemExit(f"lengths are not {args.new_tokens}: {rows}")
    settings = {name: value for name, value in setup.items() if name not in ("folder", "model", "data")}
    summary = ratios(rows, "jaxmllm", "trl")
    report("grpo_vs_trl", rows, COLUMNS, all_versions(sides), settings | {"side": args.side}, summary, args.save)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--side", type=int, default=448, help="of the image, pixels")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--beta", type=float, default=0.04)
    parser.add_argument("--unroll", action="store_true", help="our layer loop unrolled")
    parser.add_argument(
        "--remat", default="full", help="what our backward pass recomputes; TRL checkpoints its layers too"
    )
    parser.add_argument("--no_checkpointing", action="store_true", help="TRL without its gradient checkpointing")
    args = parser.parse_args()
    if args.serve:
        {"ours": ours, "theirs": theirs}[args.serve[0]](json.loads(args.serve[1]))
    else:
        clock(args)


if __name__ == "__main__":
    main()
