"""The embedded model learns to follow: one subject through eight frames, boxes as it grounds, with replay of what it knows.

    ./launch/local.sh jaxmllm train configs/merlin/tracking.py

Ten minutes on one core.
"""

from jaxmllm.methods import SFT
from jaxmllm.training.config import DataConfig, EvaluationConfig, OptimConfig, TrainConfig

CLIPS = "world:foresight?size=84x84&objects=1-3&frames=8&horizon=0&kinds=tracking&subjects=1"
SCENES = "size=84x84&objects=2-4"

config = TrainConfig(
    name="merlin_tracking",
    method=SFT(questions_per_image=3),
    model="tiny",
    trainable=r"(?!vision/).*",
    unroll=True,
    batch_size=8,
    max_steps=420,
    data=DataConfig(
        train=(
            f"{CLIPS}&questions=3&length=1000000",
            f"world:grounding:1,counting:3,detection:1?{SCENES}&questions=3&length=1000000",
        ),
        weights=(3.0, 1.0),
        eval=(f"{CLIPS}&split=val", f"world:grounding?{SCENES}&split=val", f"world:counting?{SCENES}&split=val"),
    ),
    optim=OptimConfig(learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=20, weight_decay=0.01),
    evaluation=EvaluationConfig(max_new_tokens=256),
    eval_on_start=False,
    logging_steps=20,
    save_steps=210,
)
