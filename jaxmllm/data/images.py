"""Images on the host: resizing, patches in Hugging Face's order, and the window order the vision tower wants.

numpy and Pillow only. Pixels equal transformers' `Qwen2VLImageProcessorPil` bit for bit; the windows are those of
transformers' `get_vision_window_index`.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from jaxmllm.data.decoding import LARGEST_SOURCE_PIXELS, MAX_SOURCE_PIXELS, check_size, load_image
from jaxmllm.errors import InputError
from jaxmllm.model import family
from jaxmllm.model.config import ModelConfig

NAMED_TOKENS = (4, 16384)  # fewest and most vision tokens of a size that is asked for by name: qwen-vl-utils' limits
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class PixelConfig:
    """How pixels become patches. Hashable, so that layouts are cached by it."""

    patch_size: int = 14  # pixels a side
    temporal_patch_size: int = 2  # frames in a patch; an image is repeated
    merge_size: int = 2  # patches a side that become one vision token
    window_size: int = 112  # pixels a side of an attention window
    min_pixels: int = 56 * 56  # of a resized image or video frame
    max_pixels: int = 28 * 28 * 1280
    image_mean: tuple[float, float, float] = CLIP_MEAN  # of RGB in 0..1
    image_std: tuple[float, float, float] = CLIP_STD
    max_source_pixels: int = MAX_SOURCE_PIXELS  # of a stored image; a larger one is refused before it is decoded

    def __post_init__(self):
        if not 1 <= self.max_source_pixels <= LARGEST_SOURCE_PIXELS:
            raise InputError(
                f"max_source_pixels {self.max_source_pixels}: need 1 to {LARGEST_SOURCE_PIXELS}, Pillow's limit"
            )
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise InputError(
                f"min_pixels {self.min_pixels} and max_pixels {self.max_pixels}: need 1 <= min_pixels <= max_pixels"
            )

    @property
    def factor(self) -> int:
        """Sides of a resized image are multiples of this many pixels: one vision token."""
        return self.patch_size * self.merge_size

    @property
    def patch_pixels(self) -> int:
        """C: numbers in one patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def window_patches(self) -> int:
        """P: patches of one window."""
        return (self.window_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the patches of one frame go. Arrays are read-only: they are shared by every frame of the same size."""

    index: Int[np.ndarray, "W P"]  # patch in Hugging Face order; -1 is padding
    positions: Int[np.ndarray, "W P 2"]  # (row, column) of the patch in its frame; -1 is padding
    token_index: Int[np.ndarray, "tokens"]  # raster merged token -> its place among the frame's W * P / merge**2 tokens


@dataclasses.dataclass(frozen=True)
class Frames:
    """One image (f = 1) or one video (f temporal patches), ready for the tower."""

    patches: Float[np.ndarray, "f W P C"]  # normalised pixels; padding patches are 0
    positions: Int[np.ndarray, "f W P 2"]
    grid: tuple[int, int, int]  # temporal patches, rows and columns of patches
    token_index: Int[np.ndarray, "tokens"]  # of every frame alike, see Layout
    seconds_per_grid: float | None = None  # video: seconds from one temporal patch to the next; None: an image

    @property
    def tokens(self) -> int:
        """Vision tokens of the prompt, f * rows * columns / merge_size**2."""
        return self.grid[0] * len(self.token_index)

    @property
    def window_tokens(self) -> int:
        """Vision tokens of one window, P / merge_size**2."""
        return self.patches.shape[2] * len(self.token_index) // (self.grid[1] * self.grid[2])


# ---------------------------------------------------------------- configuration


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty when the file is missing. InputError when it is something else."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def pixel_config(
    model: ModelConfig,
    raw: Mapping[str, Any] | None = None,
    source: str = "preprocessor_config.json",
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    defaults: tuple[int, int] | None = None,
) -> PixelConfig:
    """Sizes of `model`, limits and normalisation of a Hugging Face preprocessor config, then the caller's limits.

    Both forms are read: `min_pixels` / `max_pixels`, which win as in transformers, and `size` with `shortest_edge` /
    `longest_edge`. `defaults` are the limits where neither is given (None: the family's of an image). Where the caller
    gives one limit, the file's other one gives way.
    Raises InputError naming `source` and the field when the file disagrees with the model or asks for another pipeline.
    """
    raw = raw or {}
    vision, own = model.vision, family.of(model).pixels
    defaults = defaults or own.image_pixels
    fixed = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": int(Image.Resampling.BICUBIC),
    }
    for key, want in fixed.items():
        if raw.get(key) is not None and raw[key] != want:
            raise InputError(f"{source}: {key} is {raw[key]!r}; this model needs {want!r}")
    if abs(float(raw.get("rescale_factor") or 1 / 255) * 255 - 1) > 1e-6:
        raise InputError(f"{source}: rescale_factor is {raw['rescale_factor']!r}; only 1/255 is supported")
    if vision.in_channels != 3:
        raise InputError(f"vision_config: in_channels is {vision.in_channels}; images are RGB, 3")
    size = raw.get("size") or {}
    if not isinstance(size, Mapping):
        raise InputError(f"{source}: size is {size!r}; expected shortest_edge and longest_edge in pixels")

    def limit(old, new, default):
        found = (raw.get(old), size.get(new), size.get(old), default)
        return int(next(value for value in found if value is not None))

    def channels(key, default):
        values = tuple(float(v) for v in raw.get(key) or default)
        if len(values) != 3:
            raise InputError(f"{source}: {key} needs three numbers, got {list(values)}")
        return values

    low, high = limit("min_pixels", "shortest_edge", defaults[0]), limit("max_pixels", "longest_edge", defaults[1])
    if min_pixels is not None:
        low, high = min_pixels, max(high, min_pixels)
    if max_pixels is not None:
        low, high = low if min_pixels is not None else min(low, max_pixels), max_pixels
    return PixelConfig(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        min_pixels=low,
        max_pixels=high,
        image_mean=channels("image_mean", own.image_mean),
        image_std=channels("image_std", own.image_std),
    )


def load_pixel_config(
    folder: str | Path, model: ModelConfig, *, min_pixels: int | None = None, max_pixels: int | None = None
) -> PixelConfig:
    """Reads `processor_config.json` (transformers 5, nested) or `preprocessor_config.json`; defaults without either."""
    nested, flat = Path(folder) / "processor_config.json", Path(folder) / "preprocessor_config.json"
    path, raw = nested, read_json(nested).get("image_processor")
    if not raw:
        path, raw = flat, read_json(flat)
    return pixel_config(model, raw, str(path), min_pixels=min_pixels, max_pixels=max_pixels)


# ---------------------------------------------------------------- pixels


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in multiples of `factor` whose area lies in [min_pixels, max_pixels], aspect ratio kept closely.

    Qwen's published algorithm, halves rounded to even as Python does. Raises InputError beyond an aspect ratio of 200.
    """
    check_size(width, height, "image")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        scale = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


@functools.lru_cache(maxsize=16)
def _normalised(cfg: PixelConfig) -> Float[np.ndarray, "3 256"]:
    """The normalised value of each byte in each channel: rescale in float64, round to float32, then normalise in it."""
    rescaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(cfg.image_mean, np.float32)[:, None], np.array(cfg.image_std, np.float32)[:, None]
    return (rescaled - mean) / std


def to_patches(
    frames: UInt8[np.ndarray, "t k H W 3"],
    table: Float[np.ndarray, "3 256"],
    cfg: PixelConfig,
    order: Int[np.ndarray, "n"] | None = None,
) -> Float[np.ndarray, "t n C"]:
    """Frames of t temporal patches to patches; k is the temporal patch size, or 1 to repeat.

    Hugging Face's order of n: rows of merge units, columns of units, the merge_size**2 patches of a unit; of C:
    channel, frame, y, x. `order` picks others of them; it is applied to bytes, before they grow eightfold.
    """
    t, k, height, width, _ = frames.shape
    p, m = cfg.patch_size, cfg.merge_size
    rows, columns = height // cfg.factor, width // cfg.factor
    # (t, k, unit row, patch row, y, unit column, patch column, x, channel) -> t, units, patches, channel, k, y, x
    blocks = frames.reshape(t, k, rows, m, p, columns, m, p, 3).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    blocks = blocks.reshape(t, rows * columns * m * m, 3, k, p * p)
    if order is not None:
        blocks = blocks[:, order]
    patches = np.empty((*blocks.shape[:3], cfg.temporal_patch_size, p * p), np.float32)
    for channel in range(3):
        patches[:, :, channel] = np.take(table[channel], blocks[:, :, channel])
    return patches.reshape(t, -1, cfg.patch_pixels)


def resized_size(
    height: int, width: int, cfg: PixelConfig, options: Mapping[str, int] | None = None
) -> tuple[int, int]:
    """(height, width) of the resized image. `options` are a part's own: qwen-vl-utils' `min_pixels`, `max_pixels`,
    `resized_height` and `resized_width`; where a part gives one limit, the config's other one gives way."""
    options = options or {}
    if "resized_height" in options:
        unit = cfg.factor**2
        return smart_resize(
            options["resized_height"], options["resized_width"], cfg.factor, *(n * unit for n in NAMED_TOKENS)
        )
    cfg = limited(cfg, options)
    return smart_resize(height, width, cfg.factor, cfg.min_pixels, cfg.max_pixels)


def limited(cfg: PixelConfig, options: Mapping[str, int]) -> PixelConfig:
    """The config with the limits among `options`."""
    low, high = options.get("min_pixels", cfg.min_pixels), options.get("max_pixels", cfg.max_pixels)
    if low > high:
        low, high = (low, low) if "min_pixels" in options else (high, high)
    return dataclasses.replace(cfg, min_pixels=low, max_pixels=high)


def _resized(
    image: Any, cfg: PixelConfig, name: str = "", options: Mapping[str, int] | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    image = load_image(image, name, cfg.max_source_pixels)
    height, width = resized_size(image.height, image.width, cfg, options)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def patchify(image: Any, cfg: PixelConfig) -> tuple[Float[np.ndarray, "n C"], tuple[int, int, int]]:
    """Resizes an image and cuts it into patches: `pixel_values` and `image_grid_thw` of transformers, bit for bit.

    Raises InputError as `load_image`.
    """
    pixels = _resized(image, cfg)
    patches = to_patches(pixels[None, None], _normalised(cfg), cfg)
    return patches[0], (1, pixels.shape[0] // cfg.patch_size, pixels.shape[1] // cfg.patch_size)


# ---------------------------------------------------------------- windows


@functools.lru_cache(maxsize=4096)
def window_layout(grid_h: int, grid_w: int, cfg: PixelConfig) -> Layout:
    """The window order of a frame of grid_h x grid_w patches.

    Windows run row by row over the frame, merge units row by row inside a window, the patches of a unit in Hugging
    Face order. Windows cut by the right or lower edge keep their shape: what lies outside stays in place as padding.

        3 x 5 units, windows of 2 x 2:     00 01 | 02 03 | 04 --
                                           10 11 | 12 13 | 14 --    W = 6, window 2 holds 04 -- 14 --
                                           ------+-------+------
                                           20 21 | 22 23 | 24 --
                                           -- -- | -- -- | -- --
    """
    m, side = cfg.merge_size, cfg.window_size // cfg.factor  # units a side of a window
    rows, columns = grid_h // m, grid_w // m
    down, across = -(-rows // side), -(-columns // side)
    # place of each slot in the frame, in units: [down, across, side, side]
    y = np.arange(down * side).reshape(down, 1, side, 1)
    x = np.arange(across * side).reshape(1, across, 1, side)
    inside = ((y < rows) & (x < columns)).reshape(down * across, side * side, 1)
    unit = np.broadcast_to(y * columns + x, (down, across, side, side)).reshape(-1, side * side, 1)
    index = np.where(inside, unit * m * m + np.arange(m * m), -1).reshape(down * across, cfg.window_patches)
    of_unit, of_patch = np.divmod(index, m * m)
    place = np.stack([of_unit // columns * m + of_patch // m, of_unit % columns * m + of_patch % m], axis=-1)
    positions = np.where(index[..., None] < 0, -1, place)
    token_index = np.empty(rows * columns, np.int32)
    token_index[unit[inside]] = np.flatnonzero(inside)
    layout = Layout(index.astype(np.int32), positions.astype(np.int32), token_index)
    for array in (layout.index, layout.positions, layout.token_index):
        array.flags.writeable = False
    return layout


def to_frames(
    frames: UInt8[np.ndarray, "f k H W 3"],
    table: Float[np.ndarray, "3 256"],
    cfg: PixelConfig,
    seconds_per_grid: float | None = None,
) -> Frames:
    """Resized frames of f temporal patches (see `to_patches`) to patches in window order."""
    grid = (len(frames), frames.shape[2] // cfg.patch_size, frames.shape[3] // cfg.patch_size)
    layout = window_layout(grid[1], grid[2], cfg)
    patches = to_patches(frames, table, cfg, layout.index.reshape(-1))
    patches = patches.reshape(grid[0], *layout.index.shape, cfg.patch_pixels)
    patches[:, layout.index < 0] = 0  # -1 read some other patch
    positions = np.broadcast_to(layout.positions, (grid[0], *layout.positions.shape))
    return Frames(patches, positions, grid, layout.token_index, seconds_per_grid)


def image_frames(image: Any, cfg: PixelConfig, name: str = "", options: Mapping[str, int] | None = None) -> Frames:
    """An image as a clip of one frame, `options` as in `resized_size`. Raises InputError as `load_image`, with its `name`."""
    return to_frames(_resized(image, cfg, name, options)[None, None], _normalised(cfg), cfg)
