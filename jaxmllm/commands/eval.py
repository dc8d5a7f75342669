"""`jaxmllm eval`: greedy evaluation of a model."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.progress import Progress

from jaxmllm import api, tasks
from jaxmllm.commands.options import (
    BatchSize,
    Dtype,
    MaxNewTokens,
    MaxPixels,
    MaxSourcePixels,
    MinPixels,
    ModelName,
    RepetitionPenalty,
    Style,
    Thinking,
)
from jaxmllm.commands.terminal import console
from jaxmllm.data.examples import Sized
from jaxmllm.data.sources import Spec, open_source
from jaxmllm.errors import InputError
from jaxmllm.eval import controls, harness, tables
from jaxmllm.runfiles import not_a_bucket
from jaxmllm.training.config import DataConfig, EvaluationConfig, TrainConfig
from jaxmllm.training.setup import chosen_style, eval_asking, eval_options


def run(
    data: tuple[str, ...],
    model: ModelName = "tiny",
    out: Path = Path("runs/eval"),
    task: str | None = None,
    style: Style = None,
    thinking: Thinking = False,
    task_options: tuple[str, ...] = (),
    wording: Literal["train", "evaluation"] = "train",
    rules: Literal["corrected", "released"] = "corrected",
    system: str | None = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    max_bad_records: int = 0,
    limit: int | None = None,
    frames: tuple[Literal["all", "one", "shuffled", "none"], ...] = ("all",),
    batch_size: BatchSize = 32,
    max_new_tokens: MaxNewTokens = 512,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    max_source_pixels: MaxSourcePixels = None,
    by: str | None = None,
    save_pictures: int = 16,
    dtype: Dtype = None,
) -> None:
    """Greedy evaluation on one or more sources; goes on where it stopped; predictions are kept for other tools.

    Args:
        data: a source such as coco:instances.json?task=detection or world:grounding?split=val; repeat for several.
        out: folder for predictions, figures with intervals, and COCO results.
        task: the task to pose; each record's own without it.
        task_options: of the tasks: name=value, or task.name=value.
        wording: of questions whose published evaluation asks in other words than the training.
        rules: how answers are read: released repeats Perception-R1's code, bugs included.
        system: system turn; without it the template's own, or with `thinking` one that asks for it.
        max_bad_records: records that may be unreadable; they are left out.
        limit: first records of each source; every record without it.
        frames: of clips: also with one frame in the place of all, shuffled, or none (grey). All stand in one table.
        by: also give the figures for each value of this record field.
        save_pictures: pictures kept in `out` for the report.
    """
    not_a_bucket(out, "--out")
    if not data:
        raise InputError("--data: name a source, such as world:grounding?split=val")
    tasks.parsed_options(task_options)
    opened = {spec: open_source(spec, task=task if Spec.parse(spec).kind == "coco" else None) for spec in data}
    loaded = api.load(
        model, dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels, max_source_pixels=max_source_pixels
    )
    pixels = loaded.processor.pixel_config
    asked = DataConfig(style=chosen_style(style, loaded.cfg), thinking=thinking, task_options=task_options)
    config = TrainConfig("eval", data=asked)
    config = dataclasses.replace(config, evaluation=EvaluationConfig(system=system, wording=wording, rules=rules))
    asking, options = eval_asking(config), eval_options(config)

    def generate(records: Sequence[Mapping[str, Any]]) -> list[str]:
        return api.ask(
            loaded,
            asking,
            records,
            max_new_tokens=max_new_tokens,
            repetition_penalty=repetition_penalty,
            batch_size=batch_size,
        )

    with Progress(console=console(), transient=True) as bar:
        line = bar.add_task("evaluating", total=None)
        figures = harness.evaluate(
            generate,
            controls.with_controls({spec: Sized(source, pixels) for spec, source in opened.items()}, frames),
            task,
            out_dir=out,
            batch_size=batch_size,
            limit=limit,
            options=options,
            config={
                "model": api.identity(loaded),
                "dtype": loaded.cfg.dtype,
                "max_new_tokens": max_new_tokens,
                "pixels": [pixels.min_pixels, pixels.max_pixels],
                **({} if repetition_penalty == 1 else {"repetition_penalty": repetition_penalty}),
                **({} if system is None else {"system": system}),
            },
            by=by,
            max_bad_records=max_bad_records,
            save_pictures=save_pictures,
            on_batch=lambda done, total: bar.update(line, completed=done, total=total),
        )
    rows = tables.evaluation_rows(figures) if len(frames) == 1 else controls.control_rows(figures, frames)
    console().print(tables.terminal(rows, model))
    console().print(f"predictions and figures: {out}")
