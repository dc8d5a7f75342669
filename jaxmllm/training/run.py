"""What a run is made of while it runs: what `setup.build` makes, the loop turns and a step changes."""

import dataclasses
from typing import Any, Protocol

from jax.sharding import Mesh

from jaxmllm import api
from jaxmllm.data.examples import Asking
from jaxmllm.methods.optim import split
from jaxmllm.methods.update import Update
from jaxmllm.training.config import TrainConfig
from jaxmllm.types import TrainState


class Step(Protocol):
    """One update: replaces the run's state and returns its metrics. Its own state (JSON) is what a resumed run needs."""

    def __call__(self, run: "Run", batch: Any, /) -> dict[str, Any]: ...

    def get_state(self) -> dict[str, float]: ...

    def set_state(self, state: dict[str, float], /) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass
class Run:
    """Everything the loop needs; `state` is replaced at every update."""

    config: TrainConfig
    mesh: Mesh
    model: api.Model  # its params are the initial ones; the loop's are in `state`
    state: TrainState
    update: Update
    batches: Any  # iterator with get_state, set_state and close
    asking: Asking  # in training
    step: Step
    sample_mesh: Mesh  # the same devices as `mesh`, laid out for sampling

    @property
    def frozen_tower(self) -> bool:
        train, _ = split(self.state.params, self.config.trainable)
        return "vision" not in train and "vision" not in train.get("lora", {})
