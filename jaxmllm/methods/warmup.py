"""Vision warm-up: a small tower learns to see before the decoder learns to talk about it.

Trained from nothing on a small budget, tower and decoder together do not learn to ground: the loss stays at the marginal
distribution of boxes. A tower that has first been told, for each vision token, which object covers most of it, makes the rest
easy. All targets are read through the (tied) embedding: attribute words directly, each of the four coordinates as the token
of its number after a linear map of its own, which is thrown away. So numbers get embeddings that lie in order, and the
decoder has only to find those maps again.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmllm.data.images import PixelConfig, image_frames
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.machine.mesh import shard_batch
from jaxmllm.methods.box_targets import BoxTargets
from jaxmllm.methods.method import Clock, Context, Method, Own, Params, Report, Rules, Work
from jaxmllm.methods.update import Update, apply_gradients
from jaxmllm.model import family
from jaxmllm.model.config import ModelConfig
from jaxmllm.types import TrainState, Vision
from jaxmllm.world.source import WorldSource

COORDINATES = ("x1", "y1", "x2", "y2")
HEADS = "warmup"  # key of the throw-away heads in the parameter tree
Targets = WorldSource | BoxTargets  # what tells which object each cell of a picture shows


class WarmupBatch(struct.PyTreeNode):
    """Pictures of one size and, for every vision token, what it shows; -1 where a field does not apply."""

    vision: Vision
    words: dict[str, Int[Array, "B cells"]]  # index into the field's list of words
    boxes: Int[Array, "B cells 4"]  # x1, y1, x2, y2 of the object, pixels


def word_fields(sources: Sequence[Targets]) -> dict[str, tuple[str, ...]]:
    """The words each field of `grid_targets` chooses from. Sources that share a field must share its words."""
    fields: dict[str, tuple[str, ...]] = {}
    for source in sources:
        spec: Any = getattr(source, "spec", None)
        if isinstance(source, BoxTargets):
            found = source.words
        elif hasattr(spec, "vocabulary"):
            found = {"word": tuple(spec.vocabulary)}
        else:
            found = {"shape": spec.shapes, "colour": spec.colours, "size": tuple(s[0] for s in spec.sizes)}
        for name, words in found.items():
            if fields.setdefault(name, words) != words:
                raise ValueError(f"sources disagree on the words of {name!r}: {fields[name]} and {words}")
    return fields


def init_heads(key: Any, width: int) -> dict:
    """A linear map for each coordinate, from a vision token to the embedding of its number."""
    return {"kernel": width**-0.5 * jax.random.normal(key, (len(COORDINATES), width, width))}


class _Pictures:
    """Random access over several sources by turns."""

    def __init__(self, sources: Sequence[Targets], pixels: PixelConfig):
        self.sources, self.pixels, self.fields = tuple(sources), pixels, word_fields(sources)

    def __len__(self) -> int:
        return min(map(len, self.sources)) * len(self.sources)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        source = self.sources[index % len(self.sources)]
        targets = source.grid_targets(index // len(self.sources), self.pixels.factor)
        frames = image_frames(targets["image"], self.pixels)
        cells = frames.token_index.size
        none = np.full(cells, -1, np.int32)
        item = {name: targets[name].reshape(-1) if name in targets else none for name in self.fields}
        item["boxes"] = np.stack([targets[name].reshape(-1) for name in COORDINATES], axis=-1)
        return item | {"patches": frames.patches, "positions": frames.positions, "token_index": frames.token_index}


def warmup_batches(
    sources: Sequence[Targets], pixels: PixelConfig, batch_size: int, seed: int, workers: int = 1
) -> tuple[Any, np.ndarray]:
    """An endless iterator of WarmupBatch with `get_state`, `set_state` and `close`; and the raster order of tokens.

    All pictures must have one size.
    """
    pictures = _Pictures(sources, pixels)
    fields = tuple(pictures.fields)

    def pack(items: Sequence[dict[str, np.ndarray]]) -> WarmupBatch:
        stacked: dict[str, Any] = {name: np.stack([item[name] for item in items]) for name in items[0]}
        vision = Vision(stacked["patches"], stacked["positions"])
        return WarmupBatch(vision, {name: stacked[name] for name in fields}, stacked["boxes"])

    data = grain.MapDataset.source(pictures).shuffle(seed).repeat().batch(batch_size, batch_fn=pack)
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=4 * workers)
    return iter(data.to_iter_dataset(options)), pictures[0]["token_index"]


def _cross_entropy(logits: Float[Array, "*n C"], target: Int[Array, "*n"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean loss and accuracy over targets that are not -1."""
    known = target >= 0
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(target, 0)[..., None], axis=-1)[..., 0]
    count = jnp.maximum(known.sum(), 1)
    right = (logits.argmax(-1) == target) & known
    return -jnp.where(known, chosen, 0).sum() / count, right.sum() / count


@functools.partial(jax.jit, static_argnames=("update", "word_ids"), donate_argnames="state")
def warmup_step(
    state: TrainState,
    batch: WarmupBatch,
    token_index: Int[Array, "cells"],
    *,
    update: Update,
    word_ids: tuple[tuple[str, tuple[int, ...]], ...],
    number_ids: tuple[int, ...],
) -> tuple[TrainState, dict[str, Any]]:
    """One update of the tower. `word_ids`: for each field, the token of each of its words; `number_ids`: of 0, 1, .."""

    def loss_fn(params, micro: WarmupBatch):
        tokens = family.encode(params, update.cfg, micro.vision)[:, token_index].astype(jnp.float32)
        normed = tokens * jax.lax.rsqrt(jnp.mean(tokens**2, axis=-1, keepdims=True) + 1e-6)
        losses, metrics = [], {}
        for name, ids in word_ids:
            table = params["embed"][jnp.asarray(ids)].astype(jnp.float32)
            loss, accuracy = _cross_entropy(normed @ table.T, micro.words[name])
            losses.append(loss)
            metrics[f"accuracy/{name}"] = accuracy
        numbers = params["embed"][jnp.asarray(number_ids)].astype(jnp.float32)
        mapped = jnp.einsum("bcd,kde->bcke", normed, params[HEADS]["kernel"])
        coordinates = mapped @ numbers.T
        loss, metrics["accuracy/coordinate"] = _cross_entropy(coordinates, micro.boxes)
        # a coordinate counts as much as an attribute
        return (sum(losses) + 4 * loss) / (len(losses) + 4), metrics

    state, loss, metrics = apply_gradients(state, update, loss_fn, batch)
    return state, {"loss": loss} | {name: value.mean() for name, value in metrics.items()}


class WarmupWork(Work):
    def __init__(self, context: Context):
        pixels = context.model.processor.pixel_config
        opened = [open_source(spec) for spec in context.specs]
        # photographs: detection records made to tell what each cell of a picture shows
        sources: list[Any] = [s if hasattr(s, "grid_targets") else BoxTargets(s, pixels) for s in opened]
        threads = context.reading["threads"]
        self.batches, token_index = warmup_batches(sources, pixels, context.batch_size, context.seed, threads)
        self.context, self.token_index = context, jnp.asarray(token_index)
        self.number_ids, self.word_ids = target_tokens(sources, context.model.tokenizer)

    def step(self, state: TrainState, own: Own, stop: Callable[[], bool]) -> tuple[TrainState, Own, Report | None]:
        clock, update = Clock(), self.context.update
        with clock("data"):
            batch = next(self.batches)
        with clock("update"):
            on_mesh = shard_batch(batch, self.context.mesh)
            ids = dict(word_ids=self.word_ids, number_ids=self.number_ids)
            state, metrics = warmup_step(state, on_mesh, self.token_index, update=update, **ids)
            jax.block_until_ready(state.step)
        return state, own, Report(metrics | clock.metrics(), arrays=lambda: {"prompts": batch})


def target_tokens(
    sources: Sequence[Targets], tokenizer: Any
) -> tuple[tuple[int, ...], tuple[tuple[str, tuple[int, ...]], ...]]:
    """(tokens of 0, 1, .. up to the largest coordinate; for each field the token of each of its words)."""
    shown: list[Any] = [getattr(source, "spec", source) for source in sources]
    largest = max(max(spec.size) for spec in shown)
    pieces = [tokenizer.encode(str(n), add_special_tokens=False) for n in range(largest + 1)]
    if any(len(piece) != 1 for piece in pieces):
        raise InputError(f"vision_warmup: the tokenizer must write each of 0..{largest} as one token")
    # the piece a word has inside a question, where a blank precedes it
    words = tuple(
        (name, tuple(tokenizer.encode(f"the {word}", add_special_tokens=False)[-1] for word in words))
        for name, words in word_fields(sources).items()
    )
    return tuple(piece[0] for piece in pieces), words


@dataclasses.dataclass(frozen=True)
class VisionWarmup(Method):
    """The tower learns what each of its tokens shows. Its heads are thrown away; there is no plan, it trains small towers."""

    rules: ClassVar[Rules] = ((f"{HEADS}/.*", PartitionSpec()),)
    keys: ClassVar[tuple[str, ...]] = (HEADS,)

    def grow(self, key: jax.Array, params: Params, cfg: ModelConfig) -> Params:
        return params | {HEADS: init_heads(key, family.of(cfg).vision_width(cfg))}

    def work(self, context: Context) -> WarmupWork:
        return WarmupWork(context)

    def export(self, params: Params, folder: Path) -> None:
        """Nothing: the heads are thrown away."""
