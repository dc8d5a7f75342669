"""Texts of answers as the models write them, for the tests of the perception tasks."""

import json

import pytest

END, PAD = "<|im_end|>", "<|endoftext|>"
IMAGE = {"size": [640, 480], "resized": [644, 476]}


def ref(label):
    return f"<|object_ref_start|>{label}<|object_ref_end|>"


def box(a, b, c, d):
    return f"<|box_start|>({a},{b}),({c},{d})<|box_end|>"


def element(bbox, label):
    return {"bbox_2d": bbox, "label": label}


def fenced(*elements):
    return f"```json\n{json.dumps(elements)}\n```"


def near(value):
    return pytest.approx(value, abs=1e-6)
