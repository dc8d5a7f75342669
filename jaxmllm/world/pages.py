"""Pages of rendered text: plain lines, columns and receipts, with the exact box of every line and word.

The fonts are those that matplotlib ships. Widths and pixels of the glyphs are FreeType's: a page is the same in every
process and on every machine with the same releases of Pillow and of the fonts.
"""

import dataclasses
import importlib.util
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int16, UInt8
from PIL import Image, ImageDraw, ImageFont

from jaxmllm.errors import InputError
from jaxmllm.world.drawing import finish
from jaxmllm.world.streams import PIXELS, SPLITS, Stream, mix, split_index
from jaxmllm.world.words import PAGE_WORDS, RECEIPT_ITEMS, RECEIPT_WORDS

FONTS = {
    "sans": "DejaVuSans.ttf",
    "bold": "DejaVuSans-Bold.ttf",
    "oblique": "DejaVuSans-Oblique.ttf",
    "serif": "DejaVuSerif.ttf",
    "mono": "DejaVuSansMono.ttf",
    "book": "STIXGeneral.ttf",
    "roman": "cmr10.ttf",
}
LAYOUTS = ("plain", "columns", "receipt")
CASES = ("lower", "title", "upper")
_LEADING = 1.3  # distance of baselines, in font sizes
_MARGIN = 3  # pixels kept free at the border
_SHIFTS = 256  # places tried for the text block on the page
Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class PageSpec:
    """What pages look like. Every field is a difficulty knob."""

    size: tuple[int, int] = (112, 112)  # width, height, pixels
    layouts: tuple[str, ...] = ("plain",)  # of LAYOUTS; each page draws one
    lines: tuple[int, int] = (1, 3)  # fewest and most lines (of each column); fewer where the page is full
    words: tuple[int, int] = (1, 2)  # fewest and most words of a line; fewer where the line is full
    columns: int = 2  # number of columns of the layout "columns"
    fonts: tuple[str, ...] = ("sans",)  # of FONTS; each page draws one
    font_sizes: tuple[int, int] = (13, 17)  # smallest and largest font size, pixels
    case: tuple[str, ...] = ("lower",)  # of CASES; each page draws one
    numbers: float = 0.0  # chance that a word is a number
    inverted: float = 0.0  # chance of light text on a dark page
    contrast: int = 170  # smallest distance of ink and paper, levels of 255
    noise: float = 4.0  # standard deviation of the pixel noise, levels
    vocabulary: tuple[str, ...] = PAGE_WORDS

    def __post_init__(self):
        for field, known in (("layouts", LAYOUTS), ("fonts", tuple(FONTS)), ("case", CASES)):
            values = getattr(self, field)
            if isinstance(values, str) or not values or not set(values) <= set(known):
                raise InputError(f"PageSpec.{field}: {values!r} must be a non-empty tuple of {', '.join(known)}")
        for field, low in (("lines", 1), ("words", 1), ("font_sizes", 6)):
            pair = getattr(self, field)
            if len(pair) != 2 or not low <= pair[0] <= pair[1]:
                raise InputError(f"PageSpec.{field}: {pair!r} must be (least, most), both at least {low}")
        if len(self.size) != 2 or min(self.size) < 32 or self.columns < 1 or not self.vocabulary:
            raise InputError("PageSpec: size must be at least 32 x 32, columns at least 1, vocabulary not empty")
        if not 30 <= self.contrast <= 220:
            raise InputError(f"PageSpec.contrast: {self.contrast!r} must be within 30..220")


@dataclasses.dataclass(frozen=True)
class PageWord:
    """One word; `origin` is the start of its baseline, `box` surrounds its ink, pixels."""

    text: str
    origin: tuple[int, int]
    box: Box


@dataclasses.dataclass(frozen=True)
class PageLine:
    """A run of words on one baseline. Segments of a receipt's row are lines of their own, with the same `row`."""

    words: tuple[PageWord, ...]
    row: int

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)

    @property
    def box(self) -> Box:
        boxes = np.array([word.box for word in self.words])
        return (*boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist())

    @property
    def quad(self) -> list[int]:
        """Corners x, y of the box, clockwise from the upper left."""
        x1, y1, x2, y2 = self.box
        return [x1, y1, x2, y1, x2, y2, x1, y2]


@dataclasses.dataclass(frozen=True)
class Page:
    """Lines in reading order, and how they are printed. `draw` renders the page."""

    spec: PageSpec
    lines: tuple[PageLine, ...]
    layout: str  # of LAYOUTS
    font: str  # of FONTS
    font_size: int  # pixels
    ink: int  # grey levels
    paper: int
    address: tuple[int, str, int]  # seed, split, index

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, pixels."""
        return self.spec.size

    @property
    def words(self) -> list[PageWord]:
        """All words in reading order."""
        return [word for line in self.lines for word in line.words]

    @property
    def text(self) -> str:
        """All rows, one a line."""
        rows: dict[int, list[str]] = {}
        for line in self.lines:
            rows.setdefault(line.row, []).append(line.text)
        return "\n".join(" ".join(row) for row in rows.values())

    def draw(self) -> UInt8[np.ndarray, "H W 3"]:
        """The picture."""
        width, height = self.size
        cover = np.zeros((height, width), np.float32)
        for word in self.words:
            x1, y1, x2, y2 = word.box
            window = cover[y1:y2, x1:x2]
            np.maximum(window, _glyphs(self.font, self.font_size, word.text)[1], out=window)
        grey = np.float32(self.paper) + np.float32(self.ink - self.paper) * cover
        image = np.repeat(grey[..., None], 3, -1)
        return finish(image, self.spec.noise, Stream(*self.address, PIXELS))

    def owner(self) -> Int16[np.ndarray, "H W"]:
        """The number in `words` of the word whose box holds each pixel; -1 elsewhere."""
        width, height = self.size
        owner = np.full((height, width), -1, np.int16)
        for number, word in enumerate(self.words):
            x1, y1, x2, y2 = word.box
            owner[y1:y2, x1:x2] = number
        return owner


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    found = importlib.util.find_spec("matplotlib")  # not imported: that takes longer than drawing a hundred pages
    if found is None or not found.submodule_search_locations:
        raise InputError("pages need the fonts of matplotlib, which is not installed: pip install matplotlib")
    path = Path(found.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf" / FONTS[name]
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=16384)
def _glyphs(font: str, size: int, text: str) -> tuple[tuple[int, int], Float32[np.ndarray, "h w"]]:
    """Ink of a word, 0..1, cut to what is visible, and its upper left corner from the start of the baseline."""
    face = _font(font, size)
    left, top, right, bottom = (int(v) for v in face.getbbox(text, anchor="ls"))
    image = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(image).text((2 - left, 2 - top), text, fill=255, font=face, anchor="ls")
    ink = image.getbbox() or (0, 0, 1, 1)
    pixels = np.asarray(image.crop(ink), np.float32) / 255
    return (left - 2 + ink[0], top - 2 + ink[1]), pixels


@lru_cache(maxsize=16384)
def _advance(font: str, size: int, text: str) -> int:
    """How far the pen moves, whole pixels."""
    return int(_font(font, size).getlength(text) + 0.5)


def _number(stream: Stream) -> str:
    return str(stream.integer(0, 224)) if stream.chance(0.5) else _price(stream)


def _price(stream: Stream) -> str:
    return f"{stream.integer(0, 30)}.{stream.integer(0, 99):02d}"


class _Typesetter:
    """Places runs of words for one page, in coordinates of the text block."""

    def __init__(self, spec: PageSpec, stream: Stream):
        self.spec, self.stream = spec, stream
        self.font = stream.choice(spec.fonts)
        self.size = stream.integer(*spec.font_sizes)
        self.case = stream.choice(spec.case)
        self.leading = int(self.size * _LEADING + 0.5) + stream.integer(0, max(1, self.size // 4))
        self.space = _advance(self.font, self.size, " ")
        self.limit = (spec.size[0] - 2 * _MARGIN, spec.size[1] - 2 * _MARGIN)
        self.rows = max(1, (self.limit[1] - self.size) // self.leading + 1)  # rows that the page holds
        self.lines: list[PageLine] = []

    def written(self, word: str) -> str:
        return {"lower": word.lower, "title": word.title, "upper": word.upper}[self.case]()

    def width(self, words: list[str]) -> int:
        return sum(_advance(self.font, self.size, w) for w in words) + self.space * (len(words) - 1)

    def run(self, words: list[str], x: int, row: int) -> None:
        """Adds a line that starts at x."""
        y, placed = self.size + row * self.leading, []
        for word in words:
            (left, top), pixels = _glyphs(self.font, self.size, word)
            height, width = pixels.shape
            placed.append(PageWord(word, (x, y), (x + left, y + top, x + left + width, y + top + height)))
            x += _advance(self.font, self.size, word) + self.space
        self.lines.append(PageLine(tuple(placed), row))

    def random_words(self, width: int) -> list[str]:
        """Words for a line of at most `width` pixels; empty if chance offers none that fits."""
        words: list[str] = []
        left, wanted = width, self.stream.integer(*self.spec.words)
        for _ in range(wanted + 12):
            if len(words) == wanted:
                break
            number = self.stream.chance(self.spec.numbers)
            word = _number(self.stream) if number else self.written(self.stream.choice(self.spec.vocabulary))
            needed = self.width([word]) + (self.space if words else 0)
            if needed <= left:
                words.append(word)
                left -= needed
        return words

    def block(self, x: int, width: int, first_row: int, count: int) -> int:
        """`count` lines of random words; the next free row."""
        for row in range(first_row, min(first_row + count, self.rows)):
            words = self.random_words(width)
            if words:
                self.run(words, x, row)
        return min(first_row + count, self.rows)

    def plain(self) -> None:
        self.block(0, self.limit[0], 0, self.stream.integer(*self.spec.lines))

    def columns(self) -> None:
        gutter = self.size
        width = (self.limit[0] - gutter * (self.spec.columns - 1)) // self.spec.columns
        base = 0
        for column in range(self.spec.columns):
            self.block(column * (width + gutter), width, 0, self.stream.integer(*self.spec.lines))
            # columns are read one after the other, so their rows are numbered on
            fresh = [dataclasses.replace(line, row=line.row + column * self.rows) for line in self.lines[base:]]
            self.lines[base:] = fresh
            base = len(self.lines)

    def receipt(self) -> None:
        """Header, items with prices at the right edge, total."""
        width = self.limit[0]

        def entry(name: str, price: str, row: int) -> None:
            words, price_width = [self.written(name)], self.width([price])
            if self.width(words) + self.space + price_width <= width:
                self.run(words, 0, row)
                self.run([price], width - price_width, row)

        kind = self.stream.choice(RECEIPT_WORDS[:4])
        header = [self.written(word) for word in (self.stream.choice(self.spec.vocabulary), kind)]
        if self.width(header) > width:
            header = header[1:]
        if self.width(header) <= width:
            self.run(header, (width - self.width(header)) // 2, 0)
        items = min(self.stream.integer(*self.spec.lines), max(0, self.rows - 2))
        prices = [self.stream.integer(50, 3000) for _ in range(items)]
        for row, cents in enumerate(prices, 1):
            entry(self.stream.choice(RECEIPT_ITEMS), f"{cents // 100}.{cents % 100:02d}", row)
        if items + 1 < self.rows:
            entry("total", f"{sum(prices) // 100}.{sum(prices) % 100:02d}", items + 1)


def _shift(lines: list[PageLine], dx: int, dy: int) -> tuple[PageLine, ...]:
    def word(w: PageWord) -> PageWord:
        (x, y), (x1, y1, x2, y2) = w.origin, w.box
        return PageWord(w.text, (x + dx, y + dy), (x1 + dx, y1 + dy, x2 + dx, y2 + dy))

    return tuple(PageLine(tuple(map(word, line.words)), line.row) for line in lines)


def page_signature(code: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What decides the split of a page: a hash of its printed text (`code`) and of the start of its first baseline."""
    place = (np.asarray(x, np.uint64) << np.uint64(16)) + np.asarray(y, np.uint64)
    return mix((np.uint64(code) << np.uint64(32)) + place)


def text_code(page_text: str, font: str, font_size: int) -> int:
    """The part of a page's signature that does not depend on its place."""
    return zlib.crc32(f"{font}|{font_size}|{page_text}".encode())


def make_page(spec: PageSpec, seed: int, split: str, index: int) -> Page:
    """The page at an address.

    Raises:
        InputError: the page is too small for the font sizes and words of `spec`.
    """
    wanted = SPLITS.index(split)
    for attempt in range(1024):
        stream = Stream(seed, split, index, attempt=attempt)
        setter = _Typesetter(spec, stream)
        layout = stream.choice(spec.layouts)
        getattr(setter, layout)()
        if not setter.lines:
            continue
        boxes = np.array([line.box for line in setter.lines])
        low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
        slack = np.array(spec.size) - 2 * _MARGIN - (high - low)
        if (slack < 0).any():
            continue
        spare = 255 - spec.contrast
        ink = stream.integer(0, spare // 2)
        paper = 255 - stream.integer(0, spare // 2)
        if stream.chance(spec.inverted):
            ink, paper = paper, ink
        address = (seed, split, index)
        page = Page(spec, tuple(setter.lines), layout, setter.font, setter.size, ink, paper, address)
        shifts = [_MARGIN - int(low[k]) + stream.integers(0, int(slack[k]), _SHIFTS) for k in (0, 1)]
        origin = setter.lines[0].words[0].origin
        signatures = page_signature(
            text_code(page.text, page.font, page.font_size), shifts[0] + origin[0], shifts[1] + origin[1]
        )
        suits = np.flatnonzero(split_index(signatures) == wanted)
        if len(suits):
            dx, dy = int(shifts[0][suits[0]]), int(shifts[1][suits[0]])
            return dataclasses.replace(page, lines=_shift(setter.lines, dx, dy))
    raise InputError(
        f"PageSpec: words of the vocabulary do not fit {spec.size[0]} x {spec.size[1]} pixels at font sizes "
        f"{spec.font_sizes}; enlarge the page or lower font_sizes"
    )
