"""Evaluation: ask a model about every record, keep what it says, measure it with intervals.

The folder of an evaluation, readable without this library:

| file                                     | content                                                                   |
|------------------------------------------|---------------------------------------------------------------------------|
| `config.json`                            | options and whatever the caller says identifies model and data            |
| `predictions.jsonl`                      | one line a record, in the order they were asked; written as they come     |
| `metrics.json`                           | figures with intervals                                                    |
| `<source>/ground_truth.json`             | detection: COCO annotations of the records asked                          |
| `<source>/coco_results.json`             | detection: COCO results in original pixels                                |
| `pictures/`                              | small copies of the first pictures, for reports                           |

A line of `predictions.jsonl`: `source`, `task`, `id`, `index`; `question`; `text`, the completion; `prediction` and
`target` in original pixels ("boxes" [x1, y1, x2, y2], "points", "labels", "count", "text"); `size`; `figures` of this
record (a number, or [top, bottom] of a pooled ratio); `group` (see `by`); `picture`, a path in the folder, or null.

An evaluation that was stopped goes on where it was: records that have a line are not asked again.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from jaxmllm import tasks
from jaxmllm.data.images import load_image
from jaxmllm.errors import InputError
from jaxmllm.eval import predictions
from jaxmllm.eval.intervals import CONFIDENCE, RESAMPLES
from jaxmllm.eval.measure import Evaluation, Resampling, folder_name, measure, save
from jaxmllm.eval.predictions import Record
from jaxmllm.runfiles import JsonLines, claim, read_lines

log = logging.getLogger(__name__)
Generate = Callable[[Sequence[Record]], Sequence[str]]
PICTURE_SIDE, PNG_SIDE = 320, 160  # pixels: pictures are shrunk to the first; up to the second they are kept losslessly


class Source(Protocol):
    """Records by index: a list, or a source of `jaxmllm.data`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


def evaluate(
    generate: Generate,
    source: Source | Mapping[str, Source],
    task: str | None = None,
    *,
    out_dir: str | Path,
    batch_size: int = 16,
    limit: int | None = None,
    options: Mapping[str, Any] | None = None,
    config: Any = None,
    by: str | None = None,
    save_pictures: int = 0,
    max_bad_records: int = 0,
    n_resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Asks `generate` about the records, writes the folder described above, returns the figures.

    Records with images need `size` and `resized`, or boxes are read wrongly where the model sees another size: wrap the
    source in `data.examples.Sized`. A record without `resized` is warned about.

    Args:
        generate: completions of a batch of records, in order; should be greedy, so that a resumed run says the same.
        source: records by index, or several such sources by name. Records of a bare source are measured by task.
        task: the task to pose; None: each record's own `task`. A chat (`messages`) is asked without its last answer,
            which its completion is compared with; its task, if it has none, is `ocr`: figures of a text.
        out_dir: folder of this evaluation; goes on with what it holds.
        batch_size: records a call of `generate`; fewer at the end of a source and when going on.
        limit: first records of each source to ask; None: all.
        options: of the task's functions: `style`, `thinking`, `rules`, ..
        config: what else decides the completions (checkpoint, data, decoding); plain values or a dataclass.
        by: record field; the main figures are also given for each of its values, where these have 20 records on average.
            Counting: `label` unless given.
        save_pictures: first records of each source whose picture is kept.
        max_bad_records: records that may be unreadable; they are left out, with a warning.
        n_resamples, confidence, seed: of the bootstrap intervals; for AP images are resampled.
        on_batch: called after every batch with (records done, records in all).

    Raises:
        InputError: the folder holds another evaluation (the differing fields are named), an id occurs twice, the record
            of an answered id changed, an option fits no task, there are no records or too many that cannot be read, or
            `generate` returns anything but one text a record.
    """
    options, out = dict(options or {}), Path(out_dir)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise InputError(f"batch_size = {batch_size}, limit = {limit}: must be at least 1")
    predictions.check_options(options, [task] if task else tasks.names())
    sources = source if isinstance(source, Mapping) else {"": source}
    total = sum(min(len(s), limit or len(s)) for s in sources.values())
    if not total:
        raise InputError("nothing to evaluate: the source has no records")
    claim(out, {"task": task, "options": options, "config": config})
    done = {(line["source"], line["id"]): line for line in read_lines(out / "predictions.jsonl")}
    asked: dict[str, list[tuple[Record, dict[str, Any]]]] = {}  # records without images, with their lines
    finished, warned = 0, False
    with JsonLines(out / "predictions.jsonl") as file:
        for batch in _batches(sources, task, limit, batch_size, max_bad_records):
            new = [item for item in batch if item[:2] not in done]
            if not warned and any("images" in record and "resized" not in record for *_, record in new):
                log.warning("records have no `resized`: their boxes are read as if the model saw the original size")
                warned = True
            texts = _generated(generate, [record for *_, record in new])
            lines = []
            for (name, key, index, record), text in zip(new, texts, strict=True):
                place = len(asked.get(name, ())) + sum(item[0] == name and item[2] < index for item in batch)
                picture = _save_picture(out, name, index, record) if place < save_pictures else None
                lines.append(_line(name, key, index, record, text, options, by) | {"picture": picture})
            file.append(lines)
            done |= {(line["source"], line["id"]): line for line in lines}
            for name, key, index, record in batch:
                light = _without_images(record)
                line = done[name, key]
                if line["index"] != index:
                    first, second = sorted((line["index"], index))
                    raise InputError(
                        f"source {name!r}: records {first} and {second} both have the id {key!r}; ids must be "
                        "unique, and a record keeps its place"
                    )
                _check_unchanged(line, record, options)
                asked.setdefault(name, []).append((light, line))
            finished += len(batch)
            if on_batch:
                on_batch(finished, total)
    how = Resampling(n_resamples, seed, confidence)
    if not asked:
        raise InputError("nothing to evaluate: no record could be read")
    evaluation = Evaluation(
        {
            name: measure(
                [record for record, _ in pairs],
                [line for _, line in pairs],
                options,
                out / folder_name(name),
                how,
                _category_ids(sources.get(name, source)),
            )
            for name, pairs in asked.items()
        },
        confidence,
    )
    save(out, evaluation, how)
    return evaluation


Item = tuple[str, str, int, Record]  # name of the source, id, index in the source, record


def _batches(
    sources: Mapping[str, Source], task: str | None, limit: int | None, batch_size: int, max_bad_records: int
) -> Iterator[list[Item]]:
    bad = 0
    for name, source in sources.items():
        n = min(len(source), limit or len(source))
        for start in range(0, n, batch_size):
            batch = []
            for index in range(start, min(start + batch_size, n)):
                try:
                    record = _posed(source[index], task, name, index)
                except InputError as error:
                    bad += 1
                    if bad > max_bad_records:
                        hint = f"; {bad} records could not be read, max_bad_records is {max_bad_records}"
                        raise InputError(f"{error}{hint if max_bad_records else ''}") from None
                    log.warning("left out: %s", error)
                    continue
                batch.append((name or record["task"], str(record.get("id", index)), index, record))
            yield batch


def _posed(record: Record, task: str | None, name: str, index: int) -> Record:
    """The record with its task; a chat loses its last answer, which becomes the text (and caption) to compare with."""
    task = task or record.get("task")
    posed: dict[str, Any] = {**record, "task": task}
    messages = record.get("messages")
    if messages and not {"text", "caption"} & record.keys():
        posed["task"] = task or "ocr"
        last = messages[-1] if messages[-1]["role"] == "assistant" else {"content": str(record.get("solution", ""))}
        posed["messages"] = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        posed["text"] = posed["caption"] = _message_text(last)
    if posed["task"] not in tasks.names():
        known = ", ".join(tasks.names())
        raise InputError(f"source {name!r}, record {index}: task is {posed['task']!r}; give one of {known}")
    return posed


def _category_ids(source: Any) -> Mapping[str, int] | None:
    """The ids that a COCO file gives its categories, also through sources that wrap one."""
    while source is not None and not hasattr(source, "category_ids"):
        source = getattr(source, "source", None)
    return None if source is None else source.category_ids


def _message_text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "".join(part["text"] for part in parts if part.get("type") == "text")


def _without_images(record: Record) -> Record:
    """What is kept of a record until the end; the name of its image file stays."""
    images = record.get("images")
    file = {"file_name": Path(images[0]).name} if images is not None and len(images) and _is_path(images[0]) else {}
    return file | {field: value for field, value in record.items() if field not in ("images", "videos", "messages")}


def _is_path(image: Any) -> bool:
    return isinstance(image, str | Path)


def _question(record: Record, options: Mapping[str, Any]) -> str:
    if "messages" in record:
        return _message_text(record["messages"][-1])
    prompt = tasks.get(record["task"]).prompt
    return prompt(record, **predictions.accepted(prompt, options))


def _generated(generate: Generate, records: list[Record]) -> list[str]:
    texts = list(generate(records)) if records else []
    if len(texts) != len(records) or not all(isinstance(text, str) for text in texts):
        kinds = sorted({type(text).__name__ for text in texts})
        raise InputError(f"generate returned {len(texts)} of {kinds} for {len(records)} records; need one text each")
    return texts


def _line(
    name: str, key: str, index: int, record: Record, text: str, options: Mapping[str, Any], by: str | None
) -> dict[str, Any]:
    module = tasks.get(record["task"])
    group = record.get(by or ("label" if record["task"] == "counting" else ""))
    return {
        "source": name,
        "task": record["task"],
        "id": key,
        "index": index,
        "question": _question(record, options),
        "text": text,
        "prediction": predictions.predicted(record["task"], text, record, options),
        "target": predictions.target(record),
        "size": [float(side) for side in record["size"]] if "size" in record else None,
        "figures": predictions.figures(module, text, record, options),
        "group": None if group is None else str(group),
    }


def _check_unchanged(line: Mapping[str, Any], record: Record, options: Mapping[str, Any]) -> None:
    """The answer was given for this record: same question, same truth."""
    if line["question"] != _question(record, options) or line["target"] != predictions.target(record):
        raise InputError(
            f"source {line['source']!r}, id {line['id']!r}: the folder holds an answer to another record of that id; "
            "the data changed, use another folder"
        )


def _save_picture(out: Path, name: str, index: int, record: Record) -> str | None:
    """Saves a small copy of the record's first image; its path in the folder, None without an image."""
    images = record.get("images")
    if images is None or not len(images):
        return None
    image = load_image(images[0], f"record {record.get('id', index)}")
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    kind = "png" if max(image.size) <= PNG_SIDE else "jpg"
    path = Path("pictures") / f"{folder_name(name)}_{index:06d}.{kind}"
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    image.save(out / path, quality=88)
    return path.as_posix()
