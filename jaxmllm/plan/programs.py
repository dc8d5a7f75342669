"""The programs of a run as a mesh would compile them, from shapes alone: no weights, no device.

They are the functions that training calls, lowered on arguments that have shape, type and sharding but no content.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxmllm import api
from jaxmllm.config import ModelConfig, load_model_config, model_config
from jaxmllm.data.chat import Buckets
from jaxmllm.errors import InputError
from jaxmllm.machine import layout
from jaxmllm.machine.mesh import BATCH, P, param_shardings
from jaxmllm.methods.optim import make_optimizer, split, state_shardings
from jaxmllm.methods.update import Rollout, Update, dpo_step, encode_jit, grpo_step, score, score_jit, sft_step
from jaxmllm.model import hf, lora, qwen_vl
from jaxmllm.model.logprobs import Sampling
from jaxmllm.plan.flops import count
from jaxmllm.rollout import sampler
from jaxmllm.runfiles import read_json
from jaxmllm.training.config import TrainConfig
from jaxmllm.types import Completions, Prompts, TrainState, Vision

STOPS = (0, 1)  # stop tokens: how many there are changes nothing
ARCHITECTURES = Path(api.__file__).parent / "assets" / "architectures"  # config.json of published checkpoints


def architecture(name: str) -> ModelConfig:
    """The model's sizes: of "tiny", a checkpoint folder, a .json file, or a published model by the end of its hub id."""
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        return model_config(read_json(path), str(path))
    known = ARCHITECTURES / f"{path.name}.json"
    if not path.is_dir() and known.is_file():
        return model_config(read_json(known), str(known))
    if name != "tiny" and not path.is_dir():
        raise InputError(
            f"model {name!r}: its sizes are not known here. Give --model a folder with a config.json, that file itself, or "
            f"one of {', '.join(sorted(p.stem for p in ARCHITECTURES.glob('*.json')))}"
        )
    return load_model_config(api.resolve(name))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The largest batch of a run, in the buckets that it will be padded to."""

    prompts: int  # B, of a rollout or update, over all devices
    generations: int  # G
    frames: int  # F
    windows: int  # W
    prompt_tokens: int  # S
    new_tokens: int  # T


def sizes_of(config: TrainConfig, cfg: ModelConfig, vision_tokens: int, prompt_tokens: int) -> Sizes:
    """Sizes for one picture of so many vision tokens in prompts of so many tokens, both at most."""
    buckets = Buckets()
    unit = cfg.vision.window_patches // cfg.vision.spatial_merge_size**2  # vision tokens of a window
    side = math.isqrt(unit)
    # a picture that is nearly square, the usual worst case: its windows at two edges are only partly filled
    windows = math.ceil(math.sqrt(vision_tokens) / side) ** 2
    grpo = config.method == "grpo"
    answers = {"grpo": config.grpo.num_generations, "dpo": config.dpo.answers}
    return Sizes(
        config.batch_size,
        answers.get(config.method, config.data.questions_per_image),
        1,
        buckets.fit("windows", windows),
        buckets.fit("prompt", prompt_tokens),
        (config.grpo.max_completion_length or 512) if grpo else buckets.fit("completion", 512),
    )


@dataclasses.dataclass
class Phase:
    """One program of an iteration: how to compile it, how often it runs, and what it has to do."""

    name: str
    lower: Callable[[], Any]
    flops: float  # that it executes, all devices together, counted from its loops
    useful: float = 0.0  # of `flops`, what the model needs: no recomputation
    steps: int = 1  # passes of the loop whose length the compiler does not know
    beside: tuple[str, ...] = ()  # kinds of memory that lie there while it runs, besides its arguments: see Memory
    runs: int = 1  # times an iteration


def _put(tree: Any, mesh: Mesh) -> Any:
    rows, whole = NamedSharding(mesh, BATCH), NamedSharding(mesh, P())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows if x.ndim else whole), tree)


def _with(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


class Programs:
    """All programs of a config on a pair of meshes (training, sampling); shapes are those of the whole batch."""

    def __init__(self, config: TrainConfig, cfg: ModelConfig, sizes: Sizes, train: Mesh, sample: Mesh):
        self.config, self.sizes, self.train, self.sample_mesh = config, sizes, train, sample
        # of a machine that is not here: cuDNN cannot compile its kernels without the GPU
        platform, kernel = train.devices.flat[0].platform, cfg.attention
        if kernel == "auto" and platform != jax.default_backend():
            kernel = "splash" if platform == "tpu" else "dense"
        self.cfg = dataclasses.replace(
            cfg, dtype=config.dtype, remat=config.remat, unroll=config.unroll, attention=kernel
        )
        if config.method == "vision_warmup":
            raise InputError("method 'vision_warmup': there is no plan for it, it trains small towers")
        self.tx = make_optimizer(config.optim, config.max_steps)
        # without `skip_idle`: a plan counts every group as one that teaches
        self.update = Update(self.cfg, self.tx, config.trainable, config.optim.gradient_accumulation_steps)
        self.opened_shardings: Any = None  # of `opened`: known once the prefill is compiled
        self.state = self._state()
        self.copied = config.method == "grpo" and layout.needs_copy(self.state.params, sample, self.cfg.dtype)
        self.target = (
            layout.sampling_params(self.state.params, sample, self.cfg.dtype) if self.copied else self.state.params
        )
        trained, _ = split(self.state.params, config.trainable)
        self.frozen_tower = "vision" not in trained and "vision" not in trained.get("lora", {})
        self.sampling = (
            config.rollout.sampling(tuple(sorted(set(cfg.vision_token_ids)))) if config.method == "grpo" else Sampling()
        )

    def _state(self) -> TrainState:
        config, kind = self.config, jnp.dtype(self.config.param_dtype)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, kind), hf.abstract_params(self.cfg))
        if config.lora is not None:
            options = config.lora
            params = jax.eval_shape(lambda p: lora.add(jax.random.key(0), p, options), params)
        params = _with(params, param_shardings(params, self.train))
        trained, _ = split(params, config.trainable)
        shapes = jax.eval_shape(self.tx.init, trained)
        _, placed = state_shardings(trained, shapes, self.train)
        compared = config.method == "dpo" or (config.method == "grpo" and config.grpo.beta > 0)
        reference = trained if compared and config.lora is None else None
        step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(self.train, P()))
        return TrainState(step, params, _with(shapes, placed), reference)

    # ------------------------------------------------------------ arguments

    def prompts(self, mesh: Mesh, rows: int | None = None, vision: bool = True) -> Prompts:
        s, v = self.sizes, self.cfg.vision
        b = rows or s.prompts

        def array(*shape: int, dtype: Any = jnp.int32) -> Any:
            return jax.ShapeDtypeStruct((b, *shape), dtype)

        place = (s.frames, s.windows, v.window_patches)
        pictures: Any = Vision(array(*place, v.patch_pixels, dtype=jnp.float32), array(*place, 2))
        text: Any = dict(
            tokens=array(s.prompt_tokens),
            positions=array(3, s.prompt_tokens),
            lengths=array(),
            next_position=array(),
            vision_index=array(s.prompt_tokens),
        )
        return _put(Prompts(**text, vision=pictures if vision else None), mesh)

    def completions(self, mesh: Mesh, rows: int | None = None) -> Completions:
        b, g, t = rows or self.sizes.prompts, self.sizes.generations, self.sizes.new_tokens
        tokens, lengths = jax.ShapeDtypeStruct((b, g, t), jnp.int32), jax.ShapeDtypeStruct((b, g), jnp.int32)
        weights = jax.ShapeDtypeStruct((b, g, t), jnp.float32)
        return _put(Completions(tokens, lengths, weights), mesh)  # type: ignore[arg-type]

    def vision_tokens(self, mesh: Mesh) -> Any:
        """Of a frozen tower: encoded once. None where the tower trains and runs in every pass."""
        if not self.frozen_tower:
            return None
        v = self.cfg.vision
        count = self.sizes.frames * self.sizes.windows * v.window_patches // v.spatial_merge_size**2
        shape = (self.sizes.prompts, count, v.out_hidden_size)
        return _put(jax.ShapeDtypeStruct(shape, jnp.dtype(self.cfg.dtype)), mesh)

    def rollout(self) -> Rollout:
        mesh, s, config = self.train, self.sizes, self.config
        logps = _put(jax.ShapeDtypeStruct((s.prompts, s.generations, s.new_tokens), jnp.float32), mesh)
        updates = config.rollout.num_iterations * config.rollout.steps_per_generation
        return Rollout(
            prompts=self.prompts(mesh, vision=not self.frozen_tower),
            completions=self.completions(mesh),
            advantages=_put(jax.ShapeDtypeStruct((s.prompts, s.generations), jnp.float32), mesh),  # type: ignore[arg-type]
            vision_tokens=self.vision_tokens(mesh),
            old_logps=logps if updates > 1 else None,
            ref_logps=logps if config.grpo.beta else None,
            sampling_logps=logps,
        )

    # ------------------------------------------------------------ phases

    def phases(self) -> list[Phase]:
        """In the order in which they run."""
        return {"grpo": self._grpo, "dpo": self._dpo}.get(self.config.method, self._sft)()

    @property
    def full_share(self) -> float:
        """Of the tower's blocks, those that attend over the whole frame: the conditional of its scanned body."""
        return len(self.cfg.vision.fullatt_block_indexes) / self.cfg.vision.depth

    def _count(self, function: Callable[..., Any], *arguments: Any, steps: int = 1) -> float:
        return count(function, *arguments, steps=steps, chosen=self.full_share)

    def _grpo(self) -> list[Phase]:
        phases = []
        if self.copied:
            program: Any = layout.relayout(self.state.params, self.sample_mesh, self.cfg.dtype)
            phases.append(
                Phase("relayout", lambda: program.lower(self.state.params), 0.0, beside=("optimiser", "reference"))
            )
        if self.frozen_tower:
            phases.append(self._encode())
        beside = ("optimiser", "reference", *(("parameters",) if self.copied else ()))
        phases += [self._prefill(beside), self._decode(beside)]
        rollout = self.rollout()
        forward = self._forward(rollout.prompts, rollout.completions, rollout.vision_tokens)
        if self.config.grpo.beta:
            phases.append(self._score(forward, rollout.prompts, rollout.completions, rollout.vision_tokens))
        return [*phases, self._update(rollout, forward)]

    def _score(self, forward: float, prompts: Prompts, completions: Completions, tokens: Any = None) -> Phase:
        """Under the reference: the parameters it reads are that one's, the policy's lie beside."""
        inputs = (self.state.params, self.cfg, prompts, completions, self.sampling, tokens)
        beside = ("parameters", "optimiser") if self.config.lora is None else ("optimiser",)
        return Phase("score", lambda: score_jit.lower(*inputs), forward, forward, beside=beside)

    def _encode(self) -> Phase:
        params, pictures = self.state.params, self.prompts(self.train).vision
        work = self._count(lambda p, v: qwen_vl.encode(p, self.cfg, v), params, pictures)
        beside = ("optimiser", "reference")
        return Phase("encode", lambda: encode_jit.lower(params, self.cfg, pictures), work, work, beside=beside)

    def _start_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arrays and static options of `sampler.start`."""
        s, mesh = self.sizes, self.sample_mesh
        prompts = self.prompts(mesh, vision=not self.frozen_tower)
        keys = _put(jax.ShapeDtypeStruct((s.prompts, s.generations), jax.random.key(0).dtype), mesh)
        options = dict(num_generations=s.generations, max_new_tokens=s.new_tokens, stop_ids=STOPS, pad_id=0)
        return (self.target, prompts, keys, self.vision_tokens(mesh)), options

    def _start(self, params: Any, prompts: Any, keys: Any, tokens: Any) -> sampler.State:
        options = self._start_inputs()[1]
        return sampler.start(params, self.cfg, prompts, keys, self.sampling, vision_tokens=tokens, **options)

    def opened(self) -> sampler.State:
        """What the prefill returns, as the compiler lays it out (`opened_shardings`, once that is known)."""
        shapes = jax.eval_shape(self._start, *self._start_inputs()[0])
        return shapes if self.opened_shardings is None else _with(shapes, self.opened_shardings)

    def _prefill(self, beside: tuple[str, ...]) -> Phase:
        inputs, options = self._start_inputs()
        params, prompts, keys, tokens = inputs

        def lower() -> Any:
            return sampler.start.lower(params, self.cfg, prompts, keys, self.sampling, vision_tokens=tokens, **options)

        work = self._count(self._start, *inputs)
        return Phase("prefill", lower, work, work, beside=beside)

    def _decode(self, beside: tuple[str, ...]) -> Phase:
        """Every completion as long as it may be: the last token of each is written, and not read."""
        until = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(self.sample_mesh, P()))
        steps = max(1, self.sizes.new_tokens - 1)

        def advance(params: Any, state: sampler.State, n: Any) -> sampler.State:
            return sampler.advance(params, self.cfg, state, n, self.sampling, STOPS)

        def lower() -> Any:
            return sampler.advance.lower(self.target, self.cfg, self.opened(), until, self.sampling, STOPS)

        work = self._count(advance, self.target, self.opened(), until, steps=steps)
        return Phase("decode", lower, work, work, steps=steps, beside=beside)

    def _forward(self, prompts: Prompts, completions: Completions, tokens: Any = None) -> float:
        """FLOPs of scoring: of one forward pass."""

        def scored(params: Any, prompts: Prompts, completions: Completions, tokens: Any) -> Any:
            return score(params, self.cfg, prompts, completions, self.sampling, tokens)

        return self._count(scored, self.state.params, prompts, completions, tokens)

    def _update(self, rollout: Rollout, forward: float) -> Phase:
        config, cuts = self.config, self.config.rollout.steps_per_generation
        part = self._cut(rollout, cuts)
        options: dict[str, Any] = dict(update=self.update, options=config.grpo, sampling=self.sampling)
        work = self._count(lambda state, x: grpo_step(state, x, None, **options), self.state, part)
        needed = self._needed(forward) / cuts
        runs = config.rollout.num_iterations * cuts
        return Phase("update", lambda: grpo_step.lower(self.state, part, None, **options), work, needed, runs=runs)

    @staticmethod
    def _cut(rollout: Rollout, cuts: int) -> Rollout:
        def cut(x):
            return jax.ShapeDtypeStruct((x.shape[0] // cuts, *x.shape[1:]), x.dtype, sharding=x.sharding)

        return jax.tree.map(cut, rollout)

    def _needed(self, forward: float) -> float:
        """FLOPs of an update without recomputation: the backward pass has two products for each of the forward pass, one
        where the weight is frozen (adapters)."""
        return (2 if self.config.lora is not None else 3) * forward

    def _dpo(self) -> list[Phase]:
        prompts, completions, s = self.prompts(self.train), self.completions(self.train), self.sizes
        rewards = jax.ShapeDtypeStruct((s.prompts, s.generations), jnp.float32)
        logps = jax.ShapeDtypeStruct((*rewards.shape, s.new_tokens), jnp.float32)
        batch = (prompts, completions, *_put((rewards, logps), self.train))
        options: dict[str, Any] = dict(update=self.update, options=self.config.dpo)
        forward = self._forward(prompts, completions)
        work = self._count(lambda state, *x: dpo_step(state, *x, **options), self.state, *batch)
        update = Phase("update", lambda: dpo_step.lower(self.state, *batch, **options), work, self._needed(forward))
        return [self._score(forward, prompts, completions), update]

    def _sft(self) -> list[Phase]:
        prompts, completions = self.prompts(self.train), self.completions(self.train)

        def step(state, x, c):
            return sft_step(state, x, c, update=self.update, loss_norm=self.config.loss_norm)

        forward = self._forward(prompts, completions)
        options: dict[str, Any] = dict(update=self.update, loss_norm=self.config.loss_norm)
        work = self._count(step, self.state, prompts, completions)
        return [
            Phase(
                "update",
                lambda: sft_step.lower(self.state, prompts, completions, **options),
                work,
                self._needed(forward),
            )
        ]
