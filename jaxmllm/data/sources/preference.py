"""`preference:FILE`: chosen and rejected, or ranked answers."""

from pathlib import Path

from jaxmllm.data import dialogues
from jaxmllm.data.formats import Source, choose
from jaxmllm.data.sources.files import file_source
from jaxmllm.data.sources.registry import register


@register("preference")
def open_preference(path: str, images: str | None = None, answers: str = "pair") -> Source:
    found = file_source(path, dialogues.preference, "image", images)
    every = choose(answers, ("pair", "all"), "answers") == "all"
    return dialogues.Preferences(found.rows, Path(found.name), found.root, every)
