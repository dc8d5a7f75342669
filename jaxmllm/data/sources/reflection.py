"""`reflection:FILE`: dialogues of answers and feedback."""

from jaxmllm.data import dialogues
from jaxmllm.data.formats import Source
from jaxmllm.data.sources.files import file_source
from jaxmllm.data.sources.registry import register


@register("reflection")
def open_reflection(path: str, images: str | None = None) -> Source:
    return file_source(path, dialogues.reflection, "image", images)
