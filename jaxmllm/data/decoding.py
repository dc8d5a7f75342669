"""Picture files to upright RGB: which formats are read, how large a picture may be, how it is turned, what is behind it."""

import base64
import binascii
import functools
import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from jaxmllm.errors import InputError

# Raster formats that Pillow decodes itself. Others start programs (EPS: Ghostscript) or have no size in pixels.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
MAX_SOURCE_PIXELS = 89_478_485  # of a stored picture: Pillow's own limit, a quarter of a GiB once it is decoded
LARGEST_SOURCE_PIXELS = 2 * MAX_SOURCE_PIXELS  # beyond it Pillow refuses, whatever is asked for
MAX_ASPECT_RATIO = 200  # of the longer to the shorter side, Qwen's limit
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow clips these to 255 instead of scaling them
_PNG = b"\x89PNG\r\n\x1a\n"
_SHOWN = 120  # characters of a path in a message


def local_path(source: str | Path, name: str) -> Path:
    """The path of a file or folder; `file://` is dropped. InputError for a link: nothing is downloaded here."""
    text = str(source).removeprefix("file://")
    if "://" in text or text.startswith("data:"):
        raise InputError(f"{name}: {text[:80]!r} is a link; download it and give the file's path")
    return Path(text)


def shown(source: Any) -> str:
    """A path for a message. A text of thousands of characters, which is no path, is cut."""
    text = str(source)
    return text if len(text) <= 4 * _SHOWN else f"{text[:_SHOWN]}.. ({len(text)} characters)"


def data_uri(text: str) -> bytes:
    """What `data:image/png;base64,..` holds. InputError where it is not base64."""
    head, comma, body = text.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InputError(f"{head[:40]!r}: a data URI must be data:TYPE;base64,..")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{head[:40]!r}: its contents are not base64 ({error})") from None


def load_image(source: Any, name: str = "", max_source_pixels: int = MAX_SOURCE_PIXELS) -> Image.Image:
    """An upright RGB image from a path, a data URI, encoded bytes, a Pillow image or a uint8 array [H, W], [H, W, 1 | 3 | 4].

    EXIF orientation is applied. What is transparent is composed over white, as Qwen's own tool does (transformers drops
    alpha, which makes a black drawing on a clear ground all black). Palette and CMYK are converted by Pillow. 16-bit and
    float images, which that would clip to white, are refused.
    Raises InputError naming the file (or `name`) when it is missing, truncated, no image in one of FORMATS, empty, of more
    than `max_source_pixels`, or longer than 200 times its width, and for a link.
    """
    encoded, name = _encoded(source, name)
    image: Image.Image
    try:
        if encoded is not None:
            image = _decoded(encoded, name, max_source_pixels)
        elif isinstance(source, Image.Image):
            image = source
        elif hasattr(source, "__array__"):
            image = _from_array(np.asarray(source), name)
        else:
            raise InputError(f"{name}: expected a path, bytes, a Pillow image or a uint8 array")
        if image.mode in DEEP_MODES:
            raise InputError(f"{name}: mode {image.mode} (16-bit or float) is not supported; convert it to 8-bit RGB")
        check_size(*image.size, name)
        return _opaque(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, DecompressionBombError...
        raise _unreadable(name, error) from None


def image_size(image: Any) -> list[int]:
    """[W, H] of an image, upright, from its header alone where it is a file. InputError where it cannot be read."""
    (width, height), orientation = stored_size(image)
    return [height, width] if orientation in (5, 6, 7, 8) else [width, height]


def stored_size(image: Any) -> tuple[list[int], int]:
    """[W, H] of an image as it is stored, and its EXIF orientation (1 to 8, 1: upright). InputError as `image_size`."""
    if isinstance(image, np.ndarray):
        return [image.shape[1], image.shape[0]], 1
    if isinstance(image, Image.Image):
        return _stored(image)
    encoded, name = _encoded(image, "" if isinstance(image, str | Path) else "image")
    try:
        with _opened(encoded) as opened:
            return _stored(opened, encoded)
    except Exception as error:
        raise _unreadable(name, error) from None


def check_size(width: int, height: int, name: str) -> None:
    """Raises InputError for an image without pixels or beyond Qwen's aspect ratio."""
    if min(width, height) < 1:
        raise InputError(f"{name}: the image is empty, {width} x {height} px")
    if max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
        raise InputError(
            f"{name}: {width} x {height} px; one side is more than {MAX_ASPECT_RATIO} times the other, crop the image"
        )


def _encoded(source: Any, name: str) -> tuple[Any, str]:
    """A path or bytes to decode (None: it is decoded already), and what messages call it."""
    if isinstance(source, str) and source.startswith("data:"):
        name = name or "image"
        try:
            return data_uri(source), name
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    if isinstance(source, str | Path):
        path = local_path(source, name or "image")
        if not os.path.isfile(path):  # of Path it raises for a name that is too long
            hint = "; of a picture in base64 write data:image/png;base64,.." if len(str(path)) > 4 * _SHOWN else ""
            raise InputError(f"{shown(path)}: image file not found{hint}")
        return path, str(path)
    if isinstance(source, bytes | bytearray):
        return bytes(source), name or f"image ({type(source).__name__})"
    return None, name or f"image ({type(source).__name__})"


def _known() -> list[str]:
    """Those of FORMATS that this build of Pillow has."""
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]


def _opened(encoded: Path | bytes) -> Image.Image:
    """The picture, its pixels not yet decoded."""
    try:
        return Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=_known())
    except ValueError as error:
        if not _is_text_limit(error):
            raise
        return Image.open(io.BytesIO(_without_texts(encoded)), formats=("PNG",))


def _decoded(encoded: Path | bytes, name: str, limit: int) -> Image.Image:
    with _opened(encoded) as image:
        if image.width * image.height > limit:
            raise InputError(
                f"{name}: {image.width} x {image.height} px are more than max_source_pixels = {limit}; make the picture "
                f"smaller, or raise the limit (to {LARGEST_SOURCE_PIXELS} at most)"
            )
        try:
            image.load()
            return image
        except ValueError as error:  # a text may also follow the pixels
            if not _is_text_limit(error):
                raise
    return _decoded(_without_texts(encoded), name, limit)


def _is_text_limit(error: ValueError) -> bool:
    """Whether Pillow gave up at a text in a PNG (an editor's history, a generator's settings), which nobody needs."""
    return "MAX_TEXT_" in str(error)


def _without_texts(encoded: Path | bytes) -> bytes:
    """A PNG without its chunks of text."""
    data = encoded if isinstance(encoded, bytes) else encoded.read_bytes()
    kept, at = [data[: len(_PNG)]], len(_PNG)
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            kept.append(data[at : at + 12 + length])
        at += 12 + length
    return b"".join(kept)


def _unreadable(name: str, error: Exception) -> InputError:
    if isinstance(error, Image.UnidentifiedImageError):
        error = Image.UnidentifiedImageError(f"read are {', '.join(FORMATS)}")
    return InputError(f"{name}: cannot be read as an image, it may be truncated or no image ({error})")


def _stored(image: Image.Image, encoded: Path | bytes | None = None) -> tuple[list[int], int]:
    exif = image.getexif
    if image.format == "PNG" and encoded is not None and "exif" not in image.info:
        data = encoded if isinstance(encoded, bytes) else encoded.read_bytes()
        if b"eXIf" not in data:  # Pillow would decode all pixels to look for one behind them
            exif = functools.partial(Image.Image.getexif, image)
    orientation = exif().get(ExifTags.Base.Orientation, 1)
    return [image.width, image.height], orientation if orientation in range(1, 9) else 1


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    ground = Image.new("RGB", image.size, (255, 255, 255))
    ground.paste(image, mask=image.getchannel("A"))
    return ground


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(
            f"{name}: expected a uint8 array [H, W] or [H, W, 1 | 3 | 4], got {array.dtype} {list(array.shape)}"
        )
    check_size(array.shape[1], array.shape[0], name)
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
