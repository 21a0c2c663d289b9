"""Qwen3 dense shapes (arguments: 0.6b, 1.7b, 4b, 8b), trained from scratch on token shards.

The models of the report; it does not give the learning rates, so those here are usual ones for
the sizes. Write the shards with `python -m efficient_lm.data.write_shards --tokenizer=QWEN3_DIR
--out=data/qwen3 ...`. To use published weights see `python -m efficient_lm.convert --help`.

Paper: https://arxiv.org/abs/2505.09388
Command: python -m efficient_lm.train --config=configs/qwen3.py:0.6b --workdir=runs/qwen3_0.6b
Device: 0.6b: one GPU of 80 GB; 8b: 64 GPUs of 80 GB or a TPU v5p slice.
Expected time: not measured here.
Expected metric: not measured here.
"""

from efficient_lm.config import (
    CheckpointingConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainingConfig,
    choose,
)

# Sizes of the models as in their published config.json; the smaller ones tie their embeddings.
SIZES = {
    "0.6b": {
        "model": {"embed_dim": 1024, "num_layers": 28, "tie_embeddings": True},
        "num_heads": 16,
        "hidden_dim": 3072,
        "learning_rate": 6e-4,
    },
    "1.7b": {
        "model": {"embed_dim": 2048, "num_layers": 28, "tie_embeddings": True},
        "num_heads": 16,
        "hidden_dim": 6144,
        "learning_rate": 4e-4,
    },
    "4b": {
        "model": {"embed_dim": 2560, "num_layers": 36, "tie_embeddings": True},
        "num_heads": 32,
        "hidden_dim": 9728,
        "learning_rate": 3e-4,
    },
    "8b": {
        "model": {"embed_dim": 4096, "num_layers": 36, "tie_embeddings": False},
        "num_heads": 32,
        "hidden_dim": 12288,
        "learning_rate": 3e-4,
    },
}
ARGUMENTS = tuple(SIZES)


def get_config(argument="8b"):
    """The run for a size, one of SIZES."""
    size = choose(SIZES, argument)
    attention = {
        "num_heads": size["num_heads"],
        "num_key_value_heads": 8,
        "head_dim": 128,
        "qk_norm": True,
        "rope": {"theta": 1_000_000.0},
    }
    return Config(
        model=ModelConfig(
            **size["model"],
            vocabulary_size=151_936,
            max_length=40_960,
            mixers={"attention": attention},
            ffns={"dense": {"hidden_dim": size["hidden_dim"]}},
            norm_epsilon=1e-6,
            dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(
            source="tokens",
            paths=("data/qwen3/train",),
            valid_paths=("data/qwen3/valid",),
            tokenizer="data/qwen3/tokenizer",
            sequence_length=4096,
            batch_size=512,  # 2M tokens
        ),
        objective=ObjectiveConfig(chunk_logits=2**27),
        optimizer=OptimizerConfig(
            learning_rate=size["learning_rate"],
            schedule=ScheduleConfig(name="cosine", warmup_steps=2000, final_fraction=0.1),
        ),
        training=TrainingConfig(steps=100_000),
        checkpointing=CheckpointingConfig(every=1000),
        evaluation=EvaluationConfig(every=1000, batches=20),
        parallel=ParallelConfig(data=1, fsdp=-1),
    ).to_config_dict()
