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
| `order:SPLIT`                | questions of order in clips, four an item, see `world.quadruples` (seed length)    |
| `tfds:FOLDER`                | records of the world that its TFDS builder wrote to ArrayRecord (split)            |
| `mot:FOLDER` `got10k:FOLDER` | windows of annotated videos, with a query each (task=tracks,foresight frames rate  |
| `lasot:FOLDER` `clips:FILE`  | horizon stride kinds subjects max_static min_visibility seed)                      |
| `video:FOLDER`               | plain videos with one question (question)                                          |

FILE is .jsonl, .json (a list, or lines), .csv, .tsv or .parquet (also a folder of shards), unless it says otherwise.
Options are written `coco:train.json?task=counting&categories=RBC,WBC`; `module:function:PATH` is a kind of another package.
Every spec also takes `sample` (first:N, end:N, random:N, N with or without %) with `seed`, `keep` (a file of `jaxmllm tpl
--out`: the records that it keeps), `clip` (boxes that leave their picture are cut at its edges), `annotated` (stored or
upright: the pixels on which boxes were drawn, see `annotations`), `group` (records of the same pictures together, see
`Grouped`), `augment` (that many random views of each record, see `augment.Augmented`) with `crop`, and, among several
specs, `weight`.
"""

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmllm.data.annotations import Placed
from jaxmllm.data.augment import Augmented
from jaxmllm.data.formats import RowSource
from jaxmllm.data.selection import RecordSource, all_records, image_key, kept, sample, where
from jaxmllm.data.sources.mixture import ENDLESS, Grouped, Mixture, order
from jaxmllm.data.sources.registry import KINDS, opener
from jaxmllm.data.sources.spec import Spec, convert
from jaxmllm.errors import InputError
from jaxmllm.runfiles import not_a_bucket

__all__ = [
    "ENDLESS", "KINDS", "Grouped", "Mixture", "RecordSource", "Spec",
    "all_records", "image_key", "open_source", "order", "sample", "where",
]  # fmt: skip
COMMON = ("sample", "keep", "clip", "annotated", "group", "weight", "augment", "crop")  # options that every spec takes

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")  # its kinds register themselves


def open_source(spec: str | Spec | Sequence[str | Spec], **options: Any) -> RecordSource:
    """Opens a source by its spec, see the module's table; several specs become a mixture by their `weight`.

    `options` are those of the spec's query, as Python values; they win over it. An option that is None is not given.
    Raises InputError naming the spec for an unknown kind or option, a missing or empty file, or images not found.
    """
    if not isinstance(spec, str | Spec):
        parts = [_open(one, options) for one in spec]
        weights = [weight for _, weight in parts]
        if len(parts) > 1:
            given = any(weight is not None for weight in weights)
            return Mixture([part for part, _ in parts], [w or 1.0 for w in weights] if given else None)
        spec = spec[0] if spec else ""
    return _open(spec, options)[0]


def _open(spec: str | Spec, options: Mapping[str, Any]) -> tuple[RecordSource, float | None]:
    read = (Spec.parse(spec) if isinstance(spec, str) else spec).with_options(**options)
    kind, given = read.kind, dict(read.options)
    function = opener(kind, str(spec))
    if kind in KINDS:  # a kind of another package may read what it likes
        not_a_bucket(read.path, kind)
        not_a_bucket(given.get("images", ""), f"{kind}: images")
    common = {key: given.pop(key) for key in COMMON if key in given}
    seed = given.get("seed", 0)
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if ("sample" in common or "augment" in common) and "seed" not in parameters:
        given.pop("seed", None)
    known = [name for name in parameters if name not in ("path", "spec")]
    for key in given:
        if key not in known and not free:
            raise InputError(f"{kind}: option {key!r} is unknown; it takes {', '.join([*known, *COMMON])}")
    values = {k: convert(f"{kind}: {k}", v, hints.get(k, str)) if k in known else v for k, v in given.items()}
    source = function(read.path, **values)
    if isinstance(source, RowSource):
        source.kind = kind
    seed = convert(f"{kind}: seed", seed, int) if common else 0
    if "sample" in common:
        source = sample(source, str(common["sample"]), seed)
    if "keep" in common:
        source = kept(source, str(common["keep"]))
    if not len(source):
        raise InputError(f"{spec}: no records are left")
    if "clip" in common or "annotated" in common:
        clip = convert(f"{kind}: clip", common.get("clip", False), bool)
        source = Placed(source, str(common.get("annotated", "stored")), clip)
    if "group" in common and convert(f"{kind}: group", common["group"], bool):
        source = Grouped(source)
    if "augment" in common:
        views = convert(f"{kind}: augment", common["augment"], int)
        source = Augmented(source, views, convert(f"{kind}: crop", common.get("crop", 0.7), float), seed)
    elif "crop" in common:
        raise InputError(f"{kind}: option 'crop' goes with augment, the number of views")
    weight = common.get("weight")
    return source, None if weight is None else convert(f"{kind}: weight", weight, float)
