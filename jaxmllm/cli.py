"""The `jaxmllm` command. A mistake in the input prints one message; `--debug` adds the traceback."""

import ctypes
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from jaxmllm.commands import reflect, tpl
from jaxmllm.data.relation_pairs.command import relations
from jaxmllm.errors import EXIT_INPUT, InputError
from jaxmllm.experts.command import tracks
from jaxmllm.flags import finite, flag_types, spelled


def _console(quiet: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=True, highlight=False, quiet=quiet)


def sample(
    model: str = "tiny",
    prompt: str = "Describe this image.",
    image: tuple[Path, ...] = (),
    video: tuple[Path, ...] = (),
    fps: float = 2.0,
    system: str | None = None,
    num_generations: int = 1,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    max_source_pixels: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> None:
    """Answer a prompt about images and videos; the text appears as it is written.

    Args:
        model: checkpoint folder, hub id, or "tiny".
        prompt: the user's text; images and videos come before it.
        image: an image file; repeat for several.
        video: a video file or a folder of frames; repeat for several.
        fps: frames a second taken from a video.
        system: system message; the template's default without it.
        num_generations: answers to write; they share the prompt.
        temperature: 0 is greedy.
    """
    from jaxmllm import api
    from jaxmllm.model.logprobs import Sampling

    loaded = api.load(
        model, dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels, max_source_pixels=max_source_pixels
    )
    content: list[dict[str, Any]] = [{"type": "image", "image": str(path)} for path in image]
    content += [{"type": "video", "video": str(path), "fps": fps} for path in video]
    content.append({"type": "text", "text": prompt})
    opening = [{"role": "system", "content": system}] if system else []
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    shown, current, began, first = "", [], time.perf_counter(), 0.0
    for current in api.stream(
        loaded,
        [*opening, {"role": "user", "content": content}],
        num_generations=num_generations,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
    ):
        first = first or time.perf_counter()
        text = current[0].text
        # a character may be cut between two tokens: wait for the rest of it
        if num_generations == 1 and text.startswith(shown) and not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    if num_generations == 1:
        print(current[0].text[len(shown) :])
    else:
        for number, one in enumerate(current):
            print(f"--- {number + 1} ({one.stop_reason})\n{one.text}")
    tokens, seconds = sum(len(one.token_ids) for one in current), time.perf_counter() - first
    _console().print(
        f"{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s after the first "
        f"({first - began:.1f} s, compilation included)"
    )


def score(
    conversations: tyro.conf.Positional[Path],
    model: str = "tiny",
    out: Path | None = None,
    batch_size: int = 8,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> None:
    """Log-probabilities of given completions.

    Args:
        conversations: JSON lines, each {"messages": [...], "completions": ["...", ...]}.
        out: JSON lines with "logprobs" added; standard output without it.
    """
    import json

    from jaxmllm import api
    from jaxmllm.runfiles import read_lines

    rows = read_lines(conversations)
    for number, row in enumerate(rows, 1):
        for field in ("messages", "completions"):
            if not isinstance(row.get(field), list):
                raise InputError(f"{conversations}, line {number}: field {field!r} must be a list")
    if not rows:
        raise InputError(f"{conversations}: no rows")
    found = api.score(
        api.load(model, dtype=dtype),
        [r["messages"] for r in rows],
        [r["completions"] for r in rows],
        batch_size=batch_size,
    )
    lines = [
        json.dumps(row | {"logprobs": [one.tolist() for one in group]}) for row, group in zip(rows, found, strict=True)
    ]
    if out is None:
        print("\n".join(lines))
    else:
        out.write_text("\n".join(lines) + "\n")


def convert(
    source: tyro.conf.Positional[str],
    target: tyro.conf.Positional[Path],
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> None:
    """Convert between a Hugging Face folder and an Orbax one; the direction follows from what `source` holds.

    Args:
        source: Hugging Face folder, hub id, or a folder this command wrote.
        target: folder to write; must not exist.
    """
    from jaxmllm.training.convert import from_orbax, is_orbax, to_orbax

    if target.exists():
        raise InputError(f"{target}: exists already; name a new folder")
    if is_orbax(source):
        from_orbax(Path(source), target, dtype)
    else:
        to_orbax(source, target, dtype)
    _console().print(f"wrote {target}")


def evaluate(
    data: tuple[str, ...],
    model: str = "tiny",
    out: Path = Path("runs/eval"),
    task: str | None = None,
    style: str = "qwen2_5_vl",
    thinking: bool = False,
    wording: Literal["train", "evaluation"] = "train",
    rules: Literal["corrected", "released"] = "corrected",
    system: str | None = None,
    repetition_penalty: float = 1.0,
    max_bad_records: int = 0,
    limit: int | None = None,
    frames: tuple[Literal["all", "one", "shuffled", "none"], ...] = ("all",),
    batch_size: int = 32,
    max_new_tokens: int = 512,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    max_source_pixels: int | None = None,
    by: str | None = None,
    save_pictures: int = 16,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> None:
    """Greedy evaluation on one or more sources; goes on where it stopped; predictions are kept for other tools.

    Args:
        data: a source such as coco:instances.json?task=detection or world:grounding?split=val; repeat for several.
        out: folder for predictions, figures with intervals, and COCO results.
        task: the task to pose; each record's own without it.
        wording: of questions whose published evaluation asks in other words than the training.
        rules: how answers are read: released repeats Perception-R1's code, bugs included.
        system: system turn; without it the template's own, or with `thinking` one that asks for it.
        max_bad_records: records that may be unreadable; they are left out.
        frames: of clips: also with one frame in the place of all, shuffled, or none (grey). All stand in one table.
        by: also give the figures for each value of this record field.
    """
    from rich.progress import Progress

    from jaxmllm import api
    from jaxmllm.data.examples import Sized
    from jaxmllm.data.sources import open_source
    from jaxmllm.eval import controls, harness, tables
    from jaxmllm.training.config import DataConfig, EvaluationConfig, TrainConfig
    from jaxmllm.training.setup import eval_asking, eval_options

    config = TrainConfig("eval", data=DataConfig(style=style, thinking=thinking))
    config = dataclasses.replace(config, evaluation=EvaluationConfig(system=system, wording=wording, rules=rules))
    asking, options = eval_asking(config), eval_options(config)
    if not data:
        raise InputError("--data: name a source, such as world:grounding?split=val")
    extra = {} if task is None else {"task": task}
    opened = {spec: open_source(spec, **(extra if spec.startswith("coco:") else {})) for spec in data}
    loaded = api.load(
        model, dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels, max_source_pixels=max_source_pixels
    )
    sources = {spec: Sized(source, loaded.processor.pixel_config) for spec, source in opened.items()}
    sources = controls.with_controls(sources, frames)

    def generate(records: Sequence[Mapping[str, Any]]) -> list[str]:
        chats = [asking.conversation(dict(record)) for record in records]
        found = api.generate(
            loaded,
            chats,
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            repetition_penalty=repetition_penalty,
            batch_size=batch_size,
        )
        return [group[0].text for group in found]

    console = _console()
    with Progress(console=console, transient=True) as bar:
        line = bar.add_task("evaluating", total=None)
        found = harness.evaluate(
            generate,
            sources,
            task,
            out_dir=out,
            batch_size=batch_size,
            limit=limit,
            options=options,
            config={
                "model": api.identity(loaded),
                "dtype": loaded.cfg.dtype,
                "max_new_tokens": max_new_tokens,
                "pixels": [loaded.processor.pixel_config.min_pixels, loaded.processor.pixel_config.max_pixels],
                **({} if repetition_penalty == 1 else {"repetition_penalty": repetition_penalty}),
                **({} if system is None else {"system": system}),
            },
            by=by,
            max_bad_records=max_bad_records,
            save_pictures=save_pictures,
            on_batch=lambda done, total: bar.update(line, completed=done, total=total),
        )
    rows = tables.evaluation_rows(found) if len(frames) == 1 else controls.control_rows(found, frames)
    console.print(tables.terminal(rows, f"{model}"))
    console.print(f"predictions and figures: {out}")


def report(run: tyro.conf.Positional[Path], out: Path | None = None) -> None:
    """Write the self-contained HTML report of a run folder."""
    from jaxmllm.report.html import write_report

    path = out or run / "report.html"
    write_report(run, path)
    _console().print(f"wrote {path}")


def preview(source: tyro.conf.Positional[str], out: Path = Path("preview.png"), n: int = 16) -> None:
    """Draw the first records of a source with their annotations on one sheet.

    Args:
        source: for example world:detection or coco:instances.json?task=detection.
        out: PNG file to write.
        n: records to draw.
    """
    from jaxmllm.data.sources import open_source
    from jaxmllm.world import preview as draw

    draw(open_source(source), out, n)
    _console().print(f"wrote {out}")


def check(
    source: tyro.conf.Positional[tuple[str, ...]],
    eval: tuple[str, ...] = (),
    model: str = "tiny",
    style: str = "qwen2_5_vl",
    thinking: bool = False,
    max_prompt_length: int = 1024,
    max_new_tokens: int = 512,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    max_source_pixels: int | None = None,
    limit: int | None = None,
) -> None:
    """Read every record as training would: bad ones, lengths and sizes against the limits, answers that are never right.

    Ends with status 2 where a run would stop at a record.

    Args:
        source: training data, such as chat:rows.jsonl; several are looked at one by one.
        eval: sources of the evaluation; records that training has too are counted.
        model: whose tokenizer and picture sizes count: a checkpoint folder, a hub id, or "tiny".
        max_prompt_length: tokens of a prompt that the run allows, vision included: data.max_prompt_length.
        max_new_tokens: tokens of an answer that the run allows.
        limit: first records of each source; every record without it.
    """
    from rich.progress import Progress

    from jaxmllm import api
    from jaxmllm.commands import total_reward
    from jaxmllm.data import check as looking
    from jaxmllm.data.chat import Processor
    from jaxmllm.data.examples import Asking
    from jaxmllm.data.sources import open_source
    from jaxmllm.model.family import load_model_config

    for name, value in (
        ("limit", limit or 1),
        ("max_prompt_length", max_prompt_length),
        ("max_new_tokens", max_new_tokens),
    ):
        if value < 1 or limit == 0:
            raise InputError(f"--{name} {limit if name == 'limit' else value}: must be at least 1")
    opened = {spec: open_source(spec) for spec in dict.fromkeys((*source, *eval))}
    folder = api.resolve(model)
    processor = Processor.from_pretrained(
        folder,
        load_model_config(folder),
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        max_source_pixels=max_source_pixels,
    )
    pixels = processor.pixel_config
    limits = looking.Limits(max_prompt_length, max_new_tokens, pixels.max_pixels, pixels.factor)
    look = looking.Look(processor, Asking({"style": style, "thinking": thinking}), total_reward(style, thinking))
    found: dict[str, list[looking.Seen]] = {}
    with Progress(console=_console(), transient=True) as bar:
        for spec, one in opened.items():
            line = bar.add_task(spec.partition("?")[0], total=min(len(one), limit or len(one)))
            found[spec] = []
            for seen in look.source(one, limit):
                found[spec].append(seen)
                bar.advance(line)
    for spec in opened:
        print("\n".join(looking.summary(spec, found[spec], limits)))
    if eval:
        train, held_out = ([seen for spec in specs for seen in found[spec]] for specs in (source, eval))
        print("\n".join(looking.shared(train, held_out)))
    every = [seen for rows in found.values() for seen in rows]
    if stopped := looking.stopping(every, limits):
        raise InputError(f"a run would stop at {stopped} of {len(every)} records; see above for the flags")


def materialise(
    source: tyro.conf.Positional[str], out: Path, split: str = "train", start: int = 0, stop: int | None = None
) -> None:
    """Write a slice of the procedural world to ArrayRecord files, as a TFDS data set that `tfds:FOLDER` reads.

    Args:
        source: for example world:grounding?objects=2-6.
        out: folder to write into.
        split: name of the split.
        start: first item.
        stop: item to end before; the source's end without it.
    """
    from jaxmllm.data.sources import open_source
    from jaxmllm.world.source import WorldSource

    opened = open_source(source)
    if not isinstance(opened, WorldSource):
        raise InputError(f"{source}: only sources of the world are written, such as world:grounding")
    from jaxmllm.world.tfds_builder import materialise as write

    folder = write({split: opened}, out, start, stop)
    _console().print(f"wrote {folder}: read it as tfds:{folder}?split={split}", soft_wrap=True)


def train(arguments: Sequence[str]) -> int:
    """`jaxmllm train CONFIG.py [--field value ...]`: dotted flags override the config's fields."""
    from jaxmllm.training.config import parse_command

    if not arguments or arguments[0].startswith("-"):
        print("usage: jaxmllm train CONFIG.py [--field value ...]   (--help after the config lists the fields)")
        return 0 if "--help" in arguments or "-h" in arguments else EXIT_INPUT
    config, given = parse_command("train", arguments, ("--mesh",))

    from jaxmllm.machine import processes

    processes.start()
    if "--mesh" in given:
        from jaxmllm.plan.placing import on_mesh

        config = on_mesh(config, given["--mesh"])
    from jaxmllm.training.run import run_and_report
    from jaxmllm.training.stopping import EXIT_INTERRUPTED, Interrupted

    try:
        run_and_report(config)
    except Interrupted as stopped:
        _console().print(f"[yellow]{stopped}")
        return EXIT_INTERRUPTED
    return 0


def _elsewhere(line: str) -> Any:
    """A command that reads its arguments by itself, as a line of `--help`."""

    def command() -> None: ...

    command.__doc__ = line
    return command


COMMANDS: dict[str, Any] = {
    "train": _elsewhere("Train or go on with a run: CONFIG.py [--field value ...]; GRPO, SFT, DPO and others."),
    "sample": sample,
    "score": score,
    "reflect": reflect,
    "tpl": tpl,
    "convert": convert,
    "eval": evaluate,
    "report": report,
    "plan": _elsewhere("Memory, products and time of a config on a machine that is not here: CONFIG.py --mesh MESH."),
    "data": _elsewhere(
        "Look at data: check reads every record, preview draws some, materialise writes a slice, "
        "tracks makes some of video, relations makes pairs."
    ),
}
DATA_COMMANDS: dict[str, Any] = {"check": check, "preview": preview, "materialise": materialise}
DATA_COMMANDS |= {"tracks": tracks, "relations": relations}


def _call(commands: Mapping[str, Any], arguments: Sequence[str], prog: str, description: str | None) -> int:
    """Runs one of `commands` with its flags."""
    name, rest = arguments[:1], arguments[1:]
    if name and name[0] in commands:
        rest = spelled(rest, flag_types(commands[name[0]]))
    checked = {name: finite(command) for name, command in commands.items()}
    tyro.extras.subcommand_cli_from_dict(checked, args=[*name, *rest], prog=prog, description=description)
    return 0


def _keep_freed_memory() -> None:
    """Tells glibc to keep the big blocks that are freed: XLA's CPU client frees and takes its buffers anew in every step.

    Given back to the system, each is filled with zeros again page by page: a fifth of an update of the tiny model.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8  # malloc.h
    for option, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**28), (m_arena_max, 1)):
        mallopt(option, value)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 2 for a mistake in the input, 75 when saved after a signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # as a program, before jax is imported: what was compiled once is kept for the next start
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jaxmllm" / "compiled"))
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(name)s: %(message)s")
    # a failed write of a checkpoint is told in one message, not in the traceback of each thread
    logging.getLogger("absl").setLevel(logging.ERROR if debug else logging.CRITICAL)
    try:
        if arguments and arguments[0] == "train":
            if argv is None:
                _keep_freed_memory()
            from jaxmllm.machine import processes

            with processes.leaving_together():
                return train(arguments[1:])
        if arguments and arguments[0] == "plan":
            from jaxmllm.plan.command import plan

            return plan(arguments[1:])
        if arguments and arguments[0] == "data":
            return _call(DATA_COMMANDS, arguments[1:], "jaxmllm data", "Look at data before a model does.")
        return _call(COMMANDS, arguments, "jaxmllm", __doc__)
    except InputError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # a defect: say so in one line, the traceback on request
        if debug:
            raise
        print(f"error: {type(error).__name__}: {error}\n(--debug shows the traceback)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
