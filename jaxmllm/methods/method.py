"""A method: how a model is trained. The loop, `plan` and evaluation know this protocol and no method.

A subclass of `Method` is a frozen dataclass of its own options, with the rooms below. `open` gives a `Work`, which takes
batches and makes updates. Parameters are never part of a context, because updates donate them.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxmllm import api
from jaxmllm.data.examples import Asking
from jaxmllm.data.sources import RecordSource
from jaxmllm.errors import InputError
from jaxmllm.methods.names import name_of
from jaxmllm.methods.shapes import Program, Sizes
from jaxmllm.methods.update import Update
from jaxmllm.model.config import ModelConfig
from jaxmllm.runfiles import plain, write_json
from jaxmllm.tasks.task import Direction
from jaxmllm.types import TrainState

Own = dict[str, Any]  # what a step carries besides the train state: arrays and JSON values, saved and resumed with it
Params = dict[str, Any]
Rules = tuple[tuple[str, PartitionSpec], ...]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a config says beside its method: read by checks across fields, before anything is loaded."""

    batch_size: int
    microbatches: int  # gradient accumulation steps
    sources: tuple[str, ...]  # specs of the training data
    thinking: bool
    lora: bool
    trainable: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static side of a run: what its programs are made of. `plan` has one without devices."""

    cfg: ModelConfig
    mesh: Mesh
    sample_mesh: Mesh  # the same devices, laid out for sampling
    update: Update
    batch_size: int  # prompts (pictures) a rollout or update, over all devices
    frozen_tower: bool  # no parameter of the tower trains: its output is computed once
    lora: bool


@dataclasses.dataclass(frozen=True)
class Context(Layout):
    """What a run is made of, but for its parameters."""

    model: api.Model  # without parameters: tokenizer, processor, buckets
    specs: tuple[str, ...]  # of the training sources, one by one
    mixture: RecordSource  # all of them, mixed by their weights
    asking: Asking  # how records become questions in training
    evaluating: Asking  # and in evaluation
    task_options: Mapping[str, Any]  # of the tasks in training: style, thinking, ..
    reading: Mapping[str, Any]  # limits and threads of the readers, see `data.pipeline`
    seed: int
    max_steps: int  # the last update
    max_new_tokens: int  # of an answer in evaluation
    repetition_penalty: float  # of an answer in evaluation
    cache: Path  # a folder for what can be made again

    def own_model(self, params: Params) -> api.Model:
        """The model with these parameters, for calls of `api`."""
        return dataclasses.replace(self.model, params=params)


@dataclasses.dataclass
class Report:
    """What a step says. `rows` and `arrays` are made when they are asked for, and let go before the next step."""

    metrics: dict[str, Any]  # numbers, on the host or on devices
    rows: Callable[[], "Completed"] | None = None  # a table of completions
    arrays: Callable[[], dict[str, Any]] | None = None  # what the update saw, for the dump of a non-finite one
    nothing: str = ""  # why there was nothing to learn from, where there was not


@dataclasses.dataclass
class Completed:
    """Completions of a step, a row each."""

    records: Sequence[Mapping[str, Any]]
    prompts: list[str]  # what was asked
    texts: list[str]
    rewards: Mapping[str, Sequence[float]]  # by reward function and by named part
    advantages: Sequence[float]


class Batches(Protocol):
    """An endless iterator whose state is JSON and exact at every position."""

    def __next__(self) -> Any: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any, /) -> None: ...

    def close(self) -> None: ...


class Work:
    """A method at work: `batches`, and `step` which takes what it needs of them."""

    batches: Batches

    def first_own(self) -> Own:
        """What the first step carries besides the state."""
        return {}

    def step(self, state: TrainState, own: Own, stop: Callable[[], bool]) -> tuple[TrainState, Own, Report | None]:
        """One step: one update, or several on one rollout. `state` may be donated.

        `stop()` is asked between phases, at the same points in every process. A step that is told to stop before its first
        update puts the iterator back and returns what it got, and no report.
        """
        raise NotImplementedError

    def validate(self, state: TrainState, sources: Mapping[str, RecordSource], limit: int) -> dict[str, float]:
        """Figures of held-out records besides those of their greedy answers, "<source>/<figure>". None by default."""
        return {}

    def judge(self, texts: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
        """A run's own figures of greedy answers, called `reward` or `reward_..`. None by default."""
        return [{} for _ in texts]

    def close(self) -> None:
        """Ends what `open` began."""
        self.batches.close()


class Clock:
    """Seconds of the phases of a step: `with clock("sample"): ...`; a phase entered again adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def metrics(self) -> dict[str, float]:
        return {f"seconds/{name}": value for name, value in self.seconds.items()}


@dataclasses.dataclass(frozen=True)
class Method:
    """How a model is trained. Subclasses add their options as fields and fill the rooms that they need."""

    name: str = dataclasses.field(init=False, default="")  # as the registry knows the class; written into config.json
    rules: ClassVar[Rules] = ()  # where the parameters lie that the method adds
    keys: ClassVar[tuple[str, ...]] = ()  # top-level names of those parameters
    figures: ClassVar[Mapping[str, Direction]] = {}  # what `Work.validate` measures, and what of it is better
    uses_last_step: ClassVar[bool] = False  # whether its numbers depend on max_steps
    free: ClassVar[tuple[str, ...]] = ()  # options that do not enter the numbers: they may change when a run goes on

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", name_of(type(self)))

    def problems(self, facts: Facts) -> list[str]:
        """A line for every mistake in the options, alone or beside the rest of the config; each begins with its field."""
        return []

    def check(self) -> None:
        """Raises InputError for what the options name and is not there, before a model is loaded."""

    def lengths(self) -> tuple[int, int | None]:
        """(G, T): completions a prompt, and their tokens; None where the data decide."""
        return 1, None

    def cuts(self) -> int:
        """Parts that a step cuts its prompts into, an update each."""
        return 1

    def grow(self, key: jax.Array, params: Params, cfg: ModelConfig) -> Params:
        """The parameters with what the method adds to them. Traceable: `plan` counts it from shapes."""
        return params

    def reference(self, lora: bool) -> bool:
        """Whether a copy of the starting weights is kept. With adapters it is the model without them."""
        return False

    @contextlib.contextmanager
    def open(self, context: Context) -> Iterator[Work]:
        """What a run works with; closed at its end. InputError where the data do not suit."""
        work = self.work(context)
        try:
            yield work
        finally:
            work.close()

    def work(self, context: Context) -> Work:
        """The `Work` of `open`; closing it closes everything."""
        raise NotImplementedError

    def programs(self, sizes: Sizes, state: TrainState, layout: Layout) -> Generator[Program, Any, None]:
        """The programs of an iteration, on shapes, in their order; is sent each one as compiled (None: it was not).

        `state`: shapes with shardings. InputError where the method has no plan.
        """
        raise InputError(f"method {self.name}: there is no plan for it")

    def answers(self, params: Params, records: Sequence[Mapping[str, Any]], context: Context) -> list[str]:
        """Answers to records in evaluation: greedy texts, unless the method has an answer of its own."""
        return api.ask(
            context.own_model(params),
            context.evaluating,
            records,
            max_new_tokens=context.max_new_tokens,
            repetition_penalty=context.repetition_penalty,
        )

    def export(self, params: Params, folder: Path) -> None:
        """Writes what the method added beside the exported model: its tensors, and its options as method.json."""
        if not self.keys:
            return
        from safetensors.flax import save_file

        own = {name: params[name] for name in self.keys}
        leaves = jax.tree_util.tree_leaves_with_path(own)
        tensors = {jax.tree_util.keystr(path, simple=True, separator="."): jax.numpy.asarray(x) for path, x in leaves}
        save_file(tensors, folder / TENSORS)
        write_json(folder / DESCRIPTION, {"method": self.name, "options": _options(self)})


TENSORS, DESCRIPTION = "method.safetensors", "method.json"


def _options(method: Method) -> dict[str, Any]:
    return {f.name: plain(getattr(method, f.name)) for f in dataclasses.fields(method) if f.init}
