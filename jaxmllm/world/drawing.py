"""Pixels: anti-aliased shapes, textures, grounds and noise.

Only +, -, *, / and square roots touch the pixels. They are rounded the same way on every processor; sines and
exponentials are not, and would make pictures differ by a level here and there between machines.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float32, Int8, UInt8

from jaxmllm.world.streams import Stream

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 40),
    "green": (35, 165, 60),
    "blue": (45, 75, 225),
    "yellow": (238, 218, 45),
    "purple": (145, 45, 185),
    "orange": (242, 135, 25),
    "cyan": (40, 205, 215),
    "pink": (245, 140, 190),
    "white": (246, 246, 246),
    "black": (14, 14, 14),
}

# Outlines in the unit box, x right and y down, each touching all four sides of [-1, 1] x [-1, 1].
_POLYGONS: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "triangle": ((0, -1), (1, 1), (-1, 1)),
    "diamond": ((0, -1), (1, 0), (0, 1), (-1, 0)),
    "cross": (
        (-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36), (0.36, 0.36),
        (0.36, 1), (-0.36, 1), (-0.36, 0.36), (-1, 0.36), (-1, -0.36), (-0.36, -0.36),
    ),
    "star": (
        (0, -1), (0.25, -0.31), (1, -0.236), (0.43, 0.21), (0.618, 1),
        (0, 0.58), (-0.618, 1), (-0.43, 0.21), (-1, -0.236), (-0.25, -0.31),
    ),
    "hexagon": ((-0.5, -1), (0.5, -1), (1, 0), (0.5, 1), (-0.5, 1), (-1, 0)),
}  # fmt: skip
_ROUND = ("circle", "ring")
SHAPES = (*_ROUND, *_POLYGONS)
TEXTURES = ("solid", "striped", "dotted", "checked")
GROUNDS = ("plain", "gradient", "noisy")
_RING = 0.62  # inner radius of a ring, as a share of the outer
_DARK = 0.4  # second tone of a texture, as a share of the colour
_BYTE_PAIR_SIGMA = 104.5  # standard deviation of the sum of two random bytes


def _polygon_distance(name: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels to a polygon of half-width `radius`, negative inside."""
    points = np.array(_POLYGONS[name]) * radius
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        dx, dy = px - ex * along, py - ey * along
        nearest = np.minimum(nearest, dx * dx + dy * dy)
        crosses = (y >= ay) != (y >= by)
        side = ex * py - ey * px
        inside ^= crosses & ((side > 0) == (by > ay))
    return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)


@lru_cache(maxsize=4096)
def shape_mask(shape: str, side: int) -> Float32[np.ndarray, "side side"]:
    """Coverage 0..1 of each pixel by a shape that fills a box of `side` pixels. Read-only: it is cached."""
    radius = side / 2
    centres = np.arange(side) + 0.5 - radius
    x, y = centres[None, :], centres[:, None]
    if shape in _ROUND:
        distance = np.sqrt(x * x + y * y) - radius
        if shape == "ring":
            distance = np.maximum(distance, -(distance + radius * (1 - _RING)))
    else:
        x, y = np.broadcast_arrays(x, y)
        distance = _polygon_distance(shape, x, y, radius)
    mask = np.clip(0.5 - distance, 0, 1).astype(np.float32)
    mask.setflags(write=False)
    return mask


@lru_cache(maxsize=4096)
def _dark_mask(texture: str, side: int) -> Bool[np.ndarray, "side side"]:
    """Where a texture shows its second tone."""
    period = max(4, side // 4)
    y, x = np.mgrid[:side, :side]
    if texture == "striped":
        return y % period >= (period + 1) // 2
    if texture == "checked":
        return ((x // (period // 2)) + (y // (period // 2))) % 2 == 1
    u, v = x % period - (period - 1) / 2, y % period - (period - 1) / 2
    return u * u + v * v <= (0.34 * period) ** 2


def shape_pixels(
    shape: str, rgb: tuple[int, int, int], texture: str, side: int
) -> tuple[Float32[np.ndarray, "side side"], Float32[np.ndarray, "#side #side 3"]]:
    """Coverage and colour of a textured shape."""
    colour = np.array(rgb, np.float32)[None, None]
    if texture != "solid":
        second = np.where(colour.max() > 60, colour * np.float32(_DARK), colour + np.float32(110))
        colour = np.where(_dark_mask(texture, side)[..., None], second, colour)
    return shape_mask(shape, side), colour


def paint(
    image: Float32[np.ndarray, "H W 3"],
    owner: Int8[np.ndarray, "H W"],
    number: int,
    pixels: tuple[np.ndarray, np.ndarray],
    x: int,
    y: int,
) -> None:
    """Puts a shape with its upper left corner at (x, y), in place; what lies outside the image is cut off.

    `owner` receives `number` where the shape covers at least half of the pixel.
    """
    mask, colour = pixels
    height, width = owner.shape
    side = len(mask)
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + side, width), min(y + side, height)
    if x0 >= x1 or y0 >= y1:
        return
    part = np.s_[y0 - y : y1 - y, x0 - x : x1 - x]
    mask = mask[part]
    window = image[y0:y1, x0:x1]
    window += ((colour if colour.shape[0] == 1 else colour[part]) - window) * mask[..., None]
    owner[y0:y1, x0:x1][mask >= 0.5] = number


@lru_cache(maxsize=64)
def _gradient(width: int, height: int) -> Float32[np.ndarray, "H W 3"]:
    """A faint ramp, red along x and blue along y, +-30 levels: it puts the absolute position into the pixels."""
    image = np.full((height, width, 3), 128, np.float32)
    image[..., 0] += ((np.arange(width) * 2 + 1) / width - 1)[None, :].astype(np.float32) * 30
    image[..., 2] += ((np.arange(height) * 2 + 1) / height - 1)[:, None].astype(np.float32) * 30
    return image


def _stretch(grid: Float32[np.ndarray, "h w 3"], width: int, height: int) -> Float32[np.ndarray, "H W 3"]:
    """Bilinear enlargement of a small grid to the size of the image."""
    for axis, length in ((0, height), (1, width)):
        cells = grid.shape[axis] - 1
        place = np.arange(length, dtype=np.float32) * np.float32(cells) / np.float32(length)
        low = place.astype(int)
        weight = (place - low.astype(np.float32)).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        first = grid.take(low, axis)
        grid = first + (grid.take(low + 1, axis) - first) * weight
    return grid


def ground(kind: str, width: int, height: int, stream: Stream) -> Float32[np.ndarray, "H W 3"]:
    """An empty picture: `plain` (one colour), `gradient` (see `_gradient`) or `noisy` (soft random clouds)."""
    if kind == "gradient":
        return _gradient(width, height).copy()
    base = stream.integers(95, 160, 3).astype(np.float32)
    if kind == "plain":
        return np.broadcast_to(base, (height, width, 3)).copy()
    grid = base + stream.integers(-38, 38, 6 * 6 * 3).astype(np.float32).reshape(6, 6, 3)
    return _stretch(grid, width, height)


def finish(image: Float32[np.ndarray, "H W 3"], noise: float, stream: Stream) -> UInt8[np.ndarray, "H W 3"]:
    """Adds noise of the given standard deviation (levels; bell-shaped) and rounds to bytes."""
    if noise:
        raw = stream.bytes(2 * image.size).reshape(2, -1)
        bell = raw[0].astype(np.int16) + raw[1] - 255
        image = image + bell.reshape(image.shape).astype(np.float32) * np.float32(noise / _BYTE_PAIR_SIGMA)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
