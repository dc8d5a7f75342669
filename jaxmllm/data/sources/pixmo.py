"""`pixmo:FILE`: PixMo-Count, points of every object of a kind."""

from jaxmllm.data import records
from jaxmllm.data.formats import Source
from jaxmllm.data.sources.files import file_source
from jaxmllm.data.sources.registry import register


@register("pixmo")
def open_pixmo(path: str, images: str | None = None, frame: str = "pixel") -> Source:
    return file_source(path, records.pixmo_count, "image", images, frame=frame)
