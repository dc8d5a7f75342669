"""`jaxmllm reflect` (RePer) and `jaxmllm tpl` (UTR): the commands that belong to one system."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxmllm.errors import InputError

REWARD = "reward"  # the critic that is the task's own reward function


def reflect(
    model: str = "tiny",
    image: Path | None = None,
    prompt: str | None = None,
    data: str | None = None,
    limit: int = 8,
    critic: str | None = None,
    turns: int = 3,
    history: Literal["full", "current"] = "full",
    out: Path | None = None,
    style: str = "qwen2_5_vl",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
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
        style: how tasks write boxes.
        temperature: of the loop's answers; 0 is greedy.
    """
    if (image is None) == (data is None):
        raise InputError("give either --image or --data")
    if data is not None and prompt is not None:
        raise InputError("--prompt: records of --data bring their own questions")
    if data is None and critic == REWARD:
        raise InputError("--critic reward: a picture of its own has no reference; name a model, or give --data")
    for name, value in (
        ("turns", turns),
        ("limit", limit),
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise InputError(f"--{name} {value}: must be at least 1")
    if out is not None and (out / "dialogues.jsonl").exists():
        raise InputError(f"{out / 'dialogues.jsonl'}: exists already; name a new folder")

    from jaxmllm import api
    from jaxmllm.data.examples import Asking, Sized
    from jaxmllm.data.images import load_image
    from jaxmllm.data.sources import open_source
    from jaxmllm.rollout import reflect as loop
    from jaxmllm.tasks import answers, captioning

    if style not in answers.STYLES:
        raise InputError(f"--style {style!r}: use one of {', '.join(answers.STYLES)}")
    asking = Asking({"style": style})
    if image is not None:
        load_image(str(image), "--image")
        task = {"task": "captioning"} if prompt is None else {"task": "question", "question": prompt}
        found: Any = [{"id": str(image), "images": [str(image)], **task}]
    else:
        assert data is not None
        found = open_source(data)
        found = [found[k] for k in range(min(limit, len(found)))]
        for record in found:
            if len(record.get("images") or ()) != 1 or "messages" in record:
                raise InputError(f"--data {data}: record {record.get('id')!r} is not a task's question about one image")

    def load(name: str) -> api.Model:
        return api.load(name, dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels)

    policy = load(model)
    if data is not None:
        found = Sized(found, policy.processor.pixel_config)
        found = [found[k] for k in range(len(found))]
    records: list[dict[str, Any]] = found

    def speaker(one: api.Model) -> Callable[..., list[str]]:
        def generate(conversations: Sequence[Any], temperature: float = temperature) -> list[str]:
            groups = api.generate(
                one,
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

    speak, reward = speaker(policy), relative_reward(asking, style)
    judge = speak if critic in (None, model, REWARD) else speaker(load(str(critic)))
    if out is None:
        judged = loop.reward_critic(reward) if critic == REWARD else loop.model_critic(judge, history=history)
        rows = loop.reflect(speak, judged, records, turns, question)
        for row in rows:
            print("\n".join(_shown(row)), flush=True)
        means = ", ".join(_mean(row["turns"][k]["score"] for row in rows) for k in range(turns))
        print(f"mean score of answers 1 to {turns}: {means} of 10", file=sys.stderr)
        return
    items = loop.sample_candidates(speak, records, question=question, system=None)
    rater, source = (loop.rule(reward), "rule") if critic == REWARD else (loop.judge(judge), "vlm")
    dialogues, stats = loop.build_dialogues(loop.rate_candidates(items, rater), source, seed)
    _write(out, dialogues)
    lengths = ", ".join(f"{stats[f'turns_{n}']:.0f} of {n}" for n in (1, 2, 3))
    print(f"{stats['kept']:.0f} dialogues of {len(records)} images; answers: {lengths}", file=sys.stderr)
    print(f"read them as reflection:{out / 'dialogues.jsonl'}", file=sys.stderr)


def tpl(
    data: str,
    model: str = "tiny",
    limit: int = 256,
    tries: int = 1,
    single_mode: Literal["repeat", "single"] = "repeat",
    out: Path | None = None,
    style: str = "qwen2_5_vl",
    min_tokens: int = 8,
    seed: int = 0,
    batch_size: int = 8,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
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
        style: how tasks write boxes.
        min_tokens: shorter answers are not kept.
    """
    for name, value, least in (("limit", limit, 1), ("tries", tries, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise InputError(f"--{name} {value}: must be at least {least}")
    if out is not None and out.exists():
        raise InputError(f"{out}: exists already; name a new file")

    from jaxmllm import api
    from jaxmllm.data.examples import Asking, Sized
    from jaxmllm.data.sources import open_source
    from jaxmllm.eval import tpl
    from jaxmllm.intervals import percentiles, ratio, value_and_samples

    opened = open_source(data)
    loaded = api.load(model, dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels)
    scores = tpl.score_source(
        loaded,
        Sized(opened, loaded.processor.pixel_config),
        Asking({"style": style}),
        out=out,
        identity={"data": data, "model": model, "style": style, "pixels": [min_pixels, max_pixels], "dtype": dtype},
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
        print(f"to train on those: {data}{'&' if '?' in data else '?'}keep={out}", file=sys.stderr)


def total_reward(style: str, thinking: bool = False) -> Callable[[str, Mapping[str, Any]], float | None]:
    """The reward of a record's task, without its parts; None where it does not apply."""
    from jaxmllm.methods.grpo.reward_calls import task_reward

    def total(text: str, record: Mapping[str, Any]) -> float | None:
        value = task_reward(text, record, {"style": style, "thinking": thinking})
        return value["reward"] if isinstance(value, Mapping) else value

    return total


def relative_reward(asking: Any, style: str) -> Callable[[str, Mapping[str, Any]], float | None]:
    """The reward of a record's task as a share, 0..1, of what its gold answer earns; None where it does not apply."""
    total = total_reward(style)

    def reward(text: str, record: Mapping[str, Any]) -> float | None:
        value, best = total(text, record), total(asking.answer(dict(record)), record)
        return None if value is None or not best else min(max(value / best, 0.0), 1.0)

    return reward


def _mean(scores: Iterable[float | None]) -> str:
    """The mean of those that could be read, and how many they are where some could not."""
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


def _write(out: Path, dialogues: Sequence[Mapping[str, Any]]) -> None:
    """`out/dialogues.jsonl`; images that are no files go to `out/images`, once each."""
    import hashlib

    from jaxmllm.data.images import load_image
    from jaxmllm.runfiles import JsonLines

    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for dialogue in dialogues:
        image = dialogue["image"]
        if isinstance(image, str | Path):
            path = str(Path(image).absolute())
        else:
            picture = load_image(image, str(dialogue["id"]))
            path = f"images/{hashlib.sha256(picture.tobytes()).hexdigest()[:16]}.png"
            picture.save(out / path)
        rows.append({**dialogue, "image": path})
    with JsonLines(out / "dialogues.jsonl") as file:
        file.append(rows)
