"""What a person sees while a run trains."""

import io

import pytest
from rich.console import Console

import jaxmllm
from jaxmllm.eval import tables
from jaxmllm.training.config import TrainConfig
from jaxmllm.training.loop import UPDATING, Watcher
from jaxmllm.training.progress import SHOWN, Live
from tests.support import training

FIGURES = (
    dict.fromkeys(SHOWN, 0.123456)
    | {f"rewards/a_reward_of_some_length_{k}/mean": 0.5 for k in range(4)}
    | {"accuracy/counting": 0.4, "tokens_per_second": 1234.0, "seconds/left": 4000.0}
)


def screen(live: Live, width: int) -> list[str]:
    """The lines that a terminal of this width shows."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(live._bar.get_renderable())
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 60])
def test_figures_push_nothing_out_of_a_terminal(width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    live = Live(TrainConfig("a_name_that_is_a_good_deal_longer_than_what_is_usual", max_steps=12000), console)
    live.update(6000, FIGURES)
    live.phase("evaluating", 64, 256)
    first, *rest = screen(live, width)
    for part in ("evaluating 64/256", "━━", "6000/12000", "0:00:00", "66.7 min left"):
        assert part in first
    text = " ".join(" ".join(rest).split())
    assert "loss 0.123" in text and "a_reward_of_some_length_3 0.5" in text and "1234 tokens/s" in text
    live.phase(UPDATING)
    assert UPDATING in screen(live, width)[0] and "evaluating" not in screen(live, width)[0]


def test_a_log_names_phases_once_and_misses_no_interval():
    """Three updates a rollout: lines every five updates come at the first update that reaches each."""
    console = Console(file=io.StringIO(), width=80)
    with Live(TrainConfig("log", max_steps=200), console) as live:
        for step in range(3, 31, 3):
            live.phase("compiling the update" if step == 3 else UPDATING)
            live.update(step, FIGURES)
        live.phase("evaluating")
        live.phase("evaluating", 32, 64)
    first, *lines = console.file.getvalue().splitlines()
    assert first.startswith("log: preparing")
    assert [line.split("/")[0] for line in lines] == "compiling the update,3,6,12,15,21,27,30,evaluating".split(",")
    assert all(
        "66.7 min left  loss 0.123" in line for line in lines if line[0].isdigit()
    )  # however long: one line each


def test_tables_leave_nothing_out():
    source = "world:grounding?size=84x84&objects=2-4&noise=18&relations=left_of&split=val"
    value = "0.447 [0.393, 0.498]"
    rows = [["source", "figure", "before", "after", "after - before", ""]]
    rows += [[source, "mean absolute error of everything", value, value, f"+{value}", "≈ unclear"]]
    for width in (80, 60):
        console = Console(file=io.StringIO(), width=width)
        console.print(tables.terminal(rows, "before and after"))
        text = console.file.getvalue()
        together = "".join(text.split())
        assert "…" not in text and source in together and "[0.393," in text and "unclear" in text
        assert max(map(len, text.splitlines())) <= width


class Noted(Watcher):
    def __init__(self):
        super().__init__()
        self.phases, self.steps = [], []

    def phase(self, what, done=0, total=0):
        self.phases.append((what, done, total))

    def update(self, step, metrics):
        self.steps.append(step)


def test_a_run_from_python_shows_its_phases_and_writes_the_report(tmp_path, capsys, one_device):
    watcher = Noted()
    folder = jaxmllm.train(training.config(tmp_path, max_steps=2, export=True), watcher)
    assert (folder / "report.html").stat().st_size > 10_000
    names = list(dict.fromkeys(what for what, _, _ in watcher.phases))
    assert names == ["loading the model", "evaluating", "compiling the update", UPDATING, "exporting"]
    assert ("evaluating", 4, 4) in watcher.phases and watcher.steps == [1, 2]
    shown = capsys.readouterr().err
    for part in ("preparing", *names[:3], "exporting", "1/2  ", "2/2  ", "before and after", "report.html"):
        assert part in shown
