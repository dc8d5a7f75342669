"""How long a program must take at least on a chip, and what it needs of its memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxmllm.machine.targets import Chip
from jaxmllm.plan.hlo import Message


@dataclasses.dataclass(frozen=True)
class Links:
    """Who is whose neighbour: what a message between some devices of a mesh crosses."""

    chip: Chip
    nodes: tuple[
        int, ...
    ]  # what shares fast links, of every device in the mesh's order: a host of GPUs, a slice of TPUs
    torus: int  # dimensions of a TPU slice; 1 for GPUs, all of whose links reach all others of a node

    def seconds(self, message: Message) -> float:
        """At least so long: what a device must send or receive, over the links that lead there.

        A group on one axis of a torus has the links of that axis, the whole slice has all. Between nodes or slices, all
        network adapters of the group's devices share what crosses.
        """
        n = len(message.group)
        if n <= 1:
            return 0.0
        part = (n - 1) / n
        moved = {"all-reduce": 2 * part, "all-gather": part, "reduce-scatter": part, "all-to-all": part}
        size = message.size * moved.get(message.kind, 1.0)
        apart = len({self.nodes[i] for i in message.group})
        whole = n * len(set(self.nodes)) == apart * len(self.nodes)  # every device of the nodes that it is among
        inside = size / (self.chip.ici_gb_s * (1.0 if self.torus == 1 or whole else 1 / self.torus) * 1e9)
        if apart == 1:  # all links are its own
            return inside
        adapters = n / apart  # devices of the group on a node: each brings its adapter
        across = size / part * (apart - 1) / apart / (adapters * self.chip.dcn_gb_s * 1e9)
        return max(inside, across)


def links_of(chip: Chip, topology: str, devices: Sequence[Any]) -> Links:
    """The links between the devices of a mesh, given in its order."""
    torus = len(topology.partition(":")[2].split("x")) if chip.platform == "tpu" else 1
    node = "slice_index" if chip.platform == "tpu" else "process_index"
    return Links(chip, tuple(getattr(device, node, 0) for device in devices), torus)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that each resource is busy; with everything overlapped a program takes the longest."""

    products: float
    memory: float
    messages: float

    @property
    def seconds(self) -> float:
        return max(self.products, self.memory, self.messages)

    @property
    def bound(self) -> str:
        """The resource in the way."""
        return max(("products", "memory", "messages"), key=lambda name: getattr(self, name))
