"""Scenes of the world: the same everywhere, splits apart, ground truth against pixels and brute force. About 10 s."""

import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.tasks import captioning
from jaxmllm.world import DEFAULT_SPECS, TASKS, PageSpec, SceneSpec, WorldSource
from jaxmllm.world.drawing import COLOURS, GROUNDS, SHAPES, TEXTURES, shape_mask
from jaxmllm.world.pages import make_page
from jaxmllm.world.scenes import RELATIONS, make_scene
from jaxmllm.world.streams import Stream

HARD = SceneSpec(
    size=(160, 120),
    objects=(4, 10),
    shapes=SHAPES,
    colours=tuple(COLOURS),
    sizes=(("small", 0.1, 0.14), ("medium", 0.18, 0.23), ("large", 0.3, 0.38)),
    textures=TEXTURES,
    ground=GROUNDS,
    max_overlap=0.3,
    repeat=0.3,
)
CLEAN = SceneSpec(ground=("plain",), noise=0.0)


def digest(source: WorldSource, indices) -> str:
    """Hash of everything that the records hold, pixels included."""
    total = hashlib.sha256()
    for i in indices:
        for record in source.records(i):
            for image in record["images"]:
                total.update(image.tobytes())
            rest = {key: value for key, value in record.items() if key not in ("images", "unit")}
            total.update(json.dumps(rest, sort_keys=True).encode())
    return total.hexdigest()


# --- the same everywhere, the splits apart --------------------------------------------------------------------------


def fingerprint() -> dict[str, object]:
    return {
        "words": Stream(7, "val", 5).integers(0, 999_999, 4).tolist(),
        "scenes": digest(WorldSource("grounding", "val", 7, spec=HARD), range(5)),
        "captions": digest(WorldSource("captioning", "train", 0), range(5)),
    }


def test_every_process_and_machine_draws_the_same_items():
    """Values of the machine that this was written on; and those of another process without numpy's vector units."""
    assert fingerprint() == GOLDEN
    sources = [
        WorldSource(task, split, seed, questions=2)
        for seed, (task, split) in enumerate(zip(TASKS, ("train", "val", "test") * 3, strict=False))
    ]
    here = [digest(source, (3, 99_999, 0)) for source in sources]
    assert len(set(here)) == len(TASKS)
    code = (
        "import json, pickle, sys, tests.test_world as t\n"
        "out = {}\n"
        # another order and other items first, so nothing may depend on what was drawn before
        "for i, s in reversed(list(enumerate(pickle.load(sys.stdin.buffer)))):\n"
        "    t.digest(s, (77,))\n"
        "    out[i] = t.digest(s, (3, 99_999, 0))\n"
        "print(json.dumps([t.fingerprint(), [out[i] for i in range(len(out))]]))"
    )
    plain = {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX2 FMA3 AVX512F AVX512_SKX AVX512_ICL AVX512_SPR"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | plain,
        input=pickle.dumps(sources),
        capture_output=True,
        check=True,
    )
    assert json.loads(run.stdout) == [GOLDEN, here]


def test_length_and_task_do_not_change_the_pictures():
    long, short = WorldSource("grounding", length=10**9), WorldSource("counting", length=5, spec=SceneSpec())
    assert (long[4]["images"][0] == short[4]["images"][0]).all()
    assert long[10**9 - 1]["id"].endswith("-999999999-0")


def test_splits_share_no_content():
    """In a world so small that pictures repeat all the time, none repeats in another split, whatever the seed."""
    tiny = SceneSpec(size=(24, 24), objects=(1, 1), shapes=("square",), colours=("red",), sizes=(("small", 0.5, 0.5),))
    places = {
        split: {make_scene(tiny, seed, split, i).objects[0].box for seed in (0, 1) for i in range(150)}
        for split in ("train", "val", "test")
    }
    assert len(places["train"]) < 150  # of 169 places: with 300 draws they do repeat
    assert min(map(len, places.values())) > 3
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not places[a] & places[b]
    pages = PageSpec(size=(64, 40), lines=(1, 1), words=(1, 1), font_sizes=(12, 12), vocabulary=("cat",))
    origins = {
        split: {make_page(pages, seed, split, i).lines[0].box for seed in (0, 1) for i in range(120)}
        for split in ("train", "val", "test")
    }
    assert all(len(found) > 3 for found in origins.values())
    assert not origins["train"] & (origins["val"] | origins["test"]) and not origins["val"] & origins["test"]


def test_splits_look_alike():
    """Choosing by signature must not favour small objects, edges or low counts in the rarer splits."""
    stats = {}
    for split in ("train", "test"):
        things = [o for i in range(400) for o in make_scene(SceneSpec(), 0, split, i).objects]
        stats[split] = (len(things) / 400, np.mean([o.side for o in things]), np.mean([o.centre for o in things]))
    assert np.allclose(stats["train"], stats["test"], rtol=0.06), stats


# --- ground truth against pixels ------------------------------------------------------------------------------------


def extent(changed: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_box_and_has_its_area(shape):
    side = 40
    inner = 1 - 0.62**2
    area = {"circle": np.pi / 4, "ring": np.pi / 4 * inner, "square": 1, "triangle": 0.5, "diamond": 0.5,
            "hexagon": 0.75, "cross": 1 - 0.64**2}  # fmt: skip
    mask = shape_mask(shape, side)
    assert extent(mask > 0.02) == (0, 0, side, side)
    assert mask.min() >= 0 and mask.max() == 1
    if shape == "star":
        assert 0.25 < mask.mean() < 0.45
    else:
        assert mask.mean() == pytest.approx(area[shape], abs=0.01)


def test_boxes_are_where_the_pixels_are():
    """Extents found again in noise-free renders, by taking one object away."""
    for i in range(25):
        scene = make_scene(dataclasses.replace(CLEAN, shapes=SHAPES, colours=tuple(COLOURS)), 1, "train", i)
        full = scene.draw().astype(int)
        for k, thing in enumerate(scene.objects):
            others = scene.objects[:k] + scene.objects[k + 1 :]
            without = dataclasses.replace(scene, objects=others).draw().astype(int)
            found = extent(np.abs(full - without).max(-1) > 2)
            assert np.abs(np.subtract(found, thing.box)).max() <= 1, (thing, found)
            x, y = (int(v) for v in thing.centre)
            if thing.shape != "ring":
                nearest = min(COLOURS, key=lambda name: np.abs(np.subtract(COLOURS[name], full[y, x])).sum())
                assert nearest == thing.colour


def test_boxes_of_overlapping_objects_stay_visible_enough():
    covered_somewhere = False
    for i in range(30):
        scene = make_scene(HARD, 2, "test", i)
        width, height = scene.size
        for k, thing in enumerate(scene.objects):
            x1, y1, x2, y2 = thing.box
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            hidden = np.zeros((height, width), bool)
            for other in scene.objects[k + 1 :]:
                a1, b1, a2, b2 = other.box
                hidden[b1:b2, a1:a2] = True
            share = hidden[y1:y2, x1:x2].mean()
            covered_somewhere |= share > 0.1
            assert share <= HARD.max_overlap + 1e-9
    assert covered_somewhere


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(56, 224), st.integers(56, 224)),
    most=st.integers(1, 12),
    overlap=st.sampled_from((0.0, 0.2)),
    ground=st.sampled_from(GROUNDS),
    seed=st.integers(0, 2**63),
    index=st.integers(0, 2**40),
)
def test_any_spec_gives_scenes_that_keep_it(size, most, overlap, ground, seed, index):
    spec = SceneSpec(size=size, objects=(1, most), max_overlap=overlap, ground=(ground,))
    scene = make_scene(spec, seed, "val", index)
    assert 1 <= len(scene.objects) <= most
    assert scene.draw().shape == (size[1], size[0], 3)
    for thing in scene.objects:
        low, high = spec.sides(thing.size)
        assert low <= thing.side <= high and thing.box[3] - thing.box[1] == thing.side
        assert thing.shape in spec.shapes and thing.colour in spec.colours


# --- expressions against brute force --------------------------------------------------------------------------------

_OUTWARD = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def holds(a, b, relation: str, slack: float, shorter: int) -> bool:
    """A second writing of the relations, on centres and sides; `slack` in pixels makes them stricter or laxer."""
    (ax, ay), (bx, by) = a.centre, b.centre
    if relation in _OUTWARD:
        ux, uy = _OUTWARD[relation]
        along, across = (ax - bx) * ux + (ay - by) * uy, abs((ax - bx) * uy) + abs((ay - by) * ux)
        return along > across + slack
    if relation == "next to":
        gap_x = max(a.box[0] - b.box[2], b.box[0] - a.box[2], 0)
        gap_y = max(a.box[1] - b.box[3], b.box[1] - a.box[3], 0)
        return max(gap_x, gap_y) < 0.08 * shorter - slack
    if relation == "larger than":
        return a.side > 1.2 * b.side + slack
    if relation == "smaller than":
        return b.side > 1.2 * a.side + slack
    return getattr(a, "colour" if "colour" in relation else "shape") == getattr(
        b, "colour" if "colour" in relation else "shape"
    )


def referents(text: str, objects, slack: float, shorter: int) -> set[int]:
    """All objects that an expression can mean, read off its text."""
    spoken = {r: r for r in RELATIONS} | {f"of the {r}": r for r in RELATIONS if r.startswith("same")}
    pattern = "|".join(sorted(spoken, key=len, reverse=True))
    match = re.match(rf"(?P<noun>.+?)(?: (?:that is )?(?P<relation>{pattern}) the (?P<rest>.+))?$", text)
    words = set(match["noun"].split()) - {"object"}
    fits = {i for i, o in enumerate(objects) if words <= {o.size, o.texture, o.colour, o.shape}}
    if match["relation"]:
        marks = referents(match["rest"], objects, slack, shorter)
        relation = spoken[match["relation"]]
        pairs = [(i, j) for i in fits for j in marks if i != j]
        fits = {i for i, j in pairs if holds(objects[i], objects[j], relation, slack, shorter)}
    return fits


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_expressions_fit_one_object(depth):
    spec = dataclasses.replace(HARD, depth=(depth, depth), relations=RELATIONS)
    source = WorldSource("grounding", "val", seed=3, spec=spec, questions=4)
    shorter = min(spec.size)
    dead = spec.margin * shorter
    for i in range(25):
        objects = source.content(i).objects
        for record in source.records(i):
            text = record["expression"]
            for slack in (-0.99 * dead, 0, 0.99 * dead):  # every way to draw the border of a relation
                found = referents(text, objects, slack, shorter)
                assert len(found) == 1, (text, slack)
                assert list(objects[found.pop()].box) == record["box"]
            assert record["depth"] == depth == len(re.findall("|".join(RELATIONS), text))
            if depth:  # the relation is needed
                noun = re.split(rf" (?:of the )?(?:{'|'.join(RELATIONS)}) ", text)[0]
                assert len(referents(noun, objects, 0, shorter)) > 1


def test_targets_go_round_the_objects():
    source = WorldSource("grounding", questions=3)
    for i in range(10):
        boxes = {tuple(record["box"]) for record in source.records(i)}
        assert len(boxes) == 3


def test_counts_are_right_and_spread():
    spec = dataclasses.replace(DEFAULT_SPECS["counting"], zero_counts=0.3)
    source = WorldSource("counting", spec=spec, questions=4)
    counts = []
    for i in range(40):
        objects = source.content(i).objects
        for record in source.records(i):
            words = set(record["label"].split()) - {"object"}
            boxes = [list(o.box) for o in objects if words <= {o.size, o.colour, o.shape}]
            assert sorted(record["boxes"]) == sorted(boxes) and record["count"] == len(boxes)
            assert record["boxes"] == sorted(record["boxes"], key=lambda b: b[:2])
            assert record["points"] == [[(a + c) / 2, (b + d) / 2] for a, b, c, d in record["boxes"]]
            counts.append(record["count"])
    assert counts.count(0) > 10 and max(counts) >= 5
    assert max(np.bincount(counts)[1:]) < 0.6 * len(counts)


def test_detection_lists_everything():
    spec = dataclasses.replace(SceneSpec(), category=("colour", "shape"))
    source = WorldSource("detection", spec=spec)
    for i in range(10):
        record, objects = source[i], source.content(i).objects
        truth = {(*o.box, f"{o.colour} {o.shape}") for o in objects}
        assert {(*b, name) for b, name in zip(record["boxes"], record["labels"], strict=True)} == truth
        assert len(record["categories"]) == 30 and set(record["labels"]) <= set(record["categories"])


def test_captions_say_what_is_there():
    source = WorldSource("captioning", spec=dataclasses.replace(HARD, relations=RELATIONS, depth=(0, 0)))
    stated = 0
    for i in range(30):
        record, scene = source[i], source.content(i)
        by_box = {o.box: o for o in scene.objects}
        things = [by_box[tuple(o["box"])] for o in record["objects"]]
        assert len(things) == len(scene.objects)
        assert set(captioning.parse(record["caption"]).objects) == {o.shape for o in scene.objects}
        for a, relation, b in record["relations"]:
            assert holds(things[a], things[b], relation, 0, min(scene.size)), (record["caption"], a, relation, b)
            stated += 1
    assert stated > 20


def test_relation_twins_are_right_and_wrong():
    """Matched expressions have one referent, their twins none, by trying every assignment of objects to nodes."""
    spec = dataclasses.replace(DEFAULT_SPECS["relations"], depth=(1, 3), objects=(4, 6))
    source = WorldSource("relations", "test", spec=spec, questions=2)
    first = []
    for i in range(40):
        objects, twins = source.content(i).objects, source.records(i)
        first.append(twins[0]["match"])
        assert twins[0]["match"] != twins[1]["match"] and twins[0]["edges"] == twins[1]["edges"]
        assert twins[0]["twin"] == twins[1]["twin"]
        for record in twins:
            words = [set(name.split()) - {"object"} for name in record["entities"]]
            fits = [
                {k for k, o in enumerate(objects) if wanted <= {o.size, o.texture, o.colour, o.shape}}
                for wanted in words
            ]
            roots = set()
            for chosen in itertools.permutations(range(len(objects)), len(words)):
                if all(chosen[n] in fits[n] for n in range(len(words))) and all(
                    holds(objects[chosen[a]], objects[chosen[b]], relation, 0, min(spec.size))
                    for (a, b), relation in zip(record["edges"], record["scene"]["relations"], strict=True)
                ):
                    roots.add(chosen[record["root"]])
            assert len(roots) == record["match"], record["expression"]
            if record["match"]:
                assert record["box"] == list(objects[roots.pop()].box)
    assert 10 < sum(first) < 30


GOLDEN = {
    "words": [524170, 259968, 372773, 362596],
    "scenes": "6feb20acaf5da278e21bfc910bf60c88dd30a577bf41a24ffc0ad069cccdf968",
    "captions": "2754d92064dde49b7f959fac9deb55354df4f1f187fb9416c8d5656db223db3b",
}
