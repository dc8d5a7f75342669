"""One GRPO step: draw G completions of every prompt, reward them, update the policy on them."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm import distributed
from jaxmllm.data.pipeline import Batch
from jaxmllm.losses.advantages import completion_metrics, estimate_advantages, reward_metrics, soft_overlong_punishment
from jaxmllm.losses.grpo_options import GRPOOptions
from jaxmllm.losses.schedules import adaptive_entropy_coef, applied_entropy_coef, sync_reference
from jaxmllm.mesh import shard_batch
from jaxmllm.rollout import layout, sampler
from jaxmllm.train.config import TrainConfig
from jaxmllm.train.optim import join, split
from jaxmllm.train.rewards import Rewards
from jaxmllm.train.step import Rollout, encode_jit, grpo_step, score_jit
from jaxmllm.types import Completions

if TYPE_CHECKING:
    from jaxmllm.train.setup import Run


@dataclasses.dataclass
class Drawn:
    """A rollout with what the host knows about it."""

    rollout: Rollout
    texts: list[str]
    records: list[dict[str, Any]]  # one a completion
    rewards: np.ndarray  # [B * G, K]
    advantages: np.ndarray  # [B * G]
    parts: list[dict[str, float]]
    metrics: dict[str, Any]


keys_of_rows = jax.jit(sampler.row_keys, static_argnums=2)
SHORTEST = 16  # tokens a completion is cut to at least


@functools.partial(jax.jit, static_argnames=("names", "options"))
def _estimate(rewards, lengths, stopped, names: tuple[str, ...], options: GRPOOptions):
    """(advantages, metrics), in one program: op by op it would be hundreds."""
    advantages, metrics = estimate_advantages(rewards, options)
    return advantages, metrics | reward_metrics(rewards, list(names)) | completion_metrics(lengths, stopped)


def cut_length(longest: int, limit: int) -> int:
    """`limit` halved as often as the longest completion allows: few lengths, so few programs."""
    while limit % 2 == 0 and limit // 2 >= max(longest, SHORTEST):
        limit //= 2
    return limit


def judge(
    told: dict[str, Any], block: int, names: list[str], options: GRPOOptions
) -> tuple[np.ndarray, dict[str, Any]]:
    """Advantages [B * G] of the whole batch and its metrics, from what every process knows of its own rows (`told`).

    `block`: number of this process's block of rows.
    """
    blocks = dict(distributed.from_all([block, told]))
    every = [blocks[number] for number in sorted(blocks)]

    def joined(name: str) -> list[Any]:
        return [row for one in every for row in one[name]]

    rewards, lengths, parts = jnp.asarray(joined("table"), jnp.float32), joined("lengths"), joined("parts")
    estimated, metrics = _estimate(rewards, jnp.asarray(lengths), jnp.asarray(joined("stopped")), tuple(names), options)
    metrics["num_tokens"] = sum(one["prompt_tokens"] for one in every) + sum(lengths)
    for part in sorted({name for row in parts for name in row if name != "reward"}):
        metrics[f"rewards/{part}/mean"] = np.nanmean([row.get(part, np.nan) for row in parts])
    return np.asarray(estimated), metrics


class GRPO:
    """Callable `(run, batch) -> metrics` that replaces `run.state`."""

    def __init__(self, config: TrainConfig):
        self.config, self.options = config, config.grpo
        style = {"style": config.data.style, "thinking": config.data.thinking}
        rollout = config.rollout
        self.rewards = Rewards(
            rollout.reward_funcs, style, processes=rollout.reward_processes, timeout=rollout.reward_timeout
        )
        self.entropy_coef: Any = jnp.asarray(config.grpo.entropy_coef)
        self.entropy: Any = jnp.asarray(jnp.inf)
        self.last: Drawn | None = None  # for the table of completions
        self.copy: Any = None  # the program that makes the sampler's parameters, when it needs its own

    def __call__(self, run: Run, batch: Batch) -> dict[str, Any]:
        drawn, seconds = self.draw(run, batch)
        started = time.perf_counter()
        metrics = self.update(run, drawn.rollout)
        jax.block_until_ready(run.state.step)
        seconds["update"] = time.perf_counter() - started
        self.last = drawn
        return drawn.metrics | metrics | {f"seconds/{name}": value for name, value in seconds.items()}

    def draw(self, run: Run, batch: Batch) -> tuple[Drawn, dict[str, float]]:
        """Samples, rewards and advantages; and the seconds each took."""
        model, options, g = run.model, self.options, self.options.num_generations
        clock, seconds = time.perf_counter(), {}

        def lap(name: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            seconds[name], clock = now - clock, now

        params, cfg = run.state.params, model.cfg
        prompts = shard_batch(batch.prompts, run.mesh)
        vision_tokens = None
        if prompts.vision is not None and run.frozen_tower:
            # encoded once: sampling, reference and update read the same tokens
            vision_tokens = jax.block_until_ready(encode_jit(params, cfg, prompts.vision))
            prompts = prompts.replace(vision=None)
        lap("encode")
        sampling_params, (sampled_prompts, sampled_vision) = self.for_sampling(run, (prompts, vision_tokens))
        lap("relayout")
        sampling = self.sampling(run)
        step_key = jax.random.fold_in(jax.random.key(self.config.seed), int(run.state.step))
        block, _ = distributed.row_block(run.mesh)
        first = block * len(batch.records)
        ids = shard_batch(np.arange(first, first + len(batch.records), dtype=np.int32), run.mesh)
        samples = sampler.sample(
            sampling_params,
            cfg,
            sampled_prompts,
            layout.move_rows(keys_of_rows(step_key, ids, g), run.sample_mesh),
            sampling,
            max_new_tokens=options.max_completion_length,
            stop_ids=model.stop_ids,
            pad_id=model.pad_id,
            vision_tokens=sampled_vision,
        )
        del sampling_params, sampled_prompts, sampled_vision  # the copy's memory belongs to the update
        samples = layout.move_rows(samples, run.mesh)
        host = distributed.local_rows(samples)
        lap("sample")

        lengths, stopped = host.lengths.reshape(-1), host.stopped.reshape(-1)
        rows = host.tokens.reshape(len(lengths), -1)
        spoken = [row[: n - int(end)].tolist() for row, n, end in zip(rows, lengths, stopped, strict=True)]
        texts = model.tokenizer.batch_decode(spoken, skip_special_tokens=False)
        records = [record for record in batch.records for _ in range(g)]
        table, parts = self.rewards(texts, records)
        names = list(self.rewards.names)
        if self.config.rollout.soft_punish_cache:
            limit = options.max_completion_length
            punished = soft_overlong_punishment(lengths.tolist(), limit, self.config.rollout.soft_punish_cache)
            table, names = np.column_stack([table, punished]), [*names, "soft_overlong"]
        told = {
            "table": np.asarray(table, np.float64).tolist(),
            "lengths": lengths.tolist(),
            "stopped": stopped.tolist(),
            "parts": parts,
            "prompt_tokens": int(batch.prompts.lengths.sum()),
        }
        weights = options.reward_weights and (*options.reward_weights, 1.0)[: len(names)]
        estimated, metrics = judge(told, block, names, dataclasses.replace(options, reward_weights=weights))
        lap("reward")

        # what nobody wrote costs nothing in scoring and update
        width = cut_length(int(metrics["completions/max_length"]), rows.shape[1])
        counted = np.arange(width) < lengths[:, None]
        if options.mask_truncated_completions:
            counted &= stopped[:, None]
        b = len(batch.records)
        tokens, logps = samples.tokens[:, :, :width], samples.logps[:, :, :width]
        completions = Completions(
            tokens=tokens,
            lengths=samples.lengths,
            weights=shard_batch(counted.reshape(b, g, -1).astype(np.float32), run.mesh),
        )
        advantages = estimated[first * g : (first + b) * g]
        rollout = Rollout(
            prompts=prompts,
            completions=completions,
            advantages=shard_batch(advantages.reshape(b, g), run.mesh),
            vision_tokens=vision_tokens,
            # the weights that sampled are the weights at the start of the update: no pass for old log-probabilities
            old_logps=logps if self.updates > 1 else None,
            ref_logps=self.reference_logps(run, prompts, completions, vision_tokens),
            sampling_logps=logps,
        )
        lap("score")
        return Drawn(rollout, texts, records, table, advantages, parts, metrics), seconds

    def for_sampling(self, run: Run, rows: Any) -> tuple[Any, Any]:
        """Parameters and rows as the sampler wants them: the trainer's own where both layouts and types agree."""
        params, dtype = run.state.params, run.model.cfg.dtype
        if self.copy is None and layout.needs_copy(params, run.sample_mesh, dtype):
            self.copy = layout.relayout(params, run.sample_mesh, dtype)
        return self.copy(params) if self.copy else params, layout.move_rows(rows, run.sample_mesh)

    def sampling(self, run: Run):
        return self.config.rollout.sampling(tuple(sorted(set(run.model.cfg.vision_token_ids))))

    @property
    def updates(self) -> int:
        return self.config.rollout.num_iterations * self.config.rollout.steps_per_generation

    def reference_logps(self, run: Run, prompts, completions, vision_tokens):
        """Log-probabilities under the reference; no pass when no KL term reads them."""
        if self.options.beta == 0:
            return None
        if run.state.reference is None:  # adapters: the model without them
            params = {name: value for name, value in run.state.params.items() if name != "lora"}
        else:
            _, frozen = split(run.state.params, self.config.trainable)
            params = join(run.state.reference, frozen)
        logps, _ = score_jit(params, run.model.cfg, prompts, completions, self.sampling(run), vision_tokens)
        return logps

    def update(self, run: Run, rollout: Rollout) -> dict[str, Any]:
        """`num_iterations` passes of `steps_per_generation` updates; metrics are means over them."""
        options, cuts = self.options, self.config.rollout.steps_per_generation
        seen = []
        for _ in range(self.config.rollout.num_iterations):
            for cut in range(cuts):
                part = rollout if cuts == 1 else jax.tree.map(lambda x, cut=cut: x[cut::cuts], rollout)
                coefficient = None
                if options.use_adaptive_entropy:
                    coefficient = applied_entropy_coef(self.entropy_coef, self.entropy, options.entropy_target)
                run.state, metrics = grpo_step(
                    run.state, part, coefficient, update=run.update, options=options, sampling=self.sampling(run)
                )
                seen.append(metrics)
                if options.use_adaptive_entropy:
                    self.entropy = metrics["entropy_kept"]
                    bounds = (options.entropy_coef_delta, options.entropy_coef_min, options.entropy_coef_max)
                    self.entropy_coef = adaptive_entropy_coef(
                        self.entropy_coef, self.entropy, options.entropy_target, *bounds
                    )
                self.sync(run)
        return seen[0] if len(seen) == 1 else jax.tree.map(lambda *x: jnp.mean(jnp.stack(x)), *seen)

    def sync(self, run: Run) -> None:
        """Moves the reference towards the policy every `ref_model_sync_steps` updates."""
        options = self.options
        if options.sync_ref_model and run.state.reference is not None:
            if int(run.state.step) % options.ref_model_sync_steps == 0:
                train, _ = split(run.state.params, self.config.trainable)
                reference = sync_reference(train, run.state.reference, options.ref_model_mixup_alpha)
                run.state = run.state.replace(reference=reference)

    def get_state(self) -> dict[str, float]:
        """What an update reads besides `TrainState`: JSON, for the checkpoint."""
        return {"entropy_coef": float(self.entropy_coef), "entropy": min(float(self.entropy), 1e30)}

    def set_state(self, state: dict[str, float]) -> None:
        self.entropy_coef, self.entropy = jnp.asarray(state["entropy_coef"]), jnp.asarray(state["entropy"])

    def close(self) -> None:
        self.rewards.close()
