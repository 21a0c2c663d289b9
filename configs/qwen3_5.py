"""Qwen3.5 dense text shapes (arguments: debug, 0.8b, 2b, 4b, 9b, 27b), trained from scratch.

Three layers of Gated DeltaNet, whose state does not grow with the text, for each layer of gated
attention. The sizes are those of the open models (that of 2b has 16 value heads here, which gives
1.88B parameters; not all secondary sources agree); mixture-of-experts sizes and the vision tower
are not here. How Qwen3.5 was trained is not published, so learning rates are usual ones for the
sizes. Write the shards with `python -m efficient_lm.data.write_shards --tokenizer=QWEN3_5_DIR
--out=data/qwen3_5 ...`; debug reads bytes of Python source instead, and needs nothing. To use
published weights see `python -m efficient_lm.convert --help`.

Paper: https://arxiv.org/abs/2412.06464
Command: python -m efficient_lm.train --config=configs/qwen3_5.py:debug --workdir=runs/qwen3_5_debug
Device: debug: any; 0.8b: one GPU of 80 GB; 9b: 64 GPUs of 80 GB or a TPU v5p slice.
Expected time: debug: one minute on 2 CPU cores; others not measured here.
Expected metric: debug: valid loss below 2.9 nats a byte; others not measured here.
"""

import dataclasses

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
    layer,
)

# Sizes of the models as in their published config.json; the smaller ones tie their embeddings.
SIZES = {
    "debug": {
        "model": {"embed_dim": 64, "num_layers": 4, "tie_embeddings": True},
        "num_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_value_heads": 4,
        "num_key_heads": 2,
        "linear_head_dim": 16,
        "hidden_dim": 192,
        "learning_rate": 1e-2,
    },
    "0.8b": {
        "model": {"embed_dim": 1024, "num_layers": 24, "tie_embeddings": True},
        "num_heads": 8,
        "num_key_value_heads": 2,
        "num_value_heads": 16,
        "hidden_dim": 3584,
        "learning_rate": 6e-4,
    },
    "2b": {
        "model": {"embed_dim": 2048, "num_layers": 24, "tie_embeddings": True},
        "num_heads": 8,
        "num_key_value_heads": 2,
        "num_value_heads": 16,
        "hidden_dim": 6144,
        "learning_rate": 4e-4,
    },
    "4b": {
        "model": {"embed_dim": 2560, "num_layers": 32, "tie_embeddings": True},
        "num_heads": 16,
        "num_key_value_heads": 4,
        "num_value_heads": 32,
        "hidden_dim": 9216,
        "learning_rate": 3e-4,
    },
    "9b": {
        "model": {"embed_dim": 4096, "num_layers": 32, "tie_embeddings": False},
        "num_heads": 16,
        "num_key_value_heads": 4,
        "num_value_heads": 32,
        "hidden_dim": 12288,
        "learning_rate": 3e-4,
    },
    "27b": {
        "model": {"embed_dim": 5120, "num_layers": 64, "tie_embeddings": False},
        "num_heads": 24,
        "num_key_value_heads": 4,
        "num_value_heads": 48,
        "hidden_dim": 17408,
        "learning_rate": 2e-4,
    },
}
ARGUMENTS = tuple(SIZES)


def get_config(argument="9b"):
    """The run for a size, one of SIZES."""
    size = choose(SIZES, argument)
    attention = {
        "num_heads": size["num_heads"],
        "num_key_value_heads": size["num_key_value_heads"],
        "head_dim": size.get("head_dim", 256),
        "qk_norm": True,
        "rope": {"fraction": 0.25, "theta": 10_000_000.0},
    }
    gated_deltanet = {
        "num_value_heads": size["num_value_heads"],
        "num_key_heads": size.get("num_key_heads", 16),
        "key_dim": size.get("linear_head_dim", 128),
        "value_dim": size.get("linear_head_dim", 128),
        "convolution_width": 4,
    }
    config = Config(
        model=ModelConfig(
            **size["model"],
            vocabulary_size=248_320,
            max_length=262_144,
            layers=("gated_deltanet",) * 3 + (layer("attention", gate="sigmoid"),),
            mixers={"gated_deltanet": gated_deltanet, "attention": attention},
            ffns={"dense": {"hidden_dim": size["hidden_dim"]}},
            norm="zero_centered_rms_norm",
            norm_epsilon=1e-6,
            dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(
            source="tokens",
            paths=("data/qwen3_5/train",),
            valid_paths=("data/qwen3_5/valid",),
            tokenizer="data/qwen3_5/tokenizer",
            sequence_length=8192,
            batch_size=256,  # 2M tokens
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
    )
    return (debug(config) if argument == "debug" else config).to_config_dict()


def debug(config):
    """A few steps on bytes, so that the architecture can be tried on any machine."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, vocabulary_size=256, max_length=256, dtype="float32", remat="none"
        ),
        data=DataConfig(
            source="python_stdlib", valid_fraction=0.01, sequence_length=128, batch_size=8
        ),
        objective=ObjectiveConfig(),
        optimizer=dataclasses.replace(
            config.optimizer, schedule=ScheduleConfig(name="constant", warmup_steps=5)
        ),
        training=TrainingConfig(steps=50, log_every=10, sample_prompt="def ", sample_tokens=20),
        checkpointing=CheckpointingConfig(every=50, keep_last=1),
        evaluation=EvaluationConfig(every=50, batches=2, batch_size=32),
        parallel=ParallelConfig(),
    )
