"""Throw-away targets for the warm-up of a vision tower: what each cell of a picture shows."""

import numpy as np
from jaxtyping import Int, Integer

from jaxmllm.world.clips import Clip
from jaxmllm.world.pages import Page
from jaxmllm.world.scenes import Scene

LEAST = 0.04  # share of a cell that an object must cover to be its target


def grid_targets(content: Scene | Page | Clip, cell: int) -> dict[str, np.ndarray]:
    """See `source.WorldSource.grid_targets`."""
    if isinstance(content, Page):
        image, owner, words = content.draw(), content.owner(), content.words
        number = {word: k for k, word in enumerate(content.spec.vocabulary)}
        fields = {"word": [number.get(word.text.lower(), -1) for word in words]}
        boxes = [word.box for word in words]
    else:
        spec = content.spec if isinstance(content, Scene) else content.spec.scene
        image, owner = content.render() if isinstance(content, Scene) else content.render(0)
        things = content.objects if isinstance(content, Scene) else [mover.thing for mover in content.movers]
        sizes = tuple(size[0] for size in spec.sizes)
        names = {"shape": spec.shapes, "colour": spec.colours, "size": sizes, "texture": spec.textures}
        fields = {name: [known.index(getattr(o, name)) for o in things] for name, known in names.items()}
        boxes = [thing.box for thing in things]
    fields |= {name: [box[k] for box in boxes] for k, name in enumerate(("x1", "y1", "x2", "y2"))}
    winner = cell_winners(owner, cell, len(boxes))
    # the -1 at the end is what a cell without an object finds
    return {"image": image} | {name: np.array([*values, -1], np.int32)[winner] for name, values in fields.items()}


def cell_winners(owner: Integer[np.ndarray, "H W"], cell: int, objects: int) -> Int[np.ndarray, "rows columns"]:
    """Per cell, the object with most pixels in it; -1 if none has LEAST of them. Cells cut by the border are left out.

    Raises:
        ValueError: a cell is larger than the picture.
    """
    rows, columns = owner.shape[0] // cell, owner.shape[1] // cell
    if rows == 0 or columns == 0:
        raise ValueError(f"cell {cell} is larger than the picture {owner.shape[1]} x {owner.shape[0]}")
    blocks = owner[: rows * cell, : columns * cell].reshape(rows, cell, columns, cell).swapaxes(1, 2)
    numbers = blocks.reshape(rows * columns, cell * cell).astype(np.int64) + 1
    place = np.arange(rows * columns)[:, None] * (objects + 1)
    counts = np.bincount((numbers + place).ravel(), minlength=rows * columns * (objects + 1))
    counts = counts.reshape(rows, columns, objects + 1)[..., 1:]
    return np.where(counts.max(-1) >= max(1, LEAST * cell * cell), counts.argmax(-1), -1)
