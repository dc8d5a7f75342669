"""The training loop: evaluate, update until done, evaluate, export. Reads top to bottom like the experiment."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.errors import InputError
from jaxmllm.eval import harness, measure
from jaxmllm.machine import processes
from jaxmllm.methods.method import Context, Report
from jaxmllm.model import hf, lora
from jaxmllm.runfiles import claim
from jaxmllm.training.checkpoint import Checkpoints
from jaxmllm.training.config import TrainConfig
from jaxmllm.training.metrics import MetricsWriter, record_start
from jaxmllm.training.profiling import Trace
from jaxmllm.training.setup import build, eval_options, eval_sources, host_scalars
from jaxmllm.training.state import without_own
from jaxmllm.types import TrainState

log = logging.getLogger(__name__)
# may differ when a run goes on: they do not enter the numbers of an update
FREE_FIELDS = (
    *("max_seconds", "output_dir", "logging_steps", "save_steps", "save_total_limit", "export", "report_to"),
    *("data.workers", "data.max_bad_records", "optim.max_nonfinite_steps"),
    *("profile", "mesh", "sample_mesh"),  # another machine: the same numbers up to rounding
)
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved, start the same command again
Progress = Callable[[int, dict[str, float]], None]  # called with (updates done, metrics) at every logged update


class Interrupted(Exception):
    """The run was told to stop and has saved itself."""


def free_fields(config: TrainConfig) -> tuple[str, ...]:
    return (*FREE_FIELDS, *(f"method.{name}" for name in config.method.free))


@contextlib.contextmanager
def stop_flag() -> Iterator[list[str]]:
    """A list that names the signal once SIGINT or SIGTERM arrived; a second one acts as usual.

    With several processes SIGTERM is jax's, which makes all of them stop after the same update (`distributed.told_to_stop`),
    and SIGINT is passed on as SIGTERM.
    """
    received: list[str] = []
    alone = jax.process_count() == 1

    def note(number, _):
        if not alone:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        received.append(signal.Signals(number).name)
        for one, old in previous.items():
            signal.signal(one, old)

    previous = {}
    with contextlib.suppress(ValueError):  # not in the main thread: signals are somebody else's
        previous = {one: signal.signal(one, note) for one in (signal.SIGINT, signal.SIGTERM)[: 1 + alone]}
    try:
        yield received
    finally:
        for one, old in previous.items():
            signal.signal(one, old)


def train(config: TrainConfig, progress: Progress | None = None) -> Path:
    """Runs, or goes on with, the run of `config`; returns the run folder.

    Raises InputError before anything is compiled when the config, data, model or run folder does not fit, and while running
    for a failed reward, a bad record or too many non-finite updates. Raises Interrupted after SIGINT or SIGTERM, saved.
    """
    config.validate()
    context, state = build(config)
    sources = eval_sources(config, context.model.processor)
    with processes.one_after_another():
        claim(
            config.run_dir, config, free_fields(config), defaults=TrainConfig(config.name, method=type(config.method)())
        )
    checkpoints = Checkpoints(
        config.run_dir / "checkpoints",
        keep=config.save_total_limit,
        best_metric=config.metric_for_best_model,
        larger_is_better=best_direction(config.metric_for_best_model, sources) > 0,
    )
    with config.method.open(context) as work:
        return _train(config, context, state, work, sources, checkpoints, progress)


def _train(config, context, state, work, sources, checkpoints, progress):
    trained_seconds, seen_tokens, resumed, own = 0.0, 0.0, checkpoints.restore(state), work.first_own()
    if resumed is not None:
        state, data = resumed
        work.batches.set_state(data["batches"])
        own = {name: jnp.asarray(value, jnp.float32) for name, value in data["step"].items()}
        trained_seconds, seen_tokens = data["seconds"], data["tokens"]
    start = int(state.step)
    if jax.process_index() == 0:
        record_start(config.run_dir, config.seed, jax.devices())
    writer = MetricsWriter(
        config.run_dir,
        resume_step=start if resumed is not None else None,
        report_to=config.report_to,
        completions_steps=config.completions_steps,
        enabled=jax.process_index() == 0,
        config=config,
    )
    nonfinite: list[Any] = []  # of the updates since the last logged one
    failed, steady = 0, None
    began = time.monotonic() - trained_seconds
    trace = Trace(config.run_dir / "profile", start, config.profile)

    def save(metrics: dict[str, float] | None = None) -> None:
        data = {
            "batches": work.batches.get_state(),
            "step": {name: min(float(value), 1e30) for name, value in own.items()},
            "seconds": time.monotonic() - began,
            "tokens": seen_tokens,
        }
        checkpoints.save(state, data, metrics)

    with writer, trace, contextlib.closing(checkpoints):
        with stop_flag() as stop:
            if sources and start == 0 and config.eval_on_start:
                check_best(config.metric_for_best_model, evaluate(config, context, state, sources, "before"))
            step = start
            while step < config.max_steps and not stop:
                if processes.told_to_stop(step):
                    stop.append("SIGTERM")
                    break
                if config.max_seconds and processes.from_all(time.monotonic() - began > config.max_seconds)[0]:
                    break
                trace.before(step)
                clock, busy = time.perf_counter(), time.process_time()
                report = None  # what the last step saw is let go before the next one draws
                state, own, report = work.step(state, own, lambda: False)
                assert report is not None
                metrics = report.metrics
                step = int(state.step)
                nonfinite.append(metrics.get("nonfinite", 0.0))
                if step % config.logging_steps == 0 or step >= config.max_steps:
                    skipped = [bool(flag) for flag in jax.device_get(nonfinite)]
                    failed = trailing(failed, skipped)
                    nonfinite.clear()
                    metrics = host_scalars(metrics) | {"nonfinite": float(sum(skipped))}
                    seconds = time.perf_counter() - clock
                    metrics |= {"step_time": seconds}
                    # of all threads of this process: what a CPU run costs, however busy the machine is
                    metrics["processor_time"] = time.process_time() - busy
                    if "num_tokens" in metrics:  # the running total, as in TRL, of logged updates
                        metrics["tokens_per_second"] = metrics["num_tokens"] / seconds
                        seen_tokens += metrics["num_tokens"]
                        metrics["num_tokens"] = seen_tokens
                    if steady is not None:  # from the second logged update on: the first one compiles
                        pace = (time.perf_counter() - steady[1]) / (step - steady[0])
                        metrics["seconds/left"] = pace * (config.max_steps - step)
                    steady = steady or (step, time.perf_counter())
                    writer.log(step, metrics)
                    if failed >= config.optim.max_nonfinite_steps:
                        path = save_batch(report, config.run_dir / f"nonfinite_{step}.npz")
                        raise InputError(
                            f"{failed} updates in a row had a NaN or infinite gradient and were skipped; the last batch is "
                            f"in {path}. Lower optim.learning_rate or look at the data"
                        )
                    if progress is not None:
                        progress(step, metrics)
                log_completions(writer, step, report)
                if config.eval_steps and step % config.eval_steps == 0 and step < config.max_steps:
                    found = evaluate(config, context, state, sources, f"step_{step:06d}")
                    check_best(config.metric_for_best_model, found)
                    writer.log(step, {f"eval_{name}": value for name, value in found.items()})
                    save(found)
                elif step % config.save_steps == 0:
                    save()
            save()
        if stop:
            checkpoints.wait()
            raise Interrupted(f"{stop[0]}: saved update {step}; start the same command again to go on")
        if config.load_best_model_at_end:
            state = checkpoints.best(state)
        if sources:
            evaluate(config, context, state, sources, "after")
    if config.export:
        export(config, context, state, config.run_dir / "export")
    return config.run_dir


def best_direction(metric: str, sources: dict[str, Any]) -> int:
    """1 where a larger value of "<source>/<figure>" is better, -1 where a smaller one is. InputError for no such source."""
    if not metric:
        return 1
    figure = next((metric[len(name) + 1 :] for name in sources if metric.startswith(f"{name}/")), None)
    if figure is None:
        raise InputError(
            f"metric_for_best_model = {metric!r}: write <source>/<figure>, the sources are {', '.join(sources)}"
        )
    return measure.direction(figure) or 1


def check_best(metric: str, found: dict[str, float]) -> None:
    """InputError where an evaluation did not measure `metric`, the one that decides which checkpoint is best."""
    if metric and metric not in found:
        raise InputError(f"metric_for_best_model = {metric!r}: not measured; use one of {', '.join(found)}")


def trailing(before: int, flags: list[bool]) -> int:
    """How many of the last flags in a row are set, `before` having been set before them."""
    for flag in flags:
        before = before + 1 if flag else 0
    return before


def save_batch(report: Report, path: Path) -> Path:
    """What the last update saw, as .npz: the prompts or warm-up arrays, and of a rollout its completions and advantages."""
    seen = report.arrays() if report.arrays is not None else {}
    leaves = jax.tree_util.tree_leaves_with_path(seen)
    arrays = {jax.tree_util.keystr(where, simple=True, separator="."): processes.local_rows(x) for where, x in leaves}
    np.savez(path, **arrays)
    return path


def evaluate(
    config: TrainConfig, context: Context, state: TrainState, sources: dict[str, Any], name: str
) -> dict[str, float]:
    """Greedy evaluation on every source, into run_dir/eval/<name>; goes on with what the folder holds."""
    out_dir = config.run_dir / "eval" / name
    if (
        jax.process_count() > 1
    ):  # all generate together, so all go on with the same records; the first one's files are kept
        out_dir = processes.own_copy(out_dir)
    found = harness.evaluate(
        lambda records: config.method.answers(state.params, records, context),
        sources,
        out_dir=out_dir,
        batch_size=max(32, config.batch_size),
        limit=config.data.eval_samples,
        options=eval_options(config),
        max_bad_records=config.data.max_bad_records,
        config={"run": str(config.run_dir), "step": int(state.step)},
        save_pictures=config.save_pictures,
    )
    log.info("evaluation %s: %s", name, found.flat())
    return found.flat()


def log_completions(writer: MetricsWriter, step: int, report: Report) -> None:
    if report.rows is None or not writer.writes_completions(step):
        return
    table = report.rows()
    writer.log_completions(
        step,
        [str(record.get("expression") or record.get("label") or record["id"]) for record in table.records],
        table.texts,
        table.rewards,
        table.advantages,
        [record["images"][0] if record.get("images") else None for record in table.records],
    )


def export(config: TrainConfig, context: Context, state: TrainState, folder: Path) -> None:
    """The trained model as a Hugging Face folder, which shows pictures as in training; adapters are also saved, then merged.
    The method adds what it trained besides.
    """
    params = without_own(state.params, config)
    if config.lora is not None:
        lora.save(params, config.lora, folder.with_name("adapter"), base_model=config.model)
        params = jax.jit(lora.merge)(params)
    params = jax.tree.map(jnp.asarray, params)
    pixels = context.model.processor.pixel_config
    limits = (pixels.min_pixels, pixels.max_pixels)
    hf.save_params(params, context.cfg, folder, source=context.model.folder, pixels=limits)
    config.method.export(state.params, folder, context)
