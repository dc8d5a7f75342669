"""What a clip's frames are worth: the same questions with all frames, one frame, frames without order, or none.

A temporal figure says something only beside these. A figure that stays with one frame, or with frames in another order, was
not won by watching; one that stays without pictures was read off the question.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmllm.data.decoding import image_size
from jaxmllm.data.formats import Record, Source, choose
from jaxmllm.data.selection import RecordSource, where
from jaxmllm.errors import InputError
from jaxmllm.eval.measure import Evaluation

SHOWN = ("all", "one", "shuffled", "none")
GREY = 128


class Controlled(Source):
    """The records of a source with their frames as `shown` says; questions, answers and number of frames stay.

    `one`: one frame, drawn for each record, in the place of all. `shuffled`: the frames in another order than the true one.
    `none`: grey pictures of the same sizes. Ids and draws do not depend on the rest of the source.
    """

    def __init__(self, source: RecordSource, shown: str, seed: int = 0):
        self.source, self.shown, self.seed = source, choose(shown, SHOWN, "frames"), seed

    def __len__(self) -> int:
        return len(self.source)

    def where(self, index: int) -> str:
        return where(self.source, index)

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        if self.shown == "all":
            return record
        rng = np.random.default_rng([self.seed, zlib.crc32(str(record.get("id", index)).encode())])
        return controlled(record, self.shown, rng)


def with_controls(sources: Mapping[str, RecordSource], shown: Sequence[str]) -> dict[str, RecordSource]:
    """Every source once for each of `shown`, under a name that says which; the one with all frames keeps its own."""
    return {
        _label(name, how): source if how == "all" else Controlled(source, how)
        for name, source in sources.items()
        for how in dict.fromkeys(choose(how, SHOWN, "frames") for how in shown)
    }


def control_rows(evaluation: Evaluation, shown: Sequence[str]) -> list[list[str]]:
    """[source, records, figure, value with interval for each of `shown`], header first: the controls beside each figure."""
    known = {_label("", how): how for how in shown}
    rows = []
    for source, measured in evaluation.sources.items():
        ending = next((end for end in known if end and source.endswith(end)), "")
        if known.get(ending) != shown[0]:
            continue
        name = source.removesuffix(ending)
        others = [evaluation.sources[_label(name, how)].figures for how in shown]
        rows += [
            [name, str(measured.n), figure, *(str(found.get(figure, "–")) for found in others)]
            for figure in measured.figures
        ]
    return [["source", "n", "figure", *(f"frames {how}" for how in shown)], *rows]


def _label(name: str, shown: str) -> str:
    return name if shown == "all" else f"{name} (frames {shown})"


def controlled(record: Record, shown: str, rng: np.random.Generator) -> Record:
    """The record with other frames; see `Controlled`.

    Raises:
        InputError: it has fewer than two frames, or a video that is not given frame by frame.
    """
    frames = _frames(record)
    if len(frames) < 2:
        raise InputError(
            f"{record.get('id')}: --frames {shown} needs a clip of two images or more, this has {len(frames)}"
        )
    if shown == "one":
        places = [int(rng.integers(len(frames)))] * len(frames)
    else:
        places = rng.permutation(len(frames)).tolist()
        if places == sorted(places):  # chance gave the true order
            places = places[1:] + places[:1]
    new = [grey(frame) for frame in frames] if shown == "none" else [frames[k] for k in places]
    return _replaced(record, iter(new))


def grey(image: Any) -> np.ndarray:
    """A grey picture of the size of another."""
    width, height = image_size(image)
    return np.full((height, width, 3), GREY, np.uint8)


def _frames(record: Record) -> list[Any]:
    found: list[Any] = []
    _visit(record, found.append)
    return found


def _replaced(record: Record, new: Any) -> Record:
    return _visit(record, lambda _: next(new))


def _visit(record: Record, change: Callable[[Any], Any]) -> Record:
    """The record with every frame changed, in order: of `images`, of `videos` and of the messages."""
    out = dict(record)
    if len(record.get("images") or ()):
        out["images"] = [change(image) for image in record["images"]]
    if record.get("videos"):
        out["videos"] = [_video(video, change, record) for video in record["videos"]]
    if record.get("messages"):
        out["messages"] = [_message(message, change, record) for message in record["messages"]]
    return out


def _message(message: Mapping[str, Any], change: Callable[[Any], Any], record: Record) -> Mapping[str, Any]:
    if isinstance(message["content"], str) or message["content"] is None:
        return message
    parts = []
    for part in message["content"]:
        if part.get("type") == "image" and "image" in part:
            part = {**part, "image": change(part["image"])}
        elif part.get("type") == "video" and "video" in part:
            part = {**part, "video": _video(part["video"], change, record)}
        parts.append(part)
    return {**message, "content": parts}


def _video(video: Any, change: Callable[[Any], Any], record: Record) -> list[Any]:
    if not isinstance(video, Sequence) or isinstance(video, str):
        raise InputError(f"{record.get('id')}: --frames needs the frames of a video one by one, not a file")
    return [change(frame) for frame in video]
