"""Held-out records before and after training: the picture with true and predicted boxes or points, and what was said."""

import base64
import difflib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from jaxmllm.eval.harness import picture_path
from jaxmllm.eval.measure import Measured, badness, line_value
from jaxmllm.report.markup import Html, clip, escape, join, short, tag

Line = Mapping[str, Any]
Side = tuple[str, Path, Line | None]  # "before" or "after", its evaluation folder, its line

SHOWN = 6  # records of a source
PANEL = 300  # longest side of a picture, CSS pixels
SMALL = 160  # pictures up to so many pixels a side are enlarged without smoothing
MAX_TEXT, MAX_PAGE, MAX_SHAPES = 400, 1500, 300  # characters of an answer and of a page; boxes or points of a picture
MAX_WORDS = 400  # of a text that is compared word by word
_MIME = {".png": "image/png", ".jpg": "image/jpeg"}


def section(sides: Sequence[tuple[str, Path, Sequence[Line]]], measured: Mapping[str, Measured]) -> Html | None:
    """Cards of the first records of each source; `sides`: name, evaluation folder and lines, before first."""
    keyed = _keyed(sides)
    order = list(dict.fromkeys(key for _, _, table in keyed for key in table))
    chosen = {}
    for source in dict.fromkeys(source for source, _ in order):
        keys = [key for key in order if key[0] == source]
        pictured = [key for key in keys if any(table.get(key, {}).get("picture") for _, _, table in keyed)]
        chosen[source] = (pictured or keys)[:SHOWN]
    return _cards(keyed, chosen, measured)


def worst(sides: Sequence[tuple[str, Path, Sequence[Line]]], measured: Mapping[str, Measured]) -> Html | None:
    """Cards of the records of each source that the last evaluation answered worst. None where all were right."""
    keyed = _keyed(sides)
    chosen = {}
    for source, figures in measured.items():
        lines = [line for line in sides[-1][2] if line["source"] == source]
        wrong = [(bad, line) for line in lines if (bad := badness(line, figures)) is not None]
        least = min((bad for bad, _ in wrong), default=0.0)
        ranked = sorted((item for item in wrong if item[0] > least), key=lambda item: (-item[0], item[1]["index"]))
        if ranked:
            chosen[source] = [(source, line["id"]) for _, line in ranked[:SHOWN]]
    return _cards(keyed, chosen, measured, number=1000)


Keyed = list[tuple[str, Path, dict[tuple[str, str], Line]]]


def _keyed(sides: Sequence[tuple[str, Path, Sequence[Line]]]) -> Keyed:
    return [(name, folder, {(line["source"], line["id"]): line for line in lines}) for name, folder, lines in sides]


def _cards(
    keyed: Keyed, chosen: Mapping[str, Sequence[tuple[str, str]]], measured: Mapping[str, Measured], number: int = 0
) -> Html | None:
    out = []
    numbers = itertools.count(number)
    for source, keys in chosen.items():
        known = measured.get(source)
        cards = [
            _card([(n, folder, table.get(key)) for n, folder, table in keyed], next(numbers), known) for key in keys
        ]
        out += [tag("h3", source), tag("div", *cards, class_="cards")]
    return join(*out) if out else None


def _picture(folder: Path, line: Line | None) -> Path | None:
    """The saved picture of a line, if there is one."""
    if line is None:
        return None
    paths = (folder / picture_path(line["source"], line["index"], kind) for kind in ("png", "jpg"))
    return next((path for path in paths if path.is_file()), None)


def _card(sides: Sequence[Side], number: int, known: Measured | None) -> Html:
    lines = [line for _, _, line in sides if line is not None]
    path = next((p for _, folder, line in sides if (p := _picture(folder, line))), None)
    truth = lines[0]["target"]
    drawn = bool(path) and bool({"boxes", "points"} & truth.keys())
    question = clip(str(lines[0]["question"]), 220)
    head = tag("p", question, class_="question")
    if drawn and path:
        base = _Picture(path, lines[0]["size"], f"picture{number}")
        panels = [_panel(name, line, base.overlay(name, line, truth), truth, known) for name, _, line in sides]
        return tag("article", head, tag("div", *panels, class_="pair"))
    texts = [_panel(name, line, None, truth, known) for name, _, line in sides]
    image = tag("div", _image(path) if path else None, class_="plain")
    true_text = tag("div", tag("h4", "Truth"), _said(str(truth.get("text", "")), MAX_PAGE), class_="panel")
    return tag(
        "article",
        head,
        tag("div", image, true_text if "text" in truth else None, *texts, class_="texts"),
        class_="wide",
    )


def _panel(
    name: str, line: Line | None, picture: Html | None, truth: Mapping[str, Any], known: Measured | None
) -> Html:
    if line is None:
        return tag("div", tag("h4", name.capitalize()), picture, tag("p", "not asked", class_="said"), class_="panel")
    said = _compared(str(line["text"]), str(truth["text"])) if "text" in truth else _said(str(line["text"]))
    return tag("div", tag("h4", name.capitalize(), *_figures(line, known)), picture, said, class_=f"panel {name}")


def _figures(line: Line, known: Measured | None) -> list[Html]:
    """The record's main figures, coloured by how good they are where they lie in 0..1."""
    names = [name for name in (*(known.primary if known else ()), "IoU", "f1") if name in line["figures"]]
    names = ["IoU"] if "IoU" in names else names[:1]
    out = []
    for name in names:
        value = line_value(line, name)
        if value is not None:
            good = value if known is None or known.direction(name) >= 0 else 1 - value
            out.append(
                tag("span", f"{name} {short(round(value, 2))}", class_=f"pill {'good' if good >= 0.5 else 'bad'}")
            )
    counts = [side.get("count") for side in (line["prediction"], line["target"])]
    if None not in counts:
        kind = "good" if counts[0] == counts[1] else "bad"
        out = [tag("span", f"{counts[0]} of {counts[1]}", class_=f"pill {kind}")]
    return out


def _said(text: str, limit: int = MAX_TEXT) -> Html:
    """The text on few lines: line breaks and indents become blanks."""
    return tag("p", clip(" ".join(text.split()), limit) or "(nothing)", class_="said")


def _compared(text: str, truth: str) -> Html:
    """The text with the words marked that differ from the truth."""
    words, true = text.split()[:MAX_WORDS], truth.split()[:MAX_WORDS]
    parts: list[Any] = []
    for kind, start, stop, other, end in difflib.SequenceMatcher(None, words, true, autojunk=False).get_opcodes():
        mine = clip(" ".join(words[start:stop]), MAX_TEXT)
        if kind == "equal":
            parts.append(mine)
        else:
            parts.append(tag("ins", mine) if mine else None)
            missing = clip(" ".join(true[other:end]), MAX_TEXT)
            parts.append(tag("del", missing) if missing else None)
        parts.append(" ")
    return tag("p", *parts, class_="said") if words else _said("")


class _Picture:
    """One embedded picture, drawn once and reused by the panels of its card."""

    def __init__(self, path: Path, size: Sequence[float] | None, name: str):
        with Image.open(path) as image:
            self.pixels = image.size
        width, height = size or self.pixels
        self.width, self.height = float(width), float(height)
        self.path, self.id, self.drawn = path, name, False

    def overlay(self, name: str, line: Line | None, truth: Mapping[str, Any]) -> Html:
        """The picture with the true and the predicted boxes or points; coordinates are original pixels."""
        attributes = {"width": f"{self.width:g}", "height": f"{self.height:g}"}
        if self.drawn:
            image = tag("use", href=f"#{self.id}")
        else:
            sharp = "pixelated" if max(self.pixels) <= SMALL else None
            image = _image(self.path, svg=True, id=self.id, style=sharp and f"image-rendering:{sharp}", **attributes)
        self.drawn = True
        unit = max(self.width, self.height) / PANEL
        shapes = [_shapes(truth, "true", unit)]
        if line is not None:
            shapes.append(_shapes(line["prediction"], name, unit))
        box = f"0 0 {self.width:g} {self.height:g}"
        shown = f"width:{self.width / unit:.0f}px"
        return tag("svg", image, *shapes, viewBox=box, class_="picture", style=shown, role="img", aria_label=name)


def _shapes(what: Mapping[str, Any], kind: str, unit: float) -> Html:
    """Boxes and points as SVG, each with a dark outline so that it is seen on any picture."""
    out = []
    labels = what.get("labels", ())
    for k, (x1, y1, x2, y2) in enumerate(what.get("boxes", ())[:MAX_SHAPES]):
        place = {
            "x": f"{x1:.2f}",
            "y": f"{y1:.2f}",
            "width": f"{max(x2 - x1, 0):.2f}",
            "height": f"{max(y2 - y1, 0):.2f}",
        }
        out += [_rect(place, "halo", 3.6 * unit), _rect(place, kind, 2 * unit, dashed=kind == "true" and unit)]
        if kind != "true" and k < len(labels):
            size = f"{11 * unit:.2f}"
            at = {"x": f"{x1 + 2 * unit:.2f}", "y": f"{max(y1 - 3 * unit, 11 * unit):.2f}", "font_size": size}
            out.append(
                tag("text", clip(str(labels[k]), 24), class_=f"{kind} name", stroke_width=f"{3 * unit:.2f}", **at)
            )
    for x, y in () if "boxes" in what and kind == "true" and "count" in what else what.get("points", ())[:MAX_SHAPES]:
        radius = 5.5 if kind == "true" else 3
        at = {"cx": f"{x:.2f}", "cy": f"{y:.2f}", "r": f"{radius * unit:.2f}"}
        out.append(tag("circle", class_="halo", stroke_width=f"{3.6 * unit:.2f}", **at))
        out.append(tag("circle", class_=f"{kind} point", stroke_width=f"{2 * unit:.2f}", **at))
    return join(*out)


def _rect(place: Mapping[str, str], kind: str, width: float, dashed: float = 0) -> Html:
    dash = f"{6 * dashed:.2f} {4 * dashed:.2f}" if dashed else None
    return tag("rect", class_=kind, stroke_width=f"{width:.2f}", stroke_dasharray=dash, **place)


def _image(path: Path, svg: bool = False, **attributes: Any) -> Html:
    data = f"data:{_MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    if svg:
        return tag("image", href=data, preserveAspectRatio="none", **attributes)
    return Html(f'<img src="{escape(data)}" alt="">')


def thumbnail(data: bytes) -> Html:
    """A PNG from a completions table."""
    return Html(f'<img src="data:image/png;base64,{base64.b64encode(data).decode()}" alt="" class="thumb">')
