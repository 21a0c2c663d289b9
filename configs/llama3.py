"""Llama 3 shapes (arguments: 1b, 8b), trained from scratch on token shards.

Llama 3.2 1B and Llama 3.1 8B, with the paper's peak learning rate (of 8B), warm-up and cosine to
1%; the data and the number of steps are yours.
Write the shards with `python -m efficient_lm.data.write_shards --tokenizer=LLAMA3_DIR
--out=data/llama3 ...`. To use published weights see `python -m efficient_lm.convert --help`.

Paper: https://arxiv.org/abs/2407.21783
Command: python -m efficient_lm.train --config=configs/llama3.py:1b --workdir=runs/llama3_1b
Device: 1b: 8 GPUs of 80 GB or a TPU v5p slice; 8b: 64 of them.
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

SIZES = {
    "1b": {
        "model": {"embed_dim": 2048, "num_layers": 16, "tie_embeddings": True},
        "head_dim": 64,
        "hidden_dim": 8192,
        "rope_factor": 32.0,
    },
    "8b": {
        "model": {"embed_dim": 4096, "num_layers": 32, "tie_embeddings": False},
        "head_dim": 128,
        "hidden_dim": 14336,
        "rope_factor": 8.0,
    },
}
ARGUMENTS = tuple(SIZES)


def get_config(argument="8b"):
    """The run for a size, "1b" or "8b"."""
    size = choose(SIZES, argument)
    rope = {
        "theta": 500_000.0,
        "scaling": "llama3",
        "factor": size["rope_factor"],
        "original_max_length": 8192,
    }
    attention = {
        "num_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": size["head_dim"],
        "rope": rope,
    }
    return Config(
        model=ModelConfig(
            **size["model"],
            vocabulary_size=128_256,
            max_length=131_072,
            mixers={"attention": attention},
            ffns={"dense": {"hidden_dim": size["hidden_dim"]}},
            norm_epsilon=1e-5,
            dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(
            source="tokens",
            paths=("data/llama3/train",),
            valid_paths=("data/llama3/valid",),
            tokenizer="data/llama3/tokenizer",
            sequence_length=8192,
            batch_size=512,  # 4M tokens
        ),
        objective=ObjectiveConfig(chunk_logits=2**27),
        optimizer=OptimizerConfig(
            learning_rate=3e-4,
            schedule=ScheduleConfig(name="cosine", warmup_steps=8000, final_fraction=0.01),
        ),
        training=TrainingConfig(steps=100_000),
        checkpointing=CheckpointingConfig(every=1000),
        evaluation=EvaluationConfig(every=1000, batches=20),
        parallel=ParallelConfig(data=1, fsdp=-1),
    ).to_config_dict()
