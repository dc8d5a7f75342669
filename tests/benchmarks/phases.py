"""The phases of a GRPO step on random weights and random pictures, one function each, for the scripts that time them.

Needs only jax, flax, optax, einops, numpy and safetensors: call `stand_in` first where jaxtyping or Pillow may be missing.
"""

import dataclasses
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STEP = ("encode", "prefill", "decode", "score", "update")  # of a GRPO step, in order


def stand_in(*names: str) -> None:
    """Empty modules in place of those that are missing; what is asked of them is a class that can be subscripted."""

    class Meta(type):
        def __getattr__(cls, name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            return cls

    class Anything(metaclass=Meta):
        def __class_getitem__(cls, item: Any):
            return cls

    for name in names:
        if importlib.util.find_spec(name) is None:
            module = types.ModuleType(name)
            module.__getattr__ = lambda _: Anything  # type: ignore[method-assign]
            sys.modules[name] = module


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a step."""

    prompts: int = 2
    generations: int = 8
    new_tokens: int = 32
    side: int = 448  # of the picture of a prompt, pixels
    text: int = 24  # tokens of a prompt besides the picture's


def architecture(name: str, **changes: Any):
    """ "48M", or a published model whose config.json the package holds, with fields of `text` or `vision` changed."""
    from jaxmllm.model.config import ModelConfig, TextConfig, VisionConfig
    from jaxmllm.model.family import model_config

    if name == "48M":
        text = TextConfig(151936, 256, 704, 8, 4, 2, (8, 12, 12), 1e-6, tie_word_embeddings=True)
        vision = VisionConfig(8, 160, 4, 432, 256, fullatt_block_indexes=(1, 3, 5, 7), tokens_per_second=4)
        cfg = ModelConfig("qwen2_5_vl", vision, text, 151655, 151656, 151652, 151653)
    else:
        path = ROOT / "jaxmllm" / "assets" / "architectures" / f"{name}.json"
        cfg = model_config(json.loads(path.read_text()), str(path))
    for part in ("text", "vision"):
        cfg = dataclasses.replace(cfg, **{part: dataclasses.replace(getattr(cfg, part), **changes.pop(part, {}))})
    return dataclasses.replace(cfg, **changes)


class Phases:
    """`call(name)` runs a phase to its end; the phases share arrays as a step does."""

    def __init__(self, cfg: Any, size: Size, *, param_dtype: str = "float32", moment_dtype: str = "float32"):
        import jax
        import jax.numpy as jnp
        import numpy as np

        from jaxmllm.methods.grpo.options import GRPOOptions
        from jaxmllm.methods.optim import make_optimizer
        from jaxmllm.methods.update import Update
        from jaxmllm.model import family
        from jaxmllm.model.logprobs import Sampling
        from jaxmllm.rollout import sampler
        from jaxmllm.training.config import OptimConfig
        from jaxmllm.types import Completions, TrainState

        self.cfg, self.size = cfg, size
        self.sampling = Sampling(banned=tuple(sorted(set(cfg.vision_token_ids))))
        self.options = GRPOOptions(num_generations=size.generations, max_completion_length=size.new_tokens, beta=0.04)
        optim = OptimConfig(moment_dtype=moment_dtype)
        self.update = Update(cfg, make_optimizer(optim, 1000), ".*")

        def init(key):
            params = family.init(key, cfg)
            return jax.tree.map(lambda x: x.astype(param_dtype), params)

        self.params = jax.jit(init)(jax.random.key(0))
        self.state = TrainState(jnp.zeros((), jnp.int32), self.params, jax.jit(self.update.tx.init)(self.params))
        self.prompts = jax.tree.map(jnp.asarray, self.make_prompts())
        self.keys = sampler.row_keys(jax.random.key(0), jnp.arange(size.prompts), size.generations)
        shape = (size.prompts, size.generations, size.new_tokens)
        ids = np.random.default_rng(3).integers(0, cfg.text.vocab_size // 2, shape).astype(np.int32)
        full = jnp.full(shape[:2], size.new_tokens, jnp.int32)
        self.completions = Completions(jnp.asarray(ids), full, jnp.ones(shape, jnp.float32))
        self.zeros = jnp.zeros(shape, jnp.float32)

    def make_prompts(self):
        """The host's work on the pictures, and token ids around them; numpy."""
        import numpy as np

        from jaxmllm.data import images
        from jaxmllm.types import Prompts, Vision

        size, vision = self.size, self.cfg.vision
        pixels = images.PixelConfig(
            vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size, vision.window_size
        )
        rng = np.random.default_rng(0)
        shots = rng.integers(0, 256, (size.prompts, 1, 1, size.side, size.side, 3), dtype=np.uint8)
        frames = [images.to_frames(shot, images._normalised(pixels), pixels) for shot in shots]
        n = frames[0].tokens
        length = n + size.text
        tokens = rng.integers(0, self.cfg.text.vocab_size // 2, (size.prompts, length)).astype(np.int32)
        index = np.full((size.prompts, length), -1, np.int32)
        index[:, 4 : 4 + n] = frames[0].token_index
        tokens[index >= 0] = self.cfg.image_token_id
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), (size.prompts, 3, length))
        lengths = np.full(size.prompts, length, np.int32)
        patches, places = (np.stack([getattr(f, name) for f in frames]) for name in ("patches", "positions"))
        return Prompts(tokens, positions, lengths, lengths, index, Vision(patches, places))

    def programs(self) -> dict[str, tuple[Callable, tuple, dict]]:
        """Phase -> (jitted function, arguments, static and named arguments)."""
        import jax.numpy as jnp

        from jaxmllm.methods.grpo.step import Rollout, grpo_step
        from jaxmllm.methods.sft import sft_step
        from jaxmllm.rollout import sampler
        from jaxmllm.rollout.scorer import encode_jit, score_jit

        size, cfg = self.size, self.cfg
        written = dict(num_generations=size.generations, max_new_tokens=size.new_tokens, stop_ids=(), pad_id=0)
        rollout = Rollout(self.prompts, self.completions, self.zeros[..., 0], None, None, self.zeros, self.zeros)
        static = dict(update=self.update, options=self.options, sampling=self.sampling)
        params, prompts = self.state.params, self.prompts
        tokens = self.vision_tokens if hasattr(self, "vision_tokens") else None
        open_rows = (params, cfg, prompts, self.keys, self.sampling)
        until = jnp.asarray(size.new_tokens)
        return {
            "encode": (encode_jit, (params, cfg, prompts.vision), {}),
            "prefill": (sampler.start, open_rows, written | {"vision_tokens": tokens}),
            "decode": (sampler.advance, (params, cfg, getattr(self, "opened", None), until, self.sampling, ()), {}),
            "score": (score_jit, (params, cfg, prompts, self.completions, self.sampling), {}),
            "update": (grpo_step, (self.state, rollout), static),
            "sft": (sft_step, (self.state, prompts, self.completions), {"update": self.update}),
        }

    def call(self, name: str) -> None:
        import jax

        function, arguments, named = self.programs()[name]
        out = jax.block_until_ready(function(*arguments, **named))
        if name == "encode":
            self.vision_tokens = out
        elif name == "prefill":
            self.opened = out
        elif name in ("update", "sft"):
            self.state = out[0]

    def compiled(self, name: str):
        function, arguments, named = self.programs()[name]
        return function.lower(*arguments, **named).compile()

    def flops(self, name: str) -> float:
        """Of a phase, counted from its loops."""
        function, arguments, named = self.programs()[name]
        return flops_module().count(
            lambda *a: _bound(function, arguments, named)(*a),
            *_arrays(arguments),
            steps=self.size.new_tokens - 1,
            chosen=self.full_blocks,
        )

    @property
    def full_blocks(self) -> float:
        vision = self.cfg.vision
        return len(vision.fullatt_block_indexes) / vision.depth

    def seconds(self, names: tuple[str, ...], repeats: int) -> dict[str, dict[str, float]]:
        """Median seconds of every phase, first call (with compilation) apart. Decode needs a fresh prefill every time."""
        found: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(repeats + 1):
            for name in names:
                started = time.perf_counter()
                self.call(name)
                found[name].append(time.perf_counter() - started)
        return {name: {"first": t[0], "seconds": statistics.median(t[1:])} for name, t in found.items()}


def _arrays(arguments: tuple) -> list:
    return [a for a in arguments if not _static(a)]


def _static(argument: Any) -> bool:
    return (isinstance(argument, tuple) and not argument) or type(argument).__name__ in ("ModelConfig", "Sampling")


def _bound(function: Callable, arguments: tuple, named: dict) -> Callable:
    """The function of its array arguments alone."""

    def run(*arrays):
        rest = iter(arrays)
        return function.__wrapped__(*(a if _static(a) else next(rest) for a in arguments), **named)

    return run


def flops_module():
    """jaxmllm/plan/flops.py on its own: the package around it imports all of the library."""
    spec = importlib.util.spec_from_file_location("flops_of_plan", ROOT / "jaxmllm" / "plan" / "flops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peaks() -> dict[str, float]:
    """FLOP/s of a large matrix product in float32 and bfloat16, and bytes/s of a copy, of the first device, measured."""
    import jax
    import jax.numpy as jnp

    cpu = jax.default_backend() == "cpu"
    n, elements = (2048, 1 << 26) if cpu else (8192, 1 << 30)

    def best(function, *arguments) -> float:
        times = []
        for _ in range(6):
            started = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            times.append(time.perf_counter() - started)
        return min(times[1:])

    product = jax.jit(lambda a, b: a @ b)
    found = {}
    for dtype in ("float32", "bfloat16"):
        a = jnp.ones((n, n), dtype)
        found[f"{dtype} FLOP/s"] = 2 * n**3 / best(product, a, a)
    x = jnp.ones(elements, jnp.float32)
    found["copy bytes/s"] = 2 * x.nbytes / best(jax.jit(lambda x: x + 1), x)
    return found
