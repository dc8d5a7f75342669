"""The methods by name: the only list of them."""

METHODS = {
    "grpo": "jaxmllm.methods.grpo.method:GRPO",
    "sft": "jaxmllm.methods.sft:SFT",
    "unlikelihood": "jaxmllm.methods.unlikelihood:Unlikelihood",
    "dpo": "jaxmllm.methods.dpo:DPO",
    "vision_warmup": "jaxmllm.methods.warmup:VisionWarmup",
    "rcrn": "jaxmllm.methods.rcrn.method:RCRN",
}


def name_of(cls: type) -> str:
    """The name that `get` knows a class by."""
    target = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for name, known in METHODS.items() if known == target), target)
