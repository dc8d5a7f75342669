"""Perception-R1, page OCR: GRPO on Qwen2-VL-2B with 5,000 pages of English text, one epoch.

    ./launch/local.sh jaxmllm train configs/perception_r1/ocr_2b.py

The reward is 1 - edit distance / longer length, in characters.

Data, under data/ (other places: --data.train, --data.eval). The paper's pages, 50,000 of English books and arXiv papers, are
not published; any pages with their text will do:

    data/pages/train.jsonl, data/pages/val.jsonl    lines {"image": "0001.png", "text": "..."}, or file_name and lines as in
                                                    the `pages:` source, with the images in data/pages/images

Variants (a name of its own keeps each run apart):

    --name ocr_2b_thinking --data.thinking                                    the text after a thinking block
    --name ocr_2b_g16 --method.num_generations 16                               G, the paper's 8
    --name ocr_2b_kl0 --method.beta 0                                           no KL term, no reference model
    --name ocr_2b_sft --method sft --optim.learning_rate 1e-5                 SFT only
    --name ocr_2b_sft_rl --model runs/ocr_2b_sft/export                       SFT, then RL
    --batch_size 64 --optim.gradient_accumulation_steps 1                     64 chips (v5e_64): a prompt each

Answers may have 2,048 tokens. Other hyper-parameters, and where they differ from the published ones: see grounding_2b.py.
"""

from jaxmllm.methods import GRPO
from jaxmllm.tasks import ocr
from jaxmllm.training.config import DataConfig, EvaluationConfig, OptimConfig, TrainConfig

config = TrainConfig(
    name="ocr_2b",
    method=GRPO(
        num_generations=8,
        max_completion_length=2048,
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
        train=("pages:data/pages/train.jsonl?images=data/pages/images&sample=random:5000",),
        eval=("pages:data/pages/val.jsonl?images=data/pages/images",),
        eval_samples=100,
        style="qwen2_vl",
        min_pixels=3_136,
        max_pixels=1_000_000,
        max_prompt_length=2048,
        system=ocr.SYSTEM,
    ),
    optim=OptimConfig(learning_rate=1e-6, lr_scheduler_type="linear", gradient_accumulation_steps=2),
    evaluation=EvaluationConfig(max_new_tokens=2048, wording="evaluation"),
    save_steps=100,
)
