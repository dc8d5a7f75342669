"""`order:SPLIT`: questions about the order of events in clips, four an item, see `world.quadruples`."""

from jaxmllm.data.selection import RecordSource
from jaxmllm.data.sources.registry import register
from jaxmllm.world.quadruples import OrderQuadruples


@register("order")
def open_order(path: str, seed: int = 0, length: int = 100_000) -> RecordSource:
    return OrderQuadruples(path or "train", seed, length)
