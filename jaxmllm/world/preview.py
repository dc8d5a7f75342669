"""Contact sheets: records with their annotations drawn, to see with one look whether a data set is right."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_TILE = 336  # longest side of a picture on the sheet, pixels
_LINE = 14  # height of a line of text
_INK = (20, 20, 20)
_WRONG = (255, 40, 40)  # a relation that does not hold
# Distinct on any ground; each is drawn with a dark edge.
_LOOKS = ((0, 255, 120), (255, 70, 200), (255, 225, 0), (0, 205, 255), (255, 140, 30), (190, 120, 255))
Record = Mapping[str, Any]


class Source(Protocol):
    """What a preview reads: any index-addressable source of records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


def preview(source: Source, path: str | Path, n: int = 16, columns: int = 4) -> Path:
    """Writes a PNG of the first `n` records of `source` to `path`: pictures with boxes, points, lines and tracks drawn.

    Works for records of any source; of clips all frames are shown side by side. Returns the path.

    Raises:
        ValueError: the source is empty.
    """
    tiles = [_tile(source[i]) for i in range(min(n, len(source)))]
    if not tiles:
        raise ValueError("nothing to preview: the source is empty")
    columns = max(1, min(columns, len(tiles), 1600 // max(tile.width for tile in tiles)))
    rows = [tiles[k : k + columns] for k in range(0, len(tiles), columns)]
    width = columns * max(tile.width for tile in tiles)
    sheet = Image.new("RGB", (width, sum(max(tile.height for tile in row) for row in rows)), "white")
    y = 0
    for row in rows:
        for k, tile in enumerate(row):
            sheet.paste(tile, (k * (width // columns), y))
        y += max(tile.height for tile in row)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")
    return path


def _tile(record: Record) -> Image.Image:
    frames = [_open(image) for image in record["images"]]
    pictures = [_annotated(frame, record, t) for t, frame in enumerate(frames, 1)]
    width = sum(p.width + 4 for p in pictures)
    lines = [line for text in _texts(record) for line in textwrap.wrap(text, max(20, width // 6)) or [""]][:10]
    height = max(p.height for p in pictures)
    tile = Image.new("RGB", (width + 8, height + _LINE * len(lines) + 14), "white")
    x = 4
    for picture in pictures:
        tile.paste(picture, (x, 4))
        x += picture.width + 4
    pen, font = ImageDraw.Draw(tile), _font(11)
    for k, line in enumerate(lines):
        pen.text((4, height + 6 + k * _LINE), line, fill=_INK, font=font)
    return tile


def _open(image: Any) -> Image.Image:
    if isinstance(image, str | Path):
        image = Image.open(image)
    return (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).convert("RGB")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _texts(record: Record) -> list[str]:
    """What is asked and answered, as far as pictures do not show it."""
    texts = [str(record.get("id", ""))]
    for key in ("expression", "caption", "text", "categories", "query", "match"):
        if key in record:
            value = record[key]
            texts += [f"{key}: {line}" for line in (value.split("\n") if isinstance(value, str) else [value])]
    if "label" in record:
        texts.append(f"{record.get('count', '')} x {record['label']}")
    return texts


def _relations(pen: ImageDraw.ImageDraw, record: Record, zoom: np.ndarray, box: Callable[..., None]) -> None:
    """The language graph over the picture: a box for each phrase, a line for each relation, the wrong one in red."""
    centres = np.array([[b[0] + b[2], b[1] + b[3]] for b in record["node_boxes"]], float) / 2 * zoom
    for k, b in enumerate(record["node_boxes"]):
        box(b, record["entities"][k], k)
    for k, (subject, object_) in enumerate(record["edges"]):
        ends = [tuple(centres[subject]), tuple(centres[object_])]
        wrong = k == record["foil_pos"]
        pen.line(ends, fill=(0, 0, 0), width=5)
        pen.line(ends, fill=_WRONG if wrong else (255, 255, 255), width=3)
        middle = (centres[subject] + centres[object_]) / 2
        area = pen.textbbox(tuple(middle), record["relations"][k], font=_font(10), anchor="mm")
        pen.rectangle(area, fill=(0, 0, 0))
        pen.text(
            tuple(middle),
            record["relations"][k],
            fill=_WRONG if wrong else (255, 255, 255),
            font=_font(10),
            anchor="mm",
        )


def _annotated(image: Image.Image, record: Record, frame: int) -> Image.Image:
    """The picture, enlarged, with the annotations of its frame."""
    several = len(record["images"]) > 1
    scale = (_TILE / 2 if several else _TILE) / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    picture = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    own = record.get("size", image.size)
    zoom = np.array([size[0] / own[0], size[1] / own[1]])

    def outline(corners: Sequence[float], text: str, look: int) -> None:
        points = np.asarray(corners, float).reshape(-1, 2) * zoom
        points += 2 * np.sign(points - points.mean(0))  # around the object, not over its edge
        points = [tuple(point) for point in points.tolist()]
        for colour, width in (((0, 0, 0), 4), (_LOOKS[look % len(_LOOKS)], 2)):
            pen.line([*points, points[0]], fill=colour, width=width)
        if text:
            x, y = points[0]
            font = _font(10)
            area = pen.textbbox((x + 2, max(0, y - 15)), text, font=font)
            pen.rectangle(area, fill=(0, 0, 0))
            pen.text(area[:2], text, fill=_LOOKS[look % len(_LOOKS)], font=font, anchor="la")

    def box(b: Sequence[float], text: str = "", look: int = 0) -> None:
        outline([b[0], b[1], b[2], b[1], b[2], b[3], b[0], b[3]], text, look)

    if "node_boxes" in record:
        _relations(pen, record, zoom, box)
    elif record.get("box"):
        box(record["box"])
    labels = list(dict.fromkeys(record.get("labels", ())))
    for k, b in enumerate(record.get("boxes", ())):
        name = record["labels"][k] if labels else ""
        box(b, name, labels.index(name) if labels else 0)
    for x, y in record.get("points", ()):
        x, y = x * zoom[0], y * zoom[1]
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=(255, 255, 255), outline=(0, 0, 0))
    if record.get("task") == "captioning":
        for k, thing in enumerate(record.get("objects", ())):
            box(thing["box"], thing["name"], k)
    for k, line in enumerate(record.get("lines", ())):
        outline(line["quad"], "", k)
    for track in record.get("tracks", ()):
        seen = track["boxes"].get(str(frame))
        if seen:
            box(seen, str(track["id"]), int(track["id"]) - 1)
    return picture
