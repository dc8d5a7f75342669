"""Building HTML so that text is escaped unless it was built here: model output is data."""

import html
import math
import re
from typing import Any

# Control characters, those that reorder the text around them, and lone surrogates are shown as replacement characters.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


class Html(str):
    """Markup. Everything else is text."""


def escape(value: Any) -> Html:
    """Markup as it is; anything else as text, with hidden characters made visible."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(_HIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(value)), quote=True))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """`<name attributes>children</name>`. `class_` is `class`, other underscores are hyphens; None leaves one out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Any) -> Html:
    """The children one after the other; lists are flattened, None is nothing."""
    return Html("".join(join(*c) if isinstance(c, list | tuple) else "" if c is None else escape(c) for c in children))


def details(summary: Any, *children: Any, opened: bool = False) -> Html:
    """A part that is folded until its summary is clicked."""
    body = join(tag("summary", summary), *children)
    return Html(f"<details{' open' if opened else ''}>{body}</details>")


def clip(text: str, limit: int) -> str:
    """The text, cut at `limit` characters with a note of how many are left out."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def short(value: float | None) -> str:
    """A number in few characters."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e5:
        scale, unit = (1e9, "G") if size >= 1e9 else (1e6, "M") if size >= 1e6 else (1e3, "k")
        return f"{value / scale:.3g}{unit}"
    if value == int(value):
        return f"{int(value):,}"
    if size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}" if size >= 100 else f"{value:.3g}"
