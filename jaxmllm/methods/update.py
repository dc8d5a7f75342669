"""One optimiser step as a pure function of state and batch, whatever the loss.

The loss of a whole update does not depend on how it is cut: microbatches are scanned, their losses summed, and every
normaliser is counted over the update first. Microbatch k takes every K-th prompt, so that each device keeps its rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxmllm.machine.mesh import RULES
from jaxmllm.methods.optim import join, kept_layout, narrowed, split, wide
from jaxmllm.model.config import ModelConfig
from jaxmllm.model.logprobs import Sampling
from jaxmllm.rollout.scorer import score
from jaxmllm.types import TrainState

Metrics = dict[str, Any]


def microbatches(batch: Any, count: int) -> Any:
    """[B, ...] -> [count, B / count, ...]; microbatch k takes rows k, k + count, ..."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


@dataclasses.dataclass(frozen=True)
class Update:
    """What is static about an update; hashable, so that one program serves every step."""

    cfg: ModelConfig
    tx: optax.GradientTransformation
    trainable: str  # regular expression on parameter paths
    accumulation_steps: int = 1  # microbatches
    rules: tuple = RULES  # where parameters lie: the model's rules and the method's own
    skip_idle: bool = False  # leave out microbatches whose advantages are all 0, where nothing else teaches


def apply_gradients(
    state: TrainState,
    update: Update,
    loss_fn: Callable[[dict, Any], tuple[Float[Array, ""], Metrics]],
    batch: Any,
    teaches: Callable[[Any], Bool[Array, ""]] | None = None,
) -> tuple[TrainState, Float[Array, ""], Metrics]:
    """One optimiser step on the sum of `loss_fn` over microbatches. A step whose gradient is not finite changes nothing.

    `teaches(microbatch)`: False where loss and gradient are known to be 0; it is then not computed, and its metrics are 0.
    Returns the new state, the loss and the metrics of every microbatch, stacked.
    """
    train, frozen = split(state.params, update.trainable)
    differentiate = jax.value_and_grad(lambda part, micro: loss_fn(join(part, frozen), micro), has_aux=True)

    def add(total, micro):
        (loss, metrics), grads = differentiate(train, micro)
        return jax.tree.map(jnp.add, total, (loss, wide(grads))), metrics

    def add_if_it_teaches(total, micro):
        _, metrics = jax.eval_shape(add, total, micro)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)
        return jax.lax.cond(teaches(micro), lambda: add(total, micro), lambda: (total, nothing))

    if update.accumulation_steps == 1:
        (loss, metrics), grads = differentiate(train, batch)
        grads, metrics = wide(grads), jax.tree.map(lambda x: x[None], metrics)
    else:
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, wide(train)))
        body = add_if_it_teaches if teaches else add
        (loss, grads), metrics = jax.lax.scan(body, zero, microbatches(batch, update.accumulation_steps))
    norm = optax.tree.norm(grads)
    exact = wide(train)
    updates, opt_state = update.tx.update(grads, state.opt_state, exact)
    stepped = narrowed(optax.apply_updates(exact, updates), train, state.step)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)

    def keep(new, old):
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    train, opt_state = kept_layout(keep(stepped, train), keep(opt_state, state.opt_state), update.rules)
    state = state.replace(step=state.step + 1, params=join(train, frozen), opt_state=opt_state)
    return state, loss, metrics | {"grad_norm": norm[None], "nonfinite": (~finite).astype(jnp.float32)[None]}


def update_on_answers(
    state: TrainState,
    batch: tuple[Any, ...],
    update: Update,
    total: Float[Array, ""],
    numerator: Callable[[Float[Array, "B G T"], Any], tuple[Float[Array, ""], Metrics]],
) -> tuple[TrainState, Metrics]:
    """One update on given completions; `batch` begins with prompts and completions.

    `numerator(logps, microbatch)`: its part of what is divided by `total`, and metrics to add up.
    """

    def loss_fn(params, micro):
        logps, entropies = score(params, update.cfg, micro[0], micro[1], Sampling())
        counted = micro[1].weights > 0
        loss, metrics = numerator(logps, micro)
        return loss / total, metrics | {
            "entropy": jnp.where(counted, entropies, 0).sum(),
            "num_tokens": counted.sum().astype(jnp.float32),
        }

    state, loss, metrics = apply_gradients(state, update, loss_fn, batch)
    once = {name: metrics.pop(name)[0] for name in ("grad_norm", "nonfinite")}
    summed = jax.tree.map(lambda x: x.sum(0), metrics)
    entropy = summed.pop("entropy") / jnp.maximum(summed["num_tokens"], 1)
    return state, summed | once | {"loss": loss, "entropy": entropy}
