"""Blood cells, third of three runs: GRPO with the counting reward, from what SFT left.

    ./launch/local.sh jaxmllm train configs/bccd/grpo_counting.py

Asked about white cells and platelets, whose answers are short: 1.2 s of processor an update, where red cells take 9. What one
seed did on val (AP of detection, counting accuracy; before, after 60 updates, after the SFT below): AP .073, .014, .003; all
.388, .505, .486; platelets .022, .511, .400; white cells .919, .988, .988; red cells .036, .000, .012. So both arms forget what
they are not asked, RL less; and RL gets there by answering one cell nearly always. No recommendation yet.

More SFT on the same questions, to compare with:

    ./launch/local.sh jaxmllm train configs/bccd/sft.py --name bccd_counting_sft --model runs/bccd_sft/export \\
        --optim.learning_rate 5e-4 --max_steps 180 --data.weights 1 \\
        --data.train "coco:../shared/data/bccd/train.json?order=left&task=counting&categories=WBC,Platelets&augment=10000"
"""

from jaxmllm.losses.grpo_options import GRPOOptions
from jaxmllm.train.config import DataConfig, OptimConfig, TrainConfig

PHOTOS = "coco:../shared/data/bccd/{}.json?order=left&task={}"

config = TrainConfig(
    name="bccd_grpo_counting",
    method="grpo",
    model="runs/bccd_sft/export",
    trainable=r"(?!vision/).*",
    unroll=True,
    batch_size=12,
    max_steps=120,
    data=DataConfig(
        train=(PHOTOS.format("train", "counting") + "&augment=10000", PHOTOS.format("train", "counting")),
        eval=(PHOTOS.format("val", "detection"), PHOTOS.format("val", "counting")),
        eval_samples=1000,
        max_pixels=10_000,
    ),
    optim=OptimConfig(learning_rate=2e-4, lr_scheduler_type="constant", adam_beta2=0.98),
    grpo=GRPOOptions(num_generations=8, max_completion_length=256, epsilon_high=0.28),
    completions_steps=40,
    save_steps=40,
)
