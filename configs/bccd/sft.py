"""Blood cells, second of three runs: the decoder learns to name and count the cells that the tower sees.

    ./launch/local.sh jaxmllm train configs/bccd/sft.py

Objects are listed from left to right, a sequence that can be learned. Eleven minutes of one core. One run, on val:
AP .237 [.210, .267], AP50 .365, AP75 .275; counting accuracy .505 [.439, .570] (white cells .988, platelets .422, red cells
.048: it lists 19 objects where 13 are marked). An earlier embedded model came to the same AP, .240.
"""

from jaxmllm.methods import SFT
from jaxmllm.training.config import DataConfig, EvaluationConfig, OptimConfig, TrainConfig

PHOTOS = "coco:../shared/data/bccd/{}.json?order=left&task={}"

config = TrainConfig(
    name="bccd_sft",
    method=SFT(),
    evaluation=EvaluationConfig(max_new_tokens=256),
    model="runs/bccd_vision/export",
    trainable=r"(?!vision/).*",
    unroll=True,
    batch_size=16,
    max_steps=1200,
    data=DataConfig(
        train=(
            PHOTOS.format("train", "detection") + "&augment=10000",
            PHOTOS.format("train", "counting") + "&augment=10000",
        ),
        weights=(2.0, 1.0),
        eval=(PHOTOS.format("val", "detection"), PHOTOS.format("val", "counting")),
        eval_samples=1000,
        max_pixels=10_000,
    ),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=20, weight_decay=0.01, adam_beta2=0.98),
    logging_steps=10,
    save_steps=100,
)
