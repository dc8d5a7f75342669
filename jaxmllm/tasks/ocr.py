"""Page OCR: the text of an image, scored by edit distance (Perception-R1, perception_r1.md sections 2.4 and 5).

The reward is 1 - Levenshtein(prediction, page) / longer length, in characters, after every run of blanks on both sides
became one blank. Case, punctuation and order all count. The forms differ so:

- Both texts empty. Released: 0. Corrected: 1, an empty page was read rightly.
- Released: BLEU and METEOR were computed and thrown away, and without WordNet data every reward silently became 0. Here
  the reward needs neither, in both forms.

The metrics compare the raw texts. Released: without predicted words there is no precision and without words on the page
no recall, hence no F1 (None), which stops the averaging. Corrected: these are 0.

Chinese text is cut into words by `jieba` where that package is installed, as published. Without it each Chinese
character is a word: the word-based figures then differ from published ones, the edit distance does not.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from rapidfuzz.distance import Levenshtein
from sacrebleu.metrics import BLEU

from jaxmllm.tasks import answers
from jaxmllm.tasks.task import Record, Reward, Row, Shown, Task

# The evaluation script sends the marker as text, besides the real image.
PROMPTS = {"train": "OCR this image.", "evaluation": "<image>\nOCR this image: "}
SYSTEM = "Reply with the text in the image and with nothing else."

METEOR_ALPHA, METEOR_BETA, METEOR_GAMMA = 0.9, 3.0, 0.5

_CHINESE = re.compile(r"[\u4e00-\u9fa5]")


# --- reward ---------------------------------------------------------------------------------------------------------


def edit_similarity(prediction: str, page: str, rules: str = "corrected") -> float:
    """1 - edit distance / longer length after collapsing blanks, 0..1; two empty texts: 0 released, 1 corrected."""
    prediction, page = " ".join(prediction.split()), " ".join(page.split())
    if answers.choose(rules, answers.RULES, "rules") == "released" and not prediction and not page:
        return 0.0
    return float(Levenshtein.normalized_similarity(prediction, page))


# --- metrics --------------------------------------------------------------------------------------------------------


@cache
def _chinese_cutter() -> Callable[[str], list[str]]:
    try:
        import jieba
    except ImportError:
        return lambda text: _CHINESE.sub(r" \g<0> ", text).split()
    return jieba.lcut


def words(prediction: str, page: str) -> tuple[list[str], list[str]]:
    """Words of both texts: cut at blanks or, if either holds Chinese, by the Chinese cutter (see the module's text)."""
    cut = _chinese_cutter() if _CHINESE.search(prediction) or _CHINESE.search(page) else str.split
    return cut(prediction), cut(page)


def bleu(prediction: Sequence[str], page: Sequence[str]) -> float:
    """BLEU-4 of one text without smoothing, 0..1: 0 if any n-gram order has no match."""
    if not prediction or not page:
        return 0.0
    # sacrebleu cuts at blanks; a word that holds blanks (Chinese cutter) is kept whole by private-use characters
    joined = [" ".join(re.sub(r"\s", _private, word) for word in side) for side in (prediction, page)]
    return BLEU(smooth_method="none", tokenize="none", force=True).corpus_score(joined[:1], [joined[1:]]).score / 100


def _private(blank: re.Match) -> str:
    return chr(0xE000 + ord(blank[0]) % 0x1000)


def meteor(
    prediction: Sequence[str],
    page: Sequence[str],
    stem: Callable[[str], str] | None = None,
    synonyms: Callable[[str], set[str]] | None = None,
) -> float:
    """METEOR of one text, 0..1, with NLTK's alignment and parameters (alpha 0.9, beta 3, gamma 0.5).

    Words are compared in lower case: equal words are paired first, then equal stems if `stem` is given, then words
    among the `synonyms` of the predicted one if given. Each stage goes from the last predicted word to the first and
    takes the last free word of the page.
    """
    left = dict(enumerate(word.lower() for word in prediction))
    right = dict(enumerate(word.lower() for word in page))
    pairs = _align(left, right, lambda word: {word}, lambda word: word)
    if stem is not None:
        pairs |= _align(left, right, lambda word: {stem(word)}, stem)
    if synonyms is not None:
        pairs |= _align(left, right, lambda word: synonyms(word) | {word}, lambda word: word)
    if not pairs:
        return 0.0
    precision, recall = len(pairs) / len(prediction), len(pairs) / len(page)
    mean = precision * recall / (METEOR_ALPHA * precision + (1 - METEOR_ALPHA) * recall)
    ordered = sorted(pairs.items())
    steps = zip(ordered, ordered[1:], strict=False)
    chunks = 1 + sum((b[0] - a[0], b[1] - a[1]) != (1, 1) for a, b in steps)
    return (1 - METEOR_GAMMA * (chunks / len(pairs)) ** METEOR_BETA) * mean


def _align(
    left: dict[int, str], right: dict[int, str], keys: Callable[[str], set[str]], key: Callable[[str], str]
) -> dict[int, int]:
    """Pairs of positions whose words agree; paired words leave `left` and `right`."""
    places: dict[str, list[int]] = defaultdict(list)
    for j, word in right.items():
        places[key(word)].append(j)
    pairs = {}
    for i in reversed(list(left)):
        stacks = [places[k] for k in keys(left[i]) if places.get(k)]
        if stacks:
            pairs[i] = max(stacks, key=lambda stack: stack[-1]).pop()
            del left[i], right[pairs[i]]
    return pairs


@cache
def _word_net() -> tuple[Callable[[str], str], Callable[[str], set[str]]] | None:
    """NLTK's Porter stemmer and WordNet synonyms if both are installed, else None."""
    try:
        from nltk.corpus import wordnet
        from nltk.stem.porter import PorterStemmer

        wordnet.ensure_loaded()
    except (ImportError, LookupError):
        return None

    def synonyms(word: str) -> set[str]:
        return {name for s in wordnet.synsets(word) for name in s.lemma_names() if "_" not in name}

    return PorterStemmer().stem, synonyms


def page_metrics(prediction: str, page: str, rules: str = "corrected") -> dict[str, float | None]:
    """Figures of one page, each 0..1, on the raw texts; None only by the released rules (see the module's text).

    `edit_distance`: characters / longer length, blanks not collapsed. `precision`, `recall`, `f1`: on sets of words.
    `bleu`: BLEU-4, unsmoothed. `meteor`: with stems and WordNet synonyms, only where NLTK and its WordNet data are
    installed; otherwise the figure of the exact-word stage alone is reported as `meteor_exact`.
    """
    predicted, true = words(prediction, page)
    common = len(set(predicted) & set(true))
    stages = _word_net()
    undefined = None if answers.choose(rules, answers.RULES, "rules") == "released" else 0.0
    f1 = 2 * common / (len(set(predicted)) + len(set(true))) if common else 0.0
    return {
        "edit_distance": float(Levenshtein.normalized_distance(prediction, page)),
        "precision": common / len(set(predicted)) if predicted else undefined,
        "recall": common / len(set(true)) if true else undefined,
        "f1": f1 if predicted and true else undefined,
        "bleu": bleu(predicted, true),
        **({"meteor": meteor(predicted, true, *stages)} if stages else {"meteor_exact": meteor(predicted, true)}),
    }


# --- task -----------------------------------------------------------------------------------------------------------


def prompt(record: Mapping[str, Any], wording: str = "train", thinking: bool = False) -> str:
    """The user's text; the evaluation script's has a literal `<image>` line and a trailing blank."""
    text = PROMPTS[answers.choose(wording, PROMPTS, "wording")]
    return text + answers.THINKING_SUFFIX if thinking else text


def answer(record: Mapping[str, Any], thinking: bool = False) -> str:
    """The gold answer: the page's text."""
    return answers.wrap(record["text"], thinking)


def parse(text: str, thinking: bool = False) -> str:
    """The page's text in an answer, without padding, end token and outer blanks; "" without an answer block to read."""
    return answers.content(text, thinking) or ""


def reward(text: str, record: Mapping[str, Any], rules: str = "corrected", thinking: bool = False) -> float:
    """Edit similarity with the record's `text`, 0..1; with `thinking`, 0 unless the completion has the two blocks."""
    if thinking and not answers.thinking_format(text, rules):
        return 0.0
    return edit_similarity(parse(text, thinking), record["text"], rules)


@dataclass(frozen=True)
class OCR(Task):
    """The text of a page."""

    thinking: bool = False
    wording: Literal["train", "evaluation"] = "train"
    rules: answers.Rules = "corrected"

    figures = {"edit_distance": "lower", **dict.fromkeys(("precision", "recall", "f1", "bleu", "meteor*"), "higher")}
    primary = ("edit_distance", "f1")

    def prompt(self, record: Record) -> str:
        return prompt(record, self.wording, self.thinking)

    def gold(self, record: Record) -> str:
        return answer(record, self.thinking)

    def reward(self, text: str, record: Record) -> Reward:
        return reward(text, record, self.rules, self.thinking)

    def row(self, text: str, record: Record) -> Row:
        """`page_metrics`; the corrected ones in every case (the paper prints them times 100)."""
        found = page_metrics(parse(text, self.thinking), record["text"])
        return {name: value for name, value in found.items() if value is not None}

    def predicted(self, text: str, record: Record) -> Shown:
        return {"text": parse(text, self.thinking)}


PARSERS = {"direct": parse, "thinking": lambda text: parse(text, thinking=True)}
