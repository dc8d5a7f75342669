"""Detailed captions: rule reward after CAPTURE, judge rubric, and the scores of a judge or critic (RePer).

Source: sheet reper.md sections 2, 3 and 5; CAPTURE: arXiv 2405.19092. The rule reward reads a scene graph (objects,
attributes, relations) from the caption and from each reference, matches the elements of each type in three stages
(equal, synonym, similar) and returns (5 F1_objects + 2 F1_attributes + 2 F1_relations) / 9, a mean over references.

CAPTURE parses with a T5 model, takes synonyms from WordNet and similarity from a sentence encoder. None of these can be
a dependency here, so each is a function you may pass: `graph` (default: `parse`, chunking rules for plain English),
`synonyms` (default: one phrase's words are among the other's) and `similarity` (default: cosine of character trigrams).
Numbers from the defaults are comparable with each other only; for the published benchmark run the official package.

Other differences, so that wrong answers cost and the perfect answer gets 1: an attribute counts with its object
(CAPTURE matches loose attribute words, so swapped colours go unseen; `bind=False` restores that); a pair is only as
similar as its least similar part; a type that neither side has is left out instead of counting 0. Repeated elements
count once, so repetition earns nothing.
"""

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmllm.tasks import answers
from jaxmllm.tasks.scene_words import (
    ABSTRACT,
    ADJECTIVES,
    AND_WORDS,
    COPULA,
    FUNCTION_WORDS,
    ING_NOUNS,
    LY_NOUNS,
    PLURALS,
    RELATIONS,
    RELATIVE,
    SKIPPED,
    VERBS,
)
from jaxmllm.tasks.task import Record, Reward, Row, Shown, Task

PROMPTS = (
    "Describe this image in detail.",
    "Give a detailed description of the image.",
    "What can be seen in this image? Describe it thoroughly.",
    "Write a detailed caption for this picture.",
    "Describe everything you see in the picture, with the details.",
)
RULE_WEIGHTS = (5.0, 2.0, 2.0)  # objects, attributes, relations: RePer's reward
BENCHMARK_WEIGHTS = (5.0, 5.0, 2.0)  # CAPTURE's own
TYPES = ("object", "attribute", "relation")

# Criterion -> (largest score, what it asks). The sum is the 0..10 reward.
RUBRIC: dict[str, tuple[int, str]] = {
    "authenticity": (4, "nothing is mentioned that the image does not show"),
    "correctness": (2, "objects, attributes and relations are right"),
    "detail": (2, "the description is specific"),
    "coherence": (1, "it reads as one well-ordered text"),
    "completeness": (1, "foreground and background are both covered"),
}
JUDGE_SCALE = float(sum(largest for largest, _ in RUBRIC.values()))  # 10
CAPTION_CHARS = 16_384  # how much of a caption is parsed; 2,048 tokens are about 9,000 characters
CRITIC_SCALE = 100.0  # LLaVA-Critic writes 0..100

Element = tuple[str, ...]


def pick(options: Sequence[Any], key: Hashable) -> Any:
    """The option that a hash of `key` chooses: the same on every machine and in every run."""
    return options[zlib.crc32(str(key).encode()) % len(options)]


def prompt(record: Mapping[str, Any]) -> str:
    """A request for a detailed caption; the wording depends on the record's id only."""
    return pick(PROMPTS, record.get("id"))


def references(record: Mapping[str, Any]) -> list[str]:
    """The reference captions: `captions` if present, else the one `caption`."""
    return list(record.get("captions") or ([record["caption"]] if record.get("caption") else []))


def answer(record: Mapping[str, Any]) -> str:
    """The first reference caption. Raises IndexError without one."""
    return references(record)[0]


# --- scene graph ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneGraph:
    """What a caption claims, without repeats, in text order; lower case, nouns in the singular."""

    objects: tuple[str, ...] = ()
    attributes: tuple[tuple[str, str], ...] = ()  # (object, attribute)
    relations: tuple[tuple[str, str, str], ...] = ()  # (subject, relation, object)


_WORD = re.compile(r"[a-z0-9]++(?:['-][a-z0-9]++)*+|[.,;:!?\n&]")
_PHRASES: dict[str, list[tuple[str, ...]]] = {}  # first word -> relation phrases, longest first
for _phrase in sorted(RELATIONS, key=len, reverse=True):
    _PHRASES.setdefault(_phrase[0], []).append(_phrase)


def singular(word: str) -> str:
    """The singular of an English noun, by rule and a list of exceptions."""
    if word in PLURALS:
        return PLURALS[word]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        if word.endswith("ies") and len(word) > 4:
            return word[:-3] + "y"
        return word[:-2] if word.endswith(("ses", "xes", "zes", "ches", "shes")) else word[:-1]
    return word


def _kind(word: str) -> str:
    if word in ".;:!?\n":
        return "stop"
    for kind, words in (
        ("is", COPULA), ("and", AND_WORDS), ("which", RELATIVE), ("break", FUNCTION_WORDS), ("verb", VERBS)
    ):  # fmt: skip
        if word in words:
            return kind
    return "verb" if word.endswith("ing") and len(word) > 4 and word not in ING_NOUNS else "word"


def _units(text: str) -> list[tuple[str, str]]:
    """(kind, text) of each word or relation phrase."""
    found = _WORD.findall(text[:CAPTION_CHARS].lower())
    kinds = {  # of each distinct word, without adverbs
        w: _kind(w) for w in set(found) if not (w in SKIPPED or (w.endswith("ly") and len(w) > 4 and w not in LY_NOUNS))
    }
    words = [w for w in found if w in kinds]
    units, i = [], 0
    while i < len(words):
        known = _PHRASES.get(words[i])
        phrase = known and next((span for span in known if tuple(words[i : i + len(span)]) == span), None)
        units.append(("relation", RELATIONS[phrase]) if phrase else (kinds[words[i]], words[i]))
        i += len(phrase) if phrase else 1
    return units


class _Chunker:
    """Reads the units of a caption in one pass; dicts keep order and drop repeats."""

    def __init__(self) -> None:
        self.objects: dict[str, None] = {}
        self.attributes: dict[tuple[str, str], None] = {}
        self.relations: dict[tuple[str, str, str], None] = {}
        self.restart()

    def restart(self) -> None:
        self.topic: str | None = None  # first object of the clause: what a later `is` speaks of
        self.subject: str | None = None  # last object of the sentence
        self.link: list[str] = []  # relation words since then
        self.predicate = False  # after `is`: words describe the subject
        self.words: list[str] = []  # phrase being read

    def close_phrase(self) -> None:
        """The words read so far become an object with its attributes or, after `is`, attributes of the subject."""
        words, self.words = self.words, []
        if not words:
            return
        if self.predicate and self.subject:
            self.attributes.update(dict.fromkeys((self.subject, word) for word in words))
            return
        head = singular(words[-1])
        if head in ABSTRACT:
            self.subject, self.link = None, []
            return
        self.objects[head] = None
        self.attributes.update(dict.fromkeys((head, word) for word in words[:-1]))
        if self.subject and self.link:
            self.relations[self.subject, " ".join(self.link), head] = None
        self.subject, self.link, self.predicate = head, [], False
        self.topic = self.topic or head

    def read(self, kind: str, word: str) -> None:
        if kind == "verb" and not self.words and not self.predicate:
            kind = "word"  # `a smiling man`
        if kind == "word":
            self.words.append(word)
            return
        if kind == "and" and self.words and not self.predicate and all(w in ADJECTIVES for w in self.words):
            return  # `a small, red square`
        self.close_phrase()
        if kind == "is":
            self.subject = self.topic or self.subject
            self.predicate, self.link = True, []
        elif kind in ("relation", "verb"):
            self.predicate = False
            self.link.append(word)
        elif kind == "break":
            self.predicate = False
        elif kind == "which":
            self.topic = self.subject
        elif kind == "and":
            self.topic, self.link = None, []
        else:
            if self.subject and self.link:
                self.attributes[self.subject, " ".join(self.link)] = None  # `a dog is running.`
            self.restart()


def parse(text: str, thinking: bool = False) -> SceneGraph:
    """Scene graph of a caption, by chunking; meant for plain descriptions.

    A noun phrase is a run of content words, its last word the object and the others attributes; a preposition or verb
    between two phrases of a sentence is a relation; `X is ADJ` gives attributes.

    >>> parse("A small red square is left of two dogs.").relations
    (('square', 'left of', 'dog'),)
    """
    chunker = _Chunker()
    for kind, word in [*_units(answers.content(text, thinking) or ""), ("stop", ".")]:
        chunker.read(kind, word)
    return SceneGraph(tuple(chunker.objects), tuple(chunker.attributes), tuple(chunker.relations))


# --- matching -------------------------------------------------------------------------------------------------------


def same_words(a: str, b: str) -> bool:
    """Default synonym test: the words of one phrase are among the other's (`light` and `traffic light`)."""
    first, second = set(a.split()), set(b.split())
    return bool(first and second) and (first <= second or second <= first)


def trigram_cosine(a: Sequence[str], b: Sequence[str]) -> Float[np.ndarray, "P G"]:
    """Default similarity: cosine of character trigram counts, 0..1, of every pair of phrases."""

    def grams(phrase):
        padded = f"  {phrase} "
        return Counter(padded[i : i + 3] for i in range(len(padded) - 2))

    def norm(counts):
        return math.sqrt(sum(n * n for n in counts.values()))

    left, right = [grams(x) for x in a], [grams(x) for x in b]
    out = np.zeros((len(left), len(right)))
    for i, x in enumerate(left):
        for j, y in enumerate(right):
            out[i, j] = sum(n * y[g] for g, n in x.items()) / (norm(x) * norm(y))
    return out


Similarity = Callable[[Sequence[str], Sequence[str]], Float[np.ndarray, "P G"]]


def match_elements(
    candidate: Sequence[Element],
    reference: Sequence[Element],
    synonyms: Callable[[str, str], bool] = same_words,
    similarity: Similarity | None = trigram_cosine,
) -> tuple[float, float]:
    """Matched weight on the candidate's and on the reference's side (sheet reper.md 3.3).

    Equal elements, then synonyms part by part, pair one to one and count 1 on both sides; every leftover then adds its
    best similarity (least of its parts') to a leftover of the other side. `similarity` None ends after the synonyms.
    """
    left, matched = list(candidate), 0
    right = list(reference)
    for same in (
        lambda a, b: a == b,
        lambda a, b: len(a) == len(b) and all(synonyms(x, y) for x, y in zip(a, b, strict=True)),
    ):
        remaining = []
        for element in left:
            partner = next((k for k, other in enumerate(right) if same(element, other)), None)
            if partner is None:
                remaining.append(element)
            else:
                right.pop(partner)
                matched += 1
        left = remaining
    if similarity is None or not left or not right:
        return float(matched), float(matched)
    parts = [similarity(a, b) for a, b in zip(zip(*left, strict=True), zip(*right, strict=True), strict=True)]
    table = np.clip(np.min(parts, axis=0), 0.0, 1.0)
    return matched + float(table.max(axis=1).sum()), matched + float(table.max(axis=0).sum())


def _elements(graph: SceneGraph, bind: bool) -> tuple[list[Element], ...]:
    attributes: list[Element] = [pair if bind else pair[1:] for pair in graph.attributes]
    return [(o,) for o in graph.objects], attributes, list(graph.relations)


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def capture(
    candidate: SceneGraph,
    reference: SceneGraph,
    weights: Sequence[float] = RULE_WEIGHTS,
    synonyms: Callable[[str, str], bool] = same_words,
    similarity: Similarity | None = trigram_cosine,
    bind: bool = True,
) -> dict[str, float]:
    """Weighted F1, precision and recall of a caption's scene graph against one reference, in 0..1.

    Returns:
        `f1`, `precision`, `recall`: means over the types, weighted by `weights` (objects, attributes, relations), of
        those that either side has; and each type's own F1 under its name in `TYPES`.
    """
    parts, used = {}, []
    for name, weight, mine, theirs in zip(
        TYPES, weights, _elements(candidate, bind), _elements(reference, bind), strict=True
    ):
        if not mine and not theirs:
            continue
        on_mine, on_theirs = match_elements(mine, theirs, synonyms, similarity)
        precision = on_mine / len(mine) if mine else 0.0
        recall = on_theirs / len(theirs) if theirs else 0.0
        parts[name] = _f1(precision, recall)
        used.append((weight, parts[name], precision, recall))
    total = sum(weight for weight, *_ in used)
    means = [sum(row[0] * row[k] for row in used) / total if total else 0.0 for k in (1, 2, 3)]
    return dict(zip(("f1", "precision", "recall"), means, strict=True)) | parts


def _against_references(
    text: str, record: Mapping[str, Any], thinking: bool, graph: Callable[[str], SceneGraph], **options: Any
) -> dict[str, float]:
    """`capture` averaged over the record's references; a part counts over the references that have it."""
    mine = graph(answers.content(text, thinking) or "")
    rows = [capture(mine, graph(reference), **options) for reference in references(record)]
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: float(np.mean([row[key] for row in rows if key in row])) for key in keys}


def reward(
    text: str,
    record: Mapping[str, Any],
    thinking: bool = False,
    weights: Sequence[float] = RULE_WEIGHTS,
    graph: Callable[[str], SceneGraph] = parse,
    synonyms: Callable[[str, str], bool] = same_words,
    similarity: Similarity | None = trigram_cosine,
    bind: bool = True,
) -> dict[str, float] | None:
    """Rule reward in 0..1, mean over the references, with each type's F1 as a part; None without a reference."""
    options = {"weights": weights, "synonyms": synonyms, "similarity": similarity, "bind": bind}
    row = _against_references(text, record, thinking, graph, **options)
    return {"reward": row["f1"], **{name: row[name] for name in TYPES if name in row}} if row else None


# --- judges and critics ---------------------------------------------------------------------------------------------


def rubric_text() -> str:
    """The five criteria with their largest scores, one a line."""
    return "\n".join(f"- {name.capitalize()} (0 to {most}): {what}" for name, (most, what) in RUBRIC.items())


def judge_prompt(caption: str) -> str:
    """Asks a judge model, which sees the image, to rate a caption; read its answer with `parse_judgement`."""
    keys = ", ".join(f'"{name.capitalize()}": n' for name in RUBRIC)
    return (
        f"Rate this caption of the image.\n\nCaption: {caption}\n\nCriteria:\n{rubric_text()}\n\n"
        f'Answer with one JSON object: {{{keys}, "Total": n, "Reason": "what is right, wrong or missing"}}'
    )


_VALUE = r"[\"']?+\s*+[:=]\s*+([0-9]++(?:\.[0-9]++)?+)"
_CRITERIA = {name: re.compile(rf"\b{name}{_VALUE}", re.IGNORECASE | re.ASCII) for name in RUBRIC}
_REASON = re.compile(r"\breasons?+[\"']?+\s*+[:=]\s*+", re.IGNORECASE | re.ASCII)
_SCORE = re.compile(r"scores?+\s*+:\s*+([0-9]++(?:\.[0-9]++)?+)", re.IGNORECASE | re.ASCII)
_STATEMENT = re.compile(
    rf"(?:\b(?:overall|final|total) )?\b{_SCORE.pattern}(?:\s*+(?:/|out of)\s*+[0-9]++)?+", re.IGNORECASE | re.ASCII
)


def parse_judgement(text: str) -> dict[str, Any] | None:
    """`scores` per criterion, `total` (their sum, 0..10, whatever total the judge states) and `reason`.

    None if a criterion is missing or above its largest score.
    """
    text = answers.clean(text)
    scores = {}
    for name, pattern in _CRITERIA.items():
        found = pattern.search(text)
        if found is None or float(found[1]) > RUBRIC[name][0]:
            return None
        scores[name] = float(found[1])
    found = _REASON.search(text)
    reason = text[found.end() :].strip().strip("`").rstrip("} \n").strip("\"' \n") if found else ""
    return {"scores": scores, "total": sum(scores.values()), "reason": reason}


def parse_score(text: str, scale: float = CRITIC_SCALE) -> float | None:
    """The number in the last `Score: N` or `Scores: N` of a critic; None without one or outside 0..scale."""
    found = _SCORE.findall(answers.clean(text))
    value = float(found[-1]) if found else math.inf
    return value if value <= scale else None


def rationale(text: str) -> str:
    """A critic's text without its score statements: the score is told anew, on the scale of the training data."""
    lines = map(str.strip, _STATEMENT.sub("", answers.clean(text)).splitlines())
    return "\n".join(line for line in lines if re.search("[^\\W_]", line))


# --- measures -------------------------------------------------------------------------------------------------------


def _four_grams(text: str) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(words, words[1:], words[2:], words[3:], strict=False))


def repeat_4(text: str) -> float:
    """The share of a text's 4-grams that it has used before."""
    grams = _four_grams(text)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_4(texts: Sequence[str]) -> float:
    """The share of different 4-grams in all texts together; 1 without any."""
    every = [gram for text in texts for gram in _four_grams(text)]
    return len(set(every)) / len(every) if every else 1.0


@dataclass(frozen=True)
class Captioning(Task):
    """A detailed description of the picture."""

    thinking: bool = False
    weights: tuple[float, ...] = RULE_WEIGHTS  # of the reward: objects, attributes, relations

    figures = {
        **dict.fromkeys(("capture", "precision", "recall"), "higher"),
        "words": "neutral",
        "repeat_4": "lower",
    }
    primary = ("capture",)

    def prompt(self, record: Record) -> str:
        return prompt(record)

    def gold(self, record: Record) -> str:
        return answer(record)

    def reward(self, text: str, record: Record) -> Reward:
        return reward(text, record, self.thinking, self.weights)

    def row(self, text: str, record: Record) -> Row:
        """`capture`, `precision`, `recall` where there is a reference, with the benchmark's weights 5:5:2 and loose
        attributes (weights of the last two: ours); `words`, the length; `repeat_4`.
        """
        row = _against_references(text, record, self.thinking, parse, weights=BENCHMARK_WEIGHTS, bind=False)
        body = answers.content(text, self.thinking) or ""
        scored = {"capture": row["f1"], "precision": row["precision"], "recall": row["recall"]} if row else {}
        return {**scored, "words": float(len(body.split())), "repeat_4": repeat_4(body)}

    def predicted(self, text: str, record: Record) -> Shown:
        return {"text": answers.content(text, self.thinking) or ""}


def length_matched(
    texts: Sequence[str],
    others: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    thinking: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of two systems, each pair of captions cut after as many words as the shorter one has.

    Recall grows with length alone: what is left of a difference here was not bought with words (sheet reper.md 6).
    """
    cut: tuple[list[str], list[str]] = ([], [])
    for pair in zip(texts, others, strict=True):
        words = [list(re.finditer(r"\S+", answers.content(text, thinking) or "")) for text in pair]
        least = min(map(len, words))
        for kept, found in zip(cut, words, strict=True):
            kept.append(found[0].string[: found[least - 1].end()] if least else "")
    first, second = (Captioning().metric(captions, records) for captions in cut)
    return first, second


PARSERS = {"parse": parse, "parse_judgement": parse_judgement, "parse_score": parse_score, "rationale": rationale}
