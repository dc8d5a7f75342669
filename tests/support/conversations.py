"""Conversations for tests, and a tokenizer small enough to be made on the spot."""

import dataclasses

import numpy as np
from PIL import Image

from jaxmllm.data.chat import Processor
from jaxmllm.data.images import PixelConfig
from jaxmllm.data.video import VideoConfig
from tests.test_images import MODEL, noise

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if tools %}tools {{ tools | length }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKERS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"]
TOKEN_FIELDS = ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"]
PIXELS = PixelConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
VIDEO = VideoConfig(PIXELS)


def small_tokenizer(template=TEMPLATE, markers=MARKERS):
    """Bytes and the markers, so that the tests need no file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers])
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template)


def model_of(tokenizer, base=MODEL):
    ids = [tokenizer.convert_tokens_to_ids(marker) for marker in MARKERS[:4]]
    text = dataclasses.replace(base.text, vocab_size=len(tokenizer))
    vision = dataclasses.replace(base.vision, tokens_per_second=4)
    return dataclasses.replace(base, text=text, vision=vision, **dict(zip(TOKEN_FIELDS, ids, strict=True)))


def small_processor():
    tokenizer = small_tokenizer()
    return Processor(tokenizer, model_of(tokenizer), PIXELS, VIDEO)


def image(height, width, seed=0):
    return {"type": "image", "image": Image.fromarray(noise(height, width, seed))}


def video(frames, height, width, seed=0, **options):
    array = np.stack([noise(height, width, seed + i) for i in range(frames)])
    return {"type": "video", "video": array, **options}


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


WORDS = [
    "a cat",
    " runs!",
    "\n\n",
    "数える",
    " 42",
    "émigré",
    "<b>",
    "  ",
    "🙂",
    "[0.5, 12]",
    "\t",
    "<|im",
    "end|>",
    "I'll",
]


def random_conversation(rng):
    def words():
        return "".join(rng.choice(WORDS, rng.integers(0, 8)))

    def side():
        return int(np.exp(rng.uniform(np.log(5), np.log(200))))

    def part():
        kind = rng.choice(["text", "text", "image", "video"])
        seed = int(rng.integers(1000))
        if kind == "text":
            return text(words())
        if kind == "image":
            return image(side(), side(), seed)
        return video(int(rng.integers(1, 8)), side(), side(), seed, fps=float(rng.choice([0.5, 1, 2, 3.7, 10, 24])))

    messages = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": words()})
    for turn in range(rng.integers(1, 4)):
        plain = rng.random() < 0.2
        messages.append({"role": "user", "content": words() if plain else [part() for _ in range(rng.integers(0, 5))]})
        if turn or rng.random() < 0.3:
            messages.append({"role": "assistant", "content": rng.choice([words(), "ok"])})
    return messages
