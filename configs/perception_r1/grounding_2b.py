"""Perception-R1, visual grounding: GRPO on Qwen2-VL-2B with 5,000 referring expressions, one epoch.

    ./launch/local.sh jaxmllm train configs/perception_r1/grounding_2b.py

Data, under data/ (other places: --data.train, --data.eval):

    data/pr1/grounding.parquet     rows problem, image, solution: the published training set Kangheng/PR1-Datasets-Grounding;
                                   also a folder of shards, .jsonl or .json with image paths below data/pr1
    data/refcoco/refcoco_val.json  expressions of RefCOCO val in any form of the `refcoco:` source, images in data/refcoco/images

`jaxmllm data fetch pr1:grounding` and `jaxmllm data fetch refcoco` (lmms-lab/RefCOCO, val) get these from the hub and print what
--data.train (with &sample=first:5000) and --data.eval take.

Variants (a name of its own keeps each run apart):

    --name grounding_2b_thinking --data.thinking                              answers after a thinking block
    --name grounding_2b_g16 --method.num_generations 16                         G, the paper's 8; it swept 2 to 441
    --name grounding_2b_kl0 --method.beta 0                                     no KL term, no reference model
    --name grounding_2b_released --method.reward_rules released              the reward as published, its bugs included
    --name grounding_2b_sft --method sft --optim.learning_rate 1e-5           SFT only
    --name grounding_2b_sft_rl --model runs/grounding_2b_sft/export           SFT, then RL
    --batch_size 64 --optim.gradient_accumulation_steps 1                     64 chips (v5e_64): a prompt each

What the paper and its scripts say and this keeps: G 8, learning rate 1e-6 falling linearly to 0, KL 0.04, temperature 1,
768 new tokens, images of 3,136 to 1,000,000 pixels, all parameters trained, bfloat16 products on float32 weights,
checkpointing of activations; a system turn in training, the template's own in evaluation; evaluation greedy with 512 tokens
and repetition penalty 1.05. What differs: 16 prompts an update, not 14 (112 answers on 7 GPUs), so that it divides over 8
devices; no top_p 0.9 and top_k 50, which the scripts sample with but do not score with: here a token is scored under the
distribution that it was drawn from, and the KL to a reference that could not have drawn it would have no bound; the rewards
without the bugs of the published code, unless asked for. With thinking the system turn is R1's. The SFT learning rate is
not published; the one above is ours.
"""

from jaxmllm.methods import GRPO
from jaxmllm.tasks import answers
from jaxmllm.training.config import DataConfig, EvaluationConfig, OptimConfig, TrainConfig

config = TrainConfig(
    name="grounding_2b",
    method=GRPO(
        num_generations=8,
        max_completion_length=768,
        loss_type="grpo",
        beta=0.04,
        temperature=1.0,
    ),
    model="Qwen/Qwen2-VL-2B-Instruct",
    batch_size=16,
    max_steps=312,  # 5,000 / 16
    dtype="bfloat16",
    remat="full",
    data=DataConfig(
        train=("pr1:data/pr1/grounding.parquet?task=grounding&sample=first:5000",),
        eval=("refcoco:data/refcoco/refcoco_val.json?images=data/refcoco/images",),
        eval_samples=500,
        style="qwen2_vl",
        min_pixels=3_136,
        max_pixels=1_000_000,
        max_prompt_length=2048,
        system=answers.SYSTEM,
    ),
    optim=OptimConfig(learning_rate=1e-6, lr_scheduler_type="linear", gradient_accumulation_steps=2),
    evaluation=EvaluationConfig(max_new_tokens=512, repetition_penalty=1.05),
    save_steps=100,
)
