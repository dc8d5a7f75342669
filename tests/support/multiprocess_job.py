"""One process of a run of several: a few GRPO updates of a small model, its numbers written where the test finds them.

    python -m tests.support.multiprocess_job FOLDER '{"max_steps": 5, "mesh": {"fsdp": 4, "tensor": 2}}'

The processes find each other by JAX_COORDINATOR_ADDRESS and its companions. Exit statuses are the command's.
"""

import dataclasses
import json
import sys
from pathlib import Path

from jaxmllm.machine import processes
from jaxmllm.methods import GRPO
from jaxmllm.training.config import DataConfig, MeshConfig, OptimConfig, TrainConfig

SCENES = "size=56x56&objects=2-3"


def reward(text: str, record) -> dict[str, float]:
    """Differs between the completions of any model."""
    total = sum(text.encode()) % 101 / 100
    return {"reward": total, "length": float(len(text))}


def config(folder: str | Path, **changes) -> TrainConfig:
    base = TrainConfig(
        name="run",
        output_dir=str(folder),
        batch_size=8,
        max_steps=5,
        data=DataConfig(train=(f"world:grounding?{SCENES}&length=512",), workers=1),
        # a large epsilon: with the usual one Adam turns the rounding of a gradient near 0 into a whole step
        optim=OptimConfig(learning_rate=1e-3, lr_scheduler_type="constant", adam_epsilon=1e-3),
        method=GRPO(
            num_generations=2,
            max_completion_length=6,
            beta=0.04,
            scale_rewards="batch",
            reward_funcs=("tests.support.multiprocess_job:reward",),
            reward_processes=0,
        ),
        save_steps=1000,
        export=False,
        completions_steps=1000,
    )
    for name in ("mesh", "sample_mesh"):
        if isinstance(changes.get(name), dict):
            changes[name] = MeshConfig(**changes[name])
    changes = {**changes}
    options = changes.pop("method", {})
    return dataclasses.replace(base, method=dataclasses.replace(base.method, **options), **changes)


def records(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def main(folder: Path, changes: dict) -> int:
    import jax
    import numpy as np

    from jaxmllm.methods.grpo import arrange, method, step
    from jaxmllm.rollout import sampler
    from jaxmllm.training import loop, setup
    from jaxmllm.training.checkpoint import Checkpoints

    pause, uneven = changes.pop("pause", 0.0), changes.pop("uneven", False)
    if uneven:  # what is done for completions of several lengths, for those that a test can wait for
        sampler.WORTH, arrange.LONG = 1, 16
        changes["method"] = {"max_completion_length": 16}
    draw = method.GRPOWork.draw

    def noted(self, state, batch, clock):
        """Which records each update saw, by process."""
        import time

        time.sleep(pause)
        found = processes.from_all([batch.step, [record["id"] for record in batch.records]])
        if jax.process_index() == 0:
            with open(folder / "records.jsonl", "a") as file:
                file.write(json.dumps([int(state.step), sorted({tuple(ids) for _, ids in found})]) + "\n")
        return draw(self, state, batch, clock)

    method.GRPOWork.draw = noted
    asked = config(folder, **changes)
    loop.train(asked)
    assert uneven or step.grpo_step._cache_size() == 1, "an update came back in another layout than it took"
    # whole in every process, so that the first can write it
    context, like = setup.build(asked)
    last, _, _ = Checkpoints(asked.run_dir / "checkpoints").restore(like)
    whole = jax.sharding.NamedSharding(context.mesh, jax.sharding.PartitionSpec())
    state = jax.jit(lambda x: x, out_shardings=whole)(last.params)
    if jax.process_index() == 0:
        leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        np.savez(folder / "params.npz", **leaves)
    return 0


if __name__ == "__main__":
    from jaxmllm.training.loop import Interrupted

    processes.start(timeout=120)
    with processes.leaving_together():
        try:
            status = main(Path(sys.argv[1]), json.loads(sys.argv[2]))
        except Interrupted as stopped:
            print(stopped, flush=True)
            status = 75
    sys.exit(status)
