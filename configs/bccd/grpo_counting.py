"""Blood cells, third of three runs: GRPO with the counting reward, from what SFT left.

    ./launch/local.sh jaxmllm train configs/bccd/grpo_counting.py

Asked about white cells and platelets, whose answers are short; red cells are counted in the evaluation all the same. More SFT on
the same questions, to compare with:

    ./launch/local.sh jaxmllm train configs/bccd/sft.py --name bccd_counting_sft --model runs/bccd_sft/export \\
        --optim.learning_rate 5e-4 --max_steps 180 --data.weights 1 \\
        --data.train "coco:../shared/data/bccd/train.json?order=left&task=counting&categories=WBC,Platelets&augment=10000"
"""

from jaxmllm.losses.grpo_options import GRPOOptions
from jaxmllm.train.config import DataConfig, EvaluationConfig, OptimConfig, TrainConfig

PHOTOS = "coco:../shared/data/bccd/{}.json?order=left&task={}"

config = TrainConfig(
    name="bccd_grpo_counting",
    method="grpo",
    model="runs/bccd_sft/export",
    trainable=r"(?!vision/).*",
    unroll=True,
    batch_size=16,
    max_steps=60,
    data=DataConfig(
        train=(PHOTOS.format("train", "counting") + "&categories=WBC,Platelets&augment=10000",),
        eval=(PHOTOS.format("val", "detection"), PHOTOS.format("val", "counting")),
        eval_samples=1000,
        max_pixels=10_000,
    ),
    optim=OptimConfig(learning_rate=2e-4, lr_scheduler_type="constant", adam_beta2=0.98),
    grpo=GRPOOptions(num_generations=8, max_completion_length=96, epsilon_high=0.28),
    evaluation=EvaluationConfig(max_new_tokens=256),
    completions_steps=40,
    save_steps=40,
)
