"""Names of Qwen2-VL's and Qwen2.5-VL's weights in a Hugging Face checkpoint, and of their modules in memory."""

# our path -> Hugging Face's name, see `jaxmllm.model.hf.name_of`
NAMES = (
    (r"embed", "model.embed_tokens.weight"),
    (r"head", "lm_head.weight"),
    (r"text/norm/(?P<leaf>\w+)", "model.norm.{leaf}"),
    (r"text/layers/(?P<block>.+)/(?P<leaf>\w+)", "model.layers.{layer}.{block}.{leaf}"),
    (r"vision/patch_embed/(?P<leaf>\w+)", "visual.patch_embed.proj.{leaf}"),
    (r"vision/blocks/(?P<block>.+)/(?P<leaf>\w+)", "visual.blocks.{layer}.{block}.{leaf}"),
    (r"vision/ln_q/(?P<leaf>\w+)", "visual.merger.ln_q.{leaf}"),
    (r"vision/merger_fc1/(?P<leaf>\w+)", "visual.merger.mlp.0.{leaf}"),
    (r"vision/merger_fc2/(?P<leaf>\w+)", "visual.merger.mlp.2.{leaf}"),
)
# transformers >= 4.52 nests the parts one level deeper in memory; both spellings occur in files
ALIASES = (("model.language_model.", "model."), ("model.visual.", "visual."))
MODULES = (("visual.", "model.visual."), ("model.", "model.language_model."))
DECODER_LINEARS = r"text/layers/.*(q|k|v|o|gate|up|down)_proj"
SPECIAL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
