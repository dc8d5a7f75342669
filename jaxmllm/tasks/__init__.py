"""Tasks: what is asked, how the answer is written, read, rewarded and measured. One module per task, host side only.

A module offers these names where they apply. Keyword options have defaults, so `f(text)` or `f(text, record)` works.

- `prompt(record, **style) -> str`: the user's text; the image comes before it.
- `answer(record, **style) -> str`: the gold completion, for supervised training, without the end-of-turn token.
- `parse(text, **style)`: reads a completion. Never raises, never evaluates, takes linear time.
- `reward(text, record, **options) -> float | dict | None`: a dict holds the total under "reward", its other values are
  named parts; None means "does not apply to this record".
- `metric(texts, records, **style) -> dict[str, float]`: figures over a set of completions; shares are in 0..1.
- `PARSERS: dict[str, Callable[[str], Any]]`: every function here that reads model text, as functions of the text alone
  (`parse` in each style included). The fuzz test runs them all.

A record is a plain dict. Its coordinates are original pixels; the functions convert them to the frame of the answer.

| field                            | meaning                                                                  |
|----------------------------------|--------------------------------------------------------------------------|
| `id`, `task`, `images`           | identity; a name in `names()`; PIL images, paths or arrays               |
| `size`                           | [W, H], pixels of the original image                                     |
| `resized`                        | [w, h], pixels of the image the model sees; equal to `size` when absent  |
| grounding                        | `expression`, `box` [x1, y1, x2, y2]                                     |
| counting                         | `label`, `count`, `points` [[x, y], ..], optional `boxes`                |
| detection                        | `categories` (names asked for), `boxes`, `labels` (names)                |
| ocr                              | `text`, optional `lines` [{"text", "quad"}]                              |
| captioning                       | `caption`, `objects`                                                     |
| tracks, foresight, relations     | see the modules                                                          |

Options that mean the same everywhere:

- `style`: how boxes are written, a name in `answers.STYLES`: `"qwen2_vl"` (special tokens, 0..1000 grid) or
  `"qwen2_5_vl"` (JSON, pixels of the resized image).
- `thinking`: the answer is `<think>..</think><answer>..</answer>` instead of the bare answer.
- `rules`: `"released"` repeats the published code with its bugs, to reproduce its numbers; `"corrected"` is what to
  train with. Each module's docstring lists the differences.
- `matching`: `"hungarian"` pairs predictions and targets optimally; `"order"` pairs them as listed (the ablation
  without reward matching).
"""

from importlib import import_module
from types import ModuleType

_NAMES = ("grounding", "counting", "detection", "ocr", "captioning", "tracks", "foresight", "relations")


def names() -> tuple[str, ...]:
    """Names of all tasks, the legal values of a record's `task`."""
    return _NAMES


def get(name: str) -> ModuleType:
    """The module of a task.

    Raises:
        KeyError: there is no such task; the message lists the known ones.
    """
    if name not in _NAMES:
        raise KeyError(f"unknown task {name!r}; known: {', '.join(_NAMES)}")
    return import_module(f"{__name__}.{name}")
