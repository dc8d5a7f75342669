"""Videos against the documented algorithm of transformers' video processor, written out here in torch.

The processor itself needs torchvision. Where that is installed the last part of the first section compares with it too.
"""

import json
import math
import wave

import av
import numpy as np
import pytest
from PIL import Image

from jaxmllm.data.images import PixelConfig, smart_resize, window_layout
from jaxmllm.data.video import (
    VideoConfig,
    clip_frames,
    frame_size,
    load_video,
    load_video_config,
    sample_frames,
    video_frames,
)
from jaxmllm.errors import InputError
from tests.test_images import MODEL, noise

SMALL = VideoConfig(PixelConfig(min_pixels=28 * 28, max_pixels=84 * 84))


def clip_of(frames, height=60, width=80):
    """Frames whose first pixel rows tell their number."""
    array = np.stack([noise(height, width, i) for i in range(frames)])
    array[:, : height // 2] = (np.arange(frames) * 3 % 256).astype(np.uint8)[:, None, None, None]
    return array


def write_video(path, frames, rate=10, codec="libx264", **options):
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = {"gif": "rgb8", "ffv1": "bgr0"}.get(codec, "yuv420p")
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(clip):
    """The numbers that `clip_of` painted, read back."""
    return np.rint(clip.frames[:, 0, 0, 0] / 3).astype(int).tolist()


# ---------------------------------------------------------------- equal to transformers


def documented_sample(torch, total, rate, fps, min_frames, max_frames, step):
    """`Qwen2VLVideoProcessor.sample_frames` of transformers 5."""
    max_frames = math.floor(min(max_frames, total) / step) * step
    num_frames = total / rate * fps
    num_frames = min(max(num_frames, min_frames), max_frames, total)
    num_frames = max(math.floor(num_frames / step), 1) * step  # transformers divides by zero for less than a patch
    return torch.arange(0, total, total / num_frames).int().tolist()


def test_sampling_equals_the_documented_algorithm():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for _ in range(500):
        total, rate = int(rng.integers(2, 2000)), float(rng.choice([10, 23.976, 25, 29.97, 30, 60]))
        fps, low, high = float(rng.choice([0.5, 1, 2, 4, 7.3])), int(rng.integers(1, 9)), int(rng.integers(9, 800))
        cfg = VideoConfig(min_frames=low, max_frames=high)
        expected = documented_sample(torch, total, rate, fps, low, high, 2)
        assert sample_frames(total, rate, fps, cfg).tolist() == expected, (total, rate, fps, low, high)


def documented_patches(torch, video, cfg):
    """`Qwen2VLVideoProcessor._preprocess` with `cap_pixels_per_frame`, resized by Pillow."""
    px = cfg.pixels
    frames, height, width, _ = video.shape
    total_pixels = int(cfg.max_video_tokens * px.factor * px.factor * 0.9)
    limit = max(min(px.max_pixels, total_pixels * px.temporal_patch_size // frames), int(px.min_pixels * 1.05))
    size = smart_resize(height, width, px.factor, px.min_pixels, limit)
    resized = [np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC)) for frame in video]
    videos = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(torch.float32)[None]
    mean = torch.tensor(px.image_mean) * (1.0 / (1 / 255))
    std = torch.tensor(px.image_std) * (1.0 / (1 / 255))
    videos = (videos - mean[:, None, None]) / std[:, None, None]
    p, m, t = px.patch_size, px.merge_size, px.temporal_patch_size
    if pad := -frames % t:
        videos = torch.cat((videos, videos[:, -1:].expand(-1, pad, -1, -1, -1)), dim=1)
    grid = (videos.shape[1] // t, size[0] // p, size[1] // p)
    patches = videos.view(1, grid[0], t, 3, grid[1] // m, m, p, grid[2] // m, m, p)
    return patches.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(math.prod(grid), -1).numpy(), grid


def in_patch_order(frames, cfg):
    """Frames in window order back to Hugging Face order, by the positions alone."""
    f, rows, columns = frames.grid
    m = cfg.merge_size
    row, column = frames.positions[0, ..., 0], frames.positions[0, ..., 1]
    place = ((row // m * (columns // m) + column // m) * m + row % m) * m + column % m
    patches = np.full((f, rows * columns, cfg.patch_pixels), np.nan, np.float32)
    patches[:, place[row >= 0]] = frames.patches[:, row >= 0]
    return patches.reshape(-1, cfg.patch_pixels)


CASES = [(1, 60, 80), (2, 91, 47), (5, 200, 300), (6, 30, 30), (9, 400, 123)]
CONFIGS = [
    SMALL,
    VideoConfig(),
    VideoConfig(PixelConfig(min_pixels=1, max_pixels=10**7), max_video_tokens=100),  # the common budget binds
    VideoConfig(PixelConfig(temporal_patch_size=3, patch_size=8, min_pixels=1, max_pixels=10**4)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cfg", CONFIGS, ids=["small", "default", "budget", "threes"])
def test_patches_equal_the_documented_algorithm(case, cfg):
    torch = pytest.importorskip("torch")
    frames, height, width = case
    video = np.stack([noise(height, width, i) for i in range(frames)])
    expected, grid = documented_patches(torch, video, cfg)
    made = video_frames(video, cfg)
    assert made.grid == grid
    np.testing.assert_array_equal(in_patch_order(made, cfg.pixels), expected)


def test_the_common_budget_shrinks_long_videos():
    sizes = [math.prod(frame_size(n, 720, 1280, VideoConfig())) for n in (4, 300, 400, 768)]
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3]
    for frames, size in zip((4, 300, 400, 768), sizes, strict=True):
        assert size * frames / 2 <= 0.9 * 128000 * 28 * 28 * 1.05
    assert frame_size(768, 720, 1280, VideoConfig(max_video_tokens=None)) == frame_size(4, 720, 1280, VideoConfig())
    # never less than what 1.05 times the least gives
    assert frame_size(10**6, 720, 1280, VideoConfig()) == smart_resize(720, 1280, 28, 100352, int(100352 * 1.05))


def test_patches_are_close_to_the_torchvision_processor():
    pytest.importorskip("torchvision")
    module = pytest.importorskip("transformers.models.qwen2_vl.video_processing_qwen2_vl")
    cfg = VideoConfig()
    for frames, height, width in CASES:
        video = np.stack([noise(height, width, i) for i in range(frames)])
        out = module.Qwen2VLVideoProcessor()(videos=[video], cap_pixels_per_frame=True, return_tensors="np")
        made = video_frames(video, cfg)
        assert [list(made.grid)] == np.asarray(out["video_grid_thw"]).tolist()
        levels = np.repeat(np.array(cfg.pixels.image_std) * 255, cfg.pixels.patch_pixels // 3)
        gap = np.abs(in_patch_order(made, cfg.pixels) - np.asarray(out["pixel_values_videos"])) * levels
        assert gap.max() < 2.5 and (gap > 0.5).mean() < 0.02


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize(
    ("name", "codec", "tolerance"),
    [("a.mp4", "libx264", 1), ("a.avi", "mpeg4", 1), ("a.mkv", "ffv1", 0), ("a.webm", "libvpx-vp9", 1)],
)
def test_a_file_is_sampled_at_the_asked_rate(name, codec, tolerance, tmp_path):
    frames = clip_of(40)
    path = write_video(tmp_path / name, frames, rate=10, codec=codec)
    clip = load_video(path, SMALL)  # 4 s at 2 frames a second
    assert clip.indices.tolist() == [0, 5, 10, 15, 20, 25, 30, 35]
    assert clip.fps == 2.0
    assert np.abs(np.array(numbers(clip)) - clip.indices).max() <= tolerance
    made = clip_frames(clip, SMALL)
    assert made.grid[0] == 4 and made.seconds_per_grid == 1.0
    assert len(load_video(str(path), SMALL, fps=5).indices) == 20
    assert load_video(path, SMALL, fps=5, max_frames=6).fps == 1.5
    assert load_video(path, SMALL, fps=0.01).indices.tolist() == [0, 10, 20, 30]  # min_frames
    assert load_video(path, SMALL, source_fps=20).indices.tolist() == [0, 10, 20, 30]


def test_decoded_frames_are_those_of_the_file(tmp_path):
    frames = clip_of(7, 84, 84)
    path = write_video(tmp_path / "a.mkv", frames, rate=2, codec="ffv1")
    clip = load_video(path, SMALL, fps=2)
    assert clip.indices.tolist() == [0, 1, 2, 3, 4, 5][: len(clip.indices)] and len(clip.indices) == 6
    np.testing.assert_array_equal(clip.frames, frames[clip.indices])


def test_folder_list_and_array_agree(tmp_path):
    frames = clip_of(12)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"frame_{i}.png")  # frame_10 sorts after frame_9
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".hidden.png").write_bytes(b"")
    sources = {
        "folder": tmp_path,
        "array": frames,
        "arrays": list(frames),
        "images": tuple(Image.fromarray(frame) for frame in frames),
        "paths": [tmp_path / f"frame_{i}.png" for i in range(12)],
    }
    for options, count, fps in [
        ({}, 12, 2.0),
        ({"fps": 4.0}, 12, 4.0),
        ({"max_frames": 6}, 6, 1.0),
        ({"source_fps": 6.0}, 4, 2.0),
        ({"source_fps": 6.0, "fps": 3.0}, 6, 3.0),
        ({"source_fps": 6.0, "fps": 3.0, "max_frames": 4}, 4, 2.0),
    ]:
        for name, source in sources.items():
            clip = load_video(source, SMALL, **options)
            assert (len(clip.indices), clip.fps) == (count, pytest.approx(fps)), (name, options)
            assert numbers(clip) == clip.indices.tolist(), (name, options)


def test_an_odd_clip_repeats_its_last_frame():
    frames = clip_of(5, 56, 56)
    odd = video_frames(frames, SMALL, fps=4.0)
    even = video_frames(np.concatenate([frames, frames[-1:]]), SMALL, fps=4.0)
    assert odd.grid[0] == 3 and odd.seconds_per_grid == 0.5
    np.testing.assert_array_equal(odd.patches, even.patches)
    one = video_frames(frames[:1], SMALL)
    assert one.grid[0] == 1 and one.tokens == len(one.token_index)


def test_a_turned_phone_video_is_upright(tmp_path):
    frames = clip_of(8, 60, 80)
    path = write_video(tmp_path / "a.mp4", frames)
    data = path.read_bytes()
    unit = bytes.fromhex("00010000" + "00000000" * 3 + "00010000" + "00000000" * 3 + "40000000")
    quarter = bytes.fromhex("00000000 00010000 00000000 ffff0000 00000000 00000000 00000000 00000000 40000000")
    at = data.index(unit, data.index(b"tkhd"))
    (tmp_path / "b.mp4").write_bytes(data[:at] + quarter + data[at + len(unit) :])
    straight, turned = load_video(path, SMALL).frames, load_video(tmp_path / "b.mp4", SMALL).frames
    assert straight.shape[1:3] == turned.shape[2:0:-1] != turned.shape[1:3]
    # the matrix turns clockwise: what was the upper half is now the right half
    expected = np.rot90(straight, -1, axes=(1, 2)).astype(int)
    assert np.abs(expected - turned).mean() < 4 < np.abs(expected[:, ::-1, ::-1] - turned).mean()


def test_memory_holds_only_sampled_resized_frames():
    taken = []

    class Lazy:
        def __init__(self, i):
            self.i = i

        def __array__(self, dtype=None, copy=None):
            taken.append(self.i)
            return noise(60, 80, self.i)

    clip = load_video([Lazy(i) for i in range(100)], SMALL, source_fps=10, fps=1)
    assert taken == clip.indices.tolist() == list(range(0, 100, 10))


# ---------------------------------------------------------------- configuration


def test_the_first_config_file_counts(tmp_path):
    plain = load_video_config(tmp_path, MODEL)
    assert plain == VideoConfig()
    contents = {
        "preprocessor_config.json": {"min_pixels": 3136, "max_pixels": 50000},
        "video_preprocessor_config.json": {"size": {"shortest_edge": 4000, "longest_edge": 60000}, "fps": 1.0},
        "processor_config.json": {"video_processor": {"max_frames": 16, "cap_pixels_per_frame": False}},
    }
    seen = []
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
        seen.append(load_video_config(tmp_path, MODEL))
    assert [(c.pixels.min_pixels, c.pixels.max_pixels) for c in seen[:2]] == [(3136, 50000), (4000, 60000)]
    assert seen[1].fps == 1.0 and seen[0].max_video_tokens == 128000
    assert (seen[2].max_frames, seen[2].max_video_tokens, seen[2].pixels) == (16, None, plain.pixels)
    assert load_video_config(tmp_path, MODEL, max_pixels=200000).pixels.max_pixels == 200000


# ---------------------------------------------------------------- bad videos


def bad_sources(tmp_path):
    frames = clip_of(30)
    whole = {
        codec: write_video(tmp_path / name, frames, codec=codec, **options).read_bytes()
        for codec, name, options in [
            ("libx264", "whole.mp4", {"movflags": "faststart"}),
            ("mpeg4", "whole.avi", {}),
        ]
    }
    for name, data, message in [
        ("text.mp4", b"hello", "cannot be read as a video"),
        ("empty.mp4", b"", "cannot be read as a video"),
        ("header.mp4", whole["libx264"][:100], "no video stream"),
        ("half.mp4", whole["libx264"][: len(whole["libx264"]) // 2], "truncated"),
        ("half.avi", whole["mpeg4"][: len(whole["mpeg4"]) // 2], "truncated"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\n" + str(tmp_path / "whole.mp4").encode() + b"\n", "cannot be read"),
    ]:
        path = tmp_path / name
        path.write_bytes(data)
        yield path, {}, f"{name}: .*{message}"
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 800, "NONE", ""))
        sound.writeframes(bytes(1600))
    yield tmp_path / "sound.wav", {}, "sound.wav: the file has no video stream"
    (tmp_path / "folder").mkdir()
    yield tmp_path / "folder", {}, "folder: no frames"
    yield tmp_path / "missing.mp4", {}, "missing.mp4: video file not found"
    yield "https://example.org/a.mp4", {}, "is a link"
    yield [], {}, "there are no frames"
    yield np.zeros((0, 9, 9, 3), np.uint8), {}, "there are no frames"
    yield np.zeros((9, 9, 3), np.uint8), {}, r"expected an array \[frames, H, W, 3\]"
    yield np.zeros((4, 9, 9, 3), np.float32), {}, "frame 0: expected a uint8 array"
    yield np.zeros((4, 1, 500, 3), np.uint8), {}, "frame 0: 500 x 1 px"
    yield 7, {}, "expected a file"
    yield [frames[0], frames[0][:50]], {}, r"frame 1 is \(80, 50\) px and the first is \(80, 60\) px"
    yield [frames[0], tmp_path / "gone.png"], {}, "gone.png: image file not found"
    for options, message in [
        ({"fps": 0}, "fps is 0"),
        ({"fps": math.nan}, "fps is nan"),
        ({"fps": -1.0}, "fps is -1.0"),
        ({"source_fps": 0}, "source_fps is 0"),
        ({"max_frames": 1}, "max_frames 1"),
        ({"min_frames": 9, "max_frames": 8}, "min_frames 9"),
    ]:
        yield frames, options, message


def test_bad_videos_give_one_clear_error(tmp_path):
    cases = 0
    for source, options, message in bad_sources(tmp_path):
        with pytest.raises(InputError, match=message):
            load_video(source, SMALL, **options)
        cases += 1
    assert cases == 24


def test_the_layout_is_that_of_an_image():
    frames = video_frames(clip_of(4, 140, 84), VideoConfig(PixelConfig(min_pixels=1, max_pixels=10**6)))
    layout = window_layout(frames.grid[1], frames.grid[2], PixelConfig())
    assert frames.grid == (2, 10, 6)
    for f in range(2):
        np.testing.assert_array_equal(frames.positions[f], layout.positions)
    np.testing.assert_array_equal(frames.token_index, layout.token_index)
