"""Blood cells, third of three runs: GRPO with the counting reward, from what SFT left.

    ./launch/local.sh jaxmllm train configs/bccd/grpo_counting.py

Two seconds of processor an update. Means over three seeds on val, after 120 updates (268 s) and after the SFT below (247 s),
with the difference and its 95 % interval over seeds and photographs; "before" is where both start:

    counting                before   GRPO    SFT
    mean absolute error     2.45     1.34    1.82    -.48 [-.73, -.22]
    accuracy                .505     .525    .491    +.034 [-.008, .076]
      of red cells          .048     .080    .072    +.008 [-.061, .079]
      of platelets          .422     .459    .311    +.148 [-.016, .308]
      of white cells        .988     .988    .988
    detection, not asked
    AP                      .237     .160    .122    +.038 [.007, .070]
    AP50                    .365     .277    .222    +.055 [.008, .105]
    AP75                    .275     .175    .127    +.048 [-.001, .092]

Every seed has the sign of each row but those of red and white cells: GRPO is closer, and forgets less of what it is not
asked. More SFT on the same questions, to compare with:

    ./launch/local.sh jaxmllm train configs/bccd/sft.py --name bccd_counting_sft --model runs/bccd_sft/export \\
        --optim.learning_rate 5e-4 --max_steps 580 --data.weights 1 1 \\
        --data.train "coco:../shared/data/bccd/train.json?order=left&task=counting&augment=10000" \\
        "coco:../shared/data/bccd/train.json?order=left&task=counting"

All of it, seed by seed: python -m tests.benchmarks.findings FOLDER --only bccd
"""

from jaxmllm.methods import GRPO
from jaxmllm.training.config import DataConfig, OptimConfig, TrainConfig

PHOTOS = "coco:../shared/data/bccd/{}.json?order=left&task={}"

config = TrainConfig(
    name="bccd_grpo_counting",
    method=GRPO(
        num_generations=8,
        max_completion_length=256,
        epsilon_high=0.28,
    ),
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
    optim=OptimConfig(learning_rate=3e-4, adam_beta2=0.98),
    completions_steps=40,
    save_steps=40,
)
