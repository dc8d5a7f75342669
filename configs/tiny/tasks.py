"""Third of three runs that make the embedded model: grounding with relations, counting and detection together.

    ./launch/local.sh jaxmllm train configs/tiny/tasks.py
"""

from jaxmllm.train.config import DataConfig, OptimConfig, TrainConfig

SIZE = "size=84x84&objects=2-6"

config = TrainConfig(
    name="tiny_tasks",
    method="sft",
    model="runs/tiny_grounding/export",
    trainable=r"(?!vision/).*",
    unroll=True,
    batch_size=16,
    max_steps=2500,
    data=DataConfig(
        train=(
            f"world:grounding:3,counting:2,detection:1?{SIZE}&questions=4&length=10000000",
            "world:grounding?size=84x84&objects=3-6&depth=1&questions=4&seed=1&length=10000000",
        ),
        weights=(3.0, 1.0),
        eval=(
            f"world:grounding?{SIZE}&split=val",
            f"world:counting?{SIZE}&split=val",
            f"world:detection?{SIZE}&split=val",
            "world:grounding?size=84x84&objects=3-6&depth=1&split=val",
        ),
        questions_per_image=4,
        first_coordinate_weight=3.0,
    ),
    optim=OptimConfig(learning_rate=1.5e-3, warmup_steps=50, weight_decay=0.01, adam_beta2=0.98),
    logging_steps=20,
    eval_steps=500,
    save_steps=250,
)
