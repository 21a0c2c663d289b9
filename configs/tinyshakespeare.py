"""Characters of Shakespeare with the budgets of nanoGPT's two recipes (arguments: cpu, gpu).

The text is data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn: save it as
data/tinyshakespeare.txt in the working directory, or name it with --config.data.paths.
As in nanoGPT: tokens seen, layers, width, heads, context and parameters (without position
embeddings 795,904 and 10.6M, as nanoGPT has, to 0.2%). Not as in nanoGPT: RoPE, RMSNorm,
Muon and the decay of the learning rate to 0.

Paper: none; https://github.com/karpathy/nanoGPT, config/train_shakespeare_char.py.
Command: python -m efficient_lm.train --config=configs/tinyshakespeare.py:cpu --workdir=runs/chars
Device: cpu: 2 cores; gpu: one H100 or H200.
Expected time: cpu: 3 minutes; gpu: 2 minutes.
Expected metric: valid loss in nats a character; cpu: at most 1.65 at the end (nanoGPT: 1.89);
gpu: 1.448 and 1.445 at its best, after 500 steps, in two runs (nanoGPT: 1.4697).
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
    choose,
)

VOCABULARY = 65


def _data(sequence_length: int, batch_size: int) -> DataConfig:
    return DataConfig(
        source="text",
        paths=("data/tinyshakespeare.txt",),
        tokenizer="characters",
        sequence_length=sequence_length,
        batch_size=batch_size,
        mask_across_documents=False,  # the text is one document
    )


CPU = Config(
    model=ModelConfig(
        vocabulary_size=VOCABULARY,
        embed_dim=128,
        num_layers=4,
        max_length=64,
        mixers={"attention": {"num_heads": 4}},
        ffns={"dense": {"activation": "relu_squared", "hidden_dim": 512}},
        # A step's memory stays below 32 MB, which glibc keeps between steps instead of asking the
        # kernel for fresh pages each time: a third of the time of a step.
        remat="dots",
    ),
    data=_data(64, 12),
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=4e-3,
        muon_steps=3,  # of 5; each costs about 6% of a step
        schedule=ScheduleConfig(
            name="wsd", warmup_steps=20, decay_fraction=0.7, final_fraction=0.0
        ),
    ),
    training=TrainingConfig(steps=2000),
    checkpointing=CheckpointingConfig(every=1000, keep_last=1),
    evaluation=EvaluationConfig(every=500, batches=5, batch_size=48),
)

# One epoch is 61 steps, so this recipe overfits: dropout, weight decay, and the evaluated weights
# are an average. The best checkpoint by validation is kept, as nanoGPT does.
GPU = Config(
    model=ModelConfig(
        vocabulary_size=VOCABULARY,
        embed_dim=384,
        num_layers=6,
        max_length=256,
        mixers={"attention": {"num_heads": 6, "qk_norm": True}},
        ffns={"dense": {"activation": "swiglu", "hidden_dim": 1024}},
        dropout=0.1,
        dtype="bfloat16",
    ),
    data=_data(256, 64),
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=2e-3,
        weight_decay=0.5,
        schedule=ScheduleConfig(name="cosine", warmup_steps=100, final_fraction=0.0),
        ema_decay=0.998,
    ),
    training=TrainingConfig(steps=5000),
    checkpointing=CheckpointingConfig(every=50, keep_last=1),
    evaluation=EvaluationConfig(every=50, batch_size=64),  # the best moment passes quickly
)
BUDGETS = {"cpu": CPU, "gpu": GPU}
ARGUMENTS = tuple(BUDGETS)


def get_config(argument="cpu"):
    """The run with a budget, "cpu" or "gpu"."""
    return choose(BUDGETS, argument).to_config_dict()
