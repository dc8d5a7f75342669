"""Fourth of the runs that make the embedded model: counting, detection, one relation and pages join grounding.

./launch/local.sh jaxmllm train configs/tiny/tasks.py
./launch/local.sh jaxmllm convert runs/tiny_tasks/export runs/tiny_tasks_bfloat16 --dtype bfloat16  # for the next ones:
./launch/local.sh jaxmllm convert runs/tiny_tasks_bfloat16 runs/tiny_four_tasks
"""

from jaxmllm.methods import SFT
from jaxmllm.training.config import DataConfig, OptimConfig, TrainConfig

SCENES = "size=84x84&objects=2-4"
PAGES = "size=84x84&lines=1-2&words=1-1&font_sizes=14-18"

config = TrainConfig(
    name="tiny_tasks",
    method=SFT(
        questions_per_image=4,
        first_corner_weight=3.0,
    ),
    model="runs/tiny_grounding/export",
    trainable=r"(?!vision/).*",
    unroll=True,
    batch_size=16,
    max_steps=2200,
    data=DataConfig(
        train=(
            f"world:grounding:2,counting:1,detection:1?{SCENES}&questions=4&length=10000000",
            "world:grounding?size=84x84&objects=3-4&depth=1-1&questions=4&length=10000000",
            f"world:ocr?{PAGES}&questions=4&length=10000000",
        ),
        weights=(4.0, 1.0, 1.0),
        eval=(
            f"world:grounding?{SCENES}&split=val",
            f"world:counting?{SCENES}&split=val",
            f"world:detection?{SCENES}&split=val",
            f"world:ocr?{PAGES}&split=val",
        ),
    ),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=50, weight_decay=0.01, adam_beta2=0.98),
    logging_steps=20,
    eval_steps=500,
    save_steps=100,
)
