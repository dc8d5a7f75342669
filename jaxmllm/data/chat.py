"""Conversations become prompts: chat template, vision tokens, M-RoPE positions, and batches of a few fixed shapes.

Token ids, vision-token counts and positions equal those of transformers' Qwen2-VL and Qwen2.5-VL processors and models, but
for text after a video that is longer in time than in rows and columns, which follows the paper (see `Processor._expand`).
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Int

from jaxmllm.data.images import Frames, PixelConfig, image_frames, load_pixel_config, read_json
from jaxmllm.data.parts import checked_text, content_of, read_part
from jaxmllm.data.video import VideoConfig, load_video_config, video_frames
from jaxmllm.errors import InputError
from jaxmllm.model import family
from jaxmllm.model.config import ModelConfig
from jaxmllm.model.family import load_model_config
from jaxmllm.types import Completions, Prompts, Vision

Message = Mapping[str, Any]  # {"role": ..., "content": text or a list of parts}
PICTURES = ("image", "video")


@dataclasses.dataclass(frozen=True)
class Example:
    """One encoded conversation, on the host, unpadded."""

    text: str  # the rendered template, one placeholder an image or video
    tokens: Int[np.ndarray, "s"]  # placeholders expanded to one token a vision token
    positions: Int[np.ndarray, "3 s"]  # M-RoPE: temporal, height, width
    next_position: int  # of the first completion token, all three components
    frame_of: Int[np.ndarray, "s"]  # frame of the token among all frames of the conversation, -1 for text
    token_of: Int[np.ndarray, "s"]  # its place among the frame's vision tokens in window order, -1 for text
    vision: list[Frames]  # in the order of the prompt


class Processor:
    """Tokenizer, chat template and pixels of one model.

    Raises InputError when the tokenizer or its template is not the model's.
    """

    def __init__(
        self,
        tokenizer: Any,
        model_config: ModelConfig,
        pixel_config: PixelConfig,
        video_config: VideoConfig | None = None,
        *,
        max_prompt_length: int = 16384,
    ):
        """`max_prompt_length` counts tokens, vision included; longer prompts are refused, never cut."""
        self.tokenizer = tokenizer
        self.model_config = model_config
        self.pixel_config = pixel_config
        low, high = (min(limit, pixel_config.max_pixels) for limit in family.of(model_config).pixels.frame_pixels)
        self.video_config = video_config or VideoConfig(
            dataclasses.replace(pixel_config, min_pixels=low, max_pixels=high)
        )
        self.max_prompt_length = max_prompt_length
        self._check_sizes()
        self._check_tokenizer()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        model_config: ModelConfig | None = None,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_source_pixels: int | None = None,
        max_prompt_length: int = 16384,
    ) -> "Processor":
        """Reads tokenizer, template and preprocessor configs of a Hugging Face folder; nothing is downloaded.

        `min_pixels` and `max_pixels` override the limits of a resized image, and of a video frame; `max_source_pixels` that of
        a stored one, beyond which it is refused.
        Raises InputError naming the file that is missing or does not fit.
        """
        AutoTokenizer = _auto_tokenizer()
        folder = Path(folder)
        model_config = model_config or load_model_config(folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # anything from a missing file to bad JSON inside the tokenizers library
            raise InputError(f"{folder}: the tokenizer cannot be loaded ({error})") from None
        # older checkpoints keep the template that understands images beside the tokenizer
        if template := read_json(folder / "chat_template.json").get("chat_template"):
            tokenizer.chat_template = template
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        pixels = load_pixel_config(folder, model_config, **limits)
        video = load_video_config(folder, model_config, **limits)
        if max_source_pixels is not None:
            pixels = dataclasses.replace(pixels, max_source_pixels=max_source_pixels)
            video = dataclasses.replace(
                video, pixels=dataclasses.replace(video.pixels, max_source_pixels=max_source_pixels)
            )
        return cls(tokenizer, model_config, pixels, video, max_prompt_length=max_prompt_length)

    def _check_sizes(self):
        vision = self.model_config.vision
        want = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size, vision.window_size)
        for pixels in (self.pixel_config, self.video_config.pixels):
            got = (pixels.patch_size, pixels.temporal_patch_size, pixels.merge_size, pixels.window_size)
            if got != want:
                raise InputError(
                    f"patch, temporal patch, merge and window size are {got} in the pixel config, {want} in the model"
                )

    def _check_tokenizer(self):
        config, tokenizer = self.model_config, self.tokenizer
        if len(tokenizer) > config.text.vocab_size:
            raise InputError(
                f"wrong tokenizer: it has {len(tokenizer)} entries, the model's vocab_size is {config.text.vocab_size}"
            )
        for field, token in family.of(config).special_tokens.items():
            got, want = tokenizer.convert_tokens_to_ids(token), getattr(config, field)
            if got != want:
                raise InputError(f"wrong tokenizer: {token} is {got} in it and {want} in config.json ({field})")
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("the tokenizer has no chat template; expected chat_template.jinja of a Qwen-VL checkpoint")
        parts = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "a"}]
        ids = self._ids(self._render([{"role": "user", "content": parts}], True, None))
        for token in (config.image_token_id, config.video_token_id):
            if ids.count(token) != 1:
                raise InputError(
                    f"the chat template writes token {token} {ids.count(token)} times for one image and one video; "
                    "expected the template of a Qwen-VL checkpoint"
                )

    def _render(self, messages: list[Message], add_generation_prompt: bool, tools: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except Exception as error:  # a template is a program: it raises what it likes
            raise InputError(f"the chat template cannot render it ({error})") from None

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    # ------------------------------------------------------------ encoding

    def encode(
        self,
        conversation: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        name: str = "",
    ) -> Example:
        """Encodes Hugging Face chat messages.

        A part of a message is {"type": "text", "text"}, {"type": "image", "image": path | Pillow image | array | bytes}
        or {"type": "video", "video": file | folder | list or array of frames}; `data.parts` lists the options of each, which
        are qwen-vl-utils', and the other forms that are read (OpenAI's image_url, base64). Parts without a picture,
        {"type": "image"}, take those of `images` and `videos` in order.
        Raises InputError, beginning with `name` or the conversation's first words, for a bad message, picture or link,
        for more or fewer pictures than placeholders, and for a prompt longer than `max_prompt_length`.
        """
        try:
            messages, pictures = self._read(conversation, {"image": list(images), "video": list(videos)})
            text = self._render(messages, add_generation_prompt, tools)
            return self._expand(text, pictures)
        except InputError as error:
            raise InputError(f"{name or _first_words(conversation)}: {error}") from None

    def _read(self, conversation: Any, pools: dict[str, list]) -> tuple[list[Message], dict[str, list[Frames]]]:
        """Messages for the template, without their pictures, and the pictures of each kind in order."""
        if not isinstance(conversation, list | tuple) or not conversation:
            raise InputError("expected a list of messages, each with a role and content")
        given = {kind: len(pool) for kind, pool in pools.items()}
        asked = dict.fromkeys(PICTURES, 0)
        pictures: dict[str, list[Frames]] = {kind: [] for kind in PICTURES}
        messages: list[Message] = []
        for number, message in enumerate(conversation):
            place = f"message {number}"
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InputError(f"{place}: expected a dict with a role (system, user, assistant) and content")
            content = content_of(message, place)
            turn = {key: value for key, value in message.items() if key != "tool_calls"}
            if isinstance(content, str):
                messages.append({**turn, "content": checked_text(content, place)})
                continue
            parts = []
            for part in content:
                kind, held, options = read_part(part, place)
                if kind == "text":
                    parts.append({"type": kind, "text": checked_text(held, place)})
                    continue
                parts.append({"type": kind})
                if held is None:
                    asked[kind] += 1
                    if not pools[kind]:
                        continue
                    held = pools[kind].pop(0)
                label = f"{place}, {kind} {len(pictures[kind])}"
                pictures[kind].append(self._picture(kind, held, options, label))
            messages.append({**turn, "content": parts})
        for kind in PICTURES:
            if asked[kind] != given[kind]:
                raise InputError(f"{given[kind]} {kind}s are given for {asked[kind]} {kind} parts that wait for one")
        return messages, pictures

    def _picture(self, kind: str, source: Any, options: dict[str, Any], label: str) -> Frames:
        if kind == "image":
            return image_frames(source, self.pixel_config, label, options)
        return video_frames(source, self.video_config, name=label, **options)

    def _expand(self, text: str, pictures: dict[str, list[Frames]]) -> Example:
        """Expands every placeholder token to the tokens of its picture and lays out the M-RoPE positions.

        Expanding ids equals expanding the text before tokenising it: placeholders are never part of a longer token.
        """
        config = self.model_config
        expanded, lengths = family.of(config).expand(text, pictures, config)
        ids = np.array(self._ids(expanded), np.int32)
        kinds = {config.image_token_id: "image", config.video_token_id: "video"}
        holders = np.flatnonzero(np.isin(ids, list(kinds)))
        for token, kind in kinds.items():
            count = int((ids == token).sum())
            if count != len(lengths[kind]):
                raise InputError(
                    f"{len(pictures[kind])} {kind}s and {count} {kind} placeholders in the prompt; "
                    "placeholder tokens must not be written in a text"
                )
        queues = {kind: _pieces(some, lengths[kind]) for kind, some in pictures.items()}
        vision = [next(queues[kinds[int(ids[at])]]) for at in holders]
        seen = sum(frames.tokens for frames in vision)
        length = len(ids) - len(vision) + seen
        if length > self.max_prompt_length:
            raise InputError(
                f"the prompt has {length} tokens, {seen} of them vision, and max_prompt_length is "
                f"{self.max_prompt_length}: lower max_pixels or max_frames, or raise the limit"
            )
        if not length:
            raise InputError("the prompt is empty")
        runs, position, frame, start = [], 0, 0, 0  # a run: tokens, positions, frame_of, token_of
        for at, frames in zip([*holders, len(ids)], [*vision, None], strict=True):
            n = at - start
            line = np.broadcast_to(np.arange(position, position + n), (3, n))
            runs.append((ids[start:at], line, np.full(n, -1), np.full(n, -1)))
            position, start = position + n, at + 1
            if frames is None:
                break
            grid = family.of(config).positions(frames, config)
            of_frame = np.repeat(np.arange(frame, frame + frames.grid[0]), len(frames.token_index))
            of_token = np.tile(frames.token_index, frames.grid[0])
            runs.append((np.full(frames.tokens, ids[at]), grid.reshape(3, -1) + position, of_frame, of_token))
            # arXiv 2409.12191 section 2.1: after the largest position of what came before. transformers since 5.3 begins
            # sooner after a clip that is longer in time than in rows and columns, so that text overlaps the clip in time
            position, frame = position + int(grid.max()) + 1, frame + frames.grid[0]
        tokens, positions, frame_of, token_of = (
            np.concatenate(parts, axis=-1).astype(np.int32) for parts in zip(*runs, strict=True)
        )
        return Example(text, tokens, positions, int(positions.max()) + 1, frame_of, token_of, vision)


def _pieces(pictures: Sequence[Frames], lengths: Sequence[int]) -> Iterator[Frames]:
    """The pictures, cut into pieces of so many temporal patches: one for each placeholder of the prompt."""
    rest = iter(lengths)
    for picture in pictures:
        first = 0
        while first < picture.grid[0]:
            last = first + next(rest)
            whole = (first, last) == (0, picture.grid[0])
            yield (
                picture
                if whole
                else dataclasses.replace(
                    picture,
                    patches=picture.patches[first:last],
                    positions=picture.positions[first:last],
                    grid=(last - first, *picture.grid[1:]),
                )
            )
            first = last


def _auto_tokenizer() -> Any:
    """transformers' class, which is slow to import and not needed to collate; without its advice to install PyTorch."""
    silent = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(silent)
    os.environ[silent] = "1"
    try:
        from transformers import AutoTokenizer
    finally:
        if before is None:
            del os.environ[silent]
        else:
            os.environ[silent] = before
    return AutoTokenizer


def _first_words(conversation: Any) -> str:
    """How an error calls a conversation that has no name: by the first words of its user."""
    for message in conversation if isinstance(conversation, list | tuple) else ():
        content = message.get("content") if isinstance(message, Mapping) and message.get("role") != "system" else None
        if isinstance(content, str):
            content = [{"text": content}]
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                return f"conversation {part['text'][:60]!r}"
    return "conversation"


# ---------------------------------------------------------------- batches


def _ladder(first: int, last: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, ... between first and last: less than a third of a bucket is padding."""
    steps = sorted({n for k in range(32) for n in (2**k, 3 * 2**k)})
    return tuple(n for n in steps if first <= n <= last)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that batches are padded to. Every combination in use is one compilation; fewer sizes, more padding."""

    frames: tuple[int, ...] = _ladder(1, 384)  # temporal patches of a conversation
    windows: tuple[int, ...] = _ladder(1, 1024)  # of the largest frame
    prompt: tuple[int, ...] = _ladder(64, 32768)  # tokens
    completion: tuple[int, ...] = _ladder(16, 8192)  # tokens

    def __post_init__(self):
        for field in dataclasses.fields(self):
            sizes = getattr(self, field.name)
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise InputError(f"buckets: {field.name} must be ascending positive sizes, got {sizes}")

    def fit(self, kind: str, n: int) -> int:
        """The smallest size of `kind` (a field's name) that holds n. InputError above the largest."""
        sizes = getattr(self, kind)
        size = next((size for size in sizes if size >= n), None)
        if size is None:
            raise InputError(f"buckets: {n} is above the largest size of {kind}, {sizes[-1]}; add a size or shorten it")
        return size


def collate(examples: Sequence[Example], buckets: Buckets) -> Prompts:
    """Pads conversations to one batch; numpy leaves. `vision` is None when no row has a picture.

    A row's vision token t of frame f has the index f * W * P / merge_size**2 + t, with W the batch's windows:

        two images of 1 and 3 windows, P / merge_size**2 = 4, W = 3:
        frame 0: 0 1 2 3 . . . . . . . .     frame 1: 12 13 14 15 16 17 18 19 20 21 22 23
    """
    if not examples:
        raise InputError("a batch needs at least one conversation")
    shape = (len(examples), buckets.fit("prompt", max(len(example.tokens) for example in examples)))
    pictures = [picture for example in examples for picture in example.vision]
    vision, frame_tokens = None, 0
    if pictures:
        frames = max(sum(picture.grid[0] for picture in example.vision) for example in examples)
        windows = max(picture.patches.shape[1] for picture in pictures)
        size = (len(examples), buckets.fit("frames", frames), buckets.fit("windows", windows))
        patches: Any = np.zeros((*size, *pictures[0].patches.shape[2:]), np.float32)
        places: Any = np.full((*size, *pictures[0].positions.shape[2:]), -1, np.int32)
        for row, example in enumerate(examples):
            first = 0
            for picture in example.vision:
                count, width = picture.patches.shape[:2]
                patches[row, first : first + count, :width] = picture.patches
                places[row, first : first + count, :width] = picture.positions
                first += count
        vision = Vision(patches, places)
        frame_tokens = size[2] * pictures[0].window_tokens
    leaves = {
        "tokens": np.zeros(shape, np.int32),
        "positions": np.zeros((shape[0], 3, shape[1]), np.int32),
        "lengths": np.array([len(example.tokens) for example in examples], np.int32),
        "next_position": np.array([example.next_position for example in examples], np.int32),
        "vision_index": np.full(shape, -1, np.int32),
    }
    for row, example in enumerate(examples):
        n = len(example.tokens)
        index = example.frame_of * frame_tokens + example.token_of
        leaves["tokens"][row, :n] = example.tokens
        leaves["positions"][row, :, :n] = example.positions
        leaves["vision_index"][row, :n] = np.where(example.frame_of < 0, -1, index)
    return Prompts(**cast(dict[str, Any], leaves), vision=vision)


def collate_completions(
    completions: Sequence[Sequence[Sequence[int]]],
    buckets: Buckets,
    weights: Sequence[Sequence[Sequence[float]]] | None = None,
) -> Completions:
    """Pads token lists [B][G][T] to one batch with equal G; numpy leaves. `weights` of the same form default to 1."""
    if weights is None:
        weights = [[[1.0] * len(row) for row in group] for group in completions]
    if [[len(row) for row in group] for group in weights] != [[len(row) for row in group] for group in completions]:
        raise InputError("completions and their weights differ in length")
    groups = max((len(group) for group in completions), default=0)
    if not groups:
        raise InputError("a batch needs at least one completion")
    longest = max(len(row) for group in completions for row in group)
    shape = (len(completions), groups, buckets.fit("completion", longest))
    leaves = {
        "tokens": np.zeros(shape, np.int32),
        "lengths": np.zeros(shape[:2], np.int32),
        "weights": np.zeros(shape, np.float32),
    }
    for b, group in enumerate(completions):
        for g, row in enumerate(group):
            leaves["lengths"][b, g] = len(row)
            leaves["tokens"][b, g, : len(row)] = row
            leaves["weights"][b, g, : len(row)] = weights[b][g]
    return Completions(**cast(dict[str, Any], leaves))
