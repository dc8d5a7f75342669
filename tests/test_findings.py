"""The table of findings from made-up evaluations: means, paired differences, verdicts; and the order of the runs."""

import json

import numpy as np
import pytest

from jaxmllm.intervals import Interval
from jaxmllm.runfiles import write_json
from tests.benchmarks import findings, findings_table

N = 200


def leave(folder, case, seed, right):
    """What a run on counting leaves: an evaluation in which the records `right` are answered rightly."""
    lines = [
        {
            "source": "world:counting",
            "task": "counting",
            "index": k,
            "groups": [],
            "unit": None,
            "figures": {"accuracy": hit, "mae": 1 - hit},
        }
        for k, hit in enumerate(np.asarray(right, float))
    ]
    path = folder / "runs" / f"{case}_{seed}" / "eval" / "after"
    path.mkdir(parents=True)
    # in another order than that of the records, as two sources of unequal length would leave them
    (path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    (folder / "results").mkdir(exist_ok=True)
    result = {"case": case, "seed": seed, "seconds": 60 + seed, "after": {"world:counting": {"task": "counting"}}}
    write_json(folder / "results" / f"{case}_{seed}.json", result)


@pytest.fixture
def folder(tmp_path):
    """RL is right where SFT is, and on ten or twenty more of 200 records."""
    for seed in (0, 1):
        base = np.random.default_rng(seed).random(N) < 0.5
        better = base.copy()
        better[np.flatnonzero(~base)[: 10 * (seed + 1)]] = True
        leave(tmp_path, "counting_sft", seed, base)
        leave(tmp_path, "counting_rl", seed, better)
    leave(tmp_path, "counting_rl", 2, np.ones(N))  # no other arm yet
    return tmp_path


def test_a_row_pairs_seeds_and_records(folder):
    text = findings_table.table(folder)
    row = next(line for line in text.splitlines() if line.startswith("| RL, not more SFT: counting | accuracy"))
    _, _, _, first, second, difference, signs, seconds, _, here, _ = (cell.strip() for cell in row.split("|"))
    assert difference.startswith("0.075 [") and signs == "2/2" and seconds == "60 / 60" and here == "agrees"
    assert float(first.split()[0]) - float(second.split()[0]) == pytest.approx(0.075, abs=0.0011)
    low, high = json.loads(difference.partition(" ")[2])
    assert 0.02 < low < 0.075 < high < 0.14  # paired: unpaired it would be three times as wide
    assert "not run yet: RL, not more SFT: grounding (grounding_rl, grounding_sft)" in text


@pytest.mark.parametrize(
    "paper, figure, interval, said",
    [
        (1, "accuracy", (0.1, 0.05, 0.15), "agrees"),
        (1, "accuracy", (-0.1, -0.15, -0.05), "disagrees"),
        (1, "accuracy", (0.1, -0.01, 0.2), "undecided"),
        (-1, "accuracy", (-0.1, -0.15, -0.05), "agrees"),
        (1, "mae", (-0.1, -0.15, -0.05), "agrees"),
        (0, "accuracy", (-0.1, -0.15, -0.05), "worse"),
        (0, "accuracy", (0.1, -0.15, 0.15), "no difference"),
    ],
)
def test_verdicts(paper, figure, interval, said):
    finding = findings_table.Finding("", "", "", "", "", (), paper, "")
    assert findings_table.verdict(finding, figure, Interval(*interval)) == said


def test_the_bootstrap_draws_seeds_too():
    """Seeds that differ more than records do widen the interval."""

    def constant(value):
        return N, lambda counts: np.full((len(counts), 1), value)

    found, values = findings_table.over_seeds([[constant(v)] for v in (0.1, 0.2, 0.6)], (1,))
    assert values == pytest.approx([0.1, 0.2, 0.6]) and found.value == pytest.approx(0.3)
    assert found.low == pytest.approx(0.1, abs=0.04) and found.high == pytest.approx(0.6, abs=0.15)
    with pytest.raises(ValueError, match="different records"):
        findings_table.over_seeds([[constant(0.1)], [(N + 1, constant(0.1)[1])]], (1,))


def test_every_finding_has_its_runs_and_every_run_its_start():
    known = findings.cases()
    for finding in findings_table.findings():
        assert {finding.a, finding.b} <= known.keys()
    done = set()
    for job in findings.jobs("", findings.SEEDS):
        assert not job.start or job.start in done
        done.add(job.key)
    assert "bccd_sft_0" in done and "bccd_sft_1" not in done
    started = next(job for job in findings.jobs("bccd", (1,)) if job.name == "bccd_counting_sft")
    command = started.command(findings.ROOT)
    assert command[command.index("--model") + 1] == str(findings.ROOT / "runs" / "bccd_sft_0" / "export")


def test_every_run_is_a_valid_config():
    from jaxmllm.commands.config_flags import config_of

    for job in findings.jobs("", (0,)):
        _, _, path, *flags = job.command(findings.ROOT)
        config = config_of([str(findings.ROOT / path), *flags])
        assert config.name == job.key
        if config.method.name == "grpo" and job.case.group != "bccd":
            assert config.batch_size * config.method.num_generations == 128  # as much to learn from for every G
