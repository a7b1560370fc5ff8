"""A ViT-B/16 and a BERT-base wide text encoder joined by six layers (FLAVA's shape), for a slice of accelerators.

    python train.py configs/vit_b16_bert_base.py --data.name FOLDER_OF_A_TFDS_SET --mesh.data 4 --mesh.fsdp 8

The data set is any that TFDS prepared in ArrayRecord format with images of 224 x 224 and a text; `--data.fields` says
where they are. Nothing here fits a laptop; `tests/test_cli.py` builds it as shapes.
"""

import mmx
from mmx.data import DataConfig
from mmx.modalities import Ids, Patches
from mmx.objectives import Captioning, Contrastive, Matching
from mmx.topologies import Joint, PerStream
from mmx.train import CheckpointConfig, ModelConfig, OptimizerConfig


def config() -> mmx.Experiment:
    """Twelve layers for each modality, six over both; width 768, bfloat16, everything computed again in the backward pass."""
    size = {"width": 768, "heads": 12, "mlp": 3072, "dtype": "bfloat16", "remat": "full", "unroll": 1}
    return mmx.Experiment(
        stages=(PerStream(12), Joint(6)),
        steps=100_000,
        batch_size=4096,
        model=ModelConfig(embed=512, **size),
        modalities={"image": Patches((224, 224), (16, 16)), "text": Ids(32_768, 77)},
        objectives={"contrastive": Contrastive(), "matching": Matching(), "captioning": Captioning()},
        data=DataConfig(fields={"image": "image", "text": "caption"}, shift=0, keep=False, threads=16),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, schedule="rsqrt", warmup=10_000, cooldown=10_000, weight_decay=0.1, ema=0.9999
        ),
        evaluators={"validation": mmx.evaluate.Retrieval(every=5_000, split="validation[:4096]")},
        checkpoint=CheckpointConfig(every_steps=5_000, every_minutes=20, best="validation/image_to_text_R@1"),
    )
