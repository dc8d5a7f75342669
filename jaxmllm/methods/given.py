"""What methods that learn from given answers share: batches, their `Work`, the checks, the program of an update."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.data.examples import Weigh
from jaxmllm.data.pipeline import Batch, Batches, sft_batches
from jaxmllm.data.sources import RecordSource
from jaxmllm.machine import processes
from jaxmllm.machine.mesh import shard_batch
from jaxmllm.methods import shapes
from jaxmllm.methods.method import Clock, Context, Facts, Layout, Own, Params, Report, Work
from jaxmllm.methods.shapes import Sizes, Traced
from jaxmllm.model.logprobs import Sampling
from jaxmllm.rollout.scorer import score, score_jit
from jaxmllm.tasks.task import Direction
from jaxmllm.types import Completions, Prompts, TrainState


def answer_batches(
    context: Context,
    questions: int = 1,
    weigh: Weigh | None = None,
    source: RecordSource | None = None,
    **options: Any,
) -> Batches:
    """Batches of given answers, `questions` a prompt; of the training mixture unless another source is given."""
    return sft_batches(
        context.mixture if source is None else source,
        context.model.processor,
        context.batch_size,
        context.model.buckets,
        context.seed,
        asking=context.asking,
        questions=questions,
        weigh=weigh,
        **{**context.reading, **options},
    )


HELD_OUT: Mapping[str, Direction] = {"loss": "lower", "perplexity": "lower"}  # figures of `AnswerWork.validate`


class AnswerWork(Work):
    """A method that makes one update on each batch of given answers."""

    mask_history = False  # of a conversation the last answer alone counts

    def __init__(self, context: Context, batches: Batches, questions: int):
        self.context, self.batches, self.questions = context, batches, questions

    def update(self, state: TrainState, prompts: Prompts, completions: Completions, batch: Batch) -> tuple[Any, dict]:
        """(new state, metrics) of one update on arrays on the mesh."""
        raise NotImplementedError

    def step(self, state: TrainState, own: Own, stop: Callable[[], bool]) -> tuple[TrainState, Own, Report | None]:
        clock = Clock()
        with clock("data"):
            batch = next(self.batches)
        with clock("update"):
            prompts, completions = shard_batch((batch.prompts, batch.completions), self.context.mesh)
            state, metrics = self.update(state, prompts, completions, batch)
            jax.block_until_ready(state.step)
        seen = {"prompts": batch.prompts, "completions": batch.completions}
        return state, own, Report(metrics | clock.metrics(), arrays=lambda: seen)

    def figures(self, state: TrainState, batch: Batch, logps: np.ndarray) -> dict[str, tuple[float, float]]:
        """(sum, count) of each held-out figure on one batch: by default the loss of the answers' tokens.

        `logps` [B, G, T] are those of the batch's completions.
        """
        assert batch.completions is not None
        weights = np.asarray(batch.completions.weights)
        return {"loss": (-float((logps * weights).sum()), float(weights.sum()))}

    def validate(self, state: TrainState, sources: Mapping[str, RecordSource], limit: int) -> dict[str, float]:
        """`loss` (nats a token) and `perplexity` of the held-out gold answers, and what else `figures` gives."""
        found: dict[str, float] = {}
        for name, source in sources.items():
            found |= {f"{name}/{figure}": value for figure, value in self._held_out(state, source, limit).items()}
        return found

    def score(self, params: Params, batch: Batch) -> np.ndarray:
        """Log-probabilities [B, G, T] of the batch's completions, of this process's rows."""
        arrays = shard_batch((batch.prompts, batch.completions), self.context.mesh)
        logps, _ = score_jit(params, self.context.cfg, *arrays, Sampling())
        return processes.local_rows(logps)

    def _held_out(self, state: TrainState, source: RecordSource, limit: int) -> dict[str, float]:
        sums: dict[str, np.ndarray] = {}
        records = 0
        with answer_batches(
            self.context, self.questions, source=source, shuffle=False, mask_history=self.mask_history
        ) as batches:
            for batch in batches:
                logps = self.score(state.params, batch)
                for figure, pair in self.figures(state, batch, logps).items():
                    sums[figure] = sums.get(figure, np.zeros(2)) + pair
                records += len(batch.records)
                if records >= limit:
                    break
        means = {figure: float(top / max(bottom, 1e-9)) for figure, (top, bottom) in sums.items()}
        return means | ({"perplexity": float(np.exp(min(means["loss"], 700.0)))} if "loss" in means else {})


def sources_problems(facts: Facts, kind: str, method: str) -> list[str]:
    """A line where a source is not of the kind that the method learns from."""
    if all(spec.partition(":")[0] == kind for spec in facts.sources):
        return []
    return [f"data.train = {facts.sources}: method {method} learns from {kind}: sources"]


def arguments(sizes: Sizes, layout: Layout) -> tuple[Prompts, Completions]:
    """Shapes of a batch of given answers."""
    return shapes.prompts(sizes, layout.cfg, layout.mesh), shapes.completions(sizes, layout.mesh)


def forward(state: TrainState, layout: Layout, prompts: Prompts, completions: Completions) -> Traced:
    """One pass over the answers."""

    def scored(params: Any, prompts: Prompts, completions: Completions) -> Any:
        return score(params, layout.cfg, prompts, completions, Sampling())

    return Traced(scored, (state.params, prompts, completions))


def per_row(sizes: Sizes, layout: Layout, *tail: int) -> Any:
    """float32 [B, G, *tail] beside a batch."""
    return shapes.put(jax.ShapeDtypeStruct((sizes.prompts, sizes.generations, *tail), jnp.float32), layout.mesh)
