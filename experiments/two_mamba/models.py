"""What is compared: five mixers in one model, with the same number of parameters."""

from dataclasses import dataclass
from typing import Any

from efficient_lm.config import Config, ModelConfig, layer
from efficient_lm.training.in_memory import equal_hidden_dim

METHODS = ("softmax", "two_mamba_e", "two_mamba", "mamba_2s", "mamba2")
# The paper's way to 2Mamba, of which `mamba_2s` and `two_mamba` are the end.
LADDER = ("linear", "linear_convolution", "mamba_2s_step", "two_mamba_step")


@dataclass(frozen=True)
class Run:
    """Sizes of a model and of its training.

    hidden_dim: of the feed-forward beside softmax attention; the others get what makes the number
    of parameters equal. pairs: numbers of pairs to recall, in equal shares; empty: text.
    """

    embed_dim: int
    num_layers: int
    head_dim: int
    hidden_dim: int
    length: int
    rows: int
    steps: int
    rate: float
    evaluation_batches: int
    vocabulary_size: int = 256
    pairs: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)
    dtype: str = "float32"


ARMS = {
    "smoke": {
        "text": Run(16, 1, 4, 64, 32, 2, 4, 1e-2, 2),
        "recall": Run(16, 1, 4, 64, 32, 4, 4, 1e-2, 2, 64, (2, 4)),
    },
    "cpu": {
        "text": Run(64, 4, 16, 192, 256, 8, 400, 1e-2, 32),
        "recall": Run(64, 2, 16, 160, 64, 48, 600, 1e-2, 8, 128, (4, 8, 16)),
    },
    "h200": {
        "text": Run(512, 6, 64, 1536, 1024, 32, 300, 5e-3, 16, dtype="bfloat16"),
        "recall": Run(64, 2, 16, 160, 256, 64, 2000, 1e-2, 8, 512, (8, 16, 32, 64), (0, 1)),
    },
}


def layers(method: str, run: Run) -> tuple:
    """The pattern of layers: heads of `head_dim` that together are as wide as the model.

    Mamba-2 is the official block at full width: twice as many heads and a state of four times their
    size (at most 128), not the one head of 64 features in the training code of 2Mamba.
    """
    heads = {"num_heads": run.embed_dim // run.head_dim}
    return {
        "softmax": (layer("attention", **heads),),
        "two_mamba": (layer("two_mamba", **heads),),
        "two_mamba_e": (layer("two_mamba", score="exponential", **heads),),
        "mamba_2s": (layer("two_mamba", score="linear", **heads),),
        # The decay of Mamba-2 in the place of -softplus(W x).
        "mamba_2s_step": (layer("two_mamba", score="linear", decay="step", **heads),),
        "two_mamba_step": (layer("two_mamba", decay="step", **heads),),
        "linear": (layer("linear_attention", feature_map="relu", **heads),),
        "linear_convolution": (
            layer("linear_attention", feature_map="identity", normalize="rms",
                  convolution_width=2, **heads),
        ),
        "mamba2": (
            layer("mamba2", head_dim=run.head_dim, state_dim=min(4 * run.head_dim, 128)),
        ),
    }[method]  # fmt: skip


def make_config(method: str, run: Run, seed: int = 0, pairs: int | None = None) -> Config:
    """The config of a training; pairs: of each row of recall."""
    fields = _fields(method, run, seed, pairs)
    hidden_dim = equal_hidden_dim(_model(method, run), _model("softmax", run))
    fields["model"]["ffns"]["dense"]["hidden_dim"] = hidden_dim
    return Config.from_dict(fields)


def _model(method: str, run: Run) -> ModelConfig:
    return Config.from_dict(_fields(method, run, 0, None)).model


def _fields(method: str, run: Run, seed: int, pairs: int | None) -> dict[str, Any]:
    data = {"sequence_length": run.length, "batch_size": run.rows, "mask_across_documents": False}
    if run.pairs:
        data |= {
            "source": "associative_recall",
            "batch_size": run.rows // len(run.pairs),
            "task": {"pairs": pairs or run.pairs[0], "vocabulary_size": run.vocabulary_size,
                     "filler": "zero"},
        }  # fmt: skip
    schedule = {"name": "wsd", "warmup_steps": max(1, run.steps // 20), "decay_fraction": 0.5,
                "final_fraction": 0.0}  # fmt: skip
    return {
        "model": {
            "vocabulary_size": run.vocabulary_size,
            "embed_dim": run.embed_dim,
            "num_layers": run.num_layers,
            "max_length": run.length,
            "layers": layers(method, run),
            "ffns": {"dense": {"hidden_dim": run.hidden_dim}},
            "dtype": run.dtype,
        },
        "data": data,
        "optimizer": {"name": "muon", "learning_rate": run.rate, "schedule": schedule},
        "training": {"steps": run.steps, "seed": seed},
        "evaluation": {"batches": run.evaluation_batches},
        "parallel": {"data": 1},
    }
