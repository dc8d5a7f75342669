"""Which kind of source a row of a file looks like, for the message of one that cannot read it."""

from collections.abc import Mapping
from typing import Any

KINDS = {  # columns of which a row has all
    "preference": ({"chosen", "rejected"}, {"question", "turns", "source"}),
    "pages": ({"file_name", "lines"}, {"image", "lines"}),
    "pr1": ({"problem", "solution"}, {"problem", "clicks"}),
    "refcoco": ({"expression", "box"}, {"sent", "bbox"}, {"answer", "bbox"}),
    "pixmo": ({"points", "label"}, {"image_url", "count"}),
    "records": ({"task", "images"},),
    "chat": tuple({name} for name in ("messages", "conversations", "prompt", "query", "problem", "question", "instruction")),
}  # fmt: skip


def nearest(row: Mapping[str, Any], kind: str) -> str:
    """The row's columns, and the kind that they look like where it is another one than `kind`."""
    found = next((name for name, forms in KINDS.items() if any(form <= row.keys() for form in forms)), kind)
    listed = ", ".join(map(str, list(row)[:12]))
    return f"the row has {listed}" + (f", as {found}:FILE reads" if found != kind else "")
