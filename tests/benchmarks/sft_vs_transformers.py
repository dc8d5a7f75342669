"""A supervised step on pictures against transformers: same weights, pictures, questions and answers, one run.

    python -m tests.benchmarks.sft_vs_transformers [--questions 1 8] [--answer 32] [--save]

48M configuration, 2 pictures with so many questions each; forward, cross-entropy, backward and AdamW over all weights, in
float32. transformers gets a row of its own for every question, picture included, as its data collators make them; no row
is padded. Needs the `parity` extra.
"""

import json
import tempfile
from pathlib import Path

from tests.benchmarks.side_by_side import Side, all_versions, compare, options, peak_mib, ratios, report, serve

MODULE = "tests.benchmarks.sft_vs_transformers"
COLUMNS = (
    "seconds",
    "processor",
    "fastest",
    "slowest",
    "first",
    "tokens/s",
    "loss",
    "imports_mib",
    "ready_mib",
    "peak_mib",
)
LEARNING_RATE = 1e-5


def answers(setup: dict):
    """[pictures, questions, tokens] ids of the answers, the same for both sides."""
    import numpy as np

    rng = np.random.default_rng(2)
    return rng.integers(1000, 50000, (setup["prompts"], setup["questions"], setup["answer"]))


def ours(setup: dict) -> None:
    import jax
    import jax.numpy as jnp

    from jaxmllm.methods.optim import make_optimizer
    from jaxmllm.methods.sft import sft_step
    from jaxmllm.methods.update import Update
    from jaxmllm.model import hf
    from jaxmllm.model.family import load_model_config
    from jaxmllm.training.config import OptimConfig
    from jaxmllm.types import Completions, TrainState
    from tests.benchmarks.peers_48m import jax_prompts

    imported = peak_mib()
    folder = Path(setup["folder"])
    cfg = load_model_config(folder)
    params, prompts = hf.load_params(folder, cfg), jax_prompts(folder)
    tx = make_optimizer(OptimConfig(learning_rate=LEARNING_RATE, lr_scheduler_type="constant"), 1)
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(tx.init)(params))
    state = jax.device_put(
        state, jax.devices()[0]
    )  # where an update leaves it: otherwise the second call is another program
    del params  # the state's, and donated with it
    update = Update(cfg, tx, ".*")
    ids = jnp.asarray(answers(setup), jnp.int32)
    completions = Completions(ids, jnp.full(ids.shape[:2], ids.shape[2]), jnp.ones(ids.shape))

    def step(case: dict) -> dict:
        nonlocal state
        state, metrics = sft_step(state, prompts, completions, update=update)
        return {"loss": float(metrics["loss"])}

    serve(step, ("jax", "flax", "optax"), imported)


def theirs(setup: dict) -> None:
    import numpy as np
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    imported = peak_mib()
    folder = Path(setup["folder"])
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    raw, target, q = np.load(folder / "inputs.npz"), answers(setup), setup["questions"]
    ids = np.concatenate([raw["ids"].repeat(q, 0), target.reshape(-1, target.shape[-1])], axis=1)
    labels = ids.copy()
    labels[:, : raw["ids"].shape[1]] = -100
    inputs = dict(
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        attention_mask=torch.ones(ids.shape, dtype=torch.long),
        mm_token_type_ids=torch.tensor(ids == 151655, dtype=torch.int32),
        pixel_values=torch.tensor(raw["pixels"].repeat(q, 0).reshape(-1, raw["pixels"].shape[-1])),
        image_grid_thw=torch.tensor(raw["grids"].repeat(q, 0)),
    )

    def step(case: dict) -> dict:
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": float(loss)}

    serve(step, ("torch", "transformers"), imported)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--prompts", type=int, default=2, help="pictures")
    parser.add_argument("--side", type=int, default=448, help="of a picture, pixels")
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 8], help="of each picture; a comparison each")
    parser.add_argument("--answer", type=int, default=32, help="tokens")
    args = parser.parse_args()
    if args.serve:
        {"ours": ours, "theirs": theirs}[args.serve[0]](json.loads(args.serve[1]))
        return
    from tests.benchmarks import peers_48m

    rows, summary = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        peers_48m.make(folder, args.prompts, args.side)
        for questions in args.questions:
            setup = dict(folder=folder, prompts=args.prompts, questions=questions, answer=args.answer)
            sides = [
                Side("jaxmllm", MODULE, "ours", json.dumps(setup)),
                Side("transformers", MODULE, "theirs", json.dumps(setup), python=args.peer_python),
            ]
            found = compare(sides, {}, args.repeats, args.warmup)
            for side in sides:
                side.close()
            for row in found.values():
                row["tokens/s"] = args.prompts * questions * args.answer / row["seconds"]
            a, b = (row["loss"] for row in found.values())
            if abs(a - b) > 0.01 * abs(b):
                raise SystemExit(f"the sides compute another loss: {a} and {b}")
            rows |= {f"{name}, {questions} q": row for name, row in found.items()}
            summary |= {f"{questions} q, {k}": v for k, v in ratios(found, "jaxmllm", "transformers").items()}
    settings = dict(prompts=args.prompts, side=args.side, answer=args.answer, repeats=args.repeats)
    report("sft_vs_transformers", rows, COLUMNS, all_versions(sides), settings, summary, args.save)


if __name__ == "__main__":
    main()
