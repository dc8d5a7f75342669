"""Compile time against depth: 36 layers (and 36 tower blocks) against 4, layers run by a scan.

    python -m tests.benchmarks.compile_time [--repeats 3]

Every program is traced and compiled for shapes alone, in this process, after a warm-up of the compiler. Processor time, not
the clock's: other work on the machine does not count. Prints both depths and their ratio, which should be at most 1.5.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp

from jaxmllm.model import hf
from jaxmllm.model.config import ModelConfig
from jaxmllm.model.logprobs import Sampling
from jaxmllm.rollout import sampler
from jaxmllm.rollout.scorer import score
from tests.support import tiny

DEPTHS = (4, 36)


def deep(layers: int) -> ModelConfig:
    """The tests' tiny model with more layers; in the tower every fourth block attends over the whole frame."""
    cfg = tiny.config(remat="full")
    vision = dataclasses.replace(cfg.vision, depth=layers, fullatt_block_indexes=tuple(range(3, layers, 4)))
    return dataclasses.replace(cfg, vision=vision, text=dataclasses.replace(cfg.text, num_hidden_layers=layers))


def programs(cfg: ModelConfig) -> dict:
    """Name -> a function that traces and compiles it anew."""
    params = hf.abstract_params(cfg)
    prompts, completions = tiny.prompts(cfg), tiny.completions(4, 2, 8)
    keys = sampler.row_keys(jax.random.key(0), jnp.arange(4), 2)
    sampling = Sampling(banned=cfg.vision_token_ids)
    options = dict(num_generations=2, max_new_tokens=8, stop_ids=(0,), pad_id=0)

    def loss(params):
        logps, _ = score(params, cfg, prompts, completions, sampling)
        return -jnp.sum(logps * completions.weights)

    def start(params):
        return sampler.start.__wrapped__(params, cfg, prompts, keys, sampling, **options)

    state = jax.eval_shape(start, params)

    def advance(params, state):
        return sampler.advance.__wrapped__(params, cfg, state, jnp.asarray(8), sampling, (0,))

    return {
        "forward": lambda: jax.jit(lambda p: loss(p)).lower(params).compile(),
        "forward and backward": lambda: jax.jit(jax.grad(loss)).lower(params).compile(),
        "sampler: prefill": lambda: jax.jit(lambda p: start(p)).lower(params).compile(),
        "sampler: decode": lambda: jax.jit(lambda p, s: advance(p, s)).lower(params, state).compile(),
    }


def measure(repeats: int) -> dict[str, dict[int, float]]:
    """Program -> depth -> median seconds of processor time."""
    table = {layers: programs(deep(layers)) for layers in DEPTHS}
    found: dict = {}
    for name in table[DEPTHS[0]]:
        table[DEPTHS[0]][name]()  # warm-up
        seconds: dict[int, list[float]] = {layers: [] for layers in DEPTHS}
        for _ in range(repeats):
            for layers in DEPTHS:
                jax.clear_caches()
                started = time.process_time()
                table[layers][name]()
                seconds[layers].append(time.process_time() - started)
        found[name] = {layers: statistics.median(times) for layers, times in seconds.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    found = measure(parser.parse_args().repeats)
    print(f"jax {jax.__version__}, {jax.default_backend()}")
    print(f"{'':22}" + "".join(f"{f'{layers} layers':>12}" for layers in DEPTHS) + f"{'ratio':>8}")
    for name, row in found.items():
        shallow, deepest = (row[layers] for layers in DEPTHS)
        print(f"{name:22}{shallow:>10.2f} s{deepest:>10.2f} s{deepest / shallow:>8.2f}")


if __name__ == "__main__":
    main()
