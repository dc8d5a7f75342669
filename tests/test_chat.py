"""Prompts against transformers' processor (text, ids, counts) and models (M-RoPE); batches against brute force."""

import dataclasses
import types

import numpy as np
import pytest
from PIL import Image

from jaxmllm.data.chat import Buckets, Processor, collate, collate_completions
from jaxmllm.data.images import Frames, image_frames, patchify, smart_resize
from jaxmllm.errors import InputError
from jaxmllm.model import family
from tests.support.conversations import (
    MARKERS,
    PIXELS,
    VIDEO,
    image,
    model_of,
    random_conversation,
    small_processor,
    text,
    user,
    video,
)
from tests.test_images import SHARED, noise


@pytest.fixture(scope="module")
def processor():
    return small_processor()


@pytest.fixture(scope="module")
def real():
    if not (SHARED / "tokenizer").is_dir():
        pytest.skip("the real tokenizer is not here")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(SHARED / "tokenizer"))
    return Processor(tokenizer, model_of(tokenizer), PIXELS, VIDEO)


# ---------------------------------------------------------------- equal to transformers


def reference_processor(tokenizer):
    """transformers' processor without its image and video part, which needs torchvision."""
    import transformers

    reference = object.__new__(transformers.Qwen2_5_VLProcessor)
    if not hasattr(reference, "get_text_with_replacements"):
        pytest.skip("this transformers expands placeholders elsewhere")
    reference.tokenizer, reference.chat_template = tokenizer, tokenizer.chat_template
    reference.image_processor = reference.video_processor = types.SimpleNamespace(merge_size=2)
    reference.image_token, reference.video_token = MARKERS[:2]
    reference.image_token_id, reference.video_token_id = tokenizer.convert_tokens_to_ids(MARKERS[:2])
    return reference


def expected_grids(conversation):
    """(t, h, w) of every picture by transformers' rules, from sizes alone."""
    grids = {"image": [], "video": []}
    for message in conversation:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image":
                frames, width, height = 1, *part["image"].size
            elif part["type"] == "video":
                frames, height, width, _ = part["video"].shape
            else:
                continue
            limit = PIXELS.max_pixels  # far below a share of the video's budget
            size = smart_resize(height, width, 28, PIXELS.min_pixels, limit)
            grids[part["type"]].append([-(-frames // 2) if frames > 1 else 1, size[0] // 14, size[1] // 14])
    return grids


@pytest.mark.parametrize("cases", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_conversations_equal_the_real_processor(cases, real):
    rng = np.random.default_rng(cases)
    reference = reference_processor(real.tokenizer)
    pictures = 0
    for number in range(cases):
        conversation = random_conversation(rng)
        prompt = bool(number % 3)
        example = real.encode(conversation, add_generation_prompt=prompt)
        rendered = reference.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt)
        assert example.text == rendered
        grids = {kind: np.array(grid).reshape(-1, 3) for kind, grid in expected_grids(conversation).items()}
        images = [
            reference.replace_image_token({"image_grid_thw": grids["image"]}, i) for i in range(len(grids["image"]))
        ]
        videos = [
            reference.replace_video_token({"video_grid_thw": grids["video"]}, i) for i in range(len(grids["video"]))
        ]
        (expanded,), _ = reference.get_text_with_replacements([rendered], images, videos)
        ids = real.tokenizer(expanded)["input_ids"]
        assert example.tokens.tolist() == ids
        pictures += len(images) + len(videos)
        assert [list(f.grid) for f in example.vision if f.seconds_per_grid is None] == grids["image"].tolist()
        assert [list(f.grid) for f in example.vision if f.seconds_per_grid] == grids["video"].tolist()
    assert pictures > cases


def tiny_torch(kind):
    torch = pytest.importorskip("torch")
    import transformers

    text_config = {
        "vocab_size": 8,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    torch.manual_seed(0)
    if kind == "qwen2_vl":
        vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1}
        config = transformers.Qwen2VLConfig(text_config=text_config, vision_config=vision)
        return transformers.Qwen2VLModel(config)
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "out_hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 16,
        "tokens_per_second": 4,
    }
    return transformers.Qwen2_5_VLModel(transformers.Qwen2_5_VLConfig(text_config=text_config, vision_config=vision))


def torch_positions(model, example, config):
    import torch

    ids = torch.from_numpy(example.tokens.astype(np.int64))[None]
    types_ = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    images = [f.grid for f in example.vision if f.seconds_per_grid is None]
    videos = [f for f in example.vision if f.seconds_per_grid is not None]
    seconds = {"second_per_grid_ts": torch.tensor([f.seconds_per_grid for f in videos])}
    positions, delta = model.get_rope_index(
        ids,
        types_,
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor([f.grid for f in videos]) if videos else None,
        **(seconds if config.model_type == "qwen2_5_vl" else {}),
    )
    return positions[:, 0].numpy(), len(example.tokens) + int(delta[0, 0])


LAYOUTS = {
    "text": [user(text("one two"))],
    "one image": [user(image(60, 90), text("what?"))],
    "three images": [user(image(60, 90), text("and"), image(90, 30), image(28, 28), text("?"))],
    "one frame": [user(video(1, 60, 40, fps=2.0))],
    "odd video": [user(video(5, 60, 90, fps=4.0), text("what?"))],
    "slow video": [user(video(8, 60, 90, fps=0.4), text("time runs far ahead of the sides"))],
    "slow video last": [user(text("a"), video(8, 28, 28, fps=0.4))],
    "fast video": [user(video(9, 60, 90, fps=24.0), text("less than a step a frame"))],
    "interleaved": [
        user(image(30, 30), text("a"), video(3, 60, 90, fps=1.0), text("b"), image(99, 31), video(4, 31, 99, fps=3.7)),
        {"role": "assistant", "content": "so"},
        user(video(2, 84, 84, fps=2.0), image(84, 28), text("?")),
    ],
}


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen2_vl"])
def test_positions_equal_torch(kind, processor):
    model = tiny_torch(kind)
    if "mm_token_type_ids" not in model.get_rope_index.__code__.co_varnames:
        pytest.skip("this transformers goes on after the last time position")
    seconds = 4 if kind == "qwen2_5_vl" else None
    vision = dataclasses.replace(processor.model_config.vision, tokens_per_second=seconds)
    config = dataclasses.replace(processor.model_config, model_type=kind, vision=vision)
    ours = Processor(processor.tokenizer, config, PIXELS, VIDEO)
    rng = np.random.default_rng(1)
    cases = [*LAYOUTS.values(), *(random_conversation(rng) for _ in range(40))]
    late = 0
    for conversation in cases:
        example = ours.encode(conversation)
        theirs, following = torch_positions(model, example, config)
        expected, first = theirs.copy(), 0
        for picture in example.vision:
            # after a clip that is longer in time than in rows and columns the paper's positions go on later than torch's
            here = np.flatnonzero((example.frame_of >= first) & (example.frame_of < first + picture.grid[0]))
            beyond = max(0, theirs[0, here].max() - theirs[1:, here].max())
            expected[:, here[-1] + 1 :] += beyond
            first, late = first + picture.grid[0], late + (beyond > 0)
        np.testing.assert_array_equal(example.positions, expected)
        assert example.next_position == expected.max() + 1
        assert example.next_position == following or (expected != theirs).any()
    assert late > 5


def test_text_after_a_video_follows_its_largest_position(processor):
    """arXiv 2409.12191 section 2.1. The clip of transformers' issue 45381: 84 patches of 24 x 32, one every 2 s at 2 positions
    a second, after 15 tokens: its last time position is 347, so the next token stands at 348 (transformers >= 5.3: 31)."""
    vision = dataclasses.replace(processor.model_config.vision, tokens_per_second=2.0)
    config = dataclasses.replace(processor.model_config, vision=vision)
    ours = Processor(processor.tokenizer, config, PIXELS, VIDEO)
    example = ours.encode([user(video(40, 28, 28, fps=1.0), text("what?"), image(28, 28), text("and?"))])
    clip = example.frame_of == example.vision[0].grid[0] - 1
    after = int(np.flatnonzero(clip)[-1]) + 1
    assert (example.positions[:, after] == example.positions[:, clip].max() + 1).all()
    line = np.arange(after, len(example.tokens))
    line = line[example.frame_of[line] < 0]
    assert (np.diff(example.positions[0, line]) >= 1).all()  # no text overlaps a picture, nor text before it
    grid = family.of(config).positions(
        Frames(np.zeros(0), np.zeros(0), (84, 24, 32), np.zeros(192, np.int32), 2.0), config
    )
    assert 15 + grid.max() + 1 == 348


def test_time_positions_by_hand(processor):
    """Qwen2.5-VL: 4 positions a second; 8 frames at 2 a second are 4 patches, one second apart."""
    example = processor.encode([user(video(8, 28, 28, fps=2.0))])
    grid = family.of(processor.model_config).positions(example.vision[0], processor.model_config)
    assert grid[0, :, 0, 0].tolist() == [0, 4, 8, 12]
    assert example.vision[0].seconds_per_grid == 1.0


# ---------------------------------------------------------------- encoding


def test_vision_tokens_point_at_their_patches(processor):
    """The patches behind every vision token of a padded batch are those of the merged token in raster order."""
    conversations = [
        [user(image(140, 200, 1), text("a"), video(3, 60, 90, 5, fps=2.0), image(28, 28, 2))],
        [user(text("no picture"))],
        [user(image(112, 112, 3))],
    ]
    examples = [processor.encode(conversation) for conversation in conversations]
    buckets = Buckets(frames=(6,), windows=(5, 7), prompt=(128,))
    batch = collate(examples, buckets)
    assert batch.vision.patches.shape == (3, 6, 5, 64, 1176)
    flat = batch.vision.patches.reshape(3, -1, 4, 1176)  # a merged token is four patches in a row
    where = batch.vision.positions.reshape(3, -1, 4, 2)
    for row, parts in enumerate(conversation[0]["content"] for conversation in conversations):
        index = batch.vision_index[row][batch.vision_index[row] >= 0]
        expected = []
        for part in parts:
            if part["type"] == "image":
                expected.append(patchify(part["image"], PIXELS)[0])
            elif part["type"] == "video":
                frames = processor.encode([user(part)]).vision[0]
                for f in range(frames.grid[0]):
                    place = frames.positions[f].reshape(-1, 4, 2)
                    order = np.lexsort((place[:, 0, 1], place[:, 0, 0]))
                    order = order[place[order, 0, 0] >= 0]
                    expected.append(frames.patches[f].reshape(-1, 4, 1176)[order].reshape(-1, 1176))
        expected = np.concatenate(expected) if expected else np.zeros((0, 1176), np.float32)
        np.testing.assert_array_equal(flat[row][index].reshape(-1, 1176), expected)
        assert len(set(index.tolist())) == len(index)
        # the rest is padding: no position, no pixel
        rest = np.setdiff1d(np.arange(flat.shape[1]), index)
        assert (where[row][rest] == -1).all() and (where[row][index] >= 0).all() and not flat[row][rest].any()


def test_a_batch_is_padded_right(processor):
    examples = [processor.encode([user(text("x" * n), *pictures)]) for n, pictures in [(3, [image(60, 90)]), (70, [])]]
    batch = collate(examples, Buckets())
    assert batch.tokens.shape == (2, 96) and batch.positions.shape == (2, 3, 96)
    for row, example in enumerate(examples):
        n = len(example.tokens)
        assert batch.lengths[row] == n and batch.next_position[row] == example.next_position
        np.testing.assert_array_equal(batch.tokens[row, :n], example.tokens)
        np.testing.assert_array_equal(batch.positions[row, :, :n], example.positions)
        assert not batch.tokens[row, n:].any() and (batch.vision_index[row, n:] == -1).all()
        is_vision = np.isin(example.tokens, processor.model_config.vision_token_ids[:2])
        np.testing.assert_array_equal(batch.vision_index[row, :n] >= 0, is_vision)
    assert all(leaf.dtype == np.int32 for leaf in (batch.tokens, batch.positions, batch.lengths, batch.vision_index))
    assert batch.vision.patches.dtype == np.float32 and batch.vision.positions.dtype == np.int32
    assert collate(examples[1:], Buckets()).vision is None


def test_pictures_can_be_given_apart(processor):
    first, second = noise(60, 90, 1), noise(28, 56, 2)
    clip = np.stack([second] * 3)
    inline = processor.encode(
        [user({"type": "image", "image": first}, {"type": "video", "video": clip}, {"type": "image", "image": second})]
    )
    apart = processor.encode(
        [user({"type": "image"}, {"type": "video"}, {"type": "image"})], images=[first, second], videos=[clip]
    )
    assert apart.text == inline.text and apart.tokens.tolist() == inline.tokens.tolist()
    for a, b in zip(apart.vision, inline.vision, strict=True):
        np.testing.assert_array_equal(a.patches, b.patches)


def test_sources_of_a_picture(processor, tmp_path):
    array = noise(60, 90)
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    expected = image_frames(array, PIXELS).patches
    for source in (path, str(path), path.read_bytes(), Image.open(path), array):
        example = processor.encode([user({"type": "image", "image": source, "text": None})])
        np.testing.assert_array_equal(example.vision[0].patches, expected)
    clip = processor.encode([user({"type": "video", "video": tmp_path})]).vision[0]  # a folder
    assert clip.grid[0] == 1


def test_the_conversation_is_left_as_it_was(processor):
    conversation = [user(image(60, 90), text("a")), {"role": "assistant", "content": "b"}]
    before = repr(conversation)
    processor.encode(conversation)
    assert repr(conversation) == before


def test_tools_and_generation_prompt_reach_the_template(processor):
    conversation = [user(text("a"))]
    plain = processor.encode(conversation, add_generation_prompt=False)
    assert plain.text == "<|im_start|>user\na<|im_end|>\n"
    tools = [{"type": "function", "function": {"name": "zoom", "parameters": {}}}]
    assert processor.encode(conversation, tools=tools).text == plain.text + "tools 1<|im_start|>assistant\n"


# ---------------------------------------------------------------- bad conversations


@pytest.mark.parametrize(
    ("conversation", "options", "message"),
    [
        ([], {}, "expected a list of messages"),
        ("hello", {}, "expected a list of messages"),
        (["hello"], {}, "message 0: expected a dict with a role"),
        ([{"content": "a"}], {}, "message 0: expected a dict with a role"),
        ([{"role": "user"}], {}, "message 0: content must be a text or a list of parts, got NoneType"),
        ([{"role": "user", "content": 7}], {}, "got int"),
        ([user("a")], {}, "message 0: a part needs the type text, image or video, got 'a'"),
        ([user({"type": "audio"})], {}, "got 'audio'"),
        ([user({"words": "a"})], {}, "got 'None'"),
        ([user({"type": "text", "text": 7})], {}, "a part of type text has no text"),
        ([user({"type": "image", "image": "a.png", "max_pixel": 7})], {}, r"unknown fields \['max_pixel'\]"),
        (
            [user(text("a")), user(text("b"), {"type": "image", "image": "no.png"})],
            {},
            "'a': no.png: image file not found",
        ),
        ([user({"type": "image", "image": "https://a.org/b.png"})], {}, "message 0, image 0: .* is a link"),
        ([user({"type": "image", "url": "https://a.org/b.png"})], {}, "is a link"),
        ([user(image(9, 9), {"type": "image", "image": np.zeros((0, 3, 3), np.uint8)})], {}, "image 1: .* empty"),
        ([user({"type": "image", "image": Image.new("RGB", (1, 10000))})], {}, "1 x 10000 px"),
        ([user({"type": "video", "video": "no.mp4"})], {}, "no.mp4: video file not found"),
        ([user({"type": "video", "video": [], "fps": 2.0})], {}, "message 0, video 0: there are no frames"),
        ([user(video(4, 9, 9, fps="2"))], {}, "message 0: fps is '2'; it must be a number"),
        ([user(video(4, 9, 9, fps=0))], {}, "fps is 0"),
        (
            [user(text("a <|image_pad|> b"))],
            {},
            r"placeholder tokens must not be written in a text, it has <\|image_pad\|>",
        ),
        (
            [user(text("<|video_pad|>"), video(2, 9, 9))],
            {},
            r"placeholder tokens must not be written in a text, it has <\|video_pad\|>",
        ),
        (
            [{"role": "user", "content": "<|image_pad|>"}],
            {},
            r"placeholder tokens must not be written in a text, it has <\|image_pad\|>",
        ),
        ([user({"type": "image"})], {}, "0 images are given for 1 image parts that wait for one"),
        ([user({"type": "image"})], {"images": [noise(9, 9)] * 2}, "2 images are given for 1 image parts"),
        ([user(image(9, 9))], {"images": [noise(9, 9)]}, "1 images are given for 0 image parts"),
        ([user(text("a"))], {"videos": [np.zeros((2, 9, 9, 3), np.uint8)]}, "1 videos are given for 0 video parts"),
    ],
)
def test_bad_conversations_give_one_clear_error(conversation, options, message, processor):
    with pytest.raises(InputError, match=message) as error:
        processor.encode(conversation, **options)
    assert str(error.value).startswith("conversation")
    with pytest.raises(InputError, match="^record 12: "):
        processor.encode(conversation, name="record 12", **options)


def test_a_long_prompt_is_refused_whole(processor):
    conversation = [{"role": "system", "content": "s"}, user(image(112, 112), text("count the cells"))]
    length = len(processor.encode(conversation).tokens)
    exact = Processor(processor.tokenizer, processor.model_config, PIXELS, max_prompt_length=length)
    assert len(exact.encode(conversation).tokens) == length
    short = Processor(processor.tokenizer, processor.model_config, PIXELS, max_prompt_length=length - 1)
    with pytest.raises(InputError) as error:
        short.encode(conversation)
    assert str(error.value).startswith(
        f"conversation 'count the cells': the prompt has {length} tokens, 16 of them vision, and max_prompt_length is "
    )


# ---------------------------------------------------------------- buckets and completions


def test_buckets_give_the_smallest_size_that_fits():
    buckets = Buckets(prompt=(8, 12, 100))
    for n in range(1, 101):
        assert buckets.fit("prompt", n) == min(size for size in (8, 12, 100) if size >= n)
    with pytest.raises(InputError, match="101 is above the largest size of prompt, 100"):
        buckets.fit("prompt", 101)
    for kind in ("frames", "windows", "prompt", "completion"):
        sizes = getattr(Buckets(), kind)
        assert all(a < b <= 2 * a for a, b in zip(sizes, sizes[1:], strict=False))
    for bad in ((), (4, 2), (2, 2), (0, 1)):
        with pytest.raises(InputError, match="buckets: frames"):
            Buckets(frames=bad)


def test_completions_are_padded_to_equal_groups():
    batch = collate_completions([[[1, 2, 3], [4]], [[5]]], Buckets(completion=(4, 8)))
    assert batch.tokens.tolist() == [[[1, 2, 3, 0], [4, 0, 0, 0]], [[5, 0, 0, 0], [0, 0, 0, 0]]]
    assert batch.lengths.tolist() == [[3, 1], [1, 0]]
    assert batch.weights.tolist() == [[[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 0, 0, 0], [0, 0, 0, 0]]]
    weighted = collate_completions([[[1, 2]]], Buckets(completion=(3,)), [[[0.5, 0]]])
    assert weighted.weights.tolist() == [[[0.5, 0, 0]]]
    assert (batch.tokens.dtype, batch.lengths.dtype, batch.weights.dtype) == (np.int32, np.int32, np.float32)
    for completions, weights, message in [
        ([], None, "at least one completion"),
        ([[]], None, "at least one completion"),
        ([[[1, 2]]], [[[1.0]]], "differ in length"),
        ([[[1] * 9]], None, "9 is above the largest size of completion"),
    ]:
        with pytest.raises(InputError, match=message):
            collate_completions(completions, Buckets(completion=(4, 8)), weights)


def test_an_empty_batch_is_refused():
    with pytest.raises(InputError, match="at least one conversation"):
        collate([], Buckets())
