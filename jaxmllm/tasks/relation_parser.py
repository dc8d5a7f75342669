"""Free text into phrases and relations by rules, without a model: the language graph of an expression that brings none.

A sentence is cut at its relation phrases, the longest known one first; what stands between two of them is a noun phrase. A
relation belongs to the noun before it ("the cup on the table near the door": the door is the table's), after "and" to the
subject of the relation before, after ", and" to the subject above that one. Of the world's expressions with exact graphs all are
read back up to four relations and 98 % with five, where ", and" may close more than one branch (`tests/test_relation_parser.py`).
On photographs nothing measures it: a graph read by it is marked `parsed` in a record.
"""

import re
from collections.abc import Iterable
from typing import Any

from jaxmllm.tasks.relation_graphs import SPOKEN
from jaxmllm.tasks.relation_phrases import SUBSTITUTES

_SIMPLE = (
    "near", "beside", "by", "on", "in", "at", "with", "over", "against", "along", "around", "under", "underneath", "beneath",
    "between", "across from", "close to", "close by", "on top of", "at the end of", "attached to", "covered by", "leaning on",
    "leaning against", "looking at", "hanging on", "hanging from", "lying on", "laying on", "sitting in", "sitting at",
    "sitting by", "sitting next to", "standing by", "standing next to", "standing near", "standing at", "walking with",
    "watching", "using", "touching", "pulling", "pushing", "hitting", "catching", "feeding", "driving", "filled with",
    "talking on", "parked on", "parked in", "on the side of", "in the back of", "of", "smaller than", "bigger than",
)  # fmt: skip
_SIDES = ("left", "right")
_LEAD = r"(?:(?:that|which|who)\s+)?(?:(?:is|are|was|were)\s+)?"
_ARTICLES = {
    "the",
    "a",
    "an",
    "some",
    "this",
    "that",
    "there",
    "is",
    "are",
    "which",
    "who",
    "his",
    "her",
    "its",
    "their",
}
_WORN = {"in", "with", "wearing"}  # what follows them does nothing itself: "the woman in red sitting on the bench"


def known_relations() -> list[str]:
    """Relation phrases that are looked for, the longest first."""
    phrases: set[str] = {*SUBSTITUTES, *_SIMPLE, *(text for texts in SPOKEN.values() for text in texts)}
    phrases |= {f"{lead}to the {side} of" for side in _SIDES for lead in ("", "on the ")}
    phrases |= {f"{verb} {lead}{side} of" for side in _SIDES for verb in ("on the", "at the") for lead in ("",)}
    phrases |= {f"sitting {p}" for p in ("behind", "in front of")} | {
        f"{s} side of" for s in ("on the left", "on the right")
    }
    return sorted(phrases, key=lambda phrase: (-len(phrase.split()), -len(phrase), phrase))


def _pattern(phrases: Iterable[str]) -> re.Pattern[str]:
    options = "|".join(r"\s+".join(map(re.escape, phrase.split())) for phrase in phrases)
    return re.compile(rf"(?P<joint>(?:\s*,)?\s*\band\s+|\s*,\s*)?\b{_LEAD}(?P<relation>{options})\b", re.IGNORECASE)


_RELATION = _pattern(known_relations())


def parse_expression(text: str) -> dict[str, Any]:
    """`entities`, `edges`, `relations`, `root` and `spans` (characters of each relation phrase) of an English expression.

    The first noun phrase is the root. A text without a known relation is one phrase without edges. Never raises on any text.
    """
    nouns: list[str] = []
    edges: list[list[int]] = []
    relations, spans = [], []
    above: dict[int, int] = {}  # object -> its subject
    at, waiting = 0, None
    for found in _RELATION.finditer(text):
        if found.start("relation") < at:
            continue
        noun = _noun(text[at : found.start()])
        if waiting is None:
            if not noun:  # a relation before any noun: "on the left of the table"
                continue
            nouns.append(noun)
            last = 0
        else:
            if not noun:  # two relation phrases in a row are one: "standing on" "in"
                relations[-1] = text[spans[-1][0] : found.end("relation")]
                spans[-1][1] = found.end("relation")
                at = found.end()
                continue
            last = _placed(noun, waiting, nouns, edges, above)
        said = found.group("relation").lower()
        joint = (found.group("joint") or "").strip().lower()
        subject = last
        if joint and waiting is not None:
            subject = waiting
            if joint.startswith(",") and "and" in joint:
                subject = above.get(waiting, waiting)
        elif waiting is not None and relations[-1].lower() in _WORN and said.split()[0].endswith("ing"):
            subject = waiting
        relations.append(found.group("relation"))
        spans.append([found.start("relation"), found.end("relation")])
        waiting, at = subject, found.end()
    rest = _noun(text[at:])
    if waiting is None:
        return {"entities": [rest or text.strip() or text], "edges": [], "relations": [], "root": 0, "spans": []}
    if rest:
        _placed(rest, waiting, nouns, edges, above)
    else:  # it ends with a relation phrase, which belongs to the noun before
        relations.pop()
        spans.pop()
    return {
        "entities": nouns,
        "edges": edges,
        "relations": [" ".join(relation.lower().split()) for relation in relations],
        "root": 0,
        "spans": spans,
    }


def _placed(noun: str, subject: int, nouns: list[str], edges: list[list[int]], above: dict[int, int]) -> int:
    """Number of a noun phrase that is added below its subject."""
    nouns.append(noun)
    edges.append([subject, len(nouns) - 1])
    above[len(nouns) - 1] = subject
    return len(nouns) - 1


def _noun(text: str) -> str:
    words = re.sub(r"[^\w\s'-]", " ", text).lower().split()
    while words and words[0] in _ARTICLES | {"and", "while"}:
        words = words[1:]
    while words and words[-1] in {"and", "that", "which", "who", "is", "are", "while"}:
        words = words[:-1]
    return " ".join(words)
