"""Reflective unlikelihood (RePer) on the embedded model: it learns to look again when it is told to.

First the policy's own answers become dialogues from worst to best; grainy pictures make some of them bad:

    ./launch/local.sh jaxmllm reflect --critic reward --out runs/reflection --limit 3000 --batch-size 64 \\
        --max-new-tokens 48 --data "world:grounding?size=84x84&objects=2-4&noise=18"
    ./launch/local.sh jaxmllm train configs/reper/grounding.py

The same loop on unseen scenes, before and after (--model tiny, --model runs/reper_grounding/export):

    ./launch/local.sh jaxmllm reflect --critic reward --limit 256 --batch-size 64 --max-new-tokens 48 \\
        --data "world:grounding?size=84x84&objects=2-4&noise=18&split=val" --model runs/reper_grounding/export
"""

from jaxmllm.train.config import DataConfig, OptimConfig, TrainConfig, UnlikelihoodConfig

config = TrainConfig(
    name="reper_grounding",
    method="unlikelihood",
    model="tiny",
    trainable=r"(?!vision/).*",  # the decoder alone, as published
    unroll=True,
    batch_size=8,
    max_steps=300,
    data=DataConfig(
        train=("reflection:runs/reflection/dialogues.jsonl",),
        eval=("world:grounding?size=84x84&objects=2-4&noise=18&split=val",),
    ),
    unlikelihood=UnlikelihoodConfig(alpha=1.0),  # 10 was tuned for 13 billion parameters and one pass at 1e-6
    optim=OptimConfig(learning_rate=2e-4, lr_scheduler_type="cosine", warmup_steps=10, adam_beta2=0.98),
)
