"""`jaxmllm tpl`: UTR's temporal perplexity of clips."""

import sys
from pathlib import Path
from typing import Literal

import numpy as np

from jaxmllm import api
from jaxmllm.commands.options import BatchSize, Dtype, MaxPixels, MinPixels, Seed, Style, at_least
from jaxmllm.data.examples import Asking, Sized
from jaxmllm.data.sources import Spec, open_source
from jaxmllm.errors import InputError
from jaxmllm.eval import tpl
from jaxmllm.intervals import percentiles, ratio, value_and_samples
from jaxmllm.training.setup import chosen_style


def run(
    data: str,
    model: str = "tiny",
    limit: int = 256,
    tries: int = 1,
    single_mode: Literal["repeat", "single"] = "repeat",
    out: Path | None = None,
    style: Style = None,
    min_tokens: int = 8,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    dtype: Dtype = None,
) -> None:
    """Temporal perplexity of clips: how much of the gold answers needs more than one frame; a filter of training data.

    Args:
        data: a source of clips such as world:tracks, or chats with one video each.
        model: the scorer: the model to measure, or to filter data the one that training starts from.
        limit: first records of the source.
        tries: single frames tried for each record, drawn at random; 0: all.
        single_mode: a frame repeated to the clip's length, so that a still clip scores 0; or alone, as published.
        out: JSON lines with every record's scores and `keep`, which says whether it is in the better half of its task and
            kind of question. Train on that half with the same source and &keep=FILE. A stopped call goes on.
        min_tokens: shorter answers are not kept.
    """
    at_least(1, limit=limit, batch_size=batch_size)
    at_least(0, tries=tries)
    if out is not None and out.exists():
        raise InputError(f"{out}: exists already; name a new file")

    opened = open_source(data)
    loaded = api.load(model, dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels)
    written = chosen_style(style, loaded.cfg)
    scores = tpl.score_source(
        loaded,
        Sized(opened, loaded.processor.pixel_config),
        Asking({"style": written}),
        out=out,
        identity={"data": data, "model": model, "style": written, "pixels": [min_pixels, max_pixels], "dtype": dtype},
        limit=limit,
        min_tokens=min_tokens,
        batch_size=batch_size,
        tries=tries or None,
        single_mode=single_mode,
        seed=seed,
    )
    names = [name for name in scores[0] if name.startswith("tpl_")] + ["ppl_full"]
    table = np.array([[row[name] for name in names] for row in scores])
    figures = percentiles(*value_and_samples(ratio(table, np.ones_like(table)), len(table)))
    for name, figure in zip(names, figures, strict=True):
        print(f"{name:14} {figure}")
    print(f"{len(scores)} records, {sum(row['keep'] for row in scores)} of them kept", file=sys.stderr)
    if (warning := tpl.unknown_task(scores)) is not None:
        print(f"warning: {warning}", file=sys.stderr)
    if out is not None:
        print(f"to train on those: {Spec.parse(data).with_options(keep=out)}", file=sys.stderr)
