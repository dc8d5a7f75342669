"""Foresight (Merlin) on the embedded model: trajectories as text, of what was seen and of what comes next.

    ./launch/local.sh jaxmllm train configs/merlin/foresight.py

One stage holds the questions of both published ones: pre-training (tracking, referring, generic, short descriptions) and
instruction tuning (the trajectory first, then the future), half of them with frames that are not shown.

Half an hour on one core, which is too short: on 256 unseen clips the form is learned (.94), following hardly. The mean overlap
with the whole trajectory is .21 [.17, .24] where copying the first box has .48, with the frames to come .16 [.12, .20] where
going on at the last speed has .86.
"""

from jaxmllm.methods import SFT
from jaxmllm.training.config import DataConfig, EvaluationConfig, OptimConfig, TrainConfig

CLIPS = "world:foresight?size=84x84&objects=1-3&frames=3&horizon=1"

config = TrainConfig(
    name="merlin_foresight",
    method=SFT(
        loss_norm="token",
        questions_per_image=2,
    ),
    model="tiny",
    trainable=r"(?!vision/).*",
    unroll=True,
    batch_size=16,
    max_steps=600,
    data=DataConfig(
        train=(
            f"{CLIPS}&questions=2&length=1000000",
            "world:grounding?size=84x84&objects=2-4&questions=2&length=1000000",
        ),
        weights=(3.0, 1.0),  # a quarter of what it knew, replayed
        eval=(f"{CLIPS}&split=val",),
    ),
    # of the published AdamW all but the rate, which was for seven billion parameters
    optim=OptimConfig(
        learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=18, adam_beta2=0.95, weight_decay=0.05
    ),
    evaluation=EvaluationConfig(max_new_tokens=192),
    logging_steps=10,
    save_steps=200,
)
