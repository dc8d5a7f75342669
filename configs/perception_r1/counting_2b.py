"""Perception-R1, visual counting: GRPO on Qwen2-VL-2B with 10,000 PixMo-Count questions, one epoch.

    ./launch/local.sh jaxmllm train configs/perception_r1/counting_2b.py

The answer is one box for each object; the reward compares their centres with the annotated points after bipartite matching,
times the ratio of the counts.

Data, under data/ (other places: --data.train, --data.eval):

    data/pr1/pr1_counting_10k.json  rows problem (the label), image, clicks on the 0..1000 grid: the published training set
                                    Kangheng/PR1-Datasets-Counting, with image paths below data/pr1/images
    data/pixmo_count/validation.parquet, data/pixmo_count/images    PixMo-Count's validation split with its images
                                    (allenai/pixmo-count): jaxmllm data fetch pixmo

Variants (a name of its own keeps each run apart):

    --name counting_2b_thinking --data.thinking                               answers after a thinking block
    --name counting_2b_g16 --method.num_generations 16                          G, the paper's 8
    --name counting_2b_kl0 --method.beta 0                                      no KL term, no reference model
    --name counting_2b_in_order --method.reward_matching order               boxes paired as listed: no reward matching
    --name counting_2b_released --method.reward_rules released               the reward as published, its bugs included
    --name counting_2b_sft --method sft --optim.learning_rate 1e-5            SFT only, on small boxes around the points
    --name counting_2b_sft_rl --model runs/counting_2b_sft/export             SFT, then RL
    --batch_size 64 --optim.gradient_accumulation_steps 1                     64 chips (v5e_64): a prompt each

Hyper-parameters, and where they differ from the published ones: see grounding_2b.py.
"""

from jaxmllm.methods import GRPO
from jaxmllm.tasks import answers
from jaxmllm.training.config import DataConfig, EvaluationConfig, OptimConfig, TrainConfig

config = TrainConfig(
    name="counting_2b",
    method=GRPO(
        num_generations=8,
        max_completion_length=768,
        loss_type="grpo",
        beta=0.04,
        temperature=1.0,
    ),
    model="Qwen/Qwen2-VL-2B-Instruct",
    batch_size=16,
    max_steps=625,  # 10,000 / 16
    dtype="bfloat16",
    remat="full",
    data=DataConfig(
        train=("pr1:data/pr1/pr1_counting_10k.json?task=counting&images=data/pr1/images",),
        eval=("pixmo:data/pixmo_count/validation.parquet?images=data/pixmo_count/images",),
        eval_samples=540,
        style="qwen2_vl",
        min_pixels=3_136,
        max_pixels=1_000_000,
        max_prompt_length=2048,
        system=answers.SYSTEM,
    ),
    optim=OptimConfig(learning_rate=1e-6, lr_scheduler_type="linear", gradient_accumulation_steps=2),
    evaluation=EvaluationConfig(max_new_tokens=512),
    save_steps=100,
)
