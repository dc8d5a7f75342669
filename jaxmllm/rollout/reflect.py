"""Policy-critic reflection (RePer): the loop at inference, and the dialogues it is trained on.

Source: sheet reper.md sections 2 and 3. The policy answers, a critic scores the answer and says why, and the policy
answers again with all of that in context. Host side and model free: the policy is any function `generate(conversations)
-> texts` and the critic any function from records, questions and dialogues to critiques.

    user:      <image> question
    assistant: answer 1
    user:      score clause + rationale + request       (feedback 1, on the 0..10 scale of the training data)
    assistant: answer 2 ...

Conversations are chat messages, `[{"role": "user", "content": [{"type": "image", "image": ..}, {"type": "text",
"text": ..}]}]`, with the images in the first user turn only. A dialogue is a list of turns `{"response", "score",
"rationale", "feedback"}`.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmllm.data.dialogues import Conversation, Turn, conversation, pictures, say
from jaxmllm.data.parts import spelled
from jaxmllm.tasks import captioning

Generate = Callable[[list[Conversation]], Sequence[str]]
Rater = Callable[[Sequence[tuple[Mapping[str, Any], str]]], Sequence[tuple[float, str] | None]]


@dataclass(frozen=True)
class Wording:
    """Templates of the turns that answer an answer."""

    scores: tuple[str, ...]  # {s}: the score, 0..10
    requests: tuple[str, ...]
    bare_requests: tuple[str, ...]  # where there is neither score nor reason


CAPTION_WORDING = Wording(  # sheet reper.md 3.4
    ("I rate this caption {s} out of 10.", "This description earns {s}/10.", "Score: {s}/10."),
    (
        "Please write a better caption.",
        "Describe the image again and fix these problems.",
        "Can you give a more accurate and complete caption?",
    ),
    (
        "Can you do better?",
        "Please improve your description.",
        "Try again and describe the image more accurately.",
        "Is there anything to correct or add? Write an improved caption.",
    ),
)
ANSWER_WORDING = Wording(  # the same for any other question
    ("I rate this answer {s} out of 10.", "This answer earns {s}/10.", "Score: {s}/10."),
    (
        "Please give a better answer.",
        "Look at the image again and fix these problems.",
        "Can you give a more accurate answer?",
    ),
    (
        "Can you do better?",
        "Please improve your answer.",
        "Try again and look closely.",
        "Is that correct? Answer again.",
    ),
)
EXPERT_SYSTEM = "You are an expert in visual perception. Answer from what the image shows, and from nothing else."
TEMPERATURES = tuple(round(0.2 * k, 1) for k in range(8))  # 0.0 .. 1.4, one candidate each
TURN_SHARES = (0.36, 0.26, 0.38)  # of dialogues with 1, 2 and 3 answers


@dataclass(frozen=True)
class Critique:
    """What a critic says of one answer."""

    score: float | None  # 0..10; None: it could not be read
    rationale: str = ""
    spoken: bool = True  # False: a rule's score, which is logged but not told to the policy


Records = Sequence[Mapping[str, Any]]
Critic = Callable[[Records, Sequence[str], Sequence[Sequence[Turn]]], Sequence[Critique]]


# --- conversations --------------------------------------------------------------------------------------------------


def wording_of(record: Mapping[str, Any]) -> Wording:
    """How feedback speaks of an answer to this record: as of a caption, unless the record has another task."""
    return CAPTION_WORDING if record.get("task", "captioning") == "captioning" else ANSWER_WORDING


def feedback(critique: Critique, key: str, wording: Wording = CAPTION_WORDING) -> str:
    """The user turn after an answer: score clause, rationale and request; which of each, a hash of `key` chooses.

    Without a readable score the clause is left out; a rule's critique becomes a bare request.
    """
    if not critique.spoken:
        return captioning.pick(wording.bare_requests, key)
    clause = ""
    if critique.score is not None:
        clause = captioning.pick(wording.scores, f"{key}/score").format(s=f"{critique.score:.3g}")
    return " ".join(part for part in (clause, critique.rationale, captioning.pick(wording.requests, key)) if part)


def critic_conversation(
    record: Mapping[str, Any], question: str, turns: Sequence[Turn], history: str = "full"
) -> Conversation:
    """Asks a critic model about the last answer of `turns`: prose on the rubric, then `Score: N` of 100.

    `current` hides the earlier answers and feedback, for a critic trained on single answers (gap G11).
    """
    if history not in ("full", "current"):
        raise ValueError(f"unknown history {history!r}; use full or current")
    past = [f"Answer {k}: {t['response']}\nFeedback {k}: {t['feedback']}" for k, t in enumerate(turns[:-1], start=1)]
    parts = [
        f"Assess an answer to this question about the image.\n\nQuestion: {question}",
        *(past if history == "full" else []),
        f"Answer to assess: {turns[-1]['response']}",
        f"Criteria:\n{captioning.rubric_text()}",
        "Say in prose what is right, wrong and missing. Then write one line `Score: N`, with N from 0 to 100.",
    ]
    return [say("user", "\n\n".join(parts), pictures(record))]


# --- the loop -------------------------------------------------------------------------------------------------------


def model_critic(
    generate: Generate,
    scale: float = captioning.CRITIC_SCALE,
    history: str = "full",
) -> Critic:
    """A critic that is a model writing prose and `Score: N` of `scale`; scores are brought to 0..10 (gap G12)."""

    def critic(records: Records, questions: Sequence[str], dialogues: Sequence[Sequence[Turn]]) -> list[Critique]:
        rows = zip(records, questions, dialogues, strict=True)
        asked = [critic_conversation(record, question, turns, history) for record, question, turns in rows]
        critiques = []
        for text in _exactly(generate(asked), len(asked), "critic"):
            score = captioning.parse_score(text, scale)
            told = None if score is None else score * captioning.JUDGE_SCALE / scale
            critiques.append(Critique(told, captioning.rationale(text)))
        return critiques

    return critic


def reward_critic(
    reward: Callable[[str, Mapping[str, Any]], float | Mapping[str, float] | None], r_max: float = 1.0
) -> Critic:
    """A critic that is a reward function of maximum `r_max`: its score is logged, the policy only asked to improve."""

    def critic(records: Records, questions: Sequence[str], dialogues: Sequence[Sequence[Turn]]) -> list[Critique]:
        values = [_total(reward(d[-1]["response"], r)) for r, d in zip(records, dialogues, strict=True)]
        return [Critique(None if v is None else v * captioning.JUDGE_SCALE / r_max, spoken=False) for v in values]

    return critic


def share_of_gold(
    reward: Callable[[str, Mapping[str, Any]], float | None], gold: Callable[[Mapping[str, Any]], str]
) -> Callable[[str, Mapping[str, Any]], float | None]:
    """A reward as a share, 0..1, of what the record's gold answer earns; None where it does not apply."""

    def share(text: str, record: Mapping[str, Any]) -> float | None:
        value, best = reward(text, record), reward(gold(record), record)
        return None if value is None or not best else min(max(value / best, 0.0), 1.0)

    return share


def _total(value: float | Mapping[str, float] | None) -> float | None:
    return value["reward"] if isinstance(value, Mapping) else value


def _exactly(texts: Sequence[str], n: int, who: str) -> Sequence[str]:
    if len(texts) != n:
        raise ValueError(f"the {who} returned {len(texts)} texts for {n} conversations")
    return texts


def reflect(
    generate: Generate,
    critic: Critic,
    records: Records,
    turns: int = 3,
    question: Callable[[Mapping[str, Any]], str] = captioning.prompt,
    system: str | None = None,
    score_last: bool = True,
) -> list[dict[str, Any]]:
    """`turns` answers per record, each but the first after the critic's feedback; all records advance together.

    Args:
        generate: the policy, called `turns` times on one conversation per record.
        critic: called after every answer; for the last one only if `score_last`, for the log.
        turns: answers per record; there is no stop by score.
        question: the record's first user text.
        system: system message of the policy.

    Returns:
        Per record `id`, `question`, `turns`, `final` (the last answer: the one to report) and `best_turn` (index of the
        answer the critic scored highest, ties to the earlier; None without scores).

    Raises:
        ValueError: turns < 1, or a model returned another number of texts.
    """
    if turns < 1:
        raise ValueError(f"turns must be at least 1, got {turns}")
    questions = [question(record) for record in records]
    dialogues: list[list[Turn]] = [[] for _ in records]
    for t in range(turns if records else 0):
        asked = [conversation(r, q, d, system) for r, q, d in zip(records, questions, dialogues, strict=True)]
        for dialogue, text in zip(dialogues, _exactly(generate(asked), len(asked), "policy"), strict=True):
            dialogue.append({"response": spelled(text), "score": None, "rationale": "", "feedback": None})
        last = t == turns - 1
        if last and not score_last:
            break
        for record, dialogue, said in zip(records, dialogues, critic(records, questions, dialogues), strict=True):
            dialogue[-1] |= {"score": said.score, "rationale": said.rationale}
            if not last:
                dialogue[-1]["feedback"] = spelled(feedback(said, f"{record.get('id')}/{t}", wording_of(record)))
    return [
        {"id": r.get("id"), "question": q, "turns": d, "final": d[-1]["response"], "best_turn": _best_turn(d)}
        for r, q, d in zip(records, questions, dialogues, strict=True)
    ]


def _best_turn(dialogue: Sequence[Turn]) -> int | None:
    scored = [(turn["score"], -k) for k, turn in enumerate(dialogue) if turn["score"] is not None]
    return -max(scored)[1] if scored else None


# --- the visual reflection data set ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where rewards come from and which images their dialogues are made of (sheet reper.md 3.4, gaps G2, G6, G7)."""

    r_max: float  # largest reward
    best: float  # the best candidate must reach this
    gap: float  # best - worst must reach this
    margin: float  # the middle answer keeps this distance from both
    strict: bool  # whether `best` and `gap` must be exceeded
    normalisation: str  # mode of `normalize_rewards` for sigma

    def accepts(self, best: float, worst: float, gap: float) -> bool:
        spread = round(best - worst, 9)  # 0.56 - 0.36 is exactly 0.2 here
        if self.strict:
            return best > self.best and spread > gap
        return best >= self.best and spread >= gap and spread > 0


SOURCES = {
    "vlm": Source(captioning.JUDGE_SCALE, 9.0, 4.0, 1.0, False, "source_max"),
    "rule": Source(1.0, 0.55, 0.2, 0.05, True, "dialogue_max"),
}


def sample_candidates(
    generate: Callable[..., Sequence[str]],
    records: Records,
    temperatures: Sequence[float] = TEMPERATURES,
    question: Callable[[Mapping[str, Any]], str] = captioning.prompt,
    system: str | None = EXPERT_SYSTEM,
) -> list[dict[str, Any]]:
    """One answer per record and temperature from the policy itself, `generate(conversations, temperature=t)`.

    Returns:
        Items `{"id", "image", "question", "record", "candidates": [{"response", "temperature"}]}`; of equal texts the
        one of the lowest temperature is kept.
    """
    items = [
        {"id": r.get("id"), "image": pictures(r)[0], "question": question(r), "record": r, "candidates": []}
        for r in records
    ]
    asked = [conversation(item["record"], item["question"], system=system) for item in items]
    for t in sorted(temperatures):
        for item, text in zip(items, _exactly(generate(asked, temperature=t), len(asked), "policy"), strict=True):
            text = spelled(text)
            if all(text != other["response"] for other in item["candidates"]):
                item["candidates"].append({"response": text, "temperature": float(t)})
    return items


def judge(generate: Generate) -> Rater:
    """A rater that is a model answering `captioning.judge_prompt`: reward 0..10 and its reason."""

    def rate(pairs: Sequence[tuple[Mapping[str, Any], str]]) -> list[tuple[float, str] | None]:
        asked = [[say("user", captioning.judge_prompt(text), pictures(record))] for record, text in pairs]
        read = map(captioning.parse_judgement, _exactly(generate(asked), len(asked), "judge"))
        return [None if found is None else (found["total"], found["reason"]) for found in read]

    return rate


def rule(reward: Callable[[str, Mapping[str, Any]], float | Mapping[str, float] | None] = captioning.reward) -> Rater:
    """A rater that is a reward function; it gives no reason."""

    def rate(pairs: Sequence[tuple[Mapping[str, Any], str]]) -> list[tuple[float, str] | None]:
        values = [_total(reward(text, record)) for record, text in pairs]
        return [None if value is None else (value, "") for value in values]

    return rate


def rate_candidates(items: Sequence[Mapping[str, Any]], rater: Rater) -> list[dict[str, Any]]:
    """The items with `reward` and `reason` in every candidate; candidates without a readable rating are dropped."""
    ratings = iter(rater([(item["record"], c["response"]) for item in items for c in item["candidates"]]))
    rated = []
    for item in items:
        pairs = [(c, next(ratings)) for c in item["candidates"]]
        kept = [{**c, "reward": float(r[0]), "reason": r[1]} for c, r in pairs if r is not None]
        rated.append({**item, "candidates": kept})
    return rated


def build_dialogue(
    item: Mapping[str, Any], source: str, seed: int = 0, gap: float | None = None
) -> dict[str, Any] | None:
    """One training dialogue of 1 to 3 answers, worst first and best last; None if the candidates are not far apart.

    Args:
        item: `id`, `image`, `question` and rated `candidates`.
        source: key of `SOURCES`.
        seed: with the id and the source it fixes the number of answers.
        gap: least best - worst, instead of the source's.

    Returns:
        `{"id", "image", "source", "question", "turns": [{"response", "temperature", "reward", "feedback"}]}`. The
        middle answer is nearest to half way between worst and best, at least the source's margin from both; without
        one the dialogue has two answers. All ties go to the lower temperature. The last feedback is None.
    """
    rules = SOURCES[source]
    candidates = sorted(item["candidates"], key=lambda c: (c["reward"], c["temperature"]))
    if not candidates:
        return None
    worst, top = candidates[0], candidates[-1]["reward"]
    best = next(c for c in candidates if c["reward"] == top)
    if not rules.accepts(top, worst["reward"], rules.gap if gap is None else gap):
        return None
    key = f"{item['id']}/{source}"
    rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
    count = int(rng.choice(len(TURN_SHARES), p=TURN_SHARES)) + 1
    half = (worst["reward"] + top) / 2
    middle = [c for c in candidates if round(min(c["reward"] - worst["reward"], top - c["reward"]), 9) >= rules.margin]
    between = [min(middle, key=lambda c: (abs(c["reward"] - half), c["temperature"]))] if middle and count == 3 else []
    chosen = [best] if count == 1 else [worst, *between, best]
    wording = wording_of(item.get("record", {}))
    turns = [
        {
            "response": c["response"],
            "temperature": c["temperature"],
            "reward": c["reward"],
            "feedback": spelled(feedback(Critique(c["reward"], c["reason"], source != "rule"), f"{key}/{k}", wording)),
        }
        for k, c in enumerate(chosen)
    ]
    turns[-1]["feedback"] = None
    return {"id": item["id"], "image": item["image"], "source": source, "question": item["question"], "turns": turns}


def build_dialogues(
    items: Sequence[Mapping[str, Any]], source: str, seed: int = 0, gap_quantile: float | None = None
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Dialogues of all items, and what to log: `images`, `kept`, `yield`, `gap` and `turns_1` .. `turns_3`.

    `gap_quantile` sets the least gap to that quantile of the items' gaps, for a policy whose candidates are too alike.
    """
    spans = [[c["reward"] for c in item["candidates"]] for item in items if item["candidates"]]
    gap = SOURCES[source].gap
    if gap_quantile is not None and spans:
        gap = float(np.quantile([max(rewards) - min(rewards) for rewards in spans], gap_quantile))
    made = [d for item in items if (d := build_dialogue(item, source, seed, gap)) is not None]
    stats = {"images": len(items), "kept": len(made), "yield": len(made) / max(len(items), 1), "gap": gap}
    return made, stats | {f"turns_{n}": sum(len(d["turns"]) == n for d in made) for n in (1, 2, 3)}
