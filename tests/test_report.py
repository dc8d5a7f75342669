"""The report as a browser's parser sees it: what it shows, what it must never contain, what it does without data."""

import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxmllm.errors import InputError
from jaxmllm.eval.harness import evaluate
from jaxmllm.methods.method import Completed
from jaxmllm.report import curves, verdict
from jaxmllm.report.curves import Series
from jaxmllm.report.html import write_report
from jaxmllm.report.markup import clip, escape, short, tag
from jaxmllm.runfiles import read_lines, write_json
from jaxmllm.tasks import counting, grounding
from jaxmllm.training.metrics import MetricsWriter, record_start

EVIL = "</pre></td><script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)>\u202e\x00\ud800"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Elements with their attributes and text; fails where tags are not closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    def named(self, name, class_=None):
        return [a for n, a in self.elements if n == name and class_ in (None, *(a.get("class") or "").split())]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def records(n, label="thing", size=(96, 64)):
    rng = np.random.default_rng(0)
    out = []
    for i in range(n):
        low = rng.integers(2, 30, 2)
        box = [*low.tolist(), *(low + 25).tolist()]
        head = {"id": f"{label}{i}", "size": list(size), "images": [Image.new("RGB", size, (i * 9 % 255, 90, 160))]}
        out.append(head | {"task": "grounding", "expression": f"{label} {i}", "box": box})
        points = rng.integers(5, 60, (rng.integers(1, 4), 2)).tolist()
        out.append(head | {"task": "counting", "label": label, "count": len(points), "points": points})
    return out


def answers(batch, share, extra=""):
    """Right for a share of the records."""
    out = []
    for r in batch:
        right = int(re.search(r"\d+$", r["id"])[0]) % 10 < share * 10
        if r["task"] == "grounding":
            out.append(grounding.answer(r if right else {**r, "box": [60, 40, 90, 60]}) + extra)
        else:
            out.append(counting.answer(r if right else {**r, "points": [[5, 5]] * 5}) + extra)
    return out


def make_run(folder, before=0.3, after=0.9, extra="", label="thing", steps=60):
    """A run folder written by the harness and the metrics writer, as training does."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"name": f"run {label}", "method": "grpo", "seed": 3, "note": extra})
    record_start(folder, 3)
    source = records(20, label)
    for name, share in (("before", before), ("after", after)):
        if share is not None:
            evaluate(
                lambda b, share=share: answers(b, share, extra),
                source,
                out_dir=folder / "eval" / name,
                save_pictures=3,
                n_resamples=200,
            )
    with MetricsWriter(folder, report_to=()) as writer:
        for step in range(1, steps + 1):
            reward = 0.5 + 0.3 * step / steps + 0.01 * math.sin(step)
            writer.log(
                step, {"reward": reward, f"rewards/{label}/mean": reward / 2, "kl": 1e-3 * step, "num_tokens": 7}
            )
            prompts = [f"prompt {g} {extra}" for g in range(2) for _ in range(4)]
            texts = [f"completion {k} {extra}" for k in range(8)]
            images = [source[g * 2]["images"][0] for g in range(2) for _ in range(4)]
            rewards = {label + extra.encode("utf-8", "replace").decode(): [k / 8 for k in range(8)]}
            if step % 20 == 0:
                asked = [{"images": [image]} for image in images]
                table = Completed(asked, prompts, texts, rewards, [1, 0.5, -0.5, -1.25] * 2)
                writer.log_completions(step, table)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "good")


@pytest.fixture(scope="module")
def page(run):
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_figures_of_the_files_are_shown_with_their_verdict(run, page):
    before, after = (
        json.loads((run / "eval" / s / "metrics.json").read_text())["sources"] for s in ("before", "after")
    )
    for source in ("grounding", "counting"):
        for name, figure in after[source]["figures"].items():
            old = before[source]["figures"][name]
            assert f"{name} {old['value']:.3f} [{old['low']:.3f}, {old['high']:.3f}]" in page.words
            assert f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]" in page.words
    assert "Training worked: all 4 main figures got better." in page.words
    assert "grounding · IoU" in page.words and "run thing" in page.words
    for heading in ("Evaluation", "Training", "Pictures", "Sampled completions", "Config"):
        assert heading in page.words


def test_the_page_needs_nothing_from_outside_and_runs_nothing(run, page):
    for name, attributes in page.elements:
        assert name not in ("script", "link", "iframe", "object", "embed", "base", "form", "foreignobject")
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href", "xlink:href", "srcset", "action"):
                assert value.startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#"))
            assert key != "style" or "url(" not in value
    policy = page.named("meta")[1]["content"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "http" not in re.sub(r'http-equiv="|"http://www.w3.org[^"]*"', "", text) and "@import" not in text
    assert len(text) < 400_000


def test_model_and_data_texts_are_escaped_everywhere(tmp_path):
    folder = make_run(tmp_path / "evil", extra=EVIL, label="<b onclick=x>'\"")
    text = write_report(folder).read_bytes().decode("utf-8")
    page = Page(text)
    assert "<script" not in text and "alert(1)" in page.words  # shown, as text
    assert not page.named("script") and all(not attributes for attributes in page.named("b"))
    assert all(not key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert all(a["src"].startswith("data:image/") for a in page.named("img"))
    assert "\u202e" not in text and "\x00" not in text and "\N{REPLACEMENT CHARACTER}" in text


@given(st.text())
def test_any_text_survives_as_text(text):
    page = Page(tag("p", text, title=text))
    hidden = "".join(
        map(chr, [*range(9), *range(11, 32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF])
    )
    expected = "".join("\N{REPLACEMENT CHARACTER}" if c in hidden else c for c in text)
    assert [name for name, _ in page.elements] == ["p"]
    assert "".join(page.text) == page.elements[0][1]["title"] == expected


def test_boxes_and_points_are_drawn_where_they_are(run):
    """The SVG's units are original pixels."""
    text = write_report(run).read_text(encoding="utf-8")
    worst, rest = text.split("<h2>Worst records</h2>")[1].split("<h2>", 1)
    page = Page(text.replace(worst, ""))
    lines = {side: read_lines(run / "eval" / side / "predictions.jsonl") for side in ("before", "after")}
    drawn = [line for line in lines["after"] if line["picture"]]
    assert len(drawn) == 6
    for kind, side in (("true", None), ("before", "before"), ("after", "after")):
        rows = [line["target"] for line in drawn for _ in range(2)] if side is None else [
            line["prediction"] for line in lines[side] if line["picture"]
        ]  # fmt: skip
        expected = {tuple(box) for row in rows for box in row.get("boxes", ())}
        found = {
            (float(a["x"]), float(a["y"]), float(a["x"]) + float(a["width"]), float(a["y"]) + float(a["height"]))
            for a in page.named("rect", kind)
        }
        assert found == {tuple(map(float, box)) for box in expected} and expected
        points = sorted((round(x, 2), round(y, 2)) for row in rows for x, y in row.get("points", ()))
        assert points == sorted(
            (float(a["cx"]), float(a["cy"])) for a in page.named("circle", kind) if "point" in a["class"]
        )
    assert {a["viewbox"] for a in page.named("svg", "picture")} == {"0 0 96 64"}
    assert len(page.named("svg", "picture")) == 12
    assert len(page.named("image")) == 6 and len(page.named("use")) == 6  # each picture is embedded once
    assert {a["href"] for a in page.named("use")} == {f"#{a['id']}" for a in page.named("image")}


def test_completions_are_grouped_and_ranked_by_advantage(page):
    assert all(f"Step {step}: 8 completions of 2 prompts" in page.words for step in (20, 40, 60))
    last = page.words[page.words.index("Step 60") :]
    assert re.findall(r"[+-]\d\.\d\d", last)[:8] == ["+1.00", "+0.50", "-0.50", "-1.25"] * 2
    order = [last.index(f"completion {k} ") for k in (0, 1, 2, 3)]
    assert order == sorted(order)
    assert len(page.named("img", "thumb")) == 6


def test_the_report_is_the_same_every_time(run, tmp_path):
    first = write_report(run, tmp_path / "a.html").read_bytes()
    assert write_report(run, tmp_path / "b.html").read_bytes() == first
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (0.9, 0.3, "Training made it worse: 4 of 4 main figures got worse."),
        (0.5, 0.5, "No clear change"),
        (None, 0.5, "There is no evaluation before"),
        (0.5, None, "There is no evaluation after"),
        (None, None, "There is no evaluation before and after"),
    ],
)
def test_the_sentence_follows_the_figures(tmp_path, before, after, sentence):
    folder = make_run(tmp_path / "run", before, after, steps=3)
    assert sentence in Page(write_report(folder).read_text(encoding="utf-8")).words


@pytest.mark.parametrize(
    "missing", ["config.json", "run.json", "metrics.jsonl", "completions", "eval/before/pictures", "eval"]
)
def test_whatever_is_missing_is_left_out(run, tmp_path, missing):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    Page(write_report(folder).read_text(encoding="utf-8"))


def test_an_empty_run_and_no_run(tmp_path):
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "No metrics in metrics.jsonl." in page.words and "No tables in completions/." in page.words
    with pytest.raises(InputError, match="no such run folder"):
        write_report(tmp_path / "none")


def test_a_damaged_file_is_named(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    table = folder / "completions" / "completions_00060.parquet"
    table.write_bytes(table.read_bytes()[:100])
    with pytest.raises(InputError, match="completions_00060"):
        write_report(folder)


def test_only_pictures_of_the_evaluation_are_embedded(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    Image.new("RGB", (3, 3)).save(tmp_path / "secret.png")
    shutil.rmtree(folder / "completions")
    shutil.rmtree(folder / "eval" / "before" / "pictures")
    shutil.rmtree(folder / "eval" / "after" / "pictures")
    for side in ("before", "after"):
        path = folder / "eval" / side / "predictions.jsonl"
        lines = read_lines(path)
        for line in lines:
            line["picture"] = line["picture"] and "../../../../secret.png"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert not page.named("image") and not page.named("img")


# --- curves ---------------------------------------------------------------------------------------------------------


def test_running_mean_equals_brute_force():
    y = np.random.default_rng(0).random(137)
    half = 137 // 40
    expected = [y[max(i - half, 0) : i + half + 1].mean() for i in range(137)]
    np.testing.assert_allclose(curves._smooth(y), expected)
    assert curves._smooth(y[:5]).tolist() == pytest.approx(y[:5].tolist())


@pytest.mark.parametrize("n", [1, 2, 300, 301, 1000, 100_003])
def test_long_curves_are_thinned_to_means(n):
    y = np.arange(n, dtype=float)
    thin = curves._thin(y)
    size = -(-n // 300)
    assert len(thin) <= 300 and thin[0] == y[:size].mean() and thin[-1] == y[(len(thin) - 1) * size :].mean()


@given(st.floats(-1e3, 1e3), st.floats(1e-6, 1e9))
def test_ticks_are_round_and_inside(low, span):
    low *= span
    found = curves.ticks(low, low + span)
    assert 2 <= len(found) <= 8 and all(low - 1e-6 * span <= t <= low + 1.000001 * span for t in found)
    steps = np.diff(found)
    digits = steps[0] / 10 ** np.floor(np.log10(steps[0]))
    assert np.allclose(steps, steps[0], rtol=1e-3) and min(abs(digits - d) for d in (1, 2, 5, 10)) < 0.01


def test_a_curve_is_drawn_through_its_values():
    svg = Page(curves.chart("t", "", [Series("t", np.array([0.0, 10.0, 20.0]), np.array([1.0, 3.0, 2.0]))]))
    points = [tuple(map(float, p.split(","))) for p in svg.named("polyline", "smooth")[0]["points"].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and x0 == curves.LEFT and x2 == curves.WIDTH - curves.RIGHT
    assert (y0 - y1) == pytest.approx(2 * (y0 - y2), abs=0.21) and y1 < y2 < y0


def test_tokens_a_second_are_computed_and_null_is_skipped():
    rows = [{"step": s, "num_tokens": 100 * s, "step_time": 0.5, "loss": None if s == 2 else 1.0} for s in (1, 2, 4)]
    found = curves.columns(rows)
    assert found["tokens_per_second"].y.tolist() == [200.0, 400.0, 800.0] and found["loss"].x.tolist() == [1, 4]


def test_every_metric_is_shown_somewhere():
    names = [
        "reward",
        "rewards/a/mean",
        "clip_ratio/low_mean",
        "my/own",
        "eval_world:x/IoU",
        "completions/clipped_ratio",
    ]
    metrics = {name: Series(name, np.arange(3.0), np.arange(3.0)) for name in names}
    page = Page(curves.section(metrics))
    assert len(page.named("figure")) == len(names)
    assert all(word in page.words for word in ("my/own", "world:x/IoU", "1 other metrics"))


def test_suspicious_curves_are_warned_about():
    flat = {name: Series(name, np.arange(30.0), np.full(30, value)) for name, value in (
        ("completions/clipped_ratio", 0.05), ("frac_reward_zero_std", 0.2), ("entropy", 1.0), ("kl", 0.1),
        ("sampling/sampling_logp_difference/mean", 1e-6),
    )}  # fmt: skip
    rising = Series("reward", np.arange(30.0), np.linspace(0, 1, 30))
    assert verdict.checks(flat | {"reward": rising}) == []
    for name, factor in (("completions/clipped_ratio", 9), ("frac_reward_zero_std", 4), ("kl", 50)):
        assert len(verdict.checks({name: Series(name, np.arange(30.0), flat[name].y * factor)})) == 1
    skipped = Series("nonfinite", np.arange(30.0), np.eye(30)[15])
    assert verdict.checks({"nonfinite": skipped}) == ["1 updates were skipped for NaN or infinite gradients."]
    falling = Series("x", np.arange(30.0), np.linspace(1, 0, 30))
    assert len(verdict.checks({"entropy": falling, "reward": falling})) == 2


def test_numbers_and_texts_are_short():
    shown = [short(v) for v in (0, 1, 0.12345, 1234, 1.5e6, 3e-6, -0.5, float("nan"), None, 2.5e10)]
    assert shown == ["0", "1", "0.123", "1,234", "1.5M", "3.0e-6", "-0.5", "–", "–", "25G"]
    assert clip("a" * 10, 4) == "aaaa … (6 more characters)" and escape(escape("<")) == "&lt;"
