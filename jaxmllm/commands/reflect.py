"""`jaxmllm reflect`: RePer's loop of answers and critiques, and the data it is trained on."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxmllm import api
from jaxmllm.commands.options import (
    BatchSize,
    Dtype,
    MaxNewTokens,
    MaxPixels,
    MinPixels,
    Seed,
    Style,
    at_least,
)
from jaxmllm.data.dialogues import write_dialogues
from jaxmllm.data.examples import Asking, Sized
from jaxmllm.data.images import load_image
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.methods.grpo.reward_calls import total_reward
from jaxmllm.rollout import reflect as loop
from jaxmllm.tasks import captioning
from jaxmllm.training.setup import chosen_style

REWARD = "reward"  # the critic that is the task's own reward function


def run(
    model: str = "tiny",
    image: Path | None = None,
    prompt: str | None = None,
    data: str | None = None,
    limit: int = 8,
    critic: str | None = None,
    turns: int = 3,
    history: Literal["full", "current"] = "full",
    out: Path | None = None,
    style: Style = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: float = 0.0,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    dtype: Dtype = None,
) -> None:
    """Answer, critique, refined answer, ...: RePer's loop about a picture or a data source; or its training data.

    Args:
        model: the policy: checkpoint folder, hub id, or "tiny".
        image: a picture to talk about.
        prompt: what is asked about the picture; a detailed caption without it.
        data: a source such as world:grounding?split=val, in place of a picture; its tasks ask about one image each.
        limit: first records of the source to take.
        critic: the model that scores and comments; "reward": the task's own reward function, which scores silently.
            Without it the policy judges itself.
        turns: answers to each question.
        history: whether the critic reads the earlier answers too.
        out: folder to write the visual reflection data set into, in place of the loop: answers at temperatures from 0 to
            1.4, rated by the critic and made into dialogues from worst to best. Read it as reflection:OUT/dialogues.jsonl.
        temperature: of the loop's answers; 0 is greedy.
    """
    if (image is None) == (data is None):
        raise InputError("give either --image or --data")
    if data is not None and prompt is not None:
        raise InputError("--prompt: records of --data bring their own questions")
    if data is None and critic == REWARD:
        raise InputError("--critic reward: a picture of its own has no reference; name a model, or give --data")
    at_least(1, turns=turns, limit=limit, max_new_tokens=max_new_tokens, batch_size=batch_size)
    if out is not None and (out / "dialogues.jsonl").exists():
        raise InputError(f"{out / 'dialogues.jsonl'}: exists already; name a new folder")
    records = _of_picture(image, prompt) if image is not None else _of_source(str(data), limit)

    def load(name: str) -> api.Model:
        return api.load(name, dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels)

    def speaker(speaking: api.Model) -> Callable[..., list[str]]:
        def generate(conversations: Sequence[Any], temperature: float = temperature) -> list[str]:
            groups = api.generate(
                speaking,
                conversations,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                batch_size=batch_size,
            )
            return [group[0].text for group in groups]

        return generate

    def question(record: Mapping[str, Any]) -> str:
        if "question" in record:
            return str(record["question"])
        return captioning.prompt(record) if data is None else str(asking.parts(dict(record))[-1]["text"])

    policy = load(model)
    written = chosen_style(style, policy.cfg)
    asking = Asking({"style": written})
    if data is not None:
        sized = Sized(records, policy.processor.pixel_config)
        records = [sized[k] for k in range(len(sized))]
    answer = speaker(policy)
    comment = answer if critic in (None, model, REWARD) else speaker(load(str(critic)))
    reward = loop.share_of_gold(total_reward(written), lambda record: asking.answer(dict(record)))
    if out is None:
        critique = loop.reward_critic(reward) if critic == REWARD else loop.model_critic(comment, history=history)
        _print(loop.reflect(answer, critique, records, turns, question), turns)
        return
    items = loop.sample_candidates(answer, records, question=question, system=None)
    rater, source = (loop.rule(reward), "rule") if critic == REWARD else (loop.judge(comment), "vlm")
    dialogues, stats = loop.build_dialogues(loop.rate_candidates(items, rater), source, seed)
    write_dialogues(out, dialogues)
    lengths = ", ".join(f"{stats[f'turns_{n}']:.0f} of {n}" for n in (1, 2, 3))
    print(f"{stats['kept']:.0f} dialogues of {len(records)} images; answers: {lengths}", file=sys.stderr)
    print(f"read them as reflection:{out / 'dialogues.jsonl'}", file=sys.stderr)


def _of_picture(image: Path, prompt: str | None) -> list[dict[str, Any]]:
    load_image(str(image), "--image")
    task = {"task": "captioning"} if prompt is None else {"task": "question", "question": prompt}
    return [{"id": str(image), "images": [str(image)], **task}]


def _of_source(spec: str, limit: int) -> list[dict[str, Any]]:
    source = open_source(spec)
    records = [source[k] for k in range(min(limit, len(source)))]
    for record in records:
        if len(record.get("images") or ()) != 1 or "messages" in record:
            raise InputError(f"--data {spec}: record {record.get('id')!r} is not a task's question about one image")
    return records


def _print(rows: Sequence[Mapping[str, Any]], turns: int) -> None:
    for row in rows:
        print("\n".join(_shown(row)), flush=True)
    means = ", ".join(_mean(row["turns"][k]["score"] for row in rows) for k in range(turns))
    print(f"mean score of answers 1 to {turns}: {means} of 10", file=sys.stderr)


def _mean(scores: Iterable[float | None]) -> str:
    """The mean of the scores that could be read; and how many they are, where some could not."""
    every = list(scores)
    read = [score for score in every if score is not None]
    if not read:
        return "none"
    return f"{sum(read) / len(read):.2f}" + ("" if len(read) == len(every) else f" (of {len(read)})")


def _shown(row: Mapping[str, Any]) -> Iterator[str]:
    """Lines of one dialogue; only its texts come from models, and they are printed as they are."""
    yield f"=== {row['id']}: {row['question']}"
    for number, turn in enumerate(row["turns"], 1):
        score = "" if turn["score"] is None else f" (score {turn['score']:.3g} of 10)"
        best = ", the critic's best" if number - 1 == row["best_turn"] else ""
        yield f"--- answer {number}{score}{best}\n{turn['response']}"
        if turn["feedback"]:
            yield f"--- feedback\n{turn['feedback']}"
