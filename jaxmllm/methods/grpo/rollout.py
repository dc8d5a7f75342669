"""One GRPO step: draw G completions of every prompt, reward them, update the policy on them."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.data.pipeline import Batch, join_prompts
from jaxmllm.machine import layout, processes
from jaxmllm.machine.mesh import shard_batch
from jaxmllm.methods.grpo import rewards
from jaxmllm.methods.grpo.advantages import (
    completion_metrics,
    dynamic_sampling_keep,
    estimate_advantages,
    reward_metrics,
    weighted_rewards,
)
from jaxmllm.methods.grpo.options import GRPOOptions
from jaxmllm.methods.grpo.schedules import adaptive_entropy_coef, adaptive_kl_coef, applied_entropy_coef, sync_reference
from jaxmllm.methods.optim import reference_params, split
from jaxmllm.methods.update import Rollout, encode_jit, grpo_step, score_jit
from jaxmllm.rollout import sampler
from jaxmllm.training.config import TrainConfig
from jaxmllm.training.run import Run
from jaxmllm.types import Completions, Prompts


@dataclasses.dataclass
class Group:
    """G completions of one prompt, on the host."""

    record: dict[str, Any]
    tokens: np.ndarray  # [G, T]
    logps: np.ndarray  # [G, T]
    lengths: np.ndarray  # [G]
    stopped: np.ndarray  # [G]
    texts: list[str]
    rewards: np.ndarray  # [G, K]
    parts: list[dict[str, float]]


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


class Clock:
    """Seconds between laps, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.at = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.at
        self.at = now


keys_of_rows = jax.jit(sampler.row_keys, static_argnums=2)
SHORTEST = 16  # tokens a completion is cut to at least
LONG = 128  # tokens from which the shorter half of the prompts may be cut to a quarter


@functools.partial(jax.jit, static_argnames=("names", "options"))
def _estimate(rewards, lengths, stopped, names: tuple[str, ...], options: GRPOOptions):
    """(advantages, metrics), in one program: op by op it would be hundreds."""
    advantages, metrics = estimate_advantages(rewards, options)
    return advantages, metrics | reward_metrics(rewards, list(names)) | completion_metrics(lengths, stopped)


def differing(groups: list[Group], options: GRPOOptions) -> list[bool]:
    """Which groups have rewards that differ: the others teach nothing (DAPO's dynamic sampling)."""
    table = jnp.asarray(np.concatenate([group.rewards for group in groups]), jnp.float32)
    return dynamic_sampling_keep(weighted_rewards(table, options.reward_weights), options.num_generations).tolist()


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
    blocks = dict(processes.from_all([block, told]))
    every = [blocks[number] for number in sorted(blocks)]

    def joined(name: str) -> list[Any]:
        return [row for one in every for row in one[name]]

    rewards, lengths, parts = jnp.asarray(joined("table"), jnp.float32), joined("lengths"), joined("parts")
    estimated, metrics = _estimate(rewards, jnp.asarray(lengths), jnp.asarray(joined("stopped")), tuple(names), options)
    metrics["num_tokens"] = sum(one["tokens"] for one in every)
    for name in every[0]["counts"]:
        metrics[name] = sum(one["counts"][name] for one in every)
    for part in sorted({name for row in parts for name in row if name != "reward"}):
        metrics[f"rewards/{part}/mean"] = np.nanmean([row.get(part, np.nan) for row in parts])
    return np.asarray(estimated), metrics


class GRPO:
    """Callable `(run, batch) -> metrics` that replaces `run.state`."""

    def __init__(self, config: TrainConfig):
        self.config, self.options = config, config.grpo
        self.rewards = rewards.of_config(config)
        # float32 from the start: another type would be another program
        self.kl_coef: Any = jnp.asarray(config.grpo.beta, jnp.float32)
        self.entropy_coef: Any = jnp.asarray(config.grpo.entropy_coef, jnp.float32)
        self.entropy: Any = jnp.asarray(jnp.inf, jnp.float32)
        self.last: Drawn | None = None  # for the table of completions
        self.copy: Any = None  # the program that makes the sampler's parameters, when it needs its own

    def __call__(self, run: Run, batch: Batch) -> dict[str, Any]:
        drawn, seconds = self.draw(run, batch)
        self.last = drawn
        started = time.perf_counter()
        metrics = self.update(run, drawn.rollout)
        jax.block_until_ready(run.state.step)
        seconds["update"] = time.perf_counter() - started
        return drawn.metrics | metrics | {f"seconds/{name}": value for name, value in seconds.items()}

    def draw(self, run: Run, batch: Batch) -> tuple[Drawn, dict[str, float]]:
        """Samples, rewards and advantages; and the seconds each took. Dynamic sampling takes further batches from `run`."""
        clock, options, wanted = Clock(), self.options, len(batch.records)
        prompts, vision_tokens = self.encode(run, batch.prompts, clock)
        groups, missed = self.groups(run, batch, 0, (prompts, vision_tokens), clock)
        drawn, inputs, tokens = len(groups), [batch.prompts], int(batch.prompts.lengths.sum())
        tokens += sum(int(group.lengths.sum()) for group in groups)
        if self.config.rollout.filter_groups:
            picks = [(0, row) for row in range(wanted)]
            keep = differing(groups, options)
            while (
                not all(processes.from_all(sum(keep) >= wanted))
                and len(inputs) < self.config.rollout.max_num_gen_batches
            ):
                more = next(run.batches)
                device = self.encode(run, more.prompts, clock)
                found, also_missed = self.groups(run, more, len(inputs), device, clock)
                picks += [(len(inputs), row) for row in range(len(found))]
                inputs, groups, missed = [*inputs, more.prompts], groups + found, missed + also_missed
                keep += differing(found, options)
                drawn += len(found)
                tokens += int(more.prompts.lengths.sum()) + sum(int(group.lengths.sum()) for group in found)
            # those that teach, in the order they were drawn; where too few were found, others whose advantage is 0
            chosen = sorted(range(len(groups)), key=lambda k: not keep[k])[:wanted]
            groups = [groups[k] for k in chosen]
            if len(inputs) > 1:
                unit = run.model.cfg.vision.spatial_merge_size**2
                whole = join_prompts(inputs, [picks[k] for k in chosen], unit)
                prompts, vision_tokens = self.encode(run, whole, clock)
        counts: dict[str, float] = {}
        if self.config.rollout.filter_groups:
            counts |= {"filter_groups/drawn": drawn, "filter_groups/kept": sum(keep)}
        if self.config.rollout.reward_errors == "skip":
            counts["rewards/failed"] = missed
        known = {"tokens": tokens, "counts": counts}
        return self.assemble(run, groups, prompts, vision_tokens, known, clock), clock.seconds

    def encode(self, run: Run, prompts: Prompts, clock: Clock) -> tuple[Prompts, Any]:
        """Prompts on the mesh; with a frozen tower its output instead of pictures."""
        on_mesh, vision_tokens = shard_batch(prompts, run.mesh), None
        if on_mesh.vision is not None and run.frozen_tower:
            # encoded once: sampling, reference and update read the same tokens
            vision_tokens = jax.block_until_ready(encode_jit(run.state.params, run.model.cfg, on_mesh.vision))
            on_mesh = on_mesh.replace(vision=None)
        clock.lap("encode")
        return on_mesh, vision_tokens

    def groups(
        self, run: Run, batch: Batch, number: int, rows: tuple[Prompts, Any], clock: Clock
    ) -> tuple[list[Group], int]:
        """G rewarded completions of every prompt of this process, and how many rewards failed.

        `number`: batch of this rollout, so that each draws its own randomness.
        """
        model, g = run.model, self.options.num_generations
        params, (prompts, vision_tokens) = self.for_sampling(run, rows)
        clock.lap("relayout")
        step_key = jax.random.fold_in(jax.random.key(self.config.seed), int(run.state.step))
        block, _ = processes.row_block(run.mesh)
        first = number * self.config.batch_size + block * len(batch.records)
        ids = shard_batch(np.arange(first, first + len(batch.records), dtype=np.int32), run.mesh)
        length = self.options.max_completion_length
        assert length is not None
        samples = sampler.sample(
            params,
            model.cfg,
            prompts,
            layout.move_rows(keys_of_rows(step_key, ids, g), run.sample_mesh),
            self.sampling(run),
            max_new_tokens=length,
            stop_ids=model.stop_ids,
            pad_id=model.pad_id,
            vision_tokens=vision_tokens,
        )
        del params, prompts, vision_tokens  # the copy's memory belongs to the update
        host = processes.local_rows(layout.move_rows(samples, run.mesh))
        clock.lap("sample")

        lengths, stopped = host.lengths.reshape(-1), host.stopped.reshape(-1)
        written = [row[:n].tolist() for row, n in zip(host.tokens.reshape(len(lengths), -1), lengths, strict=True)]
        spoken = [row[: len(row) - int(end)] for row, end in zip(written, stopped, strict=True)]
        texts = model.tokenizer.batch_decode(spoken, skip_special_tokens=False)
        # the released rewards look for the end token
        released = self.config.rollout.reward_rules == "released"
        judged = model.tokenizer.batch_decode(written, skip_special_tokens=False) if released else texts
        table, parts = self.rewards(judged, [record for record in batch.records for _ in range(g)], written)
        found = []
        for row, record in enumerate(batch.records):
            own = slice(row * g, (row + 1) * g)
            tokens, logps, count, ended = (x[row] for x in (host.tokens, host.logps, host.lengths, host.stopped))
            found.append(Group(record, tokens, logps, count, ended, texts[own], table[own], parts[own]))
        clock.lap("reward")
        return found, self.rewards.failed

    def assemble(
        self, run: Run, groups: list[Group], prompts: Prompts, vision_tokens: Any, known: dict[str, Any], clock: Clock
    ) -> Drawn:
        """The rollout of these groups. `known`: what else is told about the batch, see `judge`."""
        options, b, g = self.options, len(groups), self.options.num_generations

        def column(name: str) -> np.ndarray:
            return np.concatenate([getattr(group, name) for group in groups])

        told = {
            "table": np.asarray(column("rewards"), np.float64).tolist(),
            "lengths": column("lengths").tolist(),
            "stopped": column("stopped").tolist(),
            "parts": [part for group in groups for part in group.parts],
        }
        block, blocks = processes.row_block(run.mesh)
        estimated, metrics = judge(told | known, block, list(self.rewards.names), options)
        advantages = estimated.reshape(-1, g)[block * b : (block + 1) * b]
        # what nobody wrote costs nothing in scoring and update
        width = cut_length(int(metrics["completions/max_length"]), groups[0].tokens.shape[1])
        parts = run.mesh.shape["replica"] * run.mesh.shape["fsdp"] // blocks  # devices with rows of this process
        cuts, microbatches = self.config.rollout.steps_per_generation, run.update.accumulation_steps
        order, short = None, 0
        if cuts * microbatches == 1 and b > parts and width >= LONG:
            by_length, longest = layout.shortest_first(column("lengths").reshape(b, g).max(1), parts)
            if max(processes.from_all(longest)) <= width // 4:
                order, short = by_length, width // 4
        elif run.update.skip_idle and not estimated.reshape(-1, g).any(1).all():
            order = layout.idle_last(np.any(advantages, axis=1), parts, cuts, microbatches)
        if order is not None:
            on_mesh = shard_batch(order % (b // parts), run.mesh)
            prompts, vision_tokens = layout.take_rows((prompts, vision_tokens), on_mesh, run.mesh)
            groups, advantages = [groups[k] for k in order], advantages[order]
        clock.lap("reward")

        lengths, stopped = column("lengths"), column("stopped")
        counted = np.arange(width) < lengths[:, None]
        if options.mask_truncated_completions:
            counted &= stopped[:, None]
        logps = shard_batch(np.stack([group.logps[:, :width] for group in groups]), run.mesh)
        completions = Completions(
            tokens=shard_batch(np.stack([group.tokens[:, :width] for group in groups]), run.mesh),
            lengths=shard_batch(lengths.reshape(b, g), run.mesh),
            weights=shard_batch(counted.reshape(b, g, -1).astype(np.float32), run.mesh),
        )
        rollout = Rollout(
            prompts=prompts,
            completions=completions,
            advantages=shard_batch(advantages, run.mesh),
            vision_tokens=vision_tokens,
            # the weights that sampled are the weights at the start of the update: no pass for old log-probabilities
            old_logps=logps if self.updates > 1 else None,
            ref_logps=self.reference_logps(run, prompts, completions, vision_tokens, short),
            sampling_logps=logps,
            short=short,
        )
        clock.lap("score")
        return Drawn(
            rollout=rollout,
            texts=[text for group in groups for text in group.texts],
            records=[group.record for group in groups for _ in range(g)],
            rewards=column("rewards"),
            advantages=advantages.reshape(-1),
            parts=[part for group in groups for part in group.parts],
            metrics=metrics,
        )

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

    def reference_logps(self, run: Run, prompts, completions, vision_tokens, short: int):
        """Log-probabilities under the reference; no pass when no KL term reads them."""
        if self.options.beta == 0:
            return None
        params = reference_params(run.state, self.config.trainable)
        logps, _ = score_jit(params, run.model.cfg, prompts, completions, self.sampling(run), vision_tokens, short)
        return logps

    def update(self, run: Run, rollout: Rollout) -> dict[str, Any]:
        """`num_iterations` passes of `steps_per_generation` updates; metrics are means over them."""
        cuts = self.config.rollout.steps_per_generation
        seen = []
        for _ in range(self.config.rollout.num_iterations):
            for cut in range(cuts):
                part = rollout if cuts == 1 else jax.tree.map(lambda x, cut=cut: x[cut::cuts], rollout)
                run.state, metrics = grpo_step(
                    run.state,
                    part,
                    *self.coefficients(),
                    update=run.update,
                    options=self.options,
                    sampling=self.sampling(run),
                )
                seen.append(metrics)
                self.adapt(metrics, part.advantages.size)
                self.sync(run)
        return seen[0] if len(seen) == 1 else jax.tree.map(lambda *x: jnp.mean(jnp.stack(x)), *seen)

    def coefficients(self) -> tuple[Any, Any]:
        """(entropy_coef, beta) of the next update; None where the options' constants hold."""
        options, entropy = self.options, None
        if options.use_adaptive_entropy:
            entropy = applied_entropy_coef(self.entropy_coef, self.entropy, options.entropy_target)
        return entropy, self.kl_coef if options.kl_ctrl == "adaptive" else None

    def adapt(self, metrics: dict[str, Any], completions: int) -> None:
        """Moves the adaptive coefficients after an update on so many completions."""
        options = self.options
        if options.kl_ctrl == "adaptive":
            self.kl_coef = adaptive_kl_coef(
                self.kl_coef, metrics["kl"], options.target_kl, completions, options.horizon
            )
        if options.use_adaptive_entropy:
            self.entropy = metrics["entropy_kept"]
            bounds = (options.entropy_coef_delta, options.entropy_coef_min, options.entropy_coef_max)
            self.entropy_coef = adaptive_entropy_coef(self.entropy_coef, self.entropy, options.entropy_target, *bounds)

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
        state = {"kl_coef": self.kl_coef, "entropy_coef": self.entropy_coef}
        return {name: float(value) for name, value in state.items()} | {"entropy": min(float(self.entropy), 1e30)}

    def set_state(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            setattr(self, name, jnp.asarray(value, jnp.float32))

    def close(self) -> None:
        self.rewards.close()
