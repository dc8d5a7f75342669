"""Training curves as inline SVG: the logged values thin, a running mean thick."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmllm.report.markup import Html, details, join, short, tag

COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#65a30d", "#be185d")
WIDTH, HEIGHT = 348, 176  # of a chart, CSS pixels
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22  # margins
MAX_POINTS = 300  # longer curves are averaged in so many pieces
SMOOTH = 20  # the running mean spans 1 / SMOOTH of the curve
MAX_SERIES = len(COLOURS)


@dataclass(frozen=True)
class Series:
    """One curve: steps and values, without missing ones."""

    label: str
    x: Float[np.ndarray, "n"]
    y: Float[np.ndarray, "n"]


# Title, what to look for, patterns of metric names in order (the first group, if any, is the label).
CHARTS = (
    ("Reward", "mean over sampled completions; should rise", (r"reward",)),
    ("Reward by part", "", (r"rewards/(.+)/mean",)),
    ("Spread of rewards", "groups without any teach nothing", (r"(reward_std)", r"(frac_reward_zero_std)")),
    ("KL to the reference", "how far the policy has moved, nats a token", (r"kl",)),
    ("Clipped ratios", "share of tokens at the clip range", (r"clip_ratio/(low)_mean", r"clip_ratio/(high)_mean")),
    ("Clipped ratios", "share of tokens at the ceiling", (r"cispo_clip_ratio",)),
    ("Completion length", "tokens", (r"completions/(min)_length", r"completions/(mean)_length", r"completions/(max)_length")),
    ("Cut-off completions", "share that hit the length limit", (r"completions/clipped_ratio",)),
    ("Entropy", "nats a token; a collapse ends exploration", (r"entropy",)),
    ("Loss", "", (r"(policy_loss)", r"(loss)")),
    ("Gradient norm", "before clipping", (r"grad_norm",)),
    ("Learning rate", "", (r"learning_rate",)),
    ("Speed", "tokens a second", (r"tokens_per_second",)),
    ("Sampler against trainer", "nats a token; rounding only", (r"sampling/sampling_logp_difference/(mean|max)",)),
)  # fmt: skip


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Every metric of the rows of metrics.jsonl over `step`; tokens a second are added where they can be computed."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, int | float) and math.isfinite(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(float(row["step"]))
                values.append(float(value))
    out = {name: Series(name, np.array(x), np.array(y)) for name, (x, y) in found.items()}
    if "tokens_per_second" not in out and (speed := _speed(rows)):
        out["tokens_per_second"] = speed
    return out


def _speed(rows: Sequence[Mapping[str, Any]]) -> Series | None:
    """From `num_tokens`, of a step, and `step_time`, seconds."""
    points = [
        (row["step"], row["num_tokens"] / row["step_time"])
        for row in rows
        if row.get("num_tokens") and row.get("step_time")
    ]
    return Series("tokens_per_second", *np.array(points, float).T) if points else None


def section(metrics: Mapping[str, Series]) -> Html:
    """All charts: the known ones first, evaluations during training, then the others folded away."""
    used: set[str] = set()
    charts = []
    for title, note, patterns in CHARTS:
        chosen = _chosen(metrics, patterns)
        used |= chosen.keys()
        if chosen:
            charts.append(chart(title, note, list(chosen.values())))
    rest = [name for name in metrics if name not in used]
    evals = [name for name in rest if name.startswith("eval_") and len(metrics[name].x) > 1]
    others = [chart(name, "", [metrics[name]]) for name in rest if name not in evals]
    charts += [chart(name.removeprefix("eval_"), "greedy, held out", [metrics[name]]) for name in evals]
    return join(
        tag("div", *charts, class_="charts"),
        details(f"{len(others)} other metrics", tag("div", *others, class_="charts")) if others else None,
    )


def _chosen(metrics: Mapping[str, Series], patterns: Sequence[str]) -> dict[str, Series]:
    """The metrics that a chart shows, by name, with the labels that its patterns give them."""
    chosen = {}
    for pattern in patterns:
        for name, series in metrics.items():
            found = re.fullmatch(pattern, name)
            if found:
                label = found[1] if found.groups() else name
                chosen[name] = Series(label, series.x, series.y)
    return dict(list(chosen.items())[:MAX_SERIES])


def chart(title: str, note: str, series: Sequence[Series]) -> Html:
    """One figure: title, last value or legend, curves."""
    many = len(series) > 1
    head = [tag("span", title, class_="chart-title")]
    if many:
        swatches = [join(tag("i", style=f"background:{COLOURS[k]}"), s.label) for k, s in enumerate(series)]
        head.append(tag("span", [tag("span", swatch) for swatch in swatches], class_="legend"))
    else:
        head.append(tag("span", f"last {short(_smooth(series[0].y)[-1])}", class_="chart-last"))
    return tag(
        "figure", tag("figcaption", *head), _plot(title, series), tag("p", note, class_="note") if note else None
    )


def _thin(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "m"]:
    """The values averaged in at most MAX_POINTS pieces of equal length (the last may be shorter)."""
    starts = np.arange(0, len(values), -(-len(values) // MAX_POINTS))
    return np.add.reduceat(values, starts) / np.diff(starts, append=len(values))


def _smooth(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Centred running mean; shorter at the ends."""
    half = len(values) // (2 * SMOOTH)
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers inside low..high, at most about `count`."""
    span = max(high - low, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _plot(title: str, series: Sequence[Series]) -> Html:
    single = len(series) == 1 and len(series[0].x) > 2 * SMOOTH  # only then the logged values are drawn too
    x_all = np.concatenate([s.x for s in series])
    y_all = np.concatenate([_thin(s.y if single else _smooth(s.y)) for s in series])
    x0, x1, y0, y1 = x_all.min(), x_all.max(), y_all.min(), y_all.max()
    flat = y1 - y0 <= 1e-9 * max(abs(y0), abs(y1))  # equal but for rounding
    pad = (abs(y1) * 0.1 or 1.0) if flat else (y1 - y0) * 0.06
    y0 = 0.0 if 0 <= y0 < 0.35 * y1 else y0 - pad  # a curve near 0 is shown from 0
    y1 = y1 + pad

    def px(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - x0) / (x1 - x0) if x1 > x0 else 0.5)

    def py(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (y - y0) / (y1 - y0))

    parts = []
    for value in ticks(y0, y1):
        parts.append(
            tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{py(value):.1f}", y2=f"{py(value):.1f}", class_="grid")
        )
        parts.append(tag("text", short(value), x=LEFT - 6, y=f"{py(value) + 3.5:.1f}", text_anchor="end"))
    for value in ticks(x0, x1) if x1 > x0 else [x0]:
        if value == int(value):
            parts.append(tag("text", short(value), x=f"{px(value):.1f}", y=HEIGHT - 6, text_anchor="middle"))
    for k, s in enumerate(series):
        if len(s.x) == 1:
            parts.append(tag("circle", cx=f"{px(s.x[0]):.1f}", cy=f"{py(s.y[0]):.1f}", r=3, fill=COLOURS[k]))
            continue
        if single:
            parts.append(_line(_thin(s.x), _thin(s.y), px, py, COLOURS[k], "raw"))
        parts.append(_line(_thin(s.x), _thin(_smooth(s.y)), px, py, COLOURS[k], "smooth"))
    label = f"{title}, steps {short(x0)} to {short(x1)}"
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="plot")


def _line(x, y, px, py, colour: str, kind: str) -> Html:
    points = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in zip(x, y, strict=True))
    return tag("polyline", points=points, stroke=colour, class_=kind)
