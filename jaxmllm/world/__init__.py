"""Procedural scenes, pages and clips with exact ground truth: the data that needs no download.

    from jaxmllm.world import SceneSpec, WorldSource
    source = WorldSource("grounding", split="train", seed=0, spec=SceneSpec(objects=(3, 6), depth=(0, 1)))
    source[0]["expression"], source[0]["box"]

`tfds_builder` (slices on disk) and `tokenizer` are imported by name, because they need slow packages.
"""

from jaxmllm.world.clips import Clip, ClipSpec
from jaxmllm.world.pages import Page, PageSpec
from jaxmllm.world.preview import preview
from jaxmllm.world.scenes import Scene, SceneObject, SceneSpec
from jaxmllm.world.source import DEFAULT_SPECS, TASKS, WorldSource
from jaxmllm.world.streams import SPLITS

__all__ = [
    "DEFAULT_SPECS",
    "SPLITS",
    "TASKS",
    "Clip",
    "ClipSpec",
    "Page",
    "PageSpec",
    "Scene",
    "SceneObject",
    "SceneSpec",
    "WorldSource",
    "preview",
]
