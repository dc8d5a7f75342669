"""Matching with mismatched relations: does an expression fit the image, where, or which relation is wrong (GITM-MR).

The model sees the image, the expression and its numbered relations, and answers with one JSON object: either
`{"match": true, "bbox_2d": [x1, y1, x2, y2]}` or `{"match": false, "relation": "R2"}`, reasoning before it allowed, and
optionally a trace `"nodes": [[x1, y1, x2, y2], ..]` and `"verdicts": [true, false, ..]`: where each phrase is and whether
each relation holds, as far as the answerer could tell without its verdict. Verdict, box and relation are
scored in cascade: a box counts only under a right "match", a relation only under a right "mismatch" (gitm_mr.md 4, 7).

A record holds `expression`, `entities` (phrases), `edges` [[subject, object], ..], `relations` (phrases), `root`,
`match`, for matches the root's `box`, for mismatches the wrong edge `foil_pos` (-1 for matches) with `foil_phrase` and
`target_phrase`; `length` in words; optional `twin`, shared by the two records of a pair; optional `scene` for the trace;
optional `rivals`, the other objects that the root's words alone fit; optional `cell`, the split by length it belongs to.
Boxes of records are continuous: [x, y, x + w, y + h]. The published inclusive boxes [x, y, x + w - 1, y + h - 1] with
their "+ 1" have the same IoU.

Option `style`: the frame of the box's numbers, as everywhere; the form is JSON in both styles.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmllm.geometry import Boxes
from jaxmllm.intervals import ratio
from jaxmllm.tasks import answers
from jaxmllm.tasks.relation_graphs import Oracle, chance_of_edges
from jaxmllm.tasks.relation_phrases import parse_graph
from jaxmllm.tasks.task import Line, Named, Record, Reward, Row, Task

MAX_TRACE_WEIGHT = 0.2
WORD_BINS = ((11, "11"), (16, "16"), (math.inf, "more"))  # words, up to -> name
_KEYS = {"match", "bbox_2d", "relation", "nodes", "verdicts"}
_QUESTION = (
    "Does this expression fit an object in the image? Expression: {expression}\n{relations}\n"
    'If it fits one, answer {{"match": true, "bbox_2d": [x1, y1, x2, y2]}} with the box of that object. If it fits none, '
    "exactly one of the relations is wrong: answer {wrong}. Write one JSON object."
)
_TRACE = ' Add "nodes", a box for every phrase ({phrases}), and "verdicts", true or false for every relation, in order.'


def relation_lines(record: Mapping[str, Any]) -> list[str]:
    """`R1: red circle — left of — small square`, one line a relation."""
    names = record["entities"]
    return [
        f"R{n}: {names[s]} — {relation} — {names[o]}"
        for n, ((s, o), relation) in enumerate(zip(record["edges"], record["relations"], strict=True), 1)
    ]


def prompt(record: Mapping[str, Any], style: str = "qwen2_5_vl", thinking: bool = False, trace: bool = False) -> str:
    """The question with the numbered relations and the two forms of the answer; `trace` also asks for the trace."""
    answers.choose(style, answers.STYLES, "style")
    lines = relation_lines(record)
    wrong = '{"match": false, "relation": "R1"} with its number' if lines else '{"match": false}'
    text = _QUESTION.format(
        expression=record["expression"], relations="\n".join(["Relations:", *lines] if lines else []), wrong=wrong
    )
    text += _TRACE.format(phrases=", ".join(record["entities"])) if trace else ""
    return text + answers.THINKING_SUFFIX.replace(" (number)", "") if thinking else text


def answer(record: Mapping[str, Any], style: str = "qwen2_5_vl", thinking: bool = False, thought: str = "") -> str:
    """The gold answer: one JSON object on one line. A record with a `trace`, {"nodes": boxes, "verdicts"}, gets it too."""
    frame = answers.STYLES[answers.choose(style, answers.STYLES, "style")].frame

    def whole(boxes: Sequence[Sequence[float]]) -> list[list[int]]:
        return answers.whole_boxes(Boxes.of(record, boxes).to(frame)).tolist()

    body: dict[str, Any] = {"match": bool(record["match"])}
    if record["match"]:
        body["bbox_2d"] = whole([record["box"]])[0]
    elif record["edges"]:
        body["relation"] = f"R{record['foil_pos'] + 1}"
    if "trace" in record:
        body |= {"nodes": whole(record["trace"]["nodes"]), "verdicts": list(record["trace"]["verdicts"])}
    return answers.wrap(json.dumps(body), thinking, thought)


def parse(text: str, n_relations: int | None = None, thinking: bool = False) -> dict[str, Any] | None:
    """The verdict of the last JSON object: `match`, `box` (four numbers or None), `relation` (from 0, or None), `nodes`,
    `verdicts`; None if it does not obey the schema.

    The schema: `match` is true or false; a box stands there if and only if it is true, a relation id (in range, if
    `n_relations` is given) if and only if it is false and there are relations; nothing else but the trace. Never raises.
    """
    body = answers.content(text, thinking)
    value = None if body is None else _last_object(body)
    if value is None or not value.keys() <= _KEYS or not isinstance(value.get("match"), bool):
        return None
    match, box, relation = value["match"], answers.four_numbers(value.get("bbox_2d")), _edge(value.get("relation"))
    if match and (box is None or "relation" in value):
        return None
    if not match:
        optional = n_relations == 0 and "relation" not in value
        in_range = relation is not None and relation < (math.inf if n_relations is None else n_relations)
        if "bbox_2d" in value or not (optional or in_range):
            return None
    return {
        "match": match,
        "box": box,
        "relation": relation,
        "nodes": value.get("nodes"),
        "verdicts": value.get("verdicts"),
    }


def _last_object(text: str) -> dict[str, Any] | None:
    """The JSON object that the last closing brace of a text closes."""
    end, depth = text.rfind("}"), 0
    for at in range(end, -1, -1):
        depth += (text[at] == "}") - (text[at] == "{")
        if depth == 0:
            value = answers.load_json(text[at : end + 1]) if at < end else None
            return value if isinstance(value, dict) else None
    return None


def _edge(value: Any) -> int | None:
    """Edge of `"R2"`, from 0."""
    if not isinstance(value, str) or len(value) > 9 or value[:1] not in "Rr" or not value[1:].isdecimal():
        return None
    return int(value[1:]) - 1 if int(value[1:]) > 0 else None


# ---- reward


def reward(
    text: str,
    record: Mapping[str, Any],
    style: str = "qwen2_5_vl",
    thinking: bool = False,
    trace_weight: float = 0.0,
) -> dict[str, float]:
    """`reward` = 0.1 format + 0.4 [verdict right] + 0.5 [verdict right] Q, in 0..1; 0 if the schema is broken.

    Q is 0.5 [IoU > 0.5] + 0.5 IoU for a match, [relation right] for a mismatch. `trace_weight` w <= 0.2 is taken from the
    last term: (0.5 - w) Q + w trace, see `trace_score`. Parts: `format`, `match`, `quality` (Q), `trace` if weighted.

    Raises:
        ValueError: trace_weight outside 0..0.2.
    """
    if not 0 <= trace_weight <= MAX_TRACE_WEIGHT:
        raise ValueError(f"trace_weight must be within 0..{MAX_TRACE_WEIGHT}, got {trace_weight}")
    said = parse(text, len(record["edges"]), thinking)
    right = False
    quality, trace = 0.0, 0.0
    if said is not None and said["match"] == bool(record["match"]):
        right = True
        if said["match"]:
            iou = _iou(said["box"], record, style)
            quality = 0.5 * (iou > 0.5) + 0.5 * iou
        else:
            quality = float(said["relation"] == record["foil_pos"] or not record["edges"])
        trace = trace_score(said, record, style) if trace_weight else 0.0
    total = 0.1 * (said is not None) + 0.4 * right + (0.5 - trace_weight) * quality + trace_weight * trace
    parts = {"reward": total, "format": float(said is not None), "match": float(right), "quality": quality}
    return parts | ({"trace": trace} if trace_weight else {})


def _iou(box: Sequence[float], record: Mapping[str, Any], style: str) -> float:
    frame = answers.STYLES[answers.choose(style, answers.STYLES, "style")].frame
    return float(Boxes.of(record, box, frame).to("pixel").iou(Boxes.of(record, record["box"])))


def _node(nodes: Any, record: Mapping[str, Any]) -> list[float] | None:
    """The box that a trace gives for the root."""
    if not isinstance(nodes, list) or len(nodes) != len(record["entities"]):
        return None
    return answers.four_numbers(nodes[record["root"]])


def trace_score(said: Mapping[str, Any], record: Mapping[str, Any], style: str = "qwen2_5_vl") -> float:
    """Share of the relations whose verdict agrees with the scene for the model's own node boxes; 0 without a trace.

    Each node box stands for the object that it overlaps most, with IoU > 0.5. A relation whose nodes stand for no object
    counts as wrong, one that the scene leaves undecided is not counted. Needs the record's `scene`.
    """
    nodes, verdicts, scene = said.get("nodes"), said.get("verdicts"), record.get("scene")
    if scene is None or not isinstance(nodes, list) or not isinstance(verdicts, list):
        return 0.0
    boxes = [box for node in nodes if (box := answers.four_numbers(node)) is not None]
    if not len(boxes) == len(nodes) == len(record["entities"]) or len(verdicts) != len(record["edges"]):
        return 0.0
    frame = answers.STYLES[style].frame
    objects = [o["box"] for o in scene["objects"]]
    iou = Boxes.of(record, boxes, frame).to("pixel").pairwise_iou(Boxes.of(record, objects))
    stands = [int(row.argmax()) if row.size and row.max() > 0.5 else None for row in iou]
    oracle = Oracle(scene["objects"], scene["links"], scene["tau"], scene["near"])
    agreed = []
    for (s, o), relation, verdict in zip(record["edges"], scene["relations"], verdicts, strict=True):
        i, j = stands[s], stands[o]
        truth = -2 if i is None or j is None else int(oracle.table(relation)[i, j])
        if truth != -1:
            agreed.append(isinstance(verdict, bool) and truth == int(verdict))
    return float(np.mean(agreed)) if agreed else 0.0


# ---- measures


def cascade_metrics(
    match_gt: Sequence[int],
    match_pred: Sequence[int],
    iou: Sequence[float],
    foil_gt: Sequence[int],
    foil_pred: Sequence[int],
    length: Sequence[int] | None = None,
    max_train_len: int | None = None,
    pair: Sequence[Any] | None = None,
    n_edges: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The published protocol, in percent: `all`, and with lengths `id` (length <= max_train_len) and `ood` alike.

    Each holds `match_acc`; `grd_acc`, a match called a match with IoU > 0.5, over the matches; `mrr_acc`, a mismatch
    called one with the right edge, over the mismatches; and `.._oracle` forms of both that ignore the verdict. An empty
    denominator gives NaN. Beside them `overall_acc` (right box or right mismatch), `joint_acc` (mismatches also need the
    edge), with lengths `gap` (id - ood), with `pair` (twins share a value) `pair_acc` (both jointly right; of
    complete pairs), with `n_edges` `mrr_chance`.
    """
    match, said = np.asarray(match_gt, bool), np.asarray(match_pred, bool)
    hit = np.asarray(iou, np.float64) > 0.5
    named = np.asarray(foil_gt) == np.asarray(foil_pred)

    def percent(right, among):
        return 100 * float(np.mean(right[among])) if among.any() else math.nan

    def figures(subset):
        matches, mismatches = subset & match, subset & ~match
        return {
            "match_acc": percent(match == said, subset),
            "grd_acc": percent(said & hit, matches),
            "grd_acc_oracle": percent(hit, matches),
            "mrr_acc": percent(~said & named, mismatches),
            "mrr_acc_oracle": percent(named, mismatches),
        }

    everything = np.ones(len(match), bool)
    joint = np.where(match, said & hit, ~said & named)
    out: dict[str, Any] = {
        "all": figures(everything),
        "overall_acc": percent(np.where(match, said & hit, ~said), everything),
        "joint_acc": percent(joint, everything),
    }
    if length is not None and max_train_len is not None:
        short = np.asarray(length) <= max_train_len
        out |= {"id": figures(short), "ood": figures(~short)}
        out["gap"] = {name: value - out["ood"][name] for name, value in out["id"].items()}
    if pair is not None:
        twins: dict[Any, list[bool]] = {}
        for key, right in zip(pair, joint.tolist(), strict=True):
            twins.setdefault(key, []).append(right)
        complete = [all(both) for both in twins.values() if len(both) == 2]
        out["pair_acc"] = 100 * float(np.mean(complete)) if complete else math.nan
    if n_edges is not None:
        out["mrr_chance"] = 100 * chance_of_edges(np.asarray(n_edges)[~match].tolist())
    return out


@dataclass(frozen=True)
class Relations(Task):
    """Whether an expression fits the picture, where, and which of its relations is wrong."""

    style: answers.StyleName = "qwen2_5_vl"
    thinking: bool = False
    trace: bool = False
    trace_weight: float = 0.0

    figures = {
        **dict.fromkeys(("*_acc", "*_acc_*", "format"), "higher"),
        **dict.fromkeys(("said_match", "*_chance"), "neutral"),
    }
    primary = ("joint_acc", "match_acc")

    def prompt(self, record: Record) -> str:
        return prompt(record, self.style, self.thinking, self.trace)

    def gold(self, record: Record) -> str:
        return answer(record, self.style, self.thinking)

    def reward(self, text: str, record: Record) -> Reward:
        return reward(text, record, self.style, self.thinking, self.trace_weight)

    def row(self, text: str, record: Record) -> Row:
        """The published cascade of one answer (`cascade_metrics`, shares), and `format`. What cannot be read is wrong.

        `said_match`: whether a readable answer calls it a match; stop if the share leaves 0.3..0.7 in training on pairs.
        `grd_acc_oracle` and `mrr_acc_oracle` ask the answer's trace, whatever its verdict: the box of the root's node,
        and the one relation it denies; without a trace they are absent. `mrr_acc_choice`: where there are relations to
        choose from; one alone is named with the verdict. `grd_acc_rivals`: where the root's words fit other objects too;
        else no relation is needed. `mrr_chance`, `grd_chance`: what a relation, an object of those words, drawn at random
        earns, given the right verdict.
        """
        edges, match = len(record["edges"]), bool(record["match"])
        read = parse(text, edges, self.thinking)
        said = read or {}
        right = said.get("match") == match
        if match:
            hit = right and _iou(said["box"], record, self.style) > 0.5
            cascade = {"grd_acc": float(hit)}
            if "rivals" in record:
                cascade |= {"grd_chance": 1 / (1 + record["rivals"])}
                cascade |= {"grd_acc_rivals": float(hit)} if record["rivals"] else {}
            box = _node(said.get("nodes"), record)
            if box is not None:
                cascade["grd_acc_oracle"] = float(_iou(box, record, self.style) > 0.5)
            joint, overall = hit, hit
        else:
            named = right and said["relation"] == record["foil_pos"]
            cascade = {"mrr_acc": float(named)} | ({"mrr_chance": 1 / edges} if edges else {})
            cascade |= {"mrr_acc_choice": float(named)} if edges > 1 else {}
            verdicts = said.get("verdicts")
            if isinstance(verdicts, list) and len(verdicts) == edges:
                cascade["mrr_acc_oracle"] = float(
                    [k for k in range(edges) if verdicts[k] is False] == [record["foil_pos"]]
                )
            joint, overall = named, right
        return {
            "match_acc": float(right),
            **cascade,
            "overall_acc": float(overall),
            "joint_acc": float(joint),
            "format": float(read is not None),
            "said_match": (float(said["match"]), 1.0) if read is not None else (0.0, 0.0),
        }

    def groups(self, record: Record) -> tuple[str, ...]:
        words = record.get("length", len(record["expression"].split()))
        up_to = next(name for limit, name in WORD_BINS if words <= limit)
        return f"edges={len(record['edges'])}", f"words={'17+' if up_to == 'more' else '<=' + up_to}"

    def unit(self, record: Record) -> str | None:
        return super().unit(record) if record.get("twin") is None else str(record["twin"])

    def whole(self, lines: Sequence[Line], files: Mapping[str, Any]) -> Named | None:
        """`pair_acc`: the share of complete pairs of twins of which both answers are jointly right."""
        twins: dict[str, list[int]] = {}
        for i, line in enumerate(lines):
            if line["unit"] is not None:
                twins.setdefault(line["unit"], []).append(i)
        pairs = [both for both in twins.values() if len(both) == 2]
        if not pairs:
            return None
        top, bottom = np.zeros((len(lines), 1)), np.zeros((len(lines), 1))
        for first, second in pairs:  # both are resampled together: the first stands for the pair
            bottom[first] = 1
            top[first] = float(all(lines[k]["figures"]["joint_acc"] == 1 for k in (first, second)))
        return ["pair_acc"], ratio(top, bottom)

    def title(self, record: Record) -> str:
        return str(record["expression"])


# ---- reading a backbone without generation


def triple_questions(record: Mapping[str, Any]) -> list[str]:
    """A yes/no question per relation, for backbones that verify triples; score each by log p(yes) - log p(no)."""
    names = record["entities"]
    return [
        f"Is the {names[s]} {relation} the {names[o]}? Answer yes or no."
        for (s, o), relation in zip(record["edges"], record["relations"], strict=True)
    ]


def triple_readout(margins: Sequence[float], threshold: float = 0.0) -> tuple[bool, int]:
    """(match iff the least margin exceeds the threshold, the relation of least margin); (True, 0) without relations."""
    if not len(margins):
        return True, 0
    return bool(min(margins) > threshold), int(np.argmin(margins))


def fit_threshold(scores: Sequence[float], match: Sequence[bool]) -> float:
    """The threshold of best accuracy for "match iff score > threshold" on validation data: the middle of the best gap.

    Raises:
        ValueError: no scores, or one that is not finite.
    """
    values, gold = np.asarray(scores, np.float64), np.asarray(match, bool)
    if not values.size or not np.isfinite(values).all():
        raise ValueError("a threshold needs finite scores")
    cuts = np.unique(values)
    cuts = np.concatenate([[cuts[0] - 1], (cuts[1:] + cuts[:-1]) / 2, [cuts[-1] + 1]])
    return float(cuts[np.argmax([np.mean((values > cut) == gold) for cut in cuts])])


PARSERS = {
    "parse": parse,
    "two relations": lambda text: parse(text, 2),
    "thinking": lambda text: parse(text, 2, thinking=True),
    "graph": lambda text: parse_graph(text, "red circle left of the small square"),
}
