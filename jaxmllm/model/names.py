"""Names of the tensors of a Hugging Face checkpoint: one invertible table."""

# our path -> Hugging Face's name. {n} is a captured group, {layer} the index on our stacked axis, {leaf} weight or bias.
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
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def canonical(name: str) -> str:
    """A tensor's name in the spelling of `NAMES`."""
    for long, short in ALIASES:
        name = name.replace(long, short, 1) if name.startswith(long) else name
    return name
