"""`jaxmllm sample`: answers to one prompt, on the terminal."""

import time
from pathlib import Path
from typing import Any

from jaxmllm import api
from jaxmllm.commands.options import (
    Dtype,
    MaxNewTokens,
    MaxPixels,
    MaxSourcePixels,
    MinPixels,
    ModelName,
    RepetitionPenalty,
    Seed,
)
from jaxmllm.commands.terminal import console
from jaxmllm.model.logprobs import Sampling


def run(
    model: ModelName = "tiny",
    prompt: str = "Describe this image.",
    image: tuple[Path, ...] = (),
    video: tuple[Path, ...] = (),
    fps: float = 2.0,
    system: str | None = None,
    num_generations: int = 1,
    max_new_tokens: MaxNewTokens = 512,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float | None = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    max_source_pixels: MaxSourcePixels = None,
    dtype: Dtype = None,
) -> None:
    """Answer a prompt about images and videos; the text appears as it is written.

    Args:
        prompt: the user's text; images and videos come before it.
        image: an image file; repeat for several.
        video: a video file or a folder of frames; repeat for several.
        fps: frames a second taken from a video.
        system: system message; the template's default without it.
        num_generations: answers to write; they share the prompt.
        temperature: 0 is greedy.
        top_p: draw from the likeliest tokens that together have this probability.
        top_k: draw from so many of the likeliest tokens; 0: from all.
        min_p: draw from tokens with at least this share of the likeliest one's probability.
    """
    loaded = api.load(
        model, dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels, max_source_pixels=max_source_pixels
    )
    content: list[dict[str, Any]] = [{"type": "image", "image": str(path)} for path in image]
    content += [{"type": "video", "video": str(path), "fps": fps} for path in video]
    content.append({"type": "text", "text": prompt})
    opening = [{"role": "system", "content": system}] if system else []
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    shown, answers, began, first = "", [], time.perf_counter(), 0.0
    for answers in api.stream(
        loaded,
        [*opening, {"role": "user", "content": content}],
        num_generations=num_generations,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
    ):
        first = first or time.perf_counter()
        text = answers[0].text
        # a character may be cut between two tokens: wait for the rest of it
        if num_generations == 1 and text.startswith(shown) and not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    if num_generations == 1:
        print(answers[0].text[len(shown) :])
    else:
        for number, answer in enumerate(answers, 1):
            print(f"--- {number} ({answer.stop_reason})\n{answer.text}")
    tokens, seconds = sum(len(answer.token_ids) for answer in answers), time.perf_counter() - first
    console().print(
        f"{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s after the first "
        f"({first - began:.1f} s, compilation included)"
    )
