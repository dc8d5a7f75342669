"""The top of the report: did training work, by how much, and what to look at before believing it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmllm.eval.measure import Change, Evaluation
from jaxmllm.eval.tables import VERDICTS, signed
from jaxmllm.intervals import Interval
from jaxmllm.report.curves import Series
from jaxmllm.report.markup import Html, join, short, tag

ENDS = 10  # the start and the end of a curve are its first and last 1 / ENDS
KINDS = {"better": "good", "worse": "bad"}

# Metric, which end values are suspicious, what that means. `{}` is the value at the end of the run.
CHECKS = (
    ("completions/clipped_ratio", lambda start, end: end > 0.1, "{:.0%} of the completions hit the length limit."),
    (
        "frac_reward_zero_std",
        lambda start, end: end > 0.5,
        "{:.0%} of the groups have equal rewards and teach nothing.",
    ),
    ("entropy", lambda start, end: end < 0.1 * start, "The entropy fell to {:.3g}, under a tenth of its start."),
    ("kl", lambda start, end: end > 1, "The policy is {:.3g} nats a token away from the reference."),
    (
        "sampling/sampling_logp_difference/mean",
        lambda start, end: end > 1e-2,
        "Sampler and trainer differ by {:.3g} nats a token; they should agree to rounding.",
    ),
)


def ends(series: Series) -> tuple[float, float]:
    """Mean of the first and of the last tenth of a curve."""
    count = max(len(series.y) // ENDS, 1)
    return float(series.y[:count].mean()), float(series.y[-count:].mean())


def section(
    metrics: Mapping[str, Series],
    changes: Mapping[str, Sequence[Change]],
    before: Evaluation | None,
    after: Evaluation | None,
) -> Html:
    """The sentence, one tile for each main figure and the reward, and warnings."""
    main = {
        source: [change for change in rows if change.name in after.sources[source].primary]
        for source, rows in changes.items()
        if after is not None
    }
    known = after or before
    warnings = checks(metrics) + [
        f"{s}: {note}." for s, m in (known.sources if known else {}).items() for note in m.notes
    ]
    kind, sentence, note = _sentence([change for rows in main.values() for change in rows], before, after)
    if warnings and kind == "good":
        kind, sentence = "warn", f"{sentence} Before you believe it, look at what stands below."
    tiles = [_tile(f"{source} · {change.name}", change) for source, rows in main.items() for change in rows]
    if not changes:
        for when, evaluation in (("before", before), ("after", after)):
            tiles += _single_tiles(when, evaluation)
    if "reward" in metrics and len(metrics["reward"].y) > 1:
        first, last = ends(metrics["reward"])
        numbers = tag("div", short(first), tag("i", " → "), short(last), class_="numbers")
        what = tag("div", f"first and last tenth of {len(metrics['reward'].y):,} logged steps", class_="change")
        tiles.append(tag("div", tag("div", "sampled reward", class_="name"), numbers, what, class_="tile"))
    return join(
        tag("div", sentence, tag("small", note), class_=f"verdict {kind}"),
        tag("div", *tiles, class_="tiles"),
        tag("ul", *(tag("li", text) for text in warnings), class_="checks") if warnings else None,
    )


def _sentence(main: Sequence[Change], before: Evaluation | None, after: Evaluation | None) -> tuple[str, str, str]:
    """(kind, sentence, explanation)."""
    if not main:
        missing = [name for name, e in (("before", before), ("after", after)) if e is None]
        which = " and ".join(missing) or "of the same records"
        return (
            "",
            "Not compared yet.",
            f"There is no evaluation {which}, so nothing is said about what training changed.",
        )
    better = [c for c in main if c.verdict == "better"]
    worse = [c for c in main if c.verdict == "worse"]
    assert after is not None
    note = (
        f"Better or worse: the {after.confidence:.0%} interval of the difference on the same held-out records, answered "
        "greedily, leaves out 0."
    )
    count = f"{len(better)} of {len(main)} main figures"
    if better and worse:
        return "warn", f"Mixed: {count} got better, {len(worse)} got worse.", note
    if worse:
        return "bad", f"Training made it worse: {len(worse)} of {len(main)} main figures got worse.", note
    if len(better) == len(main):
        return "good", f"Training worked: all {len(main)} main figures got better.", note
    if better:
        return "good", f"Training worked in part: {count} got better, none got worse.", note
    return "warn", "No clear change: no main figure moved beyond its interval.", note


def _tile(name: str, change: Change) -> Html:
    numbers = tag("div", short3(change.before), tag("i", " → "), short3(change.after), class_="numbers")
    verdict = tag("span", VERDICTS[change.verdict] or "–", class_=f"pill {KINDS.get(change.verdict, '')}")
    what = tag("div", verdict, " ", tag("span", signed(change.difference)), class_="change")
    return tag("div", tag("div", name, class_="name"), numbers, what, class_="tile")


def _single_tiles(when: str, evaluation: Evaluation | None) -> list[Html]:
    return [
        tag(
            "div",
            tag("div", f"{source} · {name}, {when}", class_="name"),
            tag("div", short3(m.figures[name]), class_="numbers"),
            tag("div", str(m.figures[name]), class_="change"),
            class_="tile",
        )
        for source, m in (evaluation.sources.items() if evaluation else ())
        for name in m.primary
    ]


def short3(figure: Interval) -> str:
    return f"{figure.value:.3f}" if abs(figure.value) < 100 else f"{figure.value:.0f}"


def checks(metrics: Mapping[str, Series]) -> list[str]:
    """Warnings about curves that often mean trouble."""
    out = []
    for name, suspicious, text in CHECKS:
        if name in metrics and np.isfinite(metrics[name].y).all() and suspicious(*ends(metrics[name])):
            out.append(text.format(ends(metrics[name])[1]))
    if "nonfinite" in metrics and metrics["nonfinite"].y.any():
        out.append(f"{int(metrics['nonfinite'].y.sum())} updates were skipped for NaN or infinite gradients.")
    if "reward" in metrics and len(metrics["reward"].y) >= 2 * ENDS:
        first, last = ends(metrics["reward"])
        if last <= first:
            out.append(f"The sampled reward did not rise: {short(first)} at the start, {short(last)} at the end.")
    return out


def evaluation_table(
    changes: Mapping[str, Sequence[Change]], before: Evaluation | None, after: Evaluation | None
) -> Html | None:
    """Every figure before and after with intervals, one table a source; figures by group folded away."""
    known = after or before
    if known is None:
        return None
    parts = []
    for source, measured in known.sources.items():
        rows = {change.name: change for change in changes.get(source, ())}
        top = [n for n in measured.figures if "/" not in n]
        groups = [n for n in measured.figures if "/" in n]
        main = measured.primary

        def table(names: Sequence[str], measured=measured, rows=rows, main=main) -> Html:
            body = [_row(name, rows.get(name), measured.figures[name], name in main, known is after) for name in names]
            head = [tag("th", name, class_=kind) for name, kind in _HEAD]
            return tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body))

        fold = tag("details", tag("summary", f"{len(groups)} figures by group"), table(groups)) if groups else None
        parts += [tag("h3", f"{source}, {measured.n:,} records"), tag("div", table(top), fold, class_="box scroll")]
    return join(*parts)


_HEAD = (
    ("figure", None),
    ("before", "number"),
    ("after", "number"),
    ("before and after", None),
    ("after - before", "number"),
    ("", None),
)


def _row(name: str, change: Change | None, figure: Interval, main: bool, is_after: bool) -> Html:
    before = change.before if change else None if is_after else figure
    after = change.after if change else figure if is_after else None
    verdict = change.verdict if change else ""
    pill = tag("span", VERDICTS[verdict], class_=f"pill {KINDS.get(verdict, '')}") if verdict else None
    return tag(
        "tr",
        tag("td", name),
        tag("td", _figure(before), class_="number"),
        tag("td", _figure(after), class_="number"),
        tag("td", _whiskers(before, after)),
        tag("td", _figure(change.difference if change else None, sign=True), class_="number"),
        tag("td", pill),
        class_="main" if main else None,
    )


def _figure(figure: Interval | None, sign: bool = False) -> Html:
    if figure is None:
        return join("–")
    text, _, interval = (signed(figure) if sign else str(figure)).partition(" ")
    return join(text, " ", tag("small", interval))


def _whiskers(*figures: Interval | None) -> Html:
    """Both intervals over one axis, from 0 to 1 or to the largest end."""
    width, height, margin = 190, 24, 5
    tops = [v for f in figures if f is not None for v in (f.value, f.high or 0.0)]
    high = max([1.0, *tops]) if max(tops) <= 1 else 1.05 * max(tops)

    def px(value: float) -> str:
        return f"{margin + (width - 2 * margin) * min(max(value, 0.0), high) / high:.1f}"

    parts: list[Any] = [tag("line", x1=margin, x2=width - margin, y1=height / 2, y2=height / 2, class_="axis")]
    for kind, y, figure in zip(("before", "after"), (height / 2 - 4, height / 2 + 4), figures, strict=True):
        if figure is None:
            continue
        if figure.low is not None and figure.high is not None:
            ends_ = {"x1": px(figure.low), "x2": px(figure.high)}
            parts.append(tag("line", y1=y, y2=y, stroke_width=2, stroke_linecap="round", class_=kind, **ends_))
        parts.append(tag("circle", cx=px(figure.value), cy=y, r=3.4, class_=kind))
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", class_="interval")
