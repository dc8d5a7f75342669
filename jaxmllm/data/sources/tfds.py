"""`tfds:FOLDER`: records of the world that its TFDS builder wrote to ArrayRecord."""

from jaxmllm.data.formats import Source
from jaxmllm.data.rows import existing
from jaxmllm.data.sources.registry import register
from jaxmllm.data.tfds import open_prepared


@register("tfds")
def open_tfds(path: str, split: str | None = None) -> Source:
    return open_prepared(existing(path, folder=True), split)
