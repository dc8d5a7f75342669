"""Model families behind their protocol: one from outside the package, and no name of one outside its room."""

import ast
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import jaxmllm
from jaxmllm import api
from jaxmllm.data.chat import Processor
from jaxmllm.errors import InputError
from jaxmllm.model import family
from jaxmllm.model.qwen2_vl import Qwen2VL
from tests.support.conversations import text, user, video

PACKAGE = Path(jaxmllm.__file__).parent
ROOMS = ("model/qwen2_vl/", "model/qwen3_vl/", "model/family.py")
STYLES = "tasks/"  # the styles of answers are called after the checkpoints that write so


def test_no_file_outside_a_familys_room_compares_its_name():
    """`model_type` is read by families and their registry alone; nor is a family's module imported past the registry."""
    faults = []
    for file in PACKAGE.rglob("*.py"):
        place = file.relative_to(PACKAGE).as_posix()
        if place.startswith(ROOMS):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "model_type":
                faults.append(f"{place}:{node.lineno} reads model_type")
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxmllm.model.qwen"):
                faults.append(f"{place}:{node.lineno} imports {node.module}")
            if isinstance(node, ast.Compare) and not place.startswith(STYLES):
                parts = [node.left, *node.comparators]
                words = {part.value for part in parts if isinstance(part, ast.Constant)}
                if words & set(family.FAMILIES):
                    faults.append(f"{place}:{node.lineno} compares a family's name")
    assert not faults


def test_machine_imports_no_model():
    for file in (PACKAGE / "machine").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxmllm.model")), file


class Timed(Qwen2VL):
    """Writes the time of each temporal patch before its tokens, as Qwen3-VL does; a frame then has an image's positions."""

    def expand(self, text, clips, cfg):
        lengths = {"image": [1] * len(clips["image"]), "video": []}
        for clip in clips["video"]:
            frames = [
                f"<{k * clip.seconds_per_grid:.1f} seconds><|vision_start|>\0<|vision_end|>"
                for k in range(clip.grid[0])
            ]
            text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "".join(frames), 1)
            lengths["video"] += [1] * clip.grid[0]
        return text.replace("\0", "<|video_pad|>"), lengths

    def style(self, cfg):
        return "qwen2_vl"


@pytest.fixture
def outside(monkeypatch):
    module = types.ModuleType("a_family_of_mine")
    module.TIMED, module.NUMBER = Timed(), 3
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield "a_family_of_mine:TIMED"
    family.named.cache_clear()


def test_a_family_from_outside_writes_text_about_frames(outside):
    model, plain = api.load("tiny", family=outside), api.load("tiny")
    assert model.cfg.family == outside and family.of(model.cfg).style(model.cfg) == "qwen2_vl"
    assert family.of(plain.cfg).style(plain.cfg) == "qwen2_5_vl"
    talk = [user(video(6, 28, 28, fps=2.0), text("What moves?"))]
    example, known = (Processor.encode(m.processor, talk) for m in (model, plain))
    frames = len(example.vision)
    assert frames == known.vision[0].grid[0] == 3
    written = model.tokenizer.decode(example.tokens[example.frame_of < 0])
    for second in ("<0.0 seconds>", "<1.0 seconds>", "<2.0 seconds>"):
        assert second in written
    np.testing.assert_array_equal(np.concatenate([piece.patches for piece in example.vision]), known.vision[0].patches)
    for frame in range(frames):
        here = example.positions[:, example.frame_of == frame]
        assert len(set(here[0])) == 1  # a frame is one moment
        before = example.positions[:, np.flatnonzero(example.frame_of == frame)[0] - 1]
        assert (here.min(axis=1) == before + 1).all()
    # the network takes it: the same weights, pieces in the place of one clip
    scored = api.score(model, [talk], [[[5, 6]]])[0][0]
    assert np.isfinite(scored).all()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nothing_here:FAMILY", "expected module:object of a model family"),
        ("a_family_of_mine", "expected module:object"),
        ("a_family_of_mine:NUMBER", "it is a int, not a jaxmllm.model.family.Family"),
    ],
)
def test_what_is_no_family_is_refused(outside, spec, words):
    with pytest.raises(InputError, match=words):
        api.load("tiny", family=spec)
