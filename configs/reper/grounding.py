"""Reflective unlikelihood (RePer) on the embedded model: it learns to answer again when it is told to.

First the policy's own answers become dialogues from worst to best; grainy pictures make some of them bad:

    ./launch/local.sh jaxmllm reflect --critic reward --out runs/reflection --limit 1500 --batch-size 64 \\
        --max-new-tokens 48 --data "world:grounding?size=84x84&objects=2-4&noise=18"
    ./launch/local.sh jaxmllm train configs/reper/grounding.py

The loop on 256 unseen scenes tells what came of it. Mean score of answers 1, 2, 3, of 10: before 7.73, 1.92, 0.41 (the
embedded model knows no second turn), after 8.08, 7.32, 6.35:

    ./launch/local.sh jaxmllm reflect --critic reward --limit 256 --batch-size 64 --max-new-tokens 48 \\
        --data "world:grounding?size=84x84&objects=2-4&noise=18&split=val" --model runs/reper_grounding/export

The best and the worst answer of the same dialogues as preferences (DPO):

    ./launch/local.sh jaxmllm train configs/reper/grounding.py --method dpo --name reper_dpo \\
        --data.train preference:runs/reflection/dialogues.jsonl --optim.learning-rate 2e-5

The ranking of all of them (LiPO):

    ./launch/local.sh jaxmllm train configs/reper/grounding.py --method dpo --name reper_lipo --method.loss_type lipo \\
        --data.train "preference:runs/reflection/dialogues.jsonl?answers=all" --optim.learning-rate 2e-5
"""

from jaxmllm.methods import Unlikelihood
from jaxmllm.training.config import DataConfig, OptimConfig, TrainConfig

config = TrainConfig(
    name="reper_grounding",
    method=Unlikelihood(
        alpha=1.0,  # 10 was tuned for 13 billion parameters and one pass at 1e-6
    ),
    model="tiny",
    trainable=r"(?!vision/).*",  # the decoder alone, as published
    unroll=True,
    batch_size=8,
    max_steps=300,
    data=DataConfig(
        train=("reflection:runs/reflection/dialogues.jsonl",),
        eval=("world:grounding?size=84x84&objects=2-4&noise=18&split=val",),
    ),
    optim=OptimConfig(learning_rate=2e-4, lr_scheduler_type="cosine", warmup_steps=10, adam_beta2=0.98),
)
