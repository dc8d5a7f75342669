"""Attribute tracks (UTR) on the embedded model, trained on the clips whose answers need more than one frame.

    ./launch/local.sh jaxmllm train configs/utr/tracks.py --name utr_scorer --max_steps 150 \\
        --data.train "world:tracks?size=84x84&objects=1-3&frames=4&seed=1"
    ./launch/local.sh jaxmllm tpl --data "world:tracks?size=84x84&objects=1-3&frames=4" --limit 4000 --batch-size 32 \\
        --model runs/utr_scorer/export --out runs/utr_tpl.jsonl
    ./launch/local.sh jaxmllm train configs/utr/tracks.py \\
        --data.train "world:tracks?size=84x84&objects=1-3&frames=4&keep=runs/utr_tpl.jsonl"

The embedded model has seen no clips, so a short run makes the scorer; a larger model scores as it is. Without the filter:

    ./launch/local.sh jaxmllm train configs/utr/tracks.py
"""

from jaxmllm.methods import SFT
from jaxmllm.training.config import DataConfig, EvaluationConfig, OptimConfig, TrainConfig

CLIPS = "world:tracks?size=84x84&objects=1-3&frames=4"

config = TrainConfig(
    name="utr_tracks",
    method=SFT(
        loss_norm="sample",  # long trajectories do not dominate
    ),
    model="tiny",
    trainable=r"(?!vision/).*",
    unroll=True,
    batch_size=16,
    max_steps=600,
    data=DataConfig(train=(CLIPS,), eval=(f"{CLIPS}&split=val",)),
    optim=OptimConfig(learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=20, adam_beta2=0.98),
    evaluation=EvaluationConfig(max_new_tokens=192),
    logging_steps=10,
    save_steps=200,
)
