"""Images against transformers' own loader, processor and window index; bad files give one clear error."""

import dataclasses
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxmllm.data.images import (
    PixelConfig,
    image_frames,
    load_image,
    load_pixel_config,
    patchify,
    pixel_config,
    smart_resize,
    window_layout,
)
from jaxmllm.errors import InputError
from jaxmllm.model.config import ModelConfig, TextConfig, VisionConfig
from jaxmllm.model.hf import write_limits

SHARED = Path(os.environ.get("JAXMLLM_SHARED") or Path(__file__).resolve().parents[2] / "shared")
MODEL = ModelConfig(
    model_type="qwen2_5_vl",
    vision=VisionConfig(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=16),
    text=TextConfig(64, 16, 16, 1, 2, 1, (1, 1, 2)),
    image_token_id=1,
    video_token_id=2,
    vision_start_token_id=3,
    vision_end_token_id=4,
)


def noise(height, width, seed=0):
    """A picture with both smooth and rough parts, so that resampling and clipping matter."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize((width, height))
    rough = rng.integers(0, 256, (height, width, 3), np.uint8)
    return np.where(rng.random((height, width, 1)) < 0.3, rough, np.asarray(smooth)).astype(np.uint8)


def reference_processor(cfg):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    return module.Qwen2VLImageProcessorPil(
        size={"shortest_edge": cfg.min_pixels, "longest_edge": cfg.max_pixels},
        patch_size=cfg.patch_size,
        temporal_patch_size=cfg.temporal_patch_size,
        merge_size=cfg.merge_size,
    )


def assert_same_patches(image, cfg):
    expected = reference_processor(cfg)(image)
    patches, grid = patchify(image, cfg)
    assert [list(grid)] == np.asarray(expected["image_grid_thw"]).tolist()
    assert patches.dtype == np.float32
    np.testing.assert_array_equal(patches, np.asarray(expected["pixel_values"]))


# ---------------------------------------------------------------- equal to transformers


def test_patches_equal_transformers_on_200_sizes():
    rng = np.random.default_rng(0)
    for case in range(200):
        height, width = (int(side) for side in np.exp(rng.uniform(np.log(4), np.log(350), 2)))
        if max(height, width) / min(height, width) > 200:
            continue
        cfg = PixelConfig(
            patch_size=int(rng.choice([14, 16, 8])),
            temporal_patch_size=int(rng.choice([2, 1, 3], p=[0.8, 0.1, 0.1])),
            merge_size=int(rng.choice([2, 1])),
            min_pixels=int(rng.choice([56 * 56, 1, 150 * 150])),
            max_pixels=int(rng.choice([28 * 28 * 1280, 200 * 200])),
        )
        assert_same_patches(Image.fromarray(noise(height, width, case)), cfg)


def photos(step):
    files = sorted((SHARED / "data").glob("*/images/*.jpg"))
    if not files:
        pytest.skip("no real photos here")
    return files[::step]


def test_patches_equal_transformers_on_real_photos():
    for path in photos(step=25):
        assert_same_patches(Image.open(path), PixelConfig())


@pytest.mark.slow
def test_patches_equal_transformers_on_every_real_photo():
    for path in photos(step=1):
        assert_same_patches(Image.open(path), PixelConfig())


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 6000),
    st.integers(1, 6000),
    st.sampled_from([28, 32, 14]),
    st.integers(1, 10**6),
    st.integers(0, 10**7),
)
def test_smart_resize_equals_transformers(height, width, factor, low, more):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(ValueError):
            module.smart_resize(height, width, factor, low, low + more)
        with pytest.raises(InputError, match=f"{width} x {height} px"):
            smart_resize(height, width, factor, low, low + more)
    else:
        size = smart_resize(height, width, factor, low, low + more)
        assert size == module.smart_resize(height, width, factor, low, low + more)
        assert min(size) >= factor


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pictures():
    rgb = Image.fromarray(noise(37, 52))
    alpha = Image.fromarray(np.dstack([noise(37, 52), noise(37, 52, 1)[..., 0]]), "RGBA")
    yield from ((mode, encoded(rgb.convert(mode), "PNG")) for mode in ("RGB", "L", "LA", "1", "P"))
    yield "RGBA", encoded(alpha, "PNG")
    yield "transparent palette", encoded(rgb.quantize(16), "PNG", transparency=3)
    yield "gif", encoded(rgb, "GIF")
    yield "cmyk", encoded(rgb.convert("CMYK"), "JPEG")
    yield "webp", encoded(alpha, "WEBP")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"exif {orientation}", encoded(rgb, "JPEG", exif=exif)


@pytest.mark.parametrize(("name", "data"), list(pictures()))
def test_loader_equals_transformers(name, data, tmp_path):
    reference = pytest.importorskip("transformers.image_utils").load_image
    path = tmp_path / "picture"
    path.write_bytes(data)
    expected = np.asarray(reference(str(path)))
    if (
        opened := Image.open(path)
    ).has_transparency_data:  # transformers drops alpha, Qwen's own tool has white behind it
        rgba = np.asarray(opened.convert("RGBA"), np.float64)
        alpha = rgba[..., 3:] / 255
        expected = np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    for source in (path, str(path), f"file://{path}", data, Image.open(path)):
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected)
    if name in ("exif 6", "exif 8"):
        assert load_image(path).size == (37, 52)


def test_arrays_are_taken_as_they_are():
    array = noise(30, 40)
    np.testing.assert_array_equal(np.asarray(load_image(array)), array)
    np.testing.assert_array_equal(np.asarray(load_image(array[..., 0])), np.repeat(array[..., :1], 3, -1))
    np.testing.assert_array_equal(np.asarray(load_image(array[..., :1])), np.repeat(array[..., :1], 3, -1))
    with_alpha = np.dstack([array, array[..., 0]])
    seen = np.asarray(load_image(with_alpha))
    alpha = array[..., :1] / 255
    np.testing.assert_array_equal(seen, np.rint(array * alpha + 255 * (1 - alpha)).astype(np.uint8))


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize(("window", "patch", "merge"), [(112, 14, 2), (56, 14, 2), (112, 14, 1), (64, 8, 2)])
def test_windows_are_those_of_transformers(window, patch, merge):
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("transformers.vision_utils")
    cfg = PixelConfig(patch_size=patch, merge_size=merge, window_size=window)
    for rows, columns in [(1, 1), (1, 9), (4, 4), (5, 7), (8, 8), (9, 3), (13, 22)]:
        h, w = rows * merge, columns * merge
        grid = torch.tensor([[1, h, w]])
        order, bounds = utils.get_vision_window_index(grid, merge, window, patch)
        layout = window_layout(h, w, cfg)
        units = layout.index.reshape(len(layout.index), -1, merge * merge)
        assert units.shape[1:] == ((window // (patch * merge)) ** 2, merge * merge)
        # a unit is padding as a whole, and holds its patches in order
        real = units[..., 0] >= 0
        np.testing.assert_array_equal(units[real] % (merge * merge), np.tile(np.arange(merge * merge), (real.sum(), 1)))
        assert (units[~real] == -1).all()
        np.testing.assert_array_equal(units[real][:, 0] // (merge * merge), order.numpy())
        np.testing.assert_array_equal(real.sum(1) * merge * merge, np.diff(bounds.numpy()))
        # positions are those that the tower rotates by
        expected = utils.get_vision_position_ids(grid, merge).numpy()
        inside = layout.index >= 0
        np.testing.assert_array_equal(layout.positions[inside], expected[layout.index[inside]])
        assert (layout.positions[~inside] == -1).all()
        # token_index undoes the order
        flat = units[..., 0].reshape(-1)
        np.testing.assert_array_equal(flat[layout.token_index], np.arange(rows * columns) * merge * merge)


def test_a_layout_by_hand():
    """3 x 5 units of one patch, windows of 2 x 2: the picture in the docstring."""
    layout = window_layout(3, 5, PixelConfig(merge_size=1, window_size=28))
    assert layout.index.tolist() == [
        [0, 1, 5, 6],
        [2, 3, 7, 8],
        [4, -1, 9, -1],
        [10, 11, -1, -1],
        [12, 13, -1, -1],
        [14, -1, -1, -1],
    ]
    assert layout.token_index.tolist() == [0, 1, 4, 5, 8, 2, 3, 6, 7, 10, 12, 13, 16, 17, 20]


@pytest.mark.parametrize("size", [(64, 100), (448, 448), (333, 91), (20, 20)])
def test_frames_hold_the_patches_of_the_image(size):
    cfg = PixelConfig()
    image = Image.fromarray(noise(*size))
    patches, grid = patchify(image, cfg)
    frames = image_frames(image, cfg)
    assert frames.grid == grid and frames.seconds_per_grid is None
    assert frames.tokens == grid[1] * grid[2] // 4
    assert frames.patches.shape == (1, -(-grid[1] // 8) * -(-grid[2] // 8), 64, 1176)
    for row in range(grid[1]):
        for column in range(grid[2]):
            unit = row // 2 * (grid[2] // 2) + column // 2
            (window, slot), *more = np.argwhere((frames.positions[0] == (row, column)).all(-1))
            assert not more
            hf = patches[unit * 4 + row % 2 * 2 + column % 2]
            np.testing.assert_array_equal(frames.patches[0, window, slot], hf)
            assert frames.token_index[unit] == window * 16 + slot // 4
    assert not frames.patches[0][frames.positions[0, ..., 0] < 0].any()


def test_layouts_are_shared_and_read_only():
    layout = window_layout(8, 8, PixelConfig())
    assert window_layout(8, 8, PixelConfig()) is layout
    with pytest.raises(ValueError):
        layout.index[0] = 1


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("raw", "limits"),
    [
        ({}, (3136, 1003520)),
        ({"min_pixels": 4000, "max_pixels": 50000}, (4000, 50000)),
        ({"size": {"shortest_edge": 4000, "longest_edge": 50000}}, (4000, 50000)),
        ({"size": {"min_pixels": 4000, "max_pixels": 50000}}, (4000, 50000)),
        ({"min_pixels": 5000, "size": {"shortest_edge": 4000, "longest_edge": 50000}}, (5000, 50000)),
        ({"size": None, "max_pixels": None}, (3136, 1003520)),
    ],
)
def test_both_forms_of_the_preprocessor_config(raw, limits, tmp_path):
    cfg = pixel_config(MODEL, raw)
    assert (cfg.min_pixels, cfg.max_pixels) == limits
    for name, content in (("preprocessor_config.json", raw), ("processor_config.json", {"image_processor": raw})):
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
        assert load_pixel_config(folder, MODEL) == cfg
        for low, high, expected in [
            (1, 10**6, (1, 10**6)),
            (None, 2000, (min(limits[0], 2000), 2000)),
            (2 * 10**6, None, (2 * 10**6, 2 * 10**6)),
            (None, 10**6, (limits[0], 10**6)),
        ]:
            made = load_pixel_config(folder, MODEL, min_pixels=low, max_pixels=high)
            assert (made.min_pixels, made.max_pixels) == expected
        write_limits(folder, 4321, 54321)
        assert load_pixel_config(folder, MODEL) == dataclasses.replace(cfg, min_pixels=4321, max_pixels=54321)
    assert load_pixel_config(tmp_path, MODEL) == PixelConfig()


def test_limits_that_cross_are_refused():
    with pytest.raises(InputError, match="min_pixels 20 and max_pixels 10"):
        pixel_config(MODEL, min_pixels=20, max_pixels=10)


def test_normalisation_is_read_from_the_config():
    reference = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    raw = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.1]}
    image = Image.fromarray(noise(60, 60))
    expected = reference.Qwen2VLImageProcessorPil(**raw)(image)["pixel_values"]
    np.testing.assert_array_equal(patchify(image, pixel_config(MODEL, raw))[0], np.asarray(expected))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"patch_size": 16}, "file.json: patch_size is 16; this model needs 14"),
        ({"merge_size": 4}, "merge_size"),
        ({"temporal_patch_size": 1}, "temporal_patch_size"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"resample": 2}, "resample"),
        ({"rescale_factor": 0.5}, "rescale_factor"),
        ({"image_mean": [0.5]}, "image_mean needs three numbers"),
        ({"size": 448}, "size is 448"),
        ({"min_pixels": 100, "max_pixels": 99}, "min_pixels"),
        ({"min_pixels": 0}, "min_pixels"),
    ],
)
def test_a_preprocessor_config_that_does_not_fit_is_refused(raw, message):
    with pytest.raises(InputError, match=message):
        pixel_config(MODEL, raw, "file.json")


def test_a_tower_that_does_not_read_rgb_is_refused():
    model = dataclasses.replace(MODEL, vision=dataclasses.replace(MODEL.vision, in_channels=1))
    with pytest.raises(InputError, match="in_channels is 1"):
        pixel_config(model)


def test_a_broken_preprocessor_config_names_the_file(tmp_path):
    for text in ("{", "[]", "\xff"):
        (tmp_path / "preprocessor_config.json").write_text(text, encoding="latin-1")
        with pytest.raises(InputError, match="preprocessor_config.json"):
            load_pixel_config(tmp_path, MODEL)


# ---------------------------------------------------------------- bad images


def bad_files():
    picture = Image.fromarray(noise(200, 300))
    deep = Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4))
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        whole = encoded(picture, kind)
        yield f"truncated {kind}", whole[: len(whole) // 3], "truncated"
        yield f"header of {kind}", whole[:20], "truncated"
    yield "empty", b"", "cannot be read"
    yield "text", b"hello", "cannot be read"
    yield "16-bit", encoded(deep, "PNG"), "16-bit"
    yield "16-bit tiff", encoded(deep, "TIFF"), "16-bit"
    yield "float tiff", encoded(Image.fromarray(np.zeros((3, 4), np.float32)), "TIFF"), "16-bit or float"
    yield "line", encoded(Image.new("RGB", (1, 10000)), "PNG"), "1 x 10000 px"
    yield "other line", encoded(Image.new("RGB", (2010, 10)), "PNG"), "2010 x 10 px"


@pytest.mark.parametrize(("name", "data", "message"), [pytest.param(*case, id=case[0]) for case in bad_files()])
def test_bad_files_give_one_clear_error(name, data, message, tmp_path):
    path = tmp_path / "the file.img"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        load_image(path)
    assert str(path) in str(error.value)
    with pytest.raises(InputError, match="^row 7"):
        load_image(data, "row 7")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/file.jpg", "/no/such/file.jpg: image file not found"),
        ("a\0b.jpg", "not found"),
        ("/", "not found"),
        ("https://example.org/a.jpg", "is a link"),
        ("data:image/png;base64,AAAA", "cannot be read as an image"),
        ("data:image/png;base64,A-A", "its contents are not base64"),
        ("data:image/svg+xml,%3Csvg", "a data URI must be data:TYPE;base64"),
        (Image.new("RGB", (0, 5)), "empty, 0 x 5 px"),
        (np.zeros((0, 5, 3), np.uint8), "empty, 5 x 0 px"),
        (np.zeros((5, 0), np.uint8), "empty"),
        (np.zeros((4, 4, 3), np.float32), "uint8 array"),
        (np.zeros((3, 40, 40), np.uint8), "uint8 array"),
        (np.zeros((2, 4, 4, 3), np.uint8), "uint8 array"),
        (np.zeros((1, 300, 3), np.uint8), "300 x 1 px"),
        (Image.new("I;16", (9, 9)), "16-bit"),
        (None, "expected a path"),
        (7, "expected a path"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_bad_sources_give_one_clear_error(source, message):
    with pytest.raises(InputError, match=message):
        load_image(source)
