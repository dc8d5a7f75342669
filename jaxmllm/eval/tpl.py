"""Temporal perplexity of records about several frames: how much of the gold answer needs all of them.

Source: sheet utr.md section 2; scores and filter: `eval.perplexity`. The model scores a record's gold answer, end of turn
included, once given all frames and once given each of K single frames, the same question both times. A metric of models
and a filter of data, never a loss.
"""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmllm import api
from jaxmllm.data.examples import Asking
from jaxmllm.data.images import load_image
from jaxmllm.data.sources import RecordSource
from jaxmllm.data.video import load_video
from jaxmllm.errors import InputError
from jaxmllm.eval.perplexity import choose_frames, single_frame_clip, tpl_filter, tpl_score
from jaxmllm.runfiles import JsonLines, plain, read_lines, replace_file

Record = Mapping[str, Any]
Message = Mapping[str, Any]
END = "<|im_end|>"
KNOWS = 1.0  # nats a token of the answers, below which a scorer knows the task (measured: above it TPL says nothing of time)
_score = jax.jit(tpl_score)


def frame_count(messages: Sequence[Message]) -> int:
    """Frames of a conversation: those of its one video, given one by one, or its images."""
    videos, images = (_parts(messages, kind) for kind in ("video", "image"))
    return len(videos[0]["video"]) if videos else len(images)


def one_frame(messages: Sequence[Message], index: int, single_mode: str = "repeat") -> list[dict[str, Any]]:
    """The conversation with one of its frames; texts stay as they are. See `eval.perplexity.single_frame_clip`.

    Of a video the frame is doubled. An image is two equal frames to the model by itself: it stays where it stands and the
    others go; `repeat` puts it in the place of each of them.
    """
    indices = single_frame_clip(index, frame_count(messages), single_mode)
    images = [part["image"] for part in _parts(messages, "image")]
    found, place = [], 0
    for message in messages:
        if isinstance(message["content"], str):
            found.append(dict(message))
            continue
        parts = []
        for part in message["content"]:
            if part["type"] == "video":
                parts.append({**part, "video": [part["video"][i] for i in indices]})
            elif part["type"] == "text":
                parts.append(part)
            else:
                if single_mode == "repeat" or place == index:
                    parts.append({**part, "image": images[index]})
                place += 1
        found.append({**message, "content": parts})
    return found


def _parts(messages: Sequence[Message], kind: str) -> list[dict[str, Any]]:
    return [p for m in messages if not isinstance(m["content"], str) for p in m["content"] if p["type"] == kind]


def _opened(model: api.Model, record: Record, asking: Asking) -> list[dict[str, Any]]:
    """The record's conversation, a video read and resized once, so that single frames have its resolution."""
    messages = [dict(message) for message in asking.conversation(dict(record))]
    name = str(record.get("id"))
    videos, images = (_parts(messages, kind) for kind in ("video", "image"))
    if len(videos) > 1 or (videos and images):
        raise InputError(f"{name}: temporal perplexity needs one video, or images that are its frames")
    for part in videos:
        options = {key: part.pop(key) for key in ("fps", "source_fps", "min_frames", "max_frames") if key in part}
        clip = load_video(part["video"], model.processor.video_config, name=name, **options)
        part |= {"video": list(clip.frames), "fps": clip.fps}
    if len({load_image(part["image"], name).size for part in images}) > 1:
        raise InputError(f"{name}: its images differ in size, so they are no frames of one clip")
    if frame_count(messages) < 2:
        raise InputError(f"{name}: it has {frame_count(messages)} frames; temporal perplexity needs two")
    return messages


def temporal_scores(
    model: api.Model,
    records: Sequence[Record],
    asking: Asking | None = None,
    *,
    tries: int | None = 1,
    choice: str = "random",
    single_mode: str = "repeat",
    batch_size: int = 8,
    seed: int = 0,
    first: int = 0,
) -> list[dict[str, Any]]:
    """Every form of TPL of each record, in the order of the records.

    Args:
        records: of a task whose images are the frames of a clip, or chats with one video.
        tries: single frames drawn for each record, its number (`first` + place) seeding the draw; None: all of them.
        choice: `random` frames or the `last` one.
        single_mode: `repeat`, the frame repeated to the clip's length, so that a still clip scores 0; or `single`, the frame
            alone as published, which also measures how the scorer takes to shorter clips.

    Returns:
        `id`, `task`, `kind` (of its query, or null), `tokens` (of the answer), `frames` (those tried), `ppl_full` and those of
        `eval.perplexity.tpl_score`: `tpl_nll_*` in nats a token, `tpl_ppl_*` in perplexity.

    Raises:
        InputError: a record has no answer, or is not one clip of at least two frames.
    """
    asking = asking or Asking()
    whole = [_opened(model, record, asking) for record in records]
    tried = [
        choose_frames(frame_count(messages), tries, np.random.default_rng([seed, first + k]), choice)
        for k, messages in enumerate(whole)
    ]
    answers = [asking.answer(dict(record)) + END for record in records]
    alone = [
        one_frame(messages, index, single_mode)
        for messages, indices in zip(whole, tried, strict=True)
        for index in indices
    ]
    repeated = [[answer] for answer, indices in zip(answers, tried, strict=True) for _ in indices]
    # apart: a single frame takes less room than the clip
    full = api.score(model, whole, [[answer] for answer in answers], batch_size=batch_size)
    single = iter(api.score(model, alone, repeated, batch_size=batch_size))
    length, most = max(len(logps) for (logps,) in full), max(map(len, tried))
    logps = np.zeros((len(records), 1 + most, length), np.float32)
    mask = np.zeros((len(records), length), bool)
    frame_mask = np.arange(most) < np.array([[len(indices)] for indices in tried])
    for row, ((given,), indices) in enumerate(zip(full, tried, strict=True)):
        mask[row, : len(given)] = True
        for place, values in enumerate([given, *(next(single)[0] for _ in indices)]):
            logps[row, place, : len(given)] = values
    table = jax.device_get(_score(logps[:, 0], logps[:, 1:], mask, frame_mask))
    names = [name for name in table if name != "ppl_frames"]
    return [
        {
            "id": record.get("id"),
            "task": record.get("task"),
            "kind": (record.get("query") or {}).get("kind"),
            "tokens": int(mask[row].sum()),
            "frames": tried[row],
            **{name: float(table[name][row]) for name in names},
        }
        for row, record in enumerate(records)
    ]


def keep(scores: Sequence[Mapping[str, Any]], min_tokens: int = 8) -> list[bool]:
    """Which records to train on: those at or above the median `tpl_nll_mean` of their task and kind of query (sheet utr.md
    2.4). A median over kinds would keep kinds of text: the half of one that needs no clip, and none of another.
    """
    values, lengths = ([row[name] for row in scores] for name in ("tpl_nll_mean", "tokens"))
    groups = [(row["task"], row.get("kind")) for row in scores]
    return tpl_filter(values, lengths, groups, min_tokens=min_tokens).tolist()


def score_source(
    model: api.Model,
    source: RecordSource,
    asking: Asking | None = None,
    *,
    out: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    limit: int | None = None,
    min_tokens: int = 8,
    batch_size: int = 8,
    **options: Any,
) -> list[dict[str, Any]]:
    """`temporal_scores` of the first `limit` records of a source, with `index` and `keep`; few clips are held at a time.

    With `out` the rows are also JSON lines in a file, which grows as they come beside it (`OUT.part`, with a first line that
    says what it is of); a stopped call goes on there. `keep` needs all scores, so the file itself is written at the end.

    Args:
        identity: what else decides the scores (data, model); a file of others is refused.

    Raises:
        InputError: `out` exists already, or its part is of other data, model or options.
    """
    total = len(source) if limit is None else min(limit, len(source))
    mine = plain({**(identity or {}), **options, "records": total})
    rows: list[dict[str, Any]] = []
    part = out.with_name(out.name + ".part") if out is not None else None
    if out is not None and part is not None:
        if out.exists():
            raise InputError(f"{out}: exists already; name a new file")
        out.parent.mkdir(parents=True, exist_ok=True)
        header, *rows = read_lines(part) or [mine]
        if header != mine:
            other = sorted(key for key in {*header, *mine} if header.get(key) != mine.get(key))
            raise InputError(f"{part}: begun with another {', '.join(other)}; remove it or name a new file")
    with JsonLines(part) if part is not None else contextlib.nullcontext() as file:
        if file is not None and part is not None and not rows and not part.stat().st_size:
            file.append([mine])
        while len(rows) < total:
            first = len(rows)
            records = [source[k] for k in range(first, min(first + 2 * batch_size, total))]
            found = temporal_scores(model, records, asking, batch_size=batch_size, first=first, **options)
            new = [{"index": first + k, **row} for k, row in enumerate(found)]
            rows += new
            if file is not None:
                file.append(new)
    rows = [{**row, "keep": kept} for row, kept in zip(rows, keep(rows, min_tokens), strict=True)]
    if out is not None and part is not None:
        replace_file(out, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())
        part.unlink()
    return rows


def unknown_task(scores: Sequence[Mapping[str, Any]]) -> str | None:
    """A warning where the scorer does not know how such answers are written, so that its scores tell kinds of text apart
    and not what needs frames: a median loss above `KNOWS` nats a token, of the answers given all frames.
    """
    loss = float(np.median([math.log(row["ppl_full"]) for row in scores]))
    if loss <= KNOWS:
        return None
    return (
        f"the scorer does not know this task: {loss:.1f} nats a token (perplexity {math.exp(min(loss, 700)):.3g}) given all "
        f"frames, above {KNOWS:g}; train it on such answers first, since until then TPL measures the kind of text"
    )
