"""RCRN on the embedded model's features: does an expression fit, where, and which relation is wrong.

./launch/local.sh jaxmllm train configs/gitm_mr/rcrn.py
"""

from jaxmllm.methods import RCRN
from jaxmllm.training.config import DataConfig, OptimConfig, TrainConfig

RELATIONS = "world:relations?size=84x84"

config = TrainConfig(
    name="rcrn",
    method=RCRN(features="tower"),  # its states show attributes better than the decoder's, see README.md
    trainable="rcrn/.*",  # the backbone's features stay as they are
    unroll=True,
    batch_size=32,
    max_steps=1500,
    data=DataConfig(train=(f"{RELATIONS}&length=1000000",), eval=(f"{RELATIONS}&split=val",), eval_samples=512),
    optim=OptimConfig(learning_rate=2e-3, lr_scheduler_type="cosine", max_grad_norm=0.5, warmup_steps=150),
    logging_steps=50,
    save_steps=500,
)
