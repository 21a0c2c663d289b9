"""GPT-2 124M shapes (arguments: muon, adamw) on token shards of any text.

12 layers, width 768, 12 heads, context 1024, GELU of 4 times the width, tied embeddings. RoPE and
RMSNorm stand for learned positions and LayerNorm, so the parameters are 123.6M. The vocabulary of
50257 is padded to 50304, a multiple of 128: the tiles of matrix units divide it, and the logits of
the 47 rows that no token uses are learned to be low. `adamw` has nanoGPT's hyperparameters.
Write the shards with `python -m efficient_lm.data.write_shards --tokenizer=GPT2_DIR
--out=data/gpt2 ...`, where GPT2_DIR holds a tokenizer.json.

Paper: https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
Command: python -m efficient_lm.train --config=configs/gpt2_124m.py:muon --workdir=runs/gpt2_124m
Device: one GPU of 80 GB.
Expected time: 0.123 s for 65,536 tokens on one H200 with AdamW (experiments/nanogpt); the whole
run is not measured here.
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
    ScheduleConfig,
    TrainingConfig,
    choose,
)

OPTIMIZERS = {
    "muon": OptimizerConfig(
        name="muon",
        learning_rate=2e-3,
        schedule=ScheduleConfig(name="wsd", warmup_steps=250, final_fraction=0.0),
        accumulation_steps=8,
    ),
    "adamw": OptimizerConfig(
        learning_rate=6e-4,
        schedule=ScheduleConfig(name="cosine", warmup_steps=2000, final_fraction=0.1),
        accumulation_steps=8,
    ),
}
ARGUMENTS = tuple(OPTIMIZERS)


def get_config(argument="muon"):
    """The run with an optimizer, "muon" or "adamw"."""
    optimizer = choose(OPTIMIZERS, argument)
    return Config(
        model=ModelConfig(
            vocabulary_size=50_304,
            embed_dim=768,
            num_layers=12,
            max_length=1024,
            mixers={"attention": {"num_heads": 12}},
            ffns={"dense": {"hidden_dim": 3072, "activation": "gelu"}},
            dtype="bfloat16",
            scan_layers=False,  # faster steps; 12 layers still compile in 13 s
        ),
        data=DataConfig(
            source="tokens",
            paths=("data/gpt2/train",),
            valid_paths=("data/gpt2/valid",),
            tokenizer="data/gpt2/tokenizer",
            sequence_length=1024,
            batch_size=512,  # 0.5M tokens
            mask_across_documents=False,  # as nanoGPT; without segments attention is faster
        ),
        objective=ObjectiveConfig(chunk_logits=2**30),
        optimizer=optimizer,
        training=TrainingConfig(steps=10_000),
        checkpointing=CheckpointingConfig(every=1000),
        evaluation=EvaluationConfig(every=250, batches=20, batch_size=64),
    ).to_config_dict()
