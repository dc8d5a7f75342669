"""Temporal perplexity of records about several frames: how much of the gold answer needs all of them.

Source: sheet utr.md section 2; scores and filter: `losses.temporal`. The model scores a record's gold answer, end of turn
included, once given all frames and once given each of K single frames, the same question both times. A metric of models
and a filter of data, never a loss.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmllm import api
from jaxmllm.data.examples import Asking
from jaxmllm.data.images import load_image
from jaxmllm.data.video import load_video
from jaxmllm.errors import InputError
from jaxmllm.eval.perplexity import choose_frames, single_frame_clip, tpl_filter, tpl_score

Record = Mapping[str, Any]
Message = Mapping[str, Any]
END = "<|im_end|>"
_score = jax.jit(tpl_score)


def frame_count(messages: Sequence[Message]) -> int:
    """Frames of a conversation: those of its one video, given one by one, or its images."""
    videos, images = (_parts(messages, kind) for kind in ("video", "image"))
    return len(videos[0]["video"]) if videos else len(images)


def one_frame(messages: Sequence[Message], index: int, single_mode: str = "single") -> list[dict[str, Any]]:
    """The conversation with one of its frames; texts stay as they are. See `losses.temporal.single_frame_clip`.

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
    frames: int | None = 1,
    choice: str = "random",
    single_mode: str = "single",
    batch_size: int = 8,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Every form of TPL of each record, in the order of the records.

    Args:
        records: of a task whose images are the frames of a clip, or chats with one video.
        frames: single frames drawn for each record, its number in the list seeding the draw; None: all of them.
        choice: `random` frames or the `last` one.
        single_mode: `single`, or `repeat`: the frame repeated to the clip's length (the control run).

    Returns:
        `id`, `task`, `tokens` (of the answer), `frames` (those tried), `ppl_full` and the figures of
        `losses.temporal.tpl_score`: `tpl_nll_*` in nats a token, `tpl_ppl_*` in perplexity.

    Raises:
        InputError: a record has no answer, or is not one clip of at least two frames.
    """
    asking = asking or Asking()
    whole = [_opened(model, record, asking) for record in records]
    tried = [
        choose_frames(frame_count(messages), frames, np.random.default_rng([seed, k]), choice)
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
            "tokens": int(mask[row].sum()),
            "frames": tried[row],
            **{name: float(table[name][row]) for name in names},
        }
        for row, record in enumerate(records)
    ]


def keep(scores: Sequence[Mapping[str, Any]], min_tokens: int = 8) -> list[bool]:
    """Which records to train on: those at or above their task's median of `tpl_nll_mean` (sheet utr.md 2.4)."""
    values, lengths, tasks = ([row[name] for row in scores] for name in ("tpl_nll_mean", "tokens", "task"))
    return tpl_filter(values, lengths, tasks, min_tokens=min_tokens).tolist()
