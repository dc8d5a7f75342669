"""Records become batches: Grain loads, encodes and pads ahead of the trainer, and can stop and go on at any batch.

Batch k is a function of (source, seed, k) alone, whatever the number of threads, worker processes or hosts, so the
state of an iterator is the number of its next batch.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from jaxmllm.data.chat import Buckets, Processor, collate, collate_completions
from jaxmllm.data.examples import AnswerEncoder, Asking, Encoded, PromptEncoder, Weigh
from jaxmllm.data.sources import ENDLESS, RecordSource, order, where
from jaxmllm.data.turns import all_turns
from jaxmllm.errors import InputError
from jaxmllm.types import Completions, Prompts, Vision

log = logging.getLogger(__name__)
Sizes = Int[np.ndarray, "4"]  # frames, windows, prompt tokens, completion tokens of a batch, see `Buckets`


@dataclasses.dataclass(frozen=True)
class Batch:
    """B prompts with their records; numpy leaves.

    An ordered pass may end with fewer records than rows, or leave out what cannot be read: then the last rows repeat
    others and must be thrown away; their completions have length 0.
    """

    step: int  # number of the batch
    records: list[Any]  # one for each row: a record; with completions, the list of their records
    index: Int[np.ndarray, "B"]  # place of each row's record in the source
    prompts: Prompts
    completions: Completions | None = None


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What a worker hands over: a batch, or its rows where all hosts must first agree on the sizes."""

    bad: dict[int, str]  # records that could not be read
    rows: list[Encoded] | None = None  # None: too many could not be read
    real: int = 0  # rows that count; the others come after them
    batch: Batch | None = None


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Batch number -> rows of this process. Picklable, so that it can run in worker processes."""

    source: RecordSource
    indices: grain.MapDataset  # the order of the records, without end
    encode: Callable[[RecordSource, int, int], Encoded]  # source, index, place in the order
    collate: Callable[..., Batch] | None  # None: the consumer does it
    batch_size: int  # of all processes together
    block: tuple[int, int]  # rows of the batch that are this process's
    total: int | None  # records of an ordered pass; None: training, without end
    max_bad_records: int

    def __call__(self, step: int) -> _Rows:
        bad: dict[int, str] = {}
        real: list[Encoded] = []
        others: list[Encoded] = []
        for place in range(step * self.batch_size + self.block[0], step * self.batch_size + self.block[1]):
            inside = place if self.total is None else min(place, self.total - 1)
            index, row = int(self.indices[inside]), None
            for attempt in range(min(self.max_bad_records + 1, len(self.source))):
                # in place of a bad record the next readable one: decided by the data alone, so resuming repeats it
                chosen = (index + attempt) % len(self.source)
                try:
                    with _named(self.source, chosen):
                        row = self.encode(self.source, chosen, inside)
                        break
                except InputError as error:
                    bad[chosen] = str(error)
            if row is None or len(bad) > self.max_bad_records:
                return _Rows(bad)
            counts = self.total is None or (inside == place and attempt == 0)
            (real if counts else others).append(row)
        if self.collate is None:
            return _Rows(bad, real + others, len(real))
        return _Rows(bad, [], len(real), self.collate(step, real + others, len(real)))


@contextlib.contextmanager
def _named(source: RecordSource, index: int) -> Iterator[None]:
    """Puts file and index before a message that lacks them."""
    name = where(source, index)
    try:
        yield
    except InputError as error:
        raise (error if str(error).startswith(name) else InputError(f"{name}: {error}")) from None
    except KeyError as error:
        raise InputError(f"{name}: field {error} is missing") from None
    except (TypeError, ValueError, AttributeError, LookupError, OSError) as error:
        raise InputError(f"{name}: a field has the wrong form ({error})") from None


# ---------------------------------------------------------------- padding


def batch_sizes(rows: Sequence[Encoded], buckets: Buckets) -> Sizes:
    """The smallest buckets that hold the rows; 0 frames and windows for text alone, 0 completion tokens for none."""
    kinds = [field.name for field in dataclasses.fields(buckets)]
    needs = np.max([row.sizes for row in rows], axis=0).tolist()
    return np.array([n and buckets.fit(kind, n) for kind, n in zip(kinds, needs, strict=True)], np.int32)


def pad(step: int, rows: Sequence[Encoded], real: int, size: Sizes, picture: tuple[int, int]) -> Batch:
    """Rows padded to exactly `size`; `picture` is (P, C), for a process whose rows have no pictures."""
    buckets = Buckets(*((max(int(n), 1),) for n in size))
    prompts = collate([row.example for row in rows], buckets)
    if prompts.vision is None and size[0]:
        places = (len(rows), int(size[0]), int(size[1]), picture[0])
        patches: Any = np.zeros((*places, picture[1]), np.float32)
        positions: Any = np.full((*places, 2), -1, np.int32)
        prompts = prompts.replace(vision=Vision(patches, positions))
    index = np.array([row.index for row in rows], np.int64)
    if not size[3]:
        return Batch(step, [row.records[0] for row in rows[:real]], index, prompts)
    nothing: list[list] = [[]] * len(rows[0].completions)
    tokens = [row.completions if k < real else nothing for k, row in enumerate(rows)]
    weights = [row.weights if k < real else nothing for k, row in enumerate(rows)]
    completions = collate_completions(tokens, buckets, weights)
    return Batch(step, [row.records for row in rows[:real]], index, prompts, completions)


def join_prompts(parts: Sequence[Prompts], picks: Sequence[tuple[int, int]], merge: int) -> Prompts:
    """Rows of several batches as one, padded to the largest: `picks` are (batch, row). numpy leaves.

    `merge`: patches of a vision token. The sizes are those of all `parts`, picked from or not, so that processes which pick
    differently pad alike.
    """

    def joined(leaves: list[Any], fill: int = 0) -> Any:
        shape = np.max([leaf.shape[1:] for leaf in leaves], axis=0).astype(int)
        whole = np.full((len(picks), *shape), fill, leaves[0].dtype)
        for place, (part, row) in enumerate(picks):
            value = np.asarray(leaves[part][row])
            corner: tuple[Any, ...] = (place, *map(slice, value.shape))
            whole[corner] = value
        return whole

    pictures = [part.vision for part in parts if part.vision is not None]
    vision, indices = None, [np.asarray(part.vision_index) for part in parts]
    if pictures:
        _, frames, windows, patches, _ = np.max([picture.patches.shape for picture in pictures], axis=0)
        unit = patches // merge  # vision tokens of a window
        for k, part in enumerate(parts):
            if part.vision is not None:  # an index counts the windows of its batch: see `collate`
                frame, token = np.divmod(indices[k], part.vision.patches.shape[2] * unit)
                indices[k] = np.where(indices[k] < 0, -1, frame * windows * unit + token)
        empty = pictures[0].patches.shape[-1]
        all_parts = [
            part.vision
            or Vision(
                np.zeros((len(part.tokens), frames, windows, patches, empty), np.float32),  # type: ignore[arg-type]
                np.full((len(part.tokens), frames, windows, patches, 2), -1, np.int32),  # type: ignore[arg-type]
            )
            for part in parts
        ]
        vision = Vision(joined([v.patches for v in all_parts]), joined([v.positions for v in all_parts], -1))
    names = ("tokens", "positions", "lengths", "next_position")
    leaves = {name: joined([getattr(part, name) for part in parts]) for name in names}
    return Prompts(**leaves, vision_index=joined(indices, -1), vision=vision)


def agree_with_all(size: Sizes) -> Sizes:
    """The largest sizes of all processes; every process must call it for the same batch."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(size)).max(axis=0)


# ---------------------------------------------------------------- the iterator


class Batches:
    """An iterator over batches that are made ahead, in the background.

    `get_state` and `set_state` are exact at every position: the state is JSON, and says which batch is next. `bad` are
    the records that could not be read so far, {index: message}; more than `max_bad_records` of them are an InputError.
    Close it, or use it in `with`, to stop its threads.
    """

    def __init__(
        self,
        loader: _Loader,
        steps: int | None,
        collate: Callable[..., Batch],
        size: Callable[[Sequence[Encoded]], Sizes],
        agree: Callable[[Sizes], Sizes] | None,
        identity: Mapping[str, Any],
        threads: int,
        workers: int,
        prefetch: int,
    ):
        self._loader, self.steps, self._collate, self._size, self._agree = loader, steps, collate, size, agree
        self._identity = dict(identity)
        self._reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
        self._workers = workers
        self.step = 0
        self.bad: dict[int, str] = {}
        self._iterator: Any = None

    def __len__(self) -> int:
        """Batches of one pass over the data."""
        return len(self._loader.source) // self._loader.batch_size if self.steps is None else self.steps

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.steps is not None and self.step >= self.steps:
            raise StopIteration
        if self._iterator is None:
            self._iterator = iter(self._dataset())
        loaded: _Rows = next(self._iterator)
        for index, message in loaded.bad.items():
            if index not in self.bad:
                log.warning("left out: %s", message)
            self.bad[index] = message
        limit = self._loader.max_bad_records
        if loaded.rows is None or len(self.bad) > limit:
            first, count = next(iter(self.bad.values())), len(self.bad)
            raise InputError(
                first if not limit else f"{first}; {count} records could not be read, max_bad_records is {limit}"
            )
        batch = loaded.batch
        if batch is None:
            size = self._size(loaded.rows)
            size = size if self._agree is None else self._agree(size)
            batch = self._collate(self.step, loaded.rows, loaded.real, size)
        self.step += 1
        return batch

    def _dataset(self) -> grain.IterDataset:
        dataset = grain.MapDataset.range(self.step, ENDLESS if self.steps is None else self.steps).map(self._loader)
        ahead = dataset.to_iter_dataset(self._reading)
        if not self._workers:
            return ahead
        if not flags.FLAGS.is_parsed():  # Grain reads its flags, which nobody parses outside of absl programs
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=self._reading.prefetch_buffer_size)
        return ahead.mp_prefetch(options)

    def get_state(self) -> dict[str, Any]:
        """Where to go on: JSON."""
        return {**self._identity, "step": self.step, "bad": {str(k): v for k, v in self.bad.items()}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken. InputError where it belongs to other data, another seed or batch size."""
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise InputError(
                    f"data state: it was saved with {key} {state.get(key)!r}, this run has {value!r}; "
                    "resume with the same data, seed and batch size, or start a new run"
                )
        self.close()
        self.step = int(state["step"])
        self.bad = {int(k): v for k, v in state["bad"].items()}

    def close(self) -> None:
        """Stops the background work; iterating again starts it anew."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _collate_rows(buckets: Buckets, picture: tuple[int, int], step: int, rows: Sequence[Encoded], real: int) -> Batch:
    return pad(step, rows, real, batch_sizes(rows, buckets), picture)


def batches(
    source: RecordSource,
    processor: Processor,
    encode: Callable[[RecordSource, int, int], Encoded],
    batch_size: int,
    buckets: Buckets,
    seed: int,
    *,
    shuffle: bool = True,
    process: tuple[int, int] = (0, 1),
    agree: Callable[[Sizes], Sizes] | None = None,
    max_bad_records: int = 0,
    threads: int = 2,
    workers: int = 0,
    prefetch: int = 2,
) -> Batches:
    number, count = process
    if batch_size < 1 or batch_size % count:
        raise InputError(f"batch_size {batch_size} does not divide over {count} processes")
    if not 0 <= number < count:
        raise InputError(f"process {number} of {count} does not exist")
    if max_bad_records < 0 or threads < 1 or workers < 0 or prefetch < 1:
        raise InputError("max_bad_records and workers must be at least 0, threads and prefetch at least 1")
    if count > 1 and agree is None and any(len(getattr(buckets, f.name)) > 1 for f in dataclasses.fields(buckets)):
        raise InputError("several processes need buckets of one size each, or agree=agree_with_all")
    if not len(source):
        raise InputError(f"{getattr(source, 'name', 'data')}: it has no records")
    pixels = processor.pixel_config
    picture = (pixels.window_patches, pixels.patch_pixels)
    share = batch_size // count
    loader = _Loader(
        source,
        order(source, seed if shuffle else None),
        encode,
        functools.partial(_collate_rows, buckets, picture) if agree is None else None,
        batch_size,
        (number * share, (number + 1) * share),
        None if shuffle else len(source),
        max_bad_records,
    )
    return Batches(
        loader,
        None if shuffle else -(-len(source) // batch_size),
        functools.partial(pad, picture=picture),
        functools.partial(batch_sizes, buckets=buckets),
        agree,
        {"records": len(source), "batch_size": batch_size, "seed": seed if shuffle else None},
        threads,
        workers,
        prefetch,
    )


def rl_batches(
    source: RecordSource,
    processor: Processor,
    batch_size: int,
    buckets: Buckets,
    seed: int = 0,
    *,
    asking: Asking | None = None,
    **options: Any,
) -> Batches:
    """Prompts to sample from: `Batch(records, index, prompts)`, each record with `size` and `resized` filled in.

    `asking` says how records become questions. Options:

    - `shuffle` (True): without end, in an order drawn from `seed` anew each epoch. False: one pass in the source's
      order, as evaluation wants it, all records in the last, partly filled batch included.
    - `max_bad_records` (0): records that may be unreadable before it is an error. In training the next readable record
      takes the place of a bad one, in an ordered pass it is left out.
    - `process` (0, 1): this process's number and how many there are. `batch_size` counts the rows of all; a process
      gets its block of them. `agree` ((sizes) -> sizes, `agree_with_all`) makes all pad alike.
    - `threads` (2), `prefetch` (2 batches): background work in this process; `workers` (0): in so many others.
    """
    encode = PromptEncoder(processor, asking or Asking(), buckets)
    return batches(source, processor, encode, batch_size, buckets, seed, **options)


def sft_batches(
    source: RecordSource,
    processor: Processor,
    batch_size: int,
    buckets: Buckets,
    seed: int = 0,
    *,
    asking: Asking | None = None,
    questions: int = 1,
    weigh: Weigh | None = None,
    mask_history: bool = False,
    **options: Any,
) -> Batches:
    """Gold answers to learn: `Batch(records, index, prompts, completions)`, G = `questions` completions a prompt.

    A source that knows several records of one image (`Grouped`, the world) gives up to G of them, drawn anew each time;
    rows are filled with completions of length 0. Weights are 1 on the tokens of an answer and its end, times what
    `weigh(record, tokens)` says, and 0 elsewhere. Chat records have one completion; of chats with pictures in
    several turns each turn's answers have a row (see `turns`), unless `mask_history`: the last answer alone is learned, as in
    LLaMA-Factory. Options as in `rl_batches`.
    """
    if questions < 1:
        raise InputError(f"questions: {questions} must be at least 1")
    encode = AnswerEncoder(processor, asking or Asking(), buckets, questions, seed, weigh, mask_history)
    source = source if mask_history else all_turns(source)
    return batches(source, processor, encode, batch_size, buckets, seed, **options)
