"""Loading what prompts are made with: checkpoint folders, tokenizers and templates that fit, and those that do not."""

import json

import pytest

from jaxmllm.data.chat import Processor
from jaxmllm.data.images import PixelConfig
from jaxmllm.errors import InputError
from tests.support.conversations import (
    MARKERS,
    PIXELS,
    TEMPLATE,
    TOKEN_FIELDS,
    image,
    small_processor,
    small_tokenizer,
    text,
    user,
)


@pytest.fixture(scope="module")
def processor():
    return small_processor()


def checkpoint(folder, **changes):
    """A folder with the files that preprocessing reads."""
    small_tokenizer().save_pretrained(folder)
    config = {
        "model_type": "qwen2_5_vl",
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2]},
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
        **dict(zip(TOKEN_FIELDS, range(256, 260), strict=True)),
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136, "max_pixels": 50176}))
    return folder


def test_from_pretrained_reads_a_checkpoint_folder(tmp_path):
    folder = checkpoint(tmp_path)
    made = Processor.from_pretrained(folder)
    assert (made.pixel_config.max_pixels, made.video_config.pixels.max_pixels) == (50176, 50176)
    example = made.encode([user(image(448, 448), text("a"))])
    assert example.vision[0].grid == (1, 16, 16)
    made = Processor.from_pretrained(folder, made.model_config, max_pixels=3000, max_prompt_length=40)
    assert made.video_config.pixels.max_pixels == made.pixel_config.max_pixels == 3000
    assert made.max_prompt_length == 40


def test_from_pretrained_refuses_what_does_not_fit(tmp_path):
    folder = checkpoint(tmp_path)
    for changes, message in [
        ({"image_token_id": 7}, "wrong tokenizer: <|image_pad|> is 256 in it and 7 in config.json"),
        ({"vocab_size": 100}, "wrong tokenizer: it has 262 entries"),
        ({"model_type": "llava"}, "model_type is 'llava'"),
    ]:
        with pytest.raises(InputError) as error:
            Processor.from_pretrained(checkpoint(tmp_path, **changes))
        assert message in str(error.value)
    checkpoint(tmp_path)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content[-1].text }}"}))
    with pytest.raises(InputError, match="chat template writes token 256 0 times"):
        Processor.from_pretrained(folder)
    (folder / "chat_template.json").unlink()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="the tokenizer cannot be loaded"):
        Processor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("template", "markers", "message"),
    [
        (None, MARKERS, "no chat template"),
        ("{{ messages[0].role }}", MARKERS, "writes token 256 0 times"),
        (TEMPLATE + TEMPLATE, MARKERS, "writes token 256 2 times"),
        ("{{ nothing.at.all }}", MARKERS, "template cannot render"),
        (TEMPLATE, MARKERS[::-1], "wrong tokenizer: <|image_pad|> is 261 in it and 256"),
        (TEMPLATE, MARKERS[4:], "wrong tokenizer: <|image_pad|> is None in it and 256"),
    ],
)
def test_a_wrong_tokenizer_is_refused(template, markers, message, processor):
    with pytest.raises(InputError) as error:
        Processor(small_tokenizer(template, markers), processor.model_config, PIXELS)
    assert message in str(error.value)


def test_pixels_of_another_model_are_refused(processor):
    with pytest.raises(InputError, match="window size"):
        Processor(processor.tokenizer, processor.model_config, PixelConfig(patch_size=16))
