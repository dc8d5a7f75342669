"""`records:FILE`: rows that already are records of this library."""

from jaxmllm.data import records
from jaxmllm.data.formats import Source
from jaxmllm.data.sources.files import file_source
from jaxmllm.data.sources.registry import register


@register("records")
def open_records(path: str, images: str | None = None, task: str | None = None) -> Source:
    return file_source(path, records.own, "images", images, task=task)
