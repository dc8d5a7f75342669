"""Evaluation: ask a model about every record, keep what it says, measure it with intervals.

The folder of an evaluation, readable without this library:

| file                                     | content                                                                   |
|------------------------------------------|---------------------------------------------------------------------------|
| `config.json`                            | options and whatever the caller says identifies model and data            |
| `predictions.jsonl`                      | one line a record, in the order they were asked; written as they come     |
| `metrics.json`                           | figures with intervals                                                    |
| `<source>/*.json`                        | the task's files for other tools: COCO annotations and results, say       |
| `pictures/`                              | small copies of the first pictures, for reports                           |

A line of `predictions.jsonl`: `source`, `task`, `id`, `index`; `question`; `text`, the completion; `prediction` and
`target` in original pixels ("boxes" [x1, y1, x2, y2], "points", "labels", "count", "text"); `size`; `figures` of this
record (a number, or [top, bottom] of a pooled ratio); `groups` of the figures by group (see `by`); `unit`, what is resampled
together, or null; `picture`, a path in the folder, or null.

An evaluation that was stopped goes on where it was: records that have a line are not asked again.
"""

import dataclasses
import heapq
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from jaxmllm import tasks
from jaxmllm.data.images import load_image
from jaxmllm.errors import InputError
from jaxmllm.eval.frames import other_frame
from jaxmllm.eval.measure import Evaluation, Measured, Resampling, badness, direction, folder_name, measure, save
from jaxmllm.intervals import CONFIDENCE, RESAMPLES
from jaxmllm.runfiles import JsonLines, claim, read_lines
from jaxmllm.tasks.chat import last_turn
from jaxmllm.tasks.task import Record, Task

log = logging.getLogger(__name__)
Generate = Callable[[Sequence[Record]], Sequence[str]]
Judge = Callable[[Sequence[str], Sequence[Record]], Sequence[Mapping[str, float]]]  # a run's own rewards of completions
WORST = 6  # records of a source, answered worst, whose pictures are kept too
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
    judge: Judge | None = None,
    config: Any = None,
    by: str | None = None,
    save_pictures: int = 0,
    notes: Mapping[str, str] | None = None,
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
            which is its `text`; its task, if it has none, is `chat`: what is compared is that text.
        out_dir: folder of this evaluation; goes on with what it holds.
        batch_size: records a call of `generate`; fewer at the end of a source and when going on.
        limit: first records of each source to ask; None: all.
        options: of the tasks: `style`, `thinking`, `rules`, ..
        judge: further figures of completions, called `reward` or `reward_..`: they come first, and larger is better.
        config: what else decides the completions (checkpoint, data, decoding); plain values or a dataclass.
        by: record field; the main figures are also given for each of its values, where these have 20 records on average.
            None: by the task's own groups.
        save_pictures: first records of each source whose picture is kept; the worst ones' are kept too.
        notes: by source, what a person should know before believing the figures.
        max_bad_records: records that may fail, when they are read or when they are asked; they are left out, with a warning.
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
    tasks.check_options(options, [task] if task else ())
    sources = source if isinstance(source, Mapping) else {"": source}
    total = sum(min(len(s), limit or len(s)) for s in sources.values())
    if not total:
        raise InputError("nothing to evaluate: the source has no records")
    claim(out, {"task": task, "options": options, "config": config})
    done = {(line["source"], line["id"]): line for line in read_lines(out / "predictions.jsonl")}
    asked: dict[str, list[tuple[Record, dict[str, Any]]]] = {}  # records without images, with their lines
    finished, warned, bad, worst = 0, False, _Bad(max_bad_records), _Worst(min(save_pictures, WORST))
    with JsonLines(out / "predictions.jsonl") as file:
        for batch in _batches(sources, task, limit, batch_size, options, bad):
            new = [item for item in batch if (item.source, item.id) not in done]
            if not warned and any("images" in item.record and "resized" not in item.record for item in new):
                log.warning("records have no `resized`: their boxes are read as if the model saw the original size")
                warned = True
            lines = []
            for item, text, rewards in _answered(generate, judge, new, bad):
                place = len(asked.get(item.source, ()))
                place += sum(other.source == item.source and other.index < item.index for other in batch)
                picture = _save_picture(out, item) if place < save_pictures else None
                line = _line(item, text, by) | {"picture": picture}
                lines.append(line | {"figures": {**rewards, **line["figures"]}})
            file.append(lines)
            done |= {(line["source"], line["id"]): line for line in lines}
            for item in batch:
                if (item.source, item.id) in done:  # otherwise it could not be asked
                    line = done[item.source, item.id]
                    _check_unchanged(line, item)
                    asked.setdefault(item.source, []).append((_without_images(item.record), line))
                    worst(item, line)
            finished += len(batch)
            if on_batch:
                on_batch(finished, total)
    if not asked:
        raise InputError("nothing to evaluate: no record could be read")
    worst.save(out)
    how = Resampling(n_resamples, seed, confidence)
    figures = {}
    for name, pairs in asked.items():
        ids = _category_ids(sources.get(name, source))
        figures[name] = _measured(name, pairs, options, out, how, ids, (notes or {}).get(name, ""))
    evaluation = Evaluation(figures, confidence)
    save(out, evaluation, how)
    return evaluation


def _measured(
    name: str,
    pairs: Sequence[tuple[Record, dict[str, Any]]],
    options: Mapping[str, Any],
    out: Path,
    how: Resampling,
    ids: Mapping[str, int] | None,
    note: str,
) -> Measured:
    records, lines = [record for record, _ in pairs], [line for _, line in pairs]
    hint = other_frame(tasks.of({"task": lines[0]["task"]}, options), [line["text"] for line in lines], records)
    if hint:
        log.warning("%s: %s", name, hint)
    notes = [text for text in (note, hint) if text]
    return measure(records, lines, options, out / folder_name(name), how, ids, notes)


@dataclasses.dataclass(frozen=True)
class _Item:
    """A record to ask about."""

    source: str  # its name
    id: str
    index: int  # in the source
    where: str  # the source's own words for it: file and row
    record: Record
    task: Task
    question: str
    target: dict[str, Any]


class _Bad:
    """Counts the records that fail, and raises where there are too many."""

    def __init__(self, most: int):
        self.most, self.count = most, 0

    def __call__(self, error: Exception) -> None:
        self.count += 1
        if self.count > self.most:
            hint = f"; {self.count} records failed, max_bad_records is {self.most}" if self.most else ""
            raise InputError(f"{error}{hint}") from None
        log.warning("left out: %s", error)


def _batches(
    sources: Mapping[str, Source],
    task: str | None,
    limit: int | None,
    batch_size: int,
    options: Mapping[str, Any],
    bad: _Bad,
) -> Iterator[list[_Item]]:
    for name, source in sources.items():
        n = min(len(source), limit or len(source))
        for start in range(0, n, batch_size):
            batch = []
            for index in range(start, min(start + batch_size, n)):
                try:
                    batch.append(_posed(source, name, index, task, options))
                except InputError as error:
                    bad(error)
            yield batch


def _posed(source: Source, name: str, index: int, task: str | None, options: Mapping[str, Any]) -> _Item:
    """The record with its task, its question and what is true; a chat's last answer is its `text` (and caption)."""
    record = source[index]
    described = getattr(source, "where", None)
    where = described(index) if described else f"source {name!r}, record {index}"
    try:
        named = task or tasks.name_of(record)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    posed: dict[str, Any] = {**record, "task": named}
    messages = record.get("messages")
    if messages and not {"text", "caption"} & record.keys():
        posed["text"] = posed["caption"] = last_turn(messages) or str(record.get("solution", ""))
    try:
        own = tasks.of(posed, options)
        question = tasks.get(tasks.CHAT).prompt(posed) if messages else own.prompt(posed)
        target = own.target(posed)
        if messages and messages[-1]["role"] == "assistant":
            posed["messages"] = messages[:-1]
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: does not suit the task {named} ({type(error).__name__}: {error})") from None
    return _Item(name or named, str(record.get("id", index)), index, where, posed, own, question, target)


class _NoTexts(InputError):
    """`generate` did not return a text a record: its own mistake, whatever the records are."""


Answered = tuple[_Item, str, Mapping[str, float]]  # with its completion and the run's own rewards of it


def _answered(generate: Generate, judge: Judge | None, items: list[_Item], bad: _Bad) -> list[Answered]:
    """The items with their completions. Where a batch fails they are asked one by one, and the ones that fail left out."""

    def ask(some: list[_Item]) -> list[Answered]:
        records = [item.record for item in some]
        texts = list(generate(records))
        if len(texts) != len(some) or not all(isinstance(text, str) for text in texts):
            kinds = sorted({type(text).__name__ for text in texts})
            raise _NoTexts(f"generate returned {len(texts)} of {kinds} for {len(some)} records; need one text each")
        rewards = judge(texts, records) if judge else [{} for _ in texts]
        return list(zip(some, texts, rewards, strict=True))

    try:
        return ask(items) if items else []
    except _NoTexts:
        raise
    except InputError:
        answered = []
        for item in items:
            try:
                answered += ask([item])
            except InputError as error:
                bad(InputError(f"{item.where}: {error}"))
        return answered


def _category_ids(source: Any) -> Mapping[str, int] | None:
    """The ids that a COCO file gives its categories, also through sources that wrap one."""
    while source is not None and not hasattr(source, "category_ids"):
        source = getattr(source, "source", None)
    return None if source is None else source.category_ids


def _without_images(record: Record) -> Record:
    """What is kept of a record until the end; the name of its image file stays."""
    images = record.get("images")
    file = {"file_name": Path(images[0]).name} if images is not None and len(images) and _is_path(images[0]) else {}
    return file | {field: value for field, value in record.items() if field not in ("images", "videos", "messages")}


def _is_path(image: Any) -> bool:
    return isinstance(image, str | Path)


def _line(item: _Item, text: str, by: str | None) -> dict[str, Any]:
    record, task = item.record, item.task
    group = record.get(by) if by else None
    return {
        "source": item.source,
        "task": record["task"],
        "id": item.id,
        "index": item.index,
        "question": item.question,
        "text": text,
        "prediction": task.predicted(text, record),
        "target": item.target,
        "size": [float(side) for side in record["size"]] if "size" in record else None,
        "figures": dict(task.row(text, record)),
        "groups": list(task.groups(record)) if not by else [] if group is None else [str(group)],
        "unit": task.unit(record),
    }


def _check_unchanged(line: Mapping[str, Any], item: _Item) -> None:
    """The answer was given for this record: same place, same question, same truth."""
    if line["index"] != item.index:
        first, second = sorted((line["index"], item.index))
        raise InputError(
            f"source {item.source!r}: records {first} and {second} both have the id {item.id!r}; ids must be "
            "unique, and a record keeps its place"
        )
    if line["question"] != item.question or line["target"] != item.target:
        raise InputError(
            f"source {item.source!r}, id {item.id!r}: the folder holds an answer to another record of that id; "
            "the data changed, use another folder"
        )


def picture_path(source: str, index: int, kind: str) -> Path:
    """Where the picture of a record lies in the folder; `kind`: png or jpg."""
    return Path("pictures") / f"{folder_name(source)}_{index:06d}.{kind}"


def _save_picture(out: Path, item: _Item) -> str | None:
    """Saves a small copy of the record's first image; its path in the folder, None without an image."""
    images = item.record.get("images")
    if images is None or not len(images):
        return None
    image = load_image(images[0], f"record {item.id}")
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    path = picture_path(item.source, item.index, "png" if max(image.size) <= PNG_SIDE else "jpg")
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    image.save(out / path, quality=88)
    return path.as_posix()


class _Worst:
    """Keeps the records that were answered worst, with their pictures, of each source."""

    def __init__(self, most: int):
        self.most = most
        self.kept: dict[str, list[tuple[float, int, _Item]]] = {}

    def __call__(self, item: _Item, line: Mapping[str, Any]) -> None:
        signs = {figure: direction(item.task, figure) for figure in line["figures"]}
        ranked = Measured(line["task"], 1, {}, item.task.primary, signs)
        bad = badness(line, ranked)
        if bad is not None and self.most:
            kept = self.kept.setdefault(item.source, [])
            heapq.heappush(kept, (bad, -item.index, item))  # of equals the first records stay
            if len(kept) > self.most:
                heapq.heappop(kept)

    def save(self, out: Path) -> None:
        for kept in self.kept.values():
            for _, _, item in kept:
                _save_picture(out, item)
