"""`coco:FILE.json`: COCO JSON, for detection, counting and grounding."""

from jaxmllm.data.coco import CocoSource
from jaxmllm.data.formats import Source
from jaxmllm.data.sources.registry import register


@register("coco")
def open_coco(
    path: str,
    task: tuple[str, ...] = ("detection",),
    images: str | None = None,
    categories: tuple[str, ...] = (),
    crowd: str = "drop",
    max_objects: int = 0,
    empty: bool = False,
    order: str = "file",
) -> Source:
    return CocoSource(path, task, images, categories, crowd, max_objects, empty, order)
