"""`pages:FILE`: pictures of pages with their lines."""

from jaxmllm.data import records
from jaxmllm.data.formats import Source
from jaxmllm.data.sources.files import file_source
from jaxmllm.data.sources.registry import register


@register("pages")
def open_pages(path: str, images: str | None = None) -> Source:
    return file_source(path, records.page, "file_name", images)
