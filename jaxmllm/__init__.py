"""Post-train vision-language models in JAX.

>>> import jaxmllm
>>> model = jaxmllm.load("Qwen/Qwen2.5-VL-3B-Instruct")  # or "tiny", the embedded model, which knows small drawings only
>>> jaxmllm.generate(model, [[{"role": "user", "content": [{"type": "image", "image": "photo.jpg"},
...     {"type": "text", "text": "Output the bounding box of the red cup in the image."}]}]])
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "load": "api",
    "generate": "api",
    "stream": "api",
    "score": "api",
    "save": "api",
    "Model": "api",
    "Generation": "api",
    "train": "training.run",
    "TrainConfig": "training.config",
    "evaluate": "eval.harness",
    "InputError": "errors",
}
_CALLED = {"train": "run_and_report"}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    """Imports on first use: workers that only compute rewards never load JAX."""
    if name not in _NAMES:
        raise AttributeError(f"module 'jaxmllm' has no attribute {name!r}")
    return getattr(import_module(f"jaxmllm.{_NAMES[name]}"), _CALLED.get(name, name))


def __dir__() -> list[str]:
    return __all__
