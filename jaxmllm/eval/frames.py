"""Whether answers are written in another style, or coordinate frame, than the one they are read in."""

from collections.abc import Sequence

from jaxmllm.tasks import answers
from jaxmllm.tasks.task import Record, Task, total

LOOKED_AT, MARGIN = 64, 0.15  # answers that are read again; the gain of the figure from which another style is named
FIGURES = ("IoU", "mean_iou", "accuracy")  # that depend on where boxes lie, or whether they can be read at all


def other_frame(task: Task, texts: Sequence[str], records: Sequence[Record]) -> str:
    """A sentence where the answers fit the truth much better in another style than in the task's own; else "".

    Every answer is read again in each style, as if it were the chosen one.
    """
    style = getattr(task, "style", None)
    if style is None or not texts:
        return ""

    pairs = list(zip(texts[:LOOKED_AT], records[:LOOKED_AT], strict=True))

    def value(name: str) -> tuple[float, float]:
        read = task.with_options({"style": name})
        figures = read.metric(*zip(*pairs, strict=True))
        rewards = [
            total(read.reward(text, record)) or 0.0 for text, record in pairs
        ]  # strict where figures are lenient
        return round(next((figures[figure] for figure in FIGURES if figure in figures), 0.0), 2), sum(rewards)

    values = {name: value(name) for name in answers.STYLES}
    best = max(values, key=lambda name: values[name])
    if values[best][0] < values[style][0] + MARGIN:
        return ""
    return (
        f"answers look like {answers.STYLES[best].words} ({values[best][0]:.2f} with style {best}), and they are read as "
        f"{answers.STYLES[style].words} ({values[style][0]:.2f} with style {style})"
    )
