"""Warm-up targets of photographs against the boxes they are made of."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxmllm import api
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError
from jaxmllm.methods.box_targets import BoxTargets, ellipses
from jaxmllm.methods.warmup import warmup_batches, word_fields

CELLS = [("RBC", [40, 40, 120, 120]), ("Platelets", [70, 70, 90, 90]), ("WBC", [160, 20, 300, 200])]


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    Image.new("RGB", (320, 240), (200, 180, 190)).save(folder / "a.png")
    names = ["RBC", "WBC", "Platelets"]
    annotations = [
        {"image_id": 1, "category_id": names.index(name) + 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for name, (x1, y1, x2, y2) in CELLS
    ]
    categories = [{"id": k, "name": name} for k, name in enumerate(names, 1)]
    images = [{"id": 1, "file_name": "a.png", "width": 320, "height": 240}]
    path = folder / "cells.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return f"coco:{path}"


@pytest.fixture(scope="module")
def pixels():
    return api.load("tiny", max_pixels=10_000).processor.pixel_config


def test_a_cell_shows_what_lies_on_top(spec, pixels):
    source = BoxTargets(open_source(spec), pixels)
    found = source.grid_targets(0, pixels.factor)
    assert source.size == [112, 84] and found["label"].shape == (6, 8)
    # the platelet's middle, (80, 80) of 320 x 240, is (28, 28) of 112 x 84; around it lies the red cell
    at = {"RBC": (1, 2), "WBC": (2, 5)}
    for name, box in CELLS[::2]:
        row, column = at[name]
        assert source.words["label"][found["label"][row, column]] == name
        assert [found[k][row, column] for k in ("x1", "y1", "x2", "y2")] == np.rint(np.array(box) * 0.35).tolist()
    assert found["label"][5, 0] == found["x1"][5, 0] == -1
    whole = ellipses(np.array([box for _, box in CELLS]) * 0.35, [112, 84])
    assert whole[28, 28] == 1 and whole[28, 18] == 0 and whole[39, 80] == 2 and whole[0, 0] == -1


def test_batches(spec, pixels):
    source = BoxTargets(open_source(f"{spec}?augment=6&crop=0.6"), pixels)
    assert word_fields([source]) == {"label": ("RBC", "WBC", "Platelets")}
    batches, order = warmup_batches([source], pixels, 4, seed=0)
    batch = next(batches)
    assert len(order) == 48 and batch.boxes.shape == (4, 48, 4) and set(batch.words) == {"label"}
    shown = batch.boxes[batch.words["label"] >= 0]
    assert (shown >= 0).all() and (shown[:, 2:] > shown[:, :2]).all()


def test_other_tasks_are_refused(spec, pixels):
    with pytest.raises(InputError, match="a vision warm-up needs sources of the world, or detection records"):
        BoxTargets(open_source(f"{spec}?task=counting"), pixels)
