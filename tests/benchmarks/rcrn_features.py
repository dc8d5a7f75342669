"""RCRN on cached features of the embedded model: what a linear probe reads in them, and what the network learns from them.

    python -m tests.benchmarks.rcrn_features [--size 112] [--kind tower] [--pairs 4000] [--steps 2000]

Writes tests/benchmarks/results/rcrn_features.json, a row for each size and kind. Features are computed once and kept in memory;
the backbone stays as it is.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression

from jaxmllm import api
from jaxmllm.data.examples import Asking, Sized
from jaxmllm.data.sources import open_source
from jaxmllm.methods.rcrn import network
from jaxmllm.methods.rcrn.graphs import Limits, RelationEncoder, arrays
from jaxmllm.methods.rcrn.method import features
from jaxmllm.runfiles import write_json
from tests.support import relation_learning as learning

RESULT = Path(__file__).parent / "results" / "rcrn_features.json"
LIMITS = Limits(objects=10, entities=4, relations=3, phrase=24)


def cached(model, spec, count, kind):
    """(inputs, match, referent, wrong edge, edges) as `relation_learning` trains on, and the records."""
    source = Sized(open_source(spec), model.processor.pixel_config)
    encoder = RelationEncoder(model.processor, Asking({}), model.buckets)
    cell = model.cfg.vision.patch_size * model.cfg.vision.spatial_merge_size
    read = jax.jit(features, static_argnames=("cfg", "kind", "shape", "cell"))
    parts, records = [], []
    for at in range(0, count, 32):
        encoded = [encoder.encode(source[k]) for k in range(at, at + 32)]
        rows = [row.records[0] for row in encoded]
        prompts, _ = model.prepare([row.example for row in encoded])
        vision = np.asarray(prompts.vision_index)
        made = arrays(rows, [int(np.argmax(row >= 0)) for row in vision], cell, LIMITS)
        shape = tuple(int(v) for v in made.grid[:, 1:].max(0))
        boxes = made.boxes + np.float32([0, 0, 1, 1])
        regions, words = read(model.params, model.cfg, prompts, kind, made.grid, boxes, shape, cell)
        phrases = np.concatenate([made.entity_words, made.relation_words], 1)
        words, index = gathered(np.asarray(words), phrases)
        m = LIMITS.entities
        inputs = network.Inputs(
            np.asarray(regions), made.boxes, made.box_mask, made.size, words, index[:, :m], index[:, m:],
            jax.tree.map(np.asarray, made.graphs),
        )  # fmt: skip
        wrong, edges = (np.array(x) for x in zip(*((r["foil_pos"], len(r["edges"])) for r in rows), strict=True))
        parts.append((inputs, made.match, np.maximum(made.gold, 0), wrong, edges))
        records += rows
    return jax.tree.map(lambda *x: np.concatenate(x), *parts), records


def gathered(words, phrases, room=64):
    """Only the words that phrases name, in `room` places, so that a prompt's other tokens need no memory."""
    out = np.zeros((len(words), room, words.shape[-1]), np.float32)
    index = np.full_like(phrases, -1)
    for b in range(len(words)):
        used = np.unique(phrases[b][phrases[b] >= 0])
        out[b, : len(used)] = words[b, used]
        index[b] = np.where(phrases[b] >= 0, np.searchsorted(used, phrases[b]), -1)
    return out, index


def probe(train, test):
    """Accuracy of a linear classifier of each attribute on the pooled features of held-out objects."""

    def table(part):
        inputs, records = part[0][0], part[1]
        rows = [(b, i, o) for b, r in enumerate(records[::2]) for i, o in enumerate(r["scene"]["objects"])]
        x = np.stack([inputs.regions[2 * b, i] for b, i, _ in rows])
        return x, {name: [o[name] for *_, o in rows] for name in ("colour", "shape", "size")}

    (x, y), (x2, y2) = table(train), table(test)
    scale = x.std(0) + 1e-6
    found = {}
    for name in y:
        fitted = LogisticRegression(max_iter=300).fit(x[:4000] / scale, y[name][:4000])
        found[name] = round(float(fitted.score(x2 / scale, y2[name])), 4)
    return found


def main(size: int, kind: str, pairs: int, steps: int, seed: int) -> None:
    model = api.load("tiny")
    base = f"world:relations?size={size}x{size}&twins=true&verbosity=0-1"
    start = time.time()
    train = cached(model, f"{base}&length={2 * pairs}", 2 * pairs, kind)
    test = cached(model, f"{base}&split=val&length={min(1024, 2 * pairs)}", min(1024, 2 * pairs), kind)
    row = {
        "size": size,
        "kind": kind,
        "pairs": pairs,
        "steps": steps,
        "seed": seed,
        "features_s": round(time.time() - start),
    }
    row["probe"] = probe(train, test)
    print(row, flush=True)
    wide = train[0][0].regions.shape[-1]
    scale = train[0][0].regions.std((0, 1)) + 1e-6
    cfg = dataclasses.replace(learning.CONFIG, region_dim=wide, word_dim=wide, width=128, joint=128)

    def scaled(part):
        return dataclasses.replace(part[0], regions=part[0].regions / scale), *part[1:]

    start = time.time()
    params = learning.train(scaled(train[0]), seed, steps, cfg=cfg)
    row["test"] = learning.figures(params, scaled(test[0]), cfg)
    row["train"] = learning.figures(params, jax.tree.map(lambda x: x[:1024], scaled(train[0])), cfg)
    row["seconds"] = round(time.time() - start)
    print(row, flush=True)
    found = json.loads(RESULT.read_text()) if RESULT.exists() else []
    write_json(RESULT, [*found, row])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, value in (("size", 112), ("kind", "tower"), ("pairs", 4000), ("steps", 2000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    main(**vars(parser.parse_args()))
