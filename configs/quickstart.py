"""A small language model of Python source, on any machine, in under three minutes.

Paper: none; a decoder with RMSNorm, RoPE, SwiGLU and Muon on the bytes of the standard library.
Command: python -m efficient_lm.train --config=configs/quickstart.py --workdir=runs/quickstart
Device: 2 CPU cores.
Expected time: under 3 minutes, compilation included.
Expected metric: valid bits_per_byte <= 2.6.
"""

from efficient_lm.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)


def get_config():
    """The quickstart run."""
    return Config(
        model=ModelConfig(vocabulary_size=256, embed_dim=128, num_layers=4, max_length=1024),
        data=DataConfig(source="python_stdlib", sequence_length=256, batch_size=8),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=5e-3,
            schedule=ScheduleConfig(
                name="wsd", warmup_steps=20, decay_fraction=0.4, final_fraction=0.0
            ),
        ),
        training=TrainingConfig(steps=600, sample_prompt="def "),
        evaluation=EvaluationConfig(every=200, batches=20, batch_size=16),
    ).to_config_dict()
