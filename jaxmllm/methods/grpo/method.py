"""GRPO: draw G completions of every prompt, reward them, update the policy on them."""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.data.pipeline import Batch, join_prompts, rl_batches
from jaxmllm.errors import InputError
from jaxmllm.machine import layout as layouts
from jaxmllm.machine import processes
from jaxmllm.machine.mesh import shard_batch
from jaxmllm.methods.grpo import adaptive, plan, rewards
from jaxmllm.methods.grpo.arrange import arrange
from jaxmllm.methods.grpo.options import GRPOOptions
from jaxmllm.methods.grpo.reward_calls import named
from jaxmllm.methods.grpo.rollout import (
    Drawn,
    Group,
    advantages_of_all,
    column,
    differing,
    keys_of_rows,
    texts_of,
)
from jaxmllm.methods.grpo.step import Rollout, grpo_step
from jaxmllm.methods.method import Clock, Completed, Context, Facts, Layout, Method, Own, Params, Report, Work
from jaxmllm.methods.optim import reference_params
from jaxmllm.methods.shapes import Program, Sizes
from jaxmllm.model.config import ModelConfig
from jaxmllm.model.logprobs import Sampling
from jaxmllm.rollout import sampler
from jaxmllm.rollout.scorer import encode_jit, score_jit
from jaxmllm.types import Completions, Prompts, TrainState

Rows = tuple[Prompts, Any]  # prompts on the mesh, and the output of a frozen tower


@dataclasses.dataclass(frozen=True)
class GRPO(Method, GRPOOptions):
    """Options of the objective are `GRPOOptions`; these say how completions are drawn and scored."""

    free: ClassVar[tuple[str, ...]] = ("reward_errors", "reward_processes", "reward_timeout")

    temperature: float = 1.0  # of the draw, and of the scores
    top_p: float = 1.0  # draw from the likeliest tokens that together have this probability
    top_k: int = 0  # draw from so many of the likeliest tokens; 0: from all
    min_p: float | None = None  # draw from tokens with at least this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1 makes tokens that were said before less likely
    # "task": the record's own; "soft_overlong", "repetition": of the tokens, see below; otherwise module:function,
    # file.py:function, or in a config file the function itself
    reward_funcs: tuple[str, ...] = ("task",)  # their weights: reward_weights
    reward_rules: Literal["corrected", "released"] = "corrected"  # of "task"; released: Perception-R1's, bugs included
    reward_matching: Literal["hungarian", "order"] = "hungarian"  # of "task": paired optimally, or as they are listed
    soft_punish_cache: int = 0  # of "soft_overlong": tokens before the limit where the punishment begins
    repetition_n_grams: int = 3  # of "repetition": tokens
    repetition_max_penalty: float = -1.0  # of "repetition": for an answer that is one n-gram over and over
    reward_timeout: float = 10.0  # seconds a reward may take for one completion, where it runs in processes
    reward_processes: int | None = None  # 0: rewards in the main one, without limit; None: 2 where one is a module's
    reward_errors: Literal["stop", "skip"] = "stop"  # what one that raises or hangs does; skip: left out and counted
    num_iterations: int = 1  # passes over each rollout
    steps_per_generation: int = 1  # updates a pass: the rollout's prompts are cut into so many batches
    filter_groups: bool = False  # DAPO's dynamic sampling: groups whose rewards do not differ make room for others
    max_num_gen_batches: int = 10  # batches drawn for one rollout; what then is missing is filled with such groups

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "reward_funcs", tuple(map(named, self.reward_funcs)))

    @property
    def loss(self) -> GRPOOptions:
        """The part that decides the program of an update: static under jit, so nothing else may recompile it."""
        return GRPOOptions(**{f.name: getattr(self, f.name) for f in dataclasses.fields(GRPOOptions)})

    def cuts(self) -> int:
        return self.steps_per_generation

    def lengths(self) -> tuple[int, int | None]:
        return self.num_generations, self.max_completion_length

    def reference(self, lora: bool) -> bool:
        return self.beta > 0 and not lora

    def sampling(self, cfg: ModelConfig) -> Sampling:
        """How tokens are drawn; a picture's placeholders never are."""
        banned = tuple(sorted(set(cfg.vision_token_ids)))
        return Sampling(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, banned
        ).validate()

    def problems(self, facts: Facts) -> list[str]:
        return [f"method.{line}" if not line.startswith("batch_size") else line for line in self._problems(facts)]

    def _problems(self, facts: Facts) -> list[str]:
        found: list[str] = []
        try:
            self.loss.validate(facts.batch_size * self.num_generations, len(self.reward_funcs))
        except ValueError as error:
            found += str(error).splitlines()
        cut = facts.microbatches * self.steps_per_generation
        if self.steps_per_generation > 0 and facts.batch_size % cut:
            found.append(
                f"batch_size = {facts.batch_size}: must be divisible by optim.gradient_accumulation_steps x "
                f"method.steps_per_generation = {cut}"
            )
        if self.beta > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p):
            found.append(
                f"beta = {self.beta}: a KL term needs the whole distribution, a reference that could not have "
                "drawn a token is infinitely far; set top_p 1, top_k 0 and min_p None, or beta 0"
            )
        if self.temperature == 0:
            found.append("temperature = 0: the completions of a group would all be the same")
        if self.sync_ref_model and facts.lora:
            found.append("sync_ref_model: with lora the reference is the model without adapters, which stays")
        length = self.max_completion_length or 0
        if length < 1:
            found.append("max_completion_length: a rollout needs a length in tokens")
        names = self.reward_funcs
        if not names or len(set(names)) != len(names):
            found.append(f"reward_funcs = {names}: name each function once, and at least one")
        for name in ("num_iterations", "steps_per_generation", "max_num_gen_batches", "repetition_n_grams"):
            if getattr(self, name) < 1:
                found.append(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.repetition_max_penalty > 0:
            found.append(f"repetition_max_penalty = {self.repetition_max_penalty}: must not be positive")
        if ("soft_overlong" in names) != (0 < self.soft_punish_cache <= length):
            found.append(
                f"soft_punish_cache = {self.soft_punish_cache}: goes with soft_overlong in reward_funcs, and lies in "
                f"1..max_completion_length = {length}"
            )
        if self.reward_timeout <= 0:
            found.append(f"reward_timeout = {self.reward_timeout}: must be above 0 seconds")
        if self.reward_rules == "released" and facts.thinking:
            found.append("reward_rules = 'released': the released rewards know no thinking format")
        try:
            Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty).validate()
        except InputError as error:
            found.append(str(error))
        return found

    def check(self) -> None:
        rewards.of_method(self, {}).close()

    def work(self, context: Context) -> "GRPOWork":
        return GRPOWork(self, context)

    def programs(self, sizes: Sizes, state: TrainState, layout: Layout) -> Generator[Program, Any, None]:
        yield from plan.programs(
            sizes,
            state,
            layout,
            loss=self.loss,
            sampling=self.sampling(layout.cfg),
            num_iterations=self.num_iterations,
            cuts=self.steps_per_generation,
        )


class GRPOWork(Work):
    """A step is draw, reward, arrange, score, update."""

    def __init__(self, method: GRPO, context: Context):
        self.method, self.context, self.loss = method, context, method.loss
        self.rewards = rewards.of_method(method, context.task_options)
        self.batches = rl_batches(
            context.mixture,
            context.model.processor,
            context.batch_size,
            context.model.buckets,
            context.seed,
            asking=context.asking,
            **context.reading,
        )
        self.sampling = method.sampling(context.cfg)
        cuts_idle = context.update.accumulation_steps > 1 and method.only_advantages
        self.one_update = dataclasses.replace(context.update, skip_idle=cuts_idle)
        self.copy: Any = None  # the program that makes the sampler's parameters, when it needs its own

    def first_own(self) -> Own:
        return adaptive.first(self.loss)

    def close(self) -> None:
        self.batches.close()
        self.rewards.close()

    def step(self, state: TrainState, own: Own, stop: Callable[[], bool]) -> tuple[TrainState, Own, Report | None]:
        clock, before = Clock(), self.batches.get_state()
        with clock("data"):
            batch = next(self.batches)
        drawn, rows, counts = self.draw(state, batch, clock)
        if stop():  # nothing is lost: the same prompts come again, and draw the same completions
            self.batches.set_state(before)
            return state, own, None
        groups, advantages, rollout, metrics = self.arrange(drawn, rows, counts, clock)
        with clock("score"):
            rollout = rollout.replace(ref_logps=self.reference_logps(state, rollout))
        with clock("update"):
            state, own, learned = self.update(state, own, rollout)
            jax.block_until_ready(state.step)
        seen = {
            "prompts": rollout.prompts,
            "completions": rollout.completions,
            "advantages": rollout.advantages,
        }
        of_all = advantages.size * processes.row_block(self.context.mesh)[1]
        nothing = "no completion got a reward: all were None, NaN or failed"
        report = Report(
            metrics | learned | clock.metrics(),
            rows=lambda: self.completed(groups, advantages),
            arrays=lambda: seen,
            nothing=nothing if metrics.get("rewards/none") == of_all else "",
        )
        return state, own, report

    def judge(self, texts: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
        """`reward`, the weighted sum of the rewards that read texts, and each of several as `reward_<function>`."""
        return self.rewards.of_answers(texts, records, self.method.reward_weights)

    # ------------------------------------------------------------ draw, reward

    def draw(self, state: TrainState, batch: Batch, clock: Clock) -> tuple[Drawn, Rows, dict[str, float]]:
        """Rewarded groups for every prompt of the batch, their rows on the mesh, and what to count.

        Dynamic sampling takes further batches until enough groups have rewards that differ.
        """
        method, wanted = self.method, len(batch.records)
        rows = self.encode(state, batch.prompts, clock)
        drawn = self.groups(state, batch, 0, rows, clock)
        counts: dict[str, float] = {}
        if method.filter_groups:
            inputs, keep = [batch.prompts], differing(drawn.groups, self.loss)
            while not all(processes.from_all(sum(keep) >= wanted)) and len(inputs) < method.max_num_gen_batches:
                with clock("data"):
                    more = next(self.batches)
                further = self.groups(state, more, len(inputs), self.encode(state, more.prompts, clock), clock)
                inputs, drawn = [*inputs, more.prompts], drawn + further
                keep += differing(further.groups, self.loss)
            counts |= {"filter_groups/drawn": len(drawn.groups), "filter_groups/kept": sum(keep)}
            # those that teach, in the order they were drawn; where too few were found, others whose advantage is 0
            drawn = drawn.chosen(sorted(range(len(drawn.groups)), key=lambda k: not keep[k])[:wanted])
            if len(inputs) > 1:
                unit = self.context.cfg.vision.spatial_merge_size**2
                rows = self.encode(state, join_prompts(inputs, drawn.picks, unit), clock)
        if method.reward_errors == "skip":
            counts["rewards/failed"] = drawn.missed
        return drawn, rows, counts | {"num_tokens": drawn.tokens}

    def encode(self, state: TrainState, prompts: Prompts, clock: Clock) -> Rows:
        """Prompts on the mesh; with a frozen tower its output instead of pictures."""
        with clock("encode"):
            on_mesh, vision_tokens = shard_batch(prompts, self.context.mesh), None
            if on_mesh.vision is not None and self.context.frozen_tower:
                # encoded once: sampling, reference and update read the same tokens
                vision_tokens = jax.block_until_ready(encode_jit(state.params, self.context.cfg, on_mesh.vision))
                on_mesh = on_mesh.replace(vision=None)
        return on_mesh, vision_tokens

    def groups(self, state: TrainState, batch: Batch, number: int, rows: Rows, clock: Clock) -> Drawn:
        """G rewarded completions of every prompt of this process.

        `number`: batch of this rollout, so that each draws its own randomness.
        """
        g, tokenizer = self.method.num_generations, self.context.model.tokenizer
        host = self.sample(state, batch, number, rows, clock)
        with clock("reward"):
            # the released rewards look for the end token
            ids, texts, rewarded = texts_of(host, tokenizer, self.method.reward_rules == "released")
            table, parts = self.rewards(rewarded, [record for record in batch.records for _ in range(g)], ids)
            groups = []
            for row, record in enumerate(batch.records):
                own = slice(row * g, (row + 1) * g)
                tokens, logps, count, ended = (x[row] for x in (host.tokens, host.logps, host.lengths, host.stopped))
                groups.append(Group(record, tokens, logps, count, ended, texts[own], table[own], parts[own]))
        spent = int(batch.prompts.lengths.sum()) + sum(int(group.lengths.sum()) for group in groups)
        return Drawn(groups, [(number, row) for row in range(len(groups))], spent, self.rewards.failed)

    def sample(self, state: TrainState, batch: Batch, number: int, rows: Rows, clock: Clock) -> Any:
        """Completions [B, G, T] of this process's prompts, on the host."""
        context, g = self.context, self.method.num_generations
        with clock("relayout"):
            params, (prompts, vision_tokens) = self.for_sampling(state.params, rows)
        with clock("sample"):
            step_key = jax.random.fold_in(jax.random.key(context.seed), int(state.step))
            block, _ = processes.row_block(context.mesh)
            first = number * context.batch_size + block * len(batch.records)
            ids = shard_batch(np.arange(first, first + len(batch.records), dtype=np.int32), context.mesh)
            assert self.method.max_completion_length is not None
            samples = sampler.sample(
                params,
                context.cfg,
                prompts,
                layouts.move_rows(keys_of_rows(step_key, ids, g), context.sample_mesh),
                self.sampling,
                max_new_tokens=self.method.max_completion_length,
                stop_ids=context.model.stop_ids,
                pad_id=context.model.pad_id,
                vision_tokens=vision_tokens,
            )
            del params, prompts, vision_tokens  # the copy's memory belongs to the update
            return processes.local_rows(layouts.move_rows(samples, context.mesh))

    def for_sampling(self, params: Params, rows: Rows) -> tuple[Params, Rows]:
        """Parameters and rows as the sampler wants them: the trainer's own where both layouts and types agree."""
        mesh, dtype = self.context.sample_mesh, self.context.cfg.dtype
        if self.copy is None and layouts.needs_copy(params, mesh, dtype):
            self.copy = layouts.relayout(params, mesh, dtype)
        return self.copy(params) if self.copy else params, layouts.move_rows(rows, mesh)

    # ------------------------------------------------------------ arrange

    def arrange(
        self, drawn: Drawn, rows: Rows, counts: dict[str, float], clock: Clock
    ) -> tuple[list[Group], np.ndarray, Rollout, dict[str, Any]]:
        """(groups and their advantages [B, G] in the order of the rollout, the rollout without reference, metrics)."""
        with clock("reward"):
            context, groups, g = self.context, drawn.groups, self.method.num_generations
            block, blocks = processes.row_block(context.mesh)
            names = tuple(self.rewards.names)
            of_all, metrics = advantages_of_all(groups, counts, block, names, self.loss)
            b = len(groups)
            advantages = of_all.reshape(-1, g)[block * b : (block + 1) * b]
            devices = context.mesh.shape["replica"] * context.mesh.shape["fsdp"] // blocks
            how = arrange(
                column(groups, "lengths").reshape(b, g),
                np.any(advantages, axis=1),
                longest=int(metrics["completions/max_length"]),
                limit=groups[0].tokens.shape[1],
                devices=devices,
                cuts=self.method.steps_per_generation,
                microbatches=self.one_update.accumulation_steps,
                skip_idle=self.one_update.skip_idle,
                all_teach=bool(of_all.reshape(-1, g).any(1).all()),
                agree=lambda value: max(processes.from_all(value)),
            )
            if how.order is not None:
                order = how.order
                rows = layouts.take_rows(rows, shard_batch(order % (b // devices), context.mesh), context.mesh)
                groups, advantages = [groups[k] for k in order], advantages[order]
        with clock("score"):
            rollout = self.rollout(groups, advantages, rows, how.width, how.short)
        return groups, advantages, rollout, metrics

    def rollout(self, groups: list[Group], advantages: np.ndarray, rows: Rows, width: int, short: int) -> Rollout:
        """The groups' arrays on the mesh; completions cut to `width` tokens."""
        b, g, mesh = len(groups), self.method.num_generations, self.context.mesh
        lengths, stopped = column(groups, "lengths"), column(groups, "stopped")
        counted = np.arange(width) < lengths[:, None]
        if self.method.mask_truncated_completions:
            counted &= stopped[:, None]
        logps = shard_batch(np.stack([group.logps[:, :width] for group in groups]), mesh)
        completions = Completions(
            tokens=shard_batch(np.stack([group.tokens[:, :width] for group in groups]), mesh),
            lengths=shard_batch(lengths.reshape(b, g), mesh),
            weights=shard_batch(counted.reshape(b, g, -1).astype(np.float32), mesh),
        )
        return Rollout(
            prompts=rows[0],
            completions=completions,
            advantages=shard_batch(advantages, mesh),
            vision_tokens=rows[1],
            # the weights that sampled are the weights at the start of the update: no pass for old log-probabilities
            old_logps=logps if self.method.num_iterations * self.method.steps_per_generation > 1 else None,
            sampling_logps=logps,
            short=short,
        )

    def completed(self, groups: list[Group], advantages: np.ndarray) -> Completed:
        """The table of completions."""
        records = [group.record for group in groups for _ in range(self.method.num_generations)]
        table, parts = column(groups, "rewards"), [part for group in groups for part in group.parts]
        columns: dict[str, list[float]] = {name: table[:, k].tolist() for k, name in enumerate(self.rewards.names)}
        for name in sorted({name for row in parts for name in row} - {"reward"}):
            columns[name] = [row.get(name, float("nan")) for row in parts]
        return Completed(
            records,
            [self.context.asking.title(record) for record in records],
            [text for group in groups for text in group.texts],
            columns,
            advantages.reshape(-1).tolist(),
        )

    # ------------------------------------------------------------ score, update

    def reference_logps(self, state: TrainState, rollout: Rollout) -> Any:
        """Log-probabilities under the reference; no pass when no KL term reads them."""
        if self.method.beta == 0:
            return None
        params = reference_params(state, self.context.update.trainable)
        given = (rollout.prompts, rollout.completions, self.sampling, rollout.vision_tokens, rollout.short)
        return score_jit(params, self.context.cfg, *given)[0]

    def update(self, state: TrainState, own: Own, rollout: Rollout) -> tuple[TrainState, Own, dict[str, Any]]:
        """`num_iterations` passes of `steps_per_generation` updates; metrics are means over them."""
        cuts, every = self.method.steps_per_generation, []
        for _ in range(self.method.num_iterations):
            for cut in range(cuts):
                part = rollout if cuts == 1 else jax.tree.map(lambda x, cut=cut: x[cut::cuts], rollout)
                state, metrics = grpo_step(
                    state,
                    part,
                    *adaptive.coefficients(own, self.loss),
                    update=self.one_update,
                    options=self.loss,
                    sampling=self.sampling,
                )
                every.append(metrics)
                own = adaptive.moved(own, self.loss, metrics, part.advantages.size)
                state = adaptive.synchronised(state, self.loss, self.context.update.trainable)
        mean = every[0] if len(every) == 1 else jax.tree.map(lambda *x: jnp.mean(jnp.stack(x)), *every)
        return state, own, mean
