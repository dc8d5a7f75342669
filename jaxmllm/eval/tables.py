"""Tables of figures with intervals: for the terminal and as Markdown."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxmllm.eval.measure import Change, Evaluation
from jaxmllm.intervals import Interval

VERDICTS = {"better": "▲ better", "worse": "▼ worse", "unclear": "≈ unclear", "": ""}
_COLOURS = {"better": "green", "worse": "red"}

Rows = list[list[str]]


def evaluation_rows(evaluation: Evaluation) -> Rows:
    """[source, records, figure, value with interval], header first."""
    interval = f"value [{evaluation.confidence:.0%} interval]"
    return [["source", "n", "figure", interval]] + [
        [source, str(m.n), name, str(figure)]
        for source, m in evaluation.sources.items()
        for name, figure in m.figures.items()
    ]


def change_rows(changes: Mapping[str, Sequence[Change]]) -> Rows:
    """[source, figure, before, after, difference, verdict], header first."""
    return [["source", "figure", "before", "after", "after - before", ""]] + [
        [source, c.name, str(c.before), str(c.after), signed(c.difference), VERDICTS[c.verdict]]
        for source, rows in changes.items()
        for c in rows
    ]


def signed(difference: Interval | None) -> str:
    """The difference with its sign and interval; a dash without one."""
    if difference is None:
        return "–"
    text = str(difference)
    return text if text.startswith("-") else f"+{text}"


def markdown(rows: Rows) -> str:
    """A Markdown table of rows whose first is the header."""
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def terminal(rows: Rows, title: str = "") -> Group:
    """The same for `rich`: a table for each source under its name, so that narrow terminals keep the intervals in one piece.

    Nothing is left out: what is too long goes on in the next line. Model and data text is not read as markup.
    """
    shown: list[RenderableType] = [Text(title, style="italic")] if title else []
    for source, group in groupby(rows[1:], key=lambda row: row[0]):
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in rows[0][1:]:
            table.add_column(name, overflow="fold")
        for row in group:
            word = row[-1].split(" ")[-1]
            table.add_row(*map(Text, row[1:]), style=_COLOURS.get(word))
        shown += [Text(source), table]
    return Group(*shown)
