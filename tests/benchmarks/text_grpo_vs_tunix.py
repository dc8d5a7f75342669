"""A GRPO step on text alone against google-tunix's GRPOLearner: same weights, prompts, reward, G and lengths, one run.

    python -m tests.benchmarks.text_grpo_vs_tunix --peer-python PEERS/bin/python [--prompt_tokens 64] [--save]

A Qwen2 decoder of 4 layers x 256 in float32, 2 prompts of 256 tokens, G 8, 32 new tokens, beta 0.04, AdamW with clipping,
everything trained. The vocabulary of 4,096 gives the embedding 26 % of the parameters, as in Qwen2.5-0.5B (27 %): one of
151,936 (`--vocabulary`) on so narrow a decoder would let the output layer decide, which tunix computes for prompts too. The
step is whole: completions are drawn, rewarded, scored under the reference, and the weights updated.

Both sides read one folder in Hugging Face's format, and before anything is timed they must give the same completions of the
same prompts the same mean log-probability. Neither can end a completion early. tunix runs as its documentation shows for one
host (vanilla rollout, whole batch as one microbatch, jitted), with a cache of just the length, no gradient accumulation and
no recomputation of activations; ours runs at its defaults. Most of the difference is the prompt, which we encode once for
its group and tunix once for each completion: it grows with `--prompt_tokens` over `--new_tokens`. `compiles` counts the
programs that were compiled in a measured step. PEERS is an environment with google-tunix.
"""

import dataclasses
import json
import string
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from tests.benchmarks.side_by_side import Side, all_versions, compare, options, peak_mib, ratios, report, serve

MODULE = "tests.benchmarks.text_grpo_vs_tunix"
COLUMNS = ("seconds", "processor", "rollout", "sampling", "update", "fastest", "slowest", "first", "compiles")
COLUMNS += ("imports_mib", "ready_mib", "peak_mib")
MARKER_IDS = 293  # of Qwen's vocabulary beyond its text: 151,936 - 151,643
TEMPLATE_TOKENS = 19  # <|im_start|>user\n ... <|im_end|>\n<|im_start|>assistant\n in the tokenizer of bytes
TOLERANCE = 1e-4  # nats a token


def text_ids(setup: dict) -> int:
    return setup["vocabulary"] - MARKER_IDS


def write(setup: dict) -> None:
    """Weights, tokenizer and questions. No end token: all completions have full length."""
    import jax

    from jaxmllm.model import family, hf
    from tests.benchmarks.peers_48m import MARKERS, write_tokenizer
    from tests.benchmarks.phases import architecture

    folder, first = Path(setup["folder"]), text_ids(setup)
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {f"vision_{end}_token_id": f"vision_{end}" for end in ("start", "end")}
    ids = {field: first + MARKERS.index(f"<|{name}|>") for field, name in names.items()}
    text = {"vocab_size": setup["vocabulary"], "num_hidden_layers": setup["layers"]}
    # the tower is never run: as small as the format allows
    tower = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=1, fullatt_block_indexes=(0,))
    cfg = architecture("48M", text=text, vision=tower, **ids)
    hf.save_params(family.init(jax.random.key(0), cfg), cfg, folder)
    write_tokenizer(folder, first, eos_token=None)
    letters, rng = np.array(list(string.ascii_lowercase)), np.random.default_rng(1)
    questions = rng.choice(letters, (setup["prompts"], setup["prompt_tokens"] - TEMPLATE_TOKENS))
    rows = [json.dumps({"id": str(k), "prompt": "".join(row)}) for k, row in enumerate(questions)]
    (folder / "chat.jsonl").write_text("\n".join(rows) + "\n")


def given_completions(setup: dict) -> np.ndarray:
    """[G, T] tokens to score on both sides."""
    shape = (setup["generations"], setup["new_tokens"])
    return np.random.default_rng(2).integers(0, text_ids(setup), shape).astype(np.int32)


def count_compilations() -> list[float]:
    """A list that grows with every program that jax compiles."""
    import jax

    seen: list[float] = []

    def note(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    return seen


# ---------------------------------------------------------------- ours


def ours(setup: dict) -> None:
    import jax.numpy as jnp

    from jaxmllm.model.logprobs import Sampling
    from jaxmllm.rollout.scorer import score_jit
    from jaxmllm.types import Completions
    from tests.benchmarks.grpo_vs_trl import config, whole_step
    from tests.benchmarks.running import Running

    imported, compiled = peak_mib(), count_compilations()
    plan = config(setup)
    run = Running(
        dataclasses.replace(
            plan, trainable=r"(?!vision/).*", method=dataclasses.replace(plan.method, loss_type=setup["loss"])
        )
    )

    def mean_logp() -> float:
        prompts = next(run.work.batches).prompts
        if (prompts.lengths != setup["prompt_tokens"]).any():
            raise SystemExit(f"prompts of {prompts.lengths} tokens, not {setup['prompt_tokens']}")
        tokens = jnp.broadcast_to(
            given_completions(setup), (len(prompts.lengths), setup["generations"], setup["new_tokens"])
        )
        lengths = jnp.full(tokens.shape[:2], setup["new_tokens"])
        completions = Completions(tokens, lengths, jnp.ones(tokens.shape))
        logps, _ = score_jit(run.state.params, run.context.cfg, prompts, completions, Sampling())
        return float(logps.mean())

    def step(case: dict) -> dict:
        if case.get("check"):
            return {"mean_logp": mean_logp()}
        before = len(compiled)
        return whole_step(run) | {"compiles": len(compiled) - before}

    serve(step, ("jax", "jaxlib", "flax"), imported)


# ---------------------------------------------------------------- tunix


def theirs(setup: dict) -> None:
    import jax
    import jax.numpy as jnp
    import optax
    import transformers
    from flax import nnx
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen2 import params as qwen2_params
    from tunix.rl import common, rl_cluster
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout.base_rollout import RolloutConfig

    from tests.benchmarks.peers_48m import checksum

    imported, compiled = peak_mib(), count_compilations()
    folder, rows = setup["folder"], setup["prompts"] * setup["generations"]
    raw = json.loads((Path(folder) / "config.json").read_text())
    text = raw | raw.get("text_config", {})
    sizes = qwen2.ModelConfig(
        num_layers=text["num_hidden_layers"],
        vocab_size=text["vocab_size"],
        embed_dim=text["hidden_size"],
        hidden_dim=text["intermediate_size"],
        num_heads=text["num_attention_heads"],
        head_dim=text["hidden_size"] // text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        rope_theta=1_000_000,
        norm_eps=text["rms_norm_eps"],
        use_tied_embedding=True,
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    actor, reference = (qwen2_params.create_model_from_safe_tensors(folder, sizes, mesh) for _ in range(2))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked = [json.loads(line)["prompt"] for line in (Path(folder) / "chat.jsonl").read_text().splitlines()]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": one}], tokenize=False, add_generation_prompt=True)
        for one in asked
    ]
    total = setup["prompt_tokens"] + setup["new_tokens"]
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role: mesh for role in (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE)}
            | {rl_cluster.Role.ROLLOUT: mesh},
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.chain(
                    optax.clip_by_global_norm(1.0), optax.adamw(setup["learning_rate"], weight_decay=0.0)
                ),
                eval_every_n_steps=setup["max_steps"],
                max_steps=setup["max_steps"],
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=setup["new_tokens"],
                max_prompt_length=setup["prompt_tokens"],
                kv_cache_size=total,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
                eos_tokens=[-1],
            ),
        ),
    )
    go, done = threading.Semaphore(0), threading.Semaphore(0)
    clock: dict[str, float] = {}
    failed: list[BaseException] = []
    ended = threading.Event()

    def batches():
        """One batch a request; being asked for the next one means that the step is over."""
        while go.acquire() and not ended.is_set():
            yield {"prompts": np.array(prompts)}
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
            done.release()

    class Timed(GRPOLearner):
        def _generate_and_compute_advantage(self, *arguments, **named):
            started = time.perf_counter()
            example = jax.block_until_ready(super()._generate_and_compute_advantage(*arguments, **named))
            clock["rollout"] = time.perf_counter() - started
            clock["length"] = float(example.completion_ids.shape[1])
            return example

    generate = cluster.generate

    def timed_generate(*arguments, **named):
        started = time.perf_counter()
        output = generate(*arguments, **named)
        clock["sampling"] = time.perf_counter() - started
        if {len(tokens) for tokens in output.tokens} != {setup["new_tokens"]} or len(output.tokens) != rows:
            raise SystemExit("tunix ended a completion early")
        return output

    cluster.generate = timed_generate

    def reward(prompts, completions, **_):
        rewards = [checksum(text) for text in completions]
        clock["reward"] = float(np.mean(rewards))
        return rewards

    algorithm = GRPOConfig(
        num_generations=setup["generations"], beta=setup["beta"], kl_loss_mode="low_var_kl", epsilon=0.2
    )
    learner = Timed(rl_cluster=cluster, reward_fns=reward, algo_config=algorithm)

    def train() -> None:
        try:
            learner.train(batches())
        except BaseException as error:  # the driver waits for an answer
            failed.append(error)
            done.release()
            raise

    training = threading.Thread(target=train, daemon=True)
    training.start()

    def mean_logp() -> float:
        ids = jnp.asarray([tokenizer.encode(prompt) for prompt in prompts])
        ids = jnp.repeat(ids, setup["generations"], axis=0)
        tokens = jnp.tile(given_completions(setup), (setup["prompts"], 1))
        graph, state = nnx.split(actor)
        logps = common.compute_per_token_logps(graph, state, ids, tokens, pad_id=-1, eos_id=-1)
        return float(logps.mean())

    def step(case: dict) -> dict:
        if case.get("check"):
            return {"mean_logp": mean_logp()}
        started, before = time.perf_counter(), len(compiled)
        go.release()
        done.acquire()
        if failed:
            raise SystemExit(f"tunix: {failed[0]!r}")
        update = time.perf_counter() - started - clock["rollout"]
        return clock | {"update": update, "compiles": len(compiled) - before}

    serve(step, ("google-tunix", "qwix", "transformers"), imported)
    ended.set()  # its worker thread waits for the next batch, and the process would wait for the thread
    go.release()
    training.join()


# ---------------------------------------------------------------- driver


def clock(args) -> None:
    names = ("prompts", "prompt_tokens", "generations", "new_tokens", "beta", "vocabulary", "layers", "unroll", "remat")
    with tempfile.TemporaryDirectory() as folder:
        setup = {name: getattr(args, name) for name in names} | {"learning_rate": 1e-6, "loss": "grpo", "seed": 0}
        settings = setup | {"repeats": args.repeats, "warmup": args.warmup}
        setup |= dict(folder=folder, model=folder, data=f"chat:{folder}/chat.jsonl", max_steps=10_000)
        setup |= dict(reward="tests.benchmarks.peers_48m:checksum")
        subprocess.run([sys.executable, "-m", MODULE, "--serve", "write", json.dumps(setup)], check=True)
        sides = [
            Side("jaxmllm", MODULE, "ours", json.dumps(setup)),
            Side("tunix", MODULE, "theirs", json.dumps(setup), python=args.peer_python),
        ]
        found = [side.call({"check": True})["mean_logp"] for side in sides]
        if abs(found[0] - found[1]) > TOLERANCE:
            raise SystemExit(f"the sides are not the same model: mean log-probabilities {found}")
        rows = compare(sides, {}, args.repeats, args.warmup)
        for side in sides:
            side.close()
    if any(row["length"] != args.new_tokens for row in rows.values()):
        raise SystemExit(f"lengths are not {args.new_tokens}: {rows}")
    summary = ratios(rows, "jaxmllm", "tunix") | {"mean log-probability, ours": found[0], "tunix's": found[1]}
    plain = args.prompt_tokens == 256 and args.vocabulary == 4096
    name = "text_grpo_vs_tunix" + ("" if plain else f"_prompt{args.prompt_tokens}_vocabulary{args.vocabulary}")
    report(name, rows, COLUMNS, all_versions(sides), settings, summary, args.save)


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(warmup=2)  # tunix's second step still compiles a program
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--prompt_tokens", type=int, default=256, help="of a prompt, its template included")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--beta", type=float, default=0.04)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--unroll", action="store_true", help="our layer loop unrolled, as tunix's is")
    parser.add_argument("--remat", default="none", help="what our backward pass recomputes; tunix recomputes nothing")
    args = parser.parse_args()
    if args.serve:
        {"write": write, "ours": ours, "theirs": theirs}[args.serve[0]](json.loads(args.serve[1]))
    else:
        clock(args)


if __name__ == "__main__":
    main()
