"""Sources of records: `open_source("coco:PATH")` and its like, subsets, groups and weighted mixtures of them.

| spec                         | records (options)                                                                  |
|------------------------------|------------------------------------------------------------------------------------|
| `world:grounding:2,counting` | the procedural world, tasks with weights (split seed length questions twins, and    |
|                              | every field of the world's spec that is no nested tuple)                           |
| `coco:FILE.json`             | COCO JSON (task=detection,counting,grounding categories=A,B crowd max_objects      |
|                              | empty images order)                                                                |
| `chat:FILE`                  | Hugging Face messages; TRL's prompt / image(s) / solution; conversations of LLaVA, |
|                              | ShareGPT and VLM-R1; ms-swift's query / response; Alpaca; EasyR1's problem /       |
|                              | answer; any table with a question and an answer (images; task: one of              |
|                              | `jaxmllm.tasks` or module:name, which reads, rewards and measures answers)         |
| `images:FOLDER`              | pictures; answers are a metadata file's, .txt files' or the subfolders' (prompt)   |
| `pr1:FILE`                   | rows of Perception-R1 and VLM-R1, or a YAML mixture of such files                  |
|                              | (task frame images seed)                                                           |
| `refcoco:PATH`               | RefCOCO, + and g: rows (lmms-lab's too), a JSON release, or a folder prepared by   |
|                              | TFDS (split dataset boxes images)                                                  |
| `pixmo:FILE`                 | PixMo-Count (frame images)                                                         |
| `pages:FILE`                 | pages with lines (images)                                                          |
| `records:FILE`               | rows that already are records of this library (task images)                        |
| `reflection:FILE`            | dialogues of answers and feedback, which `jaxmllm reflect --out` writes (images)   |
| `preference:FILE`            | two answers of which one is preferred: TRL's prompt / chosen / rejected / image(s),|
|                              | or the best and worst answer of each reflection dialogue (images; answers=all:     |
|                              | every answer of it, for dpo.loss_type lipo)                                        |
| `tfds:FOLDER`                | records of the world that its TFDS builder wrote to ArrayRecord (split)            |
| `mot:FOLDER` `got10k:FOLDER` | windows of annotated videos, with a query each (task=tracks,foresight frames rate  |
| `lasot:FOLDER` `clips:FILE`  | horizon stride kinds subjects max_static min_visibility seed)                      |
| `video:FOLDER`               | plain videos with one question (question)                                          |

FILE is .jsonl, .json (a list, or lines), .csv, .tsv or .parquet (also a folder of shards), unless it says otherwise.
Options are written `coco:train.json?task=counting&categories=RBC,WBC`. Every spec also takes `sample` (first:N, end:N,
random:N, N with or without %) with `seed`, `keep` (a file of `jaxmllm tpl --out`: the records that it keeps), `clip` (boxes
that leave their picture are cut at its edges), `annotated` (stored or upright: the pixels on which boxes were drawn, see
`annotations`), `group` (records of the same pictures together, see `Grouped`), `augment` (that many random views of each
record, see `augment.Augmented`) with `crop`, and, among several specs, `weight`.
"""

import dataclasses
import inspect
import math
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import grain
import numpy as np

from jaxmllm import tasks
from jaxmllm.data import clip_files, dialogues, records
from jaxmllm.data.annotations import Placed
from jaxmllm.data.augment import Augmented
from jaxmllm.data.coco import CocoSource, referring_rows
from jaxmllm.data.formats import Record, RowSource, Source, choose, image_root, media
from jaxmllm.data.image_folder import open_images
from jaxmllm.data.rows import Exploded, Rows, existing, is_lines
from jaxmllm.data.selection import RecordSource, all_records, image_key, kept, sample, where
from jaxmllm.data.tfds import is_prepared, open_prepared
from jaxmllm.errors import InputError
from jaxmllm.world.source import DEFAULT_SPECS, WorldSource

ENDLESS = 2**62  # length of an endless order
COMMON = ("sample", "keep", "clip", "annotated", "group", "weight", "augment", "crop")  # options that every spec takes


# ---------------------------------------------------------------- parts of sources


class Grouped(Source):
    """The records of the same pictures together: item i is the first record about pictures i, `records(i)` are all of them.

    Reads every row once; a source that knows its images without reading rows (COCO) is grouped at once.
    """

    def __init__(self, source: RecordSource):
        groups: dict[Any, list[int]] = {}
        for index in range(len(source)):
            groups.setdefault(image_key(source, index), []).append(index)
        self.source, self.groups = source, list(groups.values())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Record:
        return self.source[self.groups[index][0]]

    def records(self, index: int) -> list[Record]:
        return [record for i in self.groups[index] for record in all_records(self.source, i)]

    def image_key(self, index: int):
        return image_key(self.source, self.groups[index][0])

    def where(self, index: int) -> str:
        return where(self.source, self.groups[index][0])


class Mixture(Source):
    """Several sources, addressed one after the other; `order` draws from each by its weight.

    Without weights every record is drawn equally often.
    """

    def __init__(self, sources: Sequence[RecordSource], weights: Sequence[float] | None = None):
        if not sources or (weights is not None and len(weights) != len(sources)):
            raise InputError(f"mixture: {len(sources)} sources and {len(weights or ())} weights")
        if weights is not None and not all(math.isfinite(w) and w > 0 for w in weights):
            raise InputError(f"mixture: weights must be positive numbers, got {list(weights)}")
        self.sources = list(sources)
        self.weights = None if weights is None else [float(w) for w in weights]
        self.starts = np.cumsum([0, *map(len, sources)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _at(self, index: int) -> tuple[RecordSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"no record {index}, there are {len(self)}")
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.sources[which], index - int(self.starts[which])

    def __getitem__(self, index: int) -> Record:
        source, index = self._at(index)
        return source[index]

    def records(self, index: int) -> list[Record]:
        return all_records(*self._at(index))

    def image_key(self, index: int):
        source, inner = self._at(index)
        return id(source), image_key(source, inner)

    def where(self, index: int) -> str:
        return where(*self._at(index))


def order(source: RecordSource, seed: int | None) -> grain.MapDataset:
    """Endless indices of `source`, epoch after epoch: shuffled anew in each (`seed`), or in their order (None).

    A mixture is drawn by its weights; each of its sources has epochs of its own.
    """
    if isinstance(source, Mixture) and source.weights is not None:
        parts = [
            order(part, None if seed is None else _seed(seed, k)).map(partial(operator.add, int(source.starts[k])))
            for k, part in enumerate(source.sources)
        ]
        return grain.MapDataset.mix(parts, source.weights)
    if not len(source):
        raise InputError(f"{getattr(source, 'name', 'source')}: it has no records")
    places = grain.MapDataset.range(ENDLESS)
    return places.map(partial(_index, len(source), None if seed is None else _seed(seed, 0)))


def _index(length: int, seed: int | None, place: int) -> int:
    epoch, inside = divmod(place, length)
    return inside if seed is None else int(_permutation(length, seed, epoch)[inside])


@lru_cache(maxsize=32)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """Grain's own shuffle takes milliseconds an index for sources of less than a hundred records.

    From raw words, whose values numpy guarantees; its `permutation` may change between releases.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(length)
    return np.argsort(words, kind="stable").astype(np.int32 if length < 2**31 else np.int64)


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed % 2**64, number]).generate_state(1)[0])


# ---------------------------------------------------------------- kinds


def _file(path: str, parse: Callable[..., Record], column: str, images: str | None, **options: Any) -> RowSource:
    """Rows of a file; `column` is where the first row has the path of an image, which tells where images are."""
    file = existing(path, folder=True)
    return _rows(file, Rows(file), parse, column, images, **options)


def _rows(
    file: Path, rows: Any, parse: Callable[..., Record], column: str, images: str | None, **options: Any
) -> RowSource:
    root = image_root(file, images, _first_image(_first(file, rows), column))
    return RowSource(rows, partial(parse, **options), file, root)


def _first(file: Path, rows: Any) -> Record:
    try:
        return rows[0]
    except InputError as error:
        raise InputError(f"{file}, record 0: {error}") from None


def _first_image(row: Mapping[str, Any], column: str) -> str | None:
    for key in (column, "image", "images", "file_name"):
        cell = row.get(key)
        cell = cell[0] if isinstance(cell, list) and cell else cell
        if cell is not None:
            try:
                cell = media(cell, Path())
            except InputError:
                return None
            return cell if isinstance(cell, str) else None
    return None


def open_chat(path: str, images: str | None = None, task: str | None = None) -> Source:
    if task is not None:
        tasks.get(task)
    return _file(path, records.chat, "images", images, task=task)


def open_pages(path: str, images: str | None = None) -> Source:
    return _file(path, records.page, "file_name", images)


def open_pixmo(path: str, images: str | None = None, frame: str = "pixel") -> Source:
    return _file(path, records.pixmo_count, "image", images, frame=frame)


def open_records(path: str, images: str | None = None, task: str | None = None) -> Source:
    return _file(path, records.own, "images", images, task=task)


def open_reflection(path: str, images: str | None = None) -> Source:
    return _file(path, dialogues.reflection, "image", images)


def open_preference(path: str, images: str | None = None, answers: str = "pair") -> Source:
    found = _file(path, dialogues.preference, "image", images)
    every = choose(answers, ("pair", "all"), "answers") == "all"
    return dialogues.Preferences(found.rows, Path(found.name), found.root, every)


def open_coco(
    path: str,
    task: tuple[str, ...] = ("detection",),
    images: str | None = None,
    categories: tuple[str, ...] = (),
    crowd: str = "drop",
    max_objects: int = 0,
    empty: bool = False,
    order: str = "file",
) -> Source:
    return CocoSource(path, task, images, categories, crowd, max_objects, empty, order)


def open_refcoco(
    path: str,
    images: str | None = None,
    split: str | None = None,
    dataset: str | None = None,
    boxes: str | None = None,
) -> Source:
    file = existing(path, folder=True)
    if is_prepared(file):
        return open_prepared(file, split)
    if file.is_dir() or (file.suffix == ".json" and _starts_with_object(file) and not is_lines(file)):
        return _rows(file, referring_rows(file, split, dataset), records.referring, "file_name", images)
    rows: Any = Rows(file)
    first = _first(file, rows)
    if "answer" in first and "bbox" in first:  # lmms-lab's: several expressions a row, boxes as COCO writes them
        rows, boxes = Exploded(rows, "answer", "question_id"), boxes or "xywh"
    source = _rows(file, rows, records.referring, "image", images)
    if boxes is None:
        try:
            boxes = records.box_form(rows, source.root)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
    return RowSource(
        rows, partial(records.referring, boxes=choose(boxes, records.BOX_FORMS, "boxes")), file, source.root
    )


def _starts_with_object(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip()[:1] == b"{"


def open_pr1(
    path: str, images: str | None = None, task: str | None = None, frame: str | None = None, seed: int = 0
) -> RecordSource:
    """Rows, or a YAML file {"datasets": [{"json_path", "sampling_strategy", "data_root" or "image_root"}]}."""
    if Path(path).suffix not in (".yaml", ".yml"):
        return _file(path, records.perception_r1, "image", images, task=task, frame=frame)
    import yaml

    file = existing(path)
    try:
        entries = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("datasets")
    except (yaml.YAMLError, OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: not readable as YAML with a list datasets ({error})") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{file}: datasets must be a list of json_path and sampling_strategy")
    parts = []
    for k, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
            raise InputError(f"{file}: datasets[{k}]: json_path is missing")
        root = entry.get("data_root") or entry.get("image_root") or images
        try:
            part = open_pr1(str(file.parent / entry["json_path"]), root and str(file.parent / root), task, frame)
            part = sample(part, str(entry.get("sampling_strategy", "all")), seed + k)
        except InputError as error:
            raise InputError(f"{file}: datasets[{k}]: {error}") from None
        parts.append(part)
    return Mixture(parts)


def open_world(
    path: str,
    task: str | None = None,
    split: str = "train",
    seed: int = 0,
    length: int = 100_000,
    questions: int = 1,
    twins: bool = False,
    **spec: Any,
) -> RecordSource:
    """`path` is one task, or several with weights: `grounding:3,counting`. `spec`: fields of the world's spec."""
    if task and path:
        raise InputError(f"world: tasks are given twice, {path!r} and task={task!r}")
    weights: dict[str, float] = {}
    for item in (path or task or "").split(","):
        name, _, weight = item.partition(":")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise InputError(f"world: weight {weight!r} of {name!r} is no number") from None
    first = choose(next(iter(weights)), DEFAULT_SPECS, "world: task")
    base = DEFAULT_SPECS[first]
    scene = getattr(base, "scene", None)  # of a clip's first frame
    parts = [part for part in (base, scene) if part is not None]
    for key in spec:
        choose(key, [field.name for part in parts for field in dataclasses.fields(part)], "world: option")
    if scene is not None:
        base = dataclasses.replace(base, scene=_with_options(scene, spec))
    base = _with_options(base, spec)
    return WorldSource(weights, split=split, seed=seed, length=length, spec=base, questions=questions, twins=twins)


def _with_options(base: Any, options: Mapping[str, Any]) -> Any:
    """A spec of the world with those options that are its fields."""
    hints = typing.get_type_hints(type(base))
    return dataclasses.replace(
        base, **{k: _convert(f"world: {k}", v, hints[k]) for k, v in options.items() if k in hints}
    )


def open_tfds(path: str, split: str | None = None) -> Source:
    return open_prepared(existing(path, folder=True), split)


KINDS: dict[str, Callable[..., RecordSource]] = {
    "world": open_world,
    "coco": open_coco,
    "chat": open_chat,
    "images": open_images,
    "pr1": open_pr1,
    "refcoco": open_refcoco,
    "pixmo": open_pixmo,
    "pages": open_pages,
    "records": open_records,
    "reflection": open_reflection,
    "preference": open_preference,
    "tfds": open_tfds,
    "video": clip_files.open_videos,
    **{kind: clip_files.opener(kind) for kind in clip_files.READERS},
}


# ---------------------------------------------------------------- opening


def open_source(spec: str | Sequence[str], **options: Any) -> RecordSource:
    """Opens a source by its spec, see the module's table; several specs become a mixture by their `weight`.

    `options` are those of the spec's query, as Python values; they win over it. An option that is None is not given.
    Raises InputError naming the spec for an unknown kind or option, a missing or empty file, or images not found.
    """
    if not isinstance(spec, str):
        parts = [_open(one, options) for one in spec]
        weights = [weight for _, weight in parts]
        if len(parts) > 1:
            given = any(weight is not None for weight in weights)
            return Mixture([part for part, _ in parts], [w or 1.0 for w in weights] if given else None)
        spec = spec[0] if spec else ""
    return _open(spec, options)[0]


def _open(spec: str, options: Mapping[str, Any]) -> tuple[RecordSource, float | None]:
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in KINDS:
        raise InputError(f"data {spec!r}: write KIND:PATH with one of the kinds {', '.join(KINDS)}")
    path, _, query = rest.partition("?")
    # read as it stands, not as an address: folders may be named refcoco+
    given: dict[str, Any] = {key: value for key, _, value in (item.partition("=") for item in query.split("&")) if key}
    given |= {key: value for key, value in options.items() if value is not None}
    common = {key: given.pop(key) for key in COMMON if key in given}
    seed = given.get("seed", 0)
    hints = typing.get_type_hints(KINDS[kind])
    parameters = inspect.signature(KINDS[kind]).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if ("sample" in common or "augment" in common) and "seed" not in parameters:
        given.pop("seed", None)
    known = [name for name in parameters if name not in ("path", "spec")]
    for key in given:
        if key not in known and not free:
            raise InputError(f"{kind}: option {key!r} is unknown; it takes {', '.join([*known, *COMMON])}")
    values = {k: _convert(f"{kind}: {k}", v, hints[k]) if k in known else v for k, v in given.items()}
    source = KINDS[kind](path, **values)
    if isinstance(source, RowSource):
        source.kind = kind
    seed = _convert(f"{kind}: seed", seed, int) if common else 0
    if "sample" in common:
        source = sample(source, str(common["sample"]), seed)
    if "keep" in common:
        source = kept(source, str(common["keep"]))
    if not len(source):
        raise InputError(f"{spec}: no records are left")
    if "clip" in common or "annotated" in common:
        clip = _convert(f"{kind}: clip", common.get("clip", False), bool)
        source = Placed(source, str(common.get("annotated", "stored")), clip)
    if "group" in common and _convert(f"{kind}: group", common["group"], bool):
        source = Grouped(source)
    if "augment" in common:
        views = _convert(f"{kind}: augment", common["augment"], int)
        source = Augmented(source, views, _convert(f"{kind}: crop", common.get("crop", 0.7), float), seed)
    elif "crop" in common:
        raise InputError(f"{kind}: option 'crop' goes with augment, the number of views")
    weight = common.get("weight")
    return source, None if weight is None else _convert(f"{kind}: weight", weight, float)


def _convert(name: str, value: Any, hint: Any) -> Any:
    """A text of a query as the type that a parameter is annotated with; other values are left alone.

    Tuples are written with commas, or `3-6` and `112x112` for pairs of integers, where one number stands for both.
    """
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not types.NoneType)
    arms = typing.get_args(hint)
    try:
        if hint is bool:
            return {"": True, "1": True, "true": True, "0": False, "false": False}[value.lower()]
        if hint in (int, float):
            number = hint(value)
            if not math.isfinite(number):
                raise ValueError
            return number
        if typing.get_origin(hint) is tuple:
            if arms == (int, int):
                numbers = [int(n) for n in value.replace("-", ",").replace("x", ",").split(",")]
                low, high = numbers * 2 if len(numbers) == 1 else numbers
                return low, high
            if arms != (str, ...):
                raise ValueError
            return tuple(item for item in value.split(",") if item)
        return value
    except (ValueError, KeyError):
        raise InputError(f"{name}: {value!r} does not fit; expected {_describe(hint)}") from None


def _describe(hint: Any) -> str:
    if hint is bool:
        return "true or false"
    if typing.get_origin(hint) is tuple:
        return {(int, int): "two whole numbers like 3-6", (str, ...): "names with commas"}.get(
            typing.get_args(hint), "a value that only Python can give"
        )
    return {int: "a whole number", float: "a number"}.get(hint, "a text")
