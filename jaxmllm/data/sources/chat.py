"""`chat:FILE`: conversations, in the forms of `data.conversations`."""

from jaxmllm import tasks
from jaxmllm.data import records
from jaxmllm.data.formats import Source
from jaxmllm.data.sources.files import file_source
from jaxmllm.data.sources.registry import register


@register("chat")
def open_chat(path: str, images: str | None = None, task: str | None = None) -> Source:
    if task is not None:
        tasks.get(task)
    return file_source(path, records.chat, "images", images, task=task)
