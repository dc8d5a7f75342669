"""`config.json` of every published size in both forms, and bad ones."""

import copy
import json
import math

import pytest

from jaxmllm.errors import InputError
from jaxmllm.model import hf
from jaxmllm.model.config import ModelConfig
from jaxmllm.model.family import load_model_config, model_config

IDS = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
}


def published(kind, width, mlp, layers, heads, kv_heads, vocab, tied, vision) -> dict:
    """The file as Qwen published it, in the flat form."""
    return {
        "architectures": [
            "Qwen2VLForConditionalGeneration" if kind == "qwen2_vl" else "Qwen2_5_VLForConditionalGeneration"
        ],
        "attention_dropout": 0.0,
        **IDS,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "model_type": kind,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": vision,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": vocab,
    }


def tower2(width: int) -> dict:
    return {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": width,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    }


def tower25(width: int, mlp: int) -> dict:
    return {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": mlp,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": width,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    }


# the 32B file leaves out what equals transformers' defaults
TOWER_32B = {
    "hidden_size": 1280,
    "in_chans": 3,
    "intermediate_size": 3456,
    "model_type": "qwen2_5_vl",
    "out_hidden_size": 5120,
    "spatial_patch_size": 14,
    "tokens_per_second": 2,
    "torch_dtype": "bfloat16",
}

# name: (file, parameters as the model cards' weight files hold them)
MODELS = {
    "Qwen2-VL-2B": (published("qwen2_vl", 1536, 8960, 28, 12, 2, 151936, True, tower2(1536)), 2_208_985_600),
    "Qwen2-VL-7B": (published("qwen2_vl", 3584, 18944, 28, 28, 4, 152064, False, tower2(3584)), 8_291_375_616),
    "Qwen2-VL-72B": (published("qwen2_vl", 8192, 29568, 80, 64, 8, 152064, False, tower2(8192)), 73_405_560_320),
    "Qwen2.5-VL-3B": (
        published("qwen2_5_vl", 2048, 11008, 36, 16, 2, 151936, True, tower25(2048, 3420)),
        3_754_622_976,
    ),
    "Qwen2.5-VL-7B": (
        published("qwen2_5_vl", 3584, 18944, 28, 28, 4, 152064, False, tower25(3584, 3420)),
        8_292_166_656,
    ),
    "Qwen2.5-VL-32B": (published("qwen2_5_vl", 5120, 27648, 64, 40, 8, 152064, False, TOWER_32B), 33_452_718_336),
    "Qwen2.5-VL-72B": (
        published("qwen2_5_vl", 8192, 29568, 80, 64, 8, 152064, False, tower25(8192, 3456)),
        73_410_777_344,
    ),
}


def parameters(cfg: ModelConfig) -> int:
    return sum(math.prod(entry.shape) for entry in hf.key_table(cfg).values())


@pytest.mark.parametrize("name", MODELS)
def test_published_sizes(name):
    raw, count = MODELS[name]
    cfg = model_config(raw)
    assert parameters(cfg) == count
    assert cfg.text.head_dim == 128 and cfg.vision.hidden_size // cfg.vision.num_heads == 80
    assert cfg.text.rope_theta == 1e6 and cfg.text.rms_norm_eps == 1e-6
    assert (cfg.image_token_id, cfg.video_token_id, cfg.eos_token_id) == (151655, 151656, (151645,))
    assert cfg.vision.tokens_per_second == (2 if "2.5" in name else None)
    assert cfg.vision.fullatt_block_indexes == ((7, 15, 23, 31) if "2.5" in name else tuple(range(32)))


@pytest.mark.parametrize("name", MODELS)
def test_nested_form_of_transformers_5(name, tmp_path):
    """transformers reads the published file and writes its own form, with every default left out that it leaves out."""
    transformers = pytest.importorskip("transformers")
    raw, _ = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "new")
    saved = json.loads((tmp_path / "new/config.json").read_text())
    assert "text_config" in saved and "hidden_size" not in saved
    assert load_model_config(tmp_path / "new") == model_config(raw)
    assert model_config(config.to_dict()) == model_config(raw)


@pytest.mark.parametrize("name", ["Qwen2-VL-2B", "Qwen2.5-VL-3B", "Qwen2.5-VL-32B"])
def test_names_and_shapes_equal_transformers_at_full_size(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    raw, _ = MODELS[name]
    # a copy: transformers writes into the rotary settings
    config = transformers.AutoConfig.for_model(**{k: v for k, v in copy.deepcopy(raw).items() if k != "architectures"})
    with torch.device("meta"):
        model = getattr(transformers, raw["architectures"][0])(config)
    theirs = {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tuple(p.shape)
        for key, p in model.named_parameters()
    }
    assert {key: entry.shape for key, entry in hf.key_table(model_config(raw)).items()} == theirs


def test_defaults_are_transformers_own():
    """A file with nothing but what has no default."""
    transformers = pytest.importorskip("transformers")
    for kind, theirs in (("qwen2_vl", transformers.Qwen2VLConfig()), ("qwen2_5_vl", transformers.Qwen2_5_VLConfig())):
        rope = {"rope_type": "default", "mrope_section": [16, 24, 24]}
        tower = {"out_hidden_size": 8192} if kind == "qwen2_5_vl" else {"hidden_size": 8192}
        ours = model_config({"model_type": kind, "rope_scaling": rope, "vision_config": tower})
        full = theirs.to_dict()
        full["vision_config"] |= tower
        full["text_config"]["rope_parameters"] = rope
        full["text_config"]["eos_token_id"] = None
        assert ours == model_config(full)


def test_end_tokens_of_generation_config(tmp_path):
    """`generate` of transformers stops at those of generation_config.json."""
    raw, _ = MODELS["Qwen2.5-VL-3B"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [151645, 151643]}')
    assert load_model_config(tmp_path).eos_token_id == (151645, 151643)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.1}')
    assert load_model_config(tmp_path).eos_token_id == (151645,)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match="generation_config.json: not readable as JSON"):
        load_model_config(tmp_path)


def test_tied_head_is_read_from_either_place():
    raw, _ = MODELS["Qwen2.5-VL-7B"]
    assert not model_config(raw).text.tie_word_embeddings
    assert model_config(raw | {"tie_word_embeddings": True}).text.tie_word_embeddings
    assert model_config(raw | {"text_config": {"tie_word_embeddings": True}}).text.tie_word_embeddings


# ---------------------------------------------------------------- bad files

TEXT_CHANGES = [
    ({"model_type": "llava"}, "model_type is 'llava'; this library runs qwen2_vl and qwen2_5_vl"),
    ({"model_type": None}, "model_type is None"),
    ({"model_type": ["qwen2_vl"]}, "model_type"),
    ({"hidden_size": "2048"}, "hidden_size is '2048'; it must be a whole number"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"num_attention_heads": 7}, "hidden_size is 2048; it must be divisible by num_attention_heads, 7"),
    ({"num_key_value_heads": 3}, "divisible by num_key_value_heads, 3"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'; it must be a positive number"),
    ({"rope_theta": -1}, "rope_theta is -1"),
    ({"rope_scaling": None}, "mrope_section"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24]}}, "mrope_section (16, 24)"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": 64}}, "mrope_section is 64"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}}, "type 'yarn' is not supported"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ({"image_token_id": -3}, "image_token_id is -3"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ({"vision_config": None}, "'vision_config' is missing"),
    ({"vision_config": 3}, "vision_config: expected a JSON object"),
    ({"text_config": [1]}, "text_config: expected a JSON object"),
]
TOWER_CHANGES = [
    ({"out_hidden_size": 1024}, "output width 1024 differs from the decoder's hidden_size 2048"),
    ({"num_heads": 7}, "head width must be a whole multiple of 4"),
    ({"window_size": 100}, "window_size is 100; it must be a multiple of"),
    ({"patch_size": [14, 14]}, "patch_size is [14, 14]"),
    ({"fullatt_block_indexes": 7}, "fullatt_block_indexes is 7"),
    ({"hidden_act": "swish"}, "hidden_act is 'swish'; it must be one of silu, gelu"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    TEXT_CHANGES + [({"vision_config": tower25(2048, 3420) | change}, text) for change, text in TOWER_CHANGES],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)
def test_bad_fields_are_named(changes, message):
    raw, _ = MODELS["Qwen2.5-VL-3B"]
    with pytest.raises(InputError) as error:
        model_config(raw | changes, "folder/config.json")
    assert str(error.value).startswith("folder/config.json: ") and message in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\xff"])
def test_files_that_are_not_a_json_object(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="config.json"):
        load_model_config(tmp_path)


def test_a_folder_without_config(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="config.json: not found; expected a Hugging Face checkpoint folder"):
            load_model_config(folder)


@pytest.mark.parametrize("field", ["dtype", "remat", "attention"])
def test_run_options_are_checked(field):
    from tests.support import tiny

    with pytest.raises(InputError, match=f"{field} = 'fast': must be one of"):
        tiny.config(**{field: "fast"})
