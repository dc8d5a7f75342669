"""Perception-R1, object detection: GRPO on Qwen2.5-VL-3B with COCO train 2017, one epoch.

    ./launch/local.sh jaxmllm train configs/perception_r1/detection_3b.py

The answer is a JSON list of boxes in pixels of the resized image, with names out of COCO's 80. Reward, 0 to 3, after bipartite
matching at IoU above 0.5: format, F1 of the counts, share of right names, mean IoU.

Data, under data/, as COCO hands it out (other places: --data.train, --data.eval). Predictions are scaled back, so that the
original annotations are what AP is measured against. The paper's ablations use 10,000 images: &sample=random:10000 at the end
of the training source, --max_steps 625.

    data/coco/annotations/instances_train2017.json    data/coco/train2017/*.jpg
    data/coco/annotations/instances_val2017.json      data/coco/val2017/*.jpg

The published rows (Kangheng/PR1-Datasets-Detection: problem, image, solution in resized pixels) are read by
--data.train "pr1:data/pr1/detection.json?task=detection&images=data/pr1/images". AP of all 5,000 validation images:

    ./launch/local.sh jaxmllm eval --model runs/detection_3b/export --max_new_tokens 4096 \\
        --data "coco:data/coco/annotations/instances_val2017.json?images=data/coco/val2017"

Variants (a name of its own keeps each run apart):

    --name detection_3b_thinking --data.thinking                              answers after a thinking block
    --name detection_3b_g16 --method.num_generations 16                         G, the paper's 8
    --name detection_3b_kl0 --method.beta 0                                     no KL term, no reference model
    --name detection_3b_in_order --method.reward_matching order              boxes paired as listed: no reward matching
    --name detection_3b_released --method.reward_rules released              the reward as published, its bugs included
    --name detection_3b_penalty --data.task_options detection.weights.penalty=true    minus 0.5 x share of missed objects
    --name detection_3b_no_f1 --data.task_options detection.weights.f1=0      without the count term; .label=0, .iou=0: the others
    --name detection_3b_sft --method sft --optim.learning_rate 1e-5           SFT only
    --name detection_3b_sft_rl --model runs/detection_3b_sft/export           SFT, then RL
    --batch_size 64 --optim.gradient_accumulation_steps 1                     64 chips (v5e_64): a prompt each

Answers may have 2,048 tokens. Its curriculum (easy images first, more rollouts later) is not published in numbers and not
repeated. Other hyper-parameters, and where they differ from the published ones: see grounding_2b.py.
"""

from jaxmllm.methods import GRPO
from jaxmllm.tasks import answers
from jaxmllm.training.config import DataConfig, EvaluationConfig, OptimConfig, TrainConfig

config = TrainConfig(
    name="detection_3b",
    method=GRPO(
        num_generations=8,
        max_completion_length=2048,
        loss_type="grpo",
        beta=0.04,
        temperature=1.0,
    ),
    model="Qwen/Qwen2.5-VL-3B-Instruct",
    batch_size=16,
    max_steps=6_875,  # 110,000 / 16
    dtype="bfloat16",
    remat="full",
    data=DataConfig(
        train=("coco:data/coco/annotations/instances_train2017.json?images=data/coco/train2017",),
        eval=("coco:data/coco/annotations/instances_val2017.json?images=data/coco/val2017",),
        eval_samples=500,
        style="qwen2_5_vl",
        min_pixels=3_136,
        max_pixels=1_000_000,
        max_prompt_length=2048,
        system=answers.SYSTEM,
    ),
    optim=OptimConfig(learning_rate=1e-6, lr_scheduler_type="linear", gradient_accumulation_steps=2),
    evaluation=EvaluationConfig(max_new_tokens=4096, wording="evaluation"),
    save_steps=100,
)
