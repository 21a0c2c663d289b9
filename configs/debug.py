"""Ten steps of a tiny model, to see that everything runs.

Paper: none.
Command: python -m efficient_lm.train --config=configs/debug.py --workdir=runs/debug
Device: any; 2 CPU cores are enough.
Expected time: 20 seconds.
Expected metric: valid loss below 5.5 nats a byte (a guess has 5.55).
"""

from efficient_lm.config import (
    CheckpointingConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)


def get_config():
    """The ten steps."""
    return Config(
        model=ModelConfig(
            vocabulary_size=256,
            embed_dim=32,
            num_layers=2,
            max_length=64,
            mixers={"attention": {"num_heads": 2}},
        ),
        data=DataConfig(
            source="python_stdlib", valid_fraction=0.01, sequence_length=64, batch_size=8
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-2, schedule=ScheduleConfig(name="constant", warmup_steps=2)
        ),
        training=TrainingConfig(steps=10, log_every=2, sample_prompt="def ", sample_tokens=20),
        checkpointing=CheckpointingConfig(every=5, keep_last=2),
        evaluation=EvaluationConfig(every=5, batches=2, batch_size=32),
    ).to_config_dict()
