"""What a run says about its speed: the trace of `--profile`, and the seconds of every phase in its metrics."""

import dataclasses

import jax
import pytest

from jaxmllm import cli
from jaxmllm.methods import SFT
from jaxmllm.runfiles import read_lines
from jaxmllm.training import profiling
from jaxmllm.training.loop import train
from tests.support import training

pytestmark = pytest.mark.usefixtures("one_device")
UPDATES = 7
GRPO_PHASES = {"data", "encode", "relayout", "sample", "reward", "score", "update"}


def phases(row: dict) -> dict[str, float]:
    found = {name.removeprefix("seconds/"): value for name, value in row.items() if name.startswith("seconds/")}
    found.pop("left", None)  # a forecast
    return found


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """The folder of a run started with the flag."""
    folder = tmp_path_factory.mktemp("profiled")
    data = dataclasses.replace(training.config(folder).data, eval=())
    config = training.config(folder, max_steps=UPDATES, save_steps=UPDATES, data=data)
    path = folder / "config.py"
    path.write_text(
        f"from tests.support import training\nfrom jaxmllm.training.config import DataConfig\n"
        f"config = training.config({str(folder)!r}, max_steps={UPDATES}, save_steps={UPDATES}, data={data!r})\n"
    )
    assert cli.main(["train", str(path), "--profile"]) == 0
    return config.run_dir


def test_the_trace_holds_three_updates(profiled):
    """The third to the fifth: what compiles is not in it, and a long run's trace does not grow."""
    (path,) = (profiled / "profile").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(path))
    events = [event for plane in data.planes for line in plane.lines for event in line.events]
    # a call is told of by several tracers, one inside the other
    starts = sorted((e.start_ns, e.start_ns + e.duration_ns) for e in events if e.name == "PjitFunction(grpo_step)")
    calls = [begin for k, (begin, _) in enumerate(starts) if k == 0 or begin > max(end for _, end in starts[:k])]
    assert len(calls) == profiling.TRACED == 3
    assert not [event.name for event in events if "backend_compile" in event.name]


def test_every_update_tells_the_seconds_of_its_phases(profiled):
    rows = read_lines(profiled / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, UPDATES + 1))
    for row in rows:
        found = phases(row)
        assert found.keys() == GRPO_PHASES
        assert all(value >= 0 for value in found.values()) and min(found["sample"], found["update"]) > 0
        # they do not overlap, and leave little out
        assert 0.8 * row["step_time"] < sum(found.values()) <= 1.001 * row["step_time"]
    assert all(row["seconds/left"] > 0 for row in rows[1:-1])


def test_a_supervised_run_tells_them_too(tmp_path):
    data = dataclasses.replace(training.config(tmp_path).data, eval=())
    folder = train(training.config(tmp_path, method=SFT(), max_steps=2, data=data))
    for row in read_lines(folder / "metrics.jsonl"):
        assert phases(row).keys() == {"data", "update"}
        assert 0 < sum(phases(row).values()) <= 1.001 * row["step_time"]
    assert not (folder / "profile").exists()  # nobody asked


@pytest.mark.parametrize(
    ("first", "last", "enabled", "expected"),
    [
        (0, 10, True, ["start 2", "stop 5"]),
        (40, 50, True, ["start 42", "stop 45"]),  # a resumed run compiles again
        (0, 4, True, ["start 2", "stop 4"]),  # the run ends within the trace
        (0, 2, True, []),
        (0, 10, False, []),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_traced_updates(tmp_path, monkeypatch, first, last, enabled, expected, fails):
    seen, step = [], first
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append(f"start {step}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(f"stop {step}"))
    try:
        with profiling.Trace(tmp_path, first, enabled) as trace:
            while step < last:
                trace.before(step)
                step += 1
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert seen == expected
