"""A small language model of Python source, on any machine, in under three minutes.

Paper: none; a decoder with RMSNorm, RoPE, squared ReLU and Muon, on the standard library's bytes.
Command: python -m efficient_lm.train --config=configs/quickstart.py --workdir=runs/quickstart
Device: 2 CPU cores.
Expected time: 1 to 2 minutes, compilation included.
Expected metric: valid bits_per_byte <= 2.3.
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
    """The quickstart run."""
    return Config(
        model=ModelConfig(
            vocabulary_size=256,
            embed_dim=128,
            num_layers=4,
            max_length=1024,
            mixers={"attention": {"num_heads": 4, "qk_norm": True}},
            ffns={"dense": {"activation": "relu_squared", "hidden_dim": 512}},
            # A step's memory stays below 32 MB, which glibc keeps between steps instead of asking
            # the kernel for fresh pages each time: a third of the time of a step.
            remat="mixer",
        ),
        data=DataConfig(
            source="python_stdlib", valid_fraction=0.05, sequence_length=256, batch_size=4
        ),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=4e-3,
            schedule=ScheduleConfig(
                name="wsd", warmup_steps=20, decay_fraction=0.6, final_fraction=0.0
            ),
        ),
        training=TrainingConfig(steps=700, sample_prompt="def "),
        checkpointing=CheckpointingConfig(every=350),
        evaluation=EvaluationConfig(every=350, batches=20, batch_size=16),
    ).to_config_dict()
