"""Videos on the host: files (PyAV), folders, lists and arrays of frames, sampled in time and resized to a budget.

The algorithm is that of transformers' `Qwen2VLVideoProcessor` with `cap_pixels_per_frame`, the behaviour of Qwen's own
pipeline. Frames are resized by Pillow instead of torchvision: about 0.5 % of the values differ, by at most 2 of 255.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from jaxmllm.data.decoding import load_image, local_path, shown
from jaxmllm.data.images import Frames, PixelConfig, limited, pixel_config, read_json, resized_size, smart_resize
from jaxmllm.data.images import to_frames as frames_to_windows
from jaxmllm.errors import InputError
from jaxmllm.model import family
from jaxmllm.model.config import ModelConfig

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
FRAME_PIXELS = (128 * 28 * 28, 768 * 28 * 28)  # transformers' limits of one video frame


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """How a video becomes frames. `pixels` holds the limits of one frame."""

    pixels: PixelConfig = PixelConfig(min_pixels=FRAME_PIXELS[0], max_pixels=FRAME_PIXELS[1])
    fps: float = 2.0  # frames taken a second of a file; the rate that frames given one by one are assumed to have
    min_frames: int = 4
    max_frames: int = 768
    max_video_tokens: int | None = 128000  # frames share the pixels of 90 % of this many tokens; None: no common budget

    def __post_init__(self):
        if not (0 < self.fps < math.inf):
            raise InputError(f"video: fps is {self.fps}; it must be a positive number")
        step = self.pixels.temporal_patch_size
        if not 1 <= self.min_frames <= self.max_frames or self.max_frames < step:
            raise InputError(
                f"video: min_frames {self.min_frames} and max_frames {self.max_frames}: need 1 <= min_frames <= "
                f"max_frames, and max_frames of at least {step}"
            )


@dataclasses.dataclass(frozen=True)
class Clip:
    """The frames that the model sees, resized."""

    frames: UInt8[np.ndarray, "n H W 3"]
    indices: Int[np.ndarray, "n"]  # of the source's frames
    fps: float  # frames a second after sampling


def load_video_config(
    folder: str | Path, model: ModelConfig, *, min_pixels: int | None = None, max_pixels: int | None = None
) -> VideoConfig:
    """Reads the video part of `processor_config.json`, `video_preprocessor_config.json` or `preprocessor_config.json`.

    The first that exists counts, as in transformers. Raises InputError as `pixel_config`.
    """
    folder = Path(folder)
    path = folder / "processor_config.json"
    raw = read_json(path).get("video_processor") or {}
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if not raw:
            path, raw = folder / name, read_json(folder / name)
    pixels = pixel_config(
        model,
        raw,
        str(path),
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        defaults=family.of(model).pixels.frame_pixels,
    )
    keys = ("fps", "min_frames", "max_frames", "max_video_tokens")
    given = {key: raw[key] for key in keys if raw.get(key) is not None}
    if raw.get("cap_pixels_per_frame") is False:
        given["max_video_tokens"] = None
    return VideoConfig(pixels, **given)


# ---------------------------------------------------------------- sampling in time and space


def sample_frames(total: int, rate: float, fps: float | None, cfg: VideoConfig) -> Int[np.ndarray, "n"]:
    """Indices of about `fps` frames a second among `total` frames of `rate` a second; fps None keeps every frame.

    Equals `Qwen2VLVideoProcessor.sample_frames`: a multiple of the temporal patch, at least min_frames and at most
    max_frames where the video is long enough, evenly spread. A video shorter than a temporal patch is kept whole.
    """
    step = cfg.pixels.temporal_patch_size
    if total < step or (fps is None and total <= cfg.max_frames):
        return np.arange(total)
    most = min(cfg.max_frames, total) // step * step
    wanted = most if fps is None else min(max(total / rate * fps, cfg.min_frames), most)
    count = max(math.floor(wanted / step), 1) * step
    spacing = total / count
    # torch.arange rounds each value to float32 before the cut to an integer
    return (np.arange(math.ceil(total / spacing)) * spacing).astype(np.float32).astype(np.int64)


def frame_size(
    frames: int, height: int, width: int, cfg: VideoConfig, size: Mapping[str, int] | None = None
) -> tuple[int, int]:
    """(height, width) to which each of `frames` frames is resized: its own limit and its share of the video's.

    `size`: qwen-vl-utils' `total_pixels`, of all frames together, and the options of `resized_size`.
    """
    size = size or {}
    if "resized_height" in size:
        return resized_size(height, width, cfg.pixels, size)
    pixels = limited(cfg.pixels, size)
    most, budget = pixels.max_pixels, size.get("total_pixels")
    if budget is None and cfg.max_video_tokens is not None:
        budget = int(cfg.max_video_tokens * pixels.factor**2 * 0.9)
    if budget is not None:
        most = max(min(most, budget * pixels.temporal_patch_size // frames), int(pixels.min_pixels * 1.05))
    return smart_resize(height, width, pixels.factor, pixels.min_pixels, most)


# ---------------------------------------------------------------- reading


def load_video(
    source: Any,
    cfg: VideoConfig,
    *,
    fps: float | None = None,
    source_fps: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    nframes: int | None = None,
    video_start: float | None = None,
    video_end: float | None = None,
    name: str = "video",
    **size: int,
) -> Clip:
    """Samples and resizes a video: a file, a folder of images, a list of images, or a uint8 array [n, H, W, 3].

    A file is sampled at `fps` frames a second (default: the config's). Frames given one by one count as sampled
    already, at `fps` a second, unless `source_fps` says how many a second they are: then they are sampled like a file.
    Either way at most `max_frames` are taken, or exactly `nframes`, rounded to temporal patches. `video_start` and
    `video_end` cut a part out first, seconds. `size`: see `frame_size`. Only sampled frames are held, already resized.
    Raises InputError naming the file or frame when something is missing, truncated, empty or of another size.
    """
    if max_frames is not None and min_frames is None:
        min_frames = min(cfg.min_frames, max_frames)
    changes: dict[str, Any] = {"fps": fps, "min_frames": min_frames, "max_frames": max_frames}
    cfg = dataclasses.replace(cfg, **{key: value for key, value in changes.items() if value is not None})
    if source_fps is not None and not 0 < source_fps < math.inf:
        raise InputError(f"{name}: source_fps is {source_fps}; it must be a positive number")
    if isinstance(source, str | Path) and not os.path.isdir(path := local_path(source, name)):
        name = str(path)
        total, rate = probe_video(path, source_fps)
        first, total = _part(total, rate, video_start, video_end, name)
        indices = first + (_exactly(nframes, total, cfg, name) if nframes else sample_frames(total, rate, cfg.fps, cfg))
        images = decode_frames(path, indices)
    else:
        items = _items(source, name)
        rate = source_fps or cfg.fps
        first, total = _part(len(items), rate, video_start, video_end, name)
        sampled = sample_frames(total, rate, cfg.fps if source_fps else None, cfg)
        indices = first + (_exactly(nframes, total, cfg, name) if nframes else sampled)
        images = (load_image(items[i], f"{name}: frame {i}", cfg.pixels.max_source_pixels) for i in indices)
    return Clip(_resize_all(images, indices, cfg, name, size), indices, len(indices) / total * rate)


def _part(total: int, rate: float, start: float | None, end: float | None, name: str) -> tuple[int, int]:
    """First frame and number of frames between two times, seconds; the frame at `end` belongs to it, as in qwen-vl-utils."""
    if start is None and end is None:
        return 0, total
    first = max(math.ceil((start or 0) * rate), 0)
    last = min(math.floor(end * rate), total - 1) if end is not None else total - 1
    if not first <= last:
        raise InputError(
            f"{name}: nothing lies between video_start {start or 0} s and video_end {end if end is not None else 'its end'}; "
            f"the video is {total / rate:g} s long"
        )
    return first, last - first + 1


def _exactly(count: int, total: int, cfg: VideoConfig, name: str) -> Int[np.ndarray, "n"]:
    step = cfg.pixels.temporal_patch_size
    rounded = round(count / step) * step
    if not step <= rounded <= total:
        raise InputError(f"{name}: nframes is {count}; the video has {total} frames and needs at least {step}")
    return np.arange(rounded) * total // rounded


def _resize_all(
    images: Iterator[Image.Image], indices: np.ndarray, cfg: VideoConfig, name: str, size: Mapping[str, int]
) -> np.ndarray:
    first = next(images)
    height, width = frame_size(len(indices), first.height, first.width, cfg, size)
    frames = np.empty((len(indices), height, width, 3), np.uint8)
    for place, image in enumerate(itertools.chain([first], images)):
        if image.size != first.size:
            raise InputError(f"{name}: frame {indices[place]} is {image.size} px and the first is {first.size} px")
        frames[place] = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return frames


def _items(source: Any, name: str) -> Sequence[Any] | np.ndarray:
    """Frames of a folder, list or array, unread."""
    if isinstance(source, str | Path):
        folder = local_path(source, name)
        files = [file for file in folder.iterdir() if file.suffix.lower() in FRAME_SUFFIXES and file.name[0] != "."]
        if not files:
            raise InputError(f"{folder}: no frames; expected images ({', '.join(FRAME_SUFFIXES)}) or a video file")
        # frame 2 before frame 10
        return sorted(files, key=lambda file: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", file.name)])
    if hasattr(source, "__array__"):
        source = np.asarray(source)
        if source.ndim != 4:
            raise InputError(f"{name}: expected an array [frames, H, W, 3], got {list(source.shape)}")
    if not isinstance(source, list | tuple | np.ndarray):
        raise InputError(f"{name}: expected a file, a folder, a list or array of frames, not {type(source).__name__}")
    if len(source) == 0:
        raise InputError(f"{name}: there are no frames")
    return source


@contextlib.contextmanager
def _open(path: Path):
    # a file object and an empty whitelist: neither the name nor a playlist inside makes FFmpeg open anything else
    with path.open("rb") as file, av.open(file, options={"protocol_whitelist": ""}) as container:
        yield container


def probe_video(path: Path, rate: float | None) -> tuple[int, float]:
    """Number of frames and frames a second of a video file."""
    if not os.path.isfile(path):
        raise InputError(f"{shown(path)}: video file not found")
    try:
        with _open(path) as container:
            if not container.streams.video:
                raise InputError(f"{path}: the file has no video stream")
            stream = container.streams.video[0]
            # some containers do not store the number
            total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
            rate = rate or stream.average_rate or stream.guessed_rate
    except InputError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a video, it may be truncated or no video ({error})") from None
    if not total:
        raise InputError(f"{path}: the video has no frames")
    if not rate:
        raise InputError(f"{path}: the frame rate is not stored in the file; pass source_fps")
    return total, float(rate)


def decode_frames(path: Path, indices: np.ndarray) -> Iterator[Image.Image]:
    """The frames at `indices` (ascending), upright. Those before them are decoded too: frames refer to each other."""
    wanted, found, place = set(indices.tolist()), 0, -1
    try:
        with _open(path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for place, frame in enumerate(container.decode(stream)):
                if place in wanted:
                    found += 1
                    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                    yield image.rotate(frame.rotation, expand=True) if frame.rotation else image
                if place == indices[-1]:
                    break
    except (av.FFmpegError, OSError, ValueError) as error:
        raise InputError(f"{path}: frame {place + 1} cannot be decoded, the file may be truncated ({error})") from None
    if found < len(indices):
        raise InputError(f"{path}: ends after {place + 1} frames, frame {indices[found]} is missing; it is truncated")


# ---------------------------------------------------------------- patches


@functools.lru_cache(maxsize=16)
def _normalised(cfg: PixelConfig) -> Float[np.ndarray, "3 256"]:
    """The normalised value of each byte in each channel; for videos rescaling is fused into mean and deviation."""
    mean, std = (np.array(x, np.float32)[:, None] * np.float32(255) for x in (cfg.image_mean, cfg.image_std))
    return (np.arange(256, dtype=np.float32) - mean) / std


def clip_frames(clip: Clip, cfg: VideoConfig) -> Frames:
    """Pairs of frames become temporal patches, in window order; an odd clip repeats its last frame."""
    step = cfg.pixels.temporal_patch_size
    frames = clip.frames
    if odd := -len(frames) % step:
        frames = np.concatenate([frames, np.repeat(frames[-1:], odd, axis=0)])
    frames = frames.reshape(-1, step, *frames.shape[1:])
    return frames_to_windows(frames, _normalised(cfg.pixels), cfg.pixels, seconds_per_grid=step / clip.fps)


def video_frames(source: Any, cfg: VideoConfig, **options) -> Frames:
    """`load_video` (with its options and errors), then `clip_frames`."""
    return clip_frames(load_video(source, cfg, **options), cfg)
