"""Relation records as the arrays of RCRN: phrases at their tokens, candidate boxes, the language graph."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxmllm.data.examples import Encoded, Encoder, extend, sized
from jaxmllm.data.sources import RecordSource
from jaxmllm.errors import InputError
from jaxmllm.methods.rcrn.loss import inclusive_iou
from jaxmllm.methods.rcrn.propagation import Graphs, pad_graphs

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a batch is padded to, so that there is one program."""

    objects: int  # N candidate boxes
    entities: int  # M
    relations: int  # E
    phrase: int  # L tokens of a phrase; a relation's are those of subject, predicate and object


@dataclasses.dataclass(frozen=True)
class Spans:
    """Where a record's phrases stand in its prompt."""

    entities: list[list[int]]  # token positions of each phrase
    relations: list[list[int]]  # of subject, predicate and object together


class RelationEncoder(Encoder):
    """A record as picture and text, `<picture> expression`, then each phrase on a line of its own.

    Phrases are tokenised apart, so that their tokens are known without an aligner. The record gets `spans`.
    """

    def __call__(self, source: RecordSource, index: int, place: int) -> Encoded:
        return self.encode(sized(source[index], self.processor.pixel_config), index)

    def encode(self, record: Record, index: int = 0) -> Encoded:
        phrases = [*record["entities"], *record["relations"]]
        if not record["entities"] or not all(phrase.strip() for phrase in phrases):
            raise InputError("entities, relations: every phrase needs words, and there must be an entity")
        opening = self.asking.opening()
        images = [{"type": "image", "image": image} for image in record["images"]]
        prefix = self.prefix(opening, images)
        head, *lines = self.ids([f"{record['expression']}\n", *(f"{phrase}\n" for phrase in phrases)])
        spans, at = [], len(prefix.tokens) + len(head)
        for line in lines:
            spans.append(list(range(at, at + len(line) - 1)))  # without the line break
            at += len(line)
        example = extend(prefix, sum([head, *lines], []))
        n = len(record["entities"])
        relations = [[*spans[s], *spans[n + k], *spans[o]] for k, (s, o) in enumerate(record["edges"])]
        seen = self.seen(dict(record), example)
        return self.checked(Encoded(index, [{**seen, "spans": Spans(spans[:n], relations)}], example))


def candidates(record: Record) -> Float[np.ndarray, "n 4"]:
    """Boxes [x1, y1, x2, y2] among which the referred object is, original pixels: `candidates`, or all objects of a scene."""
    if "candidates" in record:
        return np.asarray(record["candidates"], np.float64).reshape(-1, 4)
    if "scene" in record:
        return np.asarray([thing["box"] for thing in record["scene"]["objects"]], np.float64).reshape(-1, 4)
    raise InputError("candidates: a relation record needs candidate boxes, or its scene")


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A padded batch on the host, apart from the prompts. Boxes are inclusive pixels of the resized picture."""

    boxes: Float[Any, "B N 4"]
    box_mask: Bool[Any, "B N"]
    size: Float[Any, "B 2"]
    grid: Int[Any, "B 3"]  # prompt position of the picture's first token, rows and columns of tokens
    entity_words: Int[Any, "B M L"]
    relation_words: Int[Any, "B E L"]
    graphs: Graphs
    match: Bool[Any, "B"]
    gold: Int[Any, "B"]  # candidate that is the referred object; -1: none overlaps enough, or no match
    gold_box: Float[Any, "B 4"]


def arrays(records: Sequence[Record], starts: Sequence[int], cell: int, limits: Limits) -> Arrays:
    """The arrays of encoded records. `starts`: prompt position of each picture; `cell`: resized pixels of a token's side.

    InputError naming the record and the limit that it exceeds.
    """
    b = len(records)
    boxes, mask = np.zeros((b, limits.objects, 4), np.float32), np.zeros((b, limits.objects), bool)
    size, grid = np.zeros((b, 2), np.float32), np.zeros((b, 3), np.int32)
    entity = np.full((b, limits.entities, limits.phrase), -1, np.int32)
    relation = np.full((b, limits.relations, limits.phrase), -1, np.int32)
    match, gold, gold_box = np.zeros(b, bool), np.full(b, -1, np.int32), np.zeros((b, 4), np.float32)
    graphs = []
    for i, record in enumerate(records):
        width, height = record["resized"]
        scale = np.tile(np.divide(record["resized"], record["size"]), 2)
        shown = candidates(record) * scale - [0, 0, 1, 1]
        _fits(record, "candidates", len(shown), limits.objects)
        if not len(shown):
            raise InputError(f"record {record.get('id')!r}: candidates: there is none")
        boxes[i, : len(shown)], mask[i, : len(shown)] = shown, True
        size[i], grid[i] = (width, height), (starts[i], height // cell, width // cell)
        _placed(record, "entities", record["spans"].entities, entity[i])
        _placed(record, "relations", record["spans"].relations, relation[i])
        graphs.append((len(record["entities"]), record["edges"], record["root"]))
        match[i] = record["match"]
        if match[i]:
            gold_box[i] = np.asarray(record["box"]) * scale - [0, 0, 1, 1]
            overlaps = np.asarray(inclusive_iou(shown, gold_box[i]))
            gold[i] = int(overlaps.argmax()) if overlaps.max() >= 0.5 else -1
    try:
        padded = pad_graphs(graphs, limits.entities, limits.relations)
    except ValueError as error:
        raise InputError(f"records {[record.get('id') for record in records]}: {error}") from error
    return Arrays(boxes, mask, size, grid, entity, relation, padded, match, gold, gold_box)


def _fits(record: Record, field: str, count: int, limit: int) -> None:
    if count > limit:
        raise InputError(f"record {record.get('id')!r}: {count} {field}, method.max_{field} is {limit}")


def _placed(record: Record, field: str, spans: Sequence[Sequence[int]], rows: np.ndarray) -> None:
    _fits(record, field, len(spans), len(rows))
    for span, row in zip(spans, rows, strict=False):
        _fits(record, "phrase_tokens", len(span), len(row))
        row[: len(span)] = span
