"""What is compared: layers that learn at test time by one rule each, and a window of attention."""

from dataclasses import dataclass

from efficient_lm.config import Config, ModelConfig, layer
from efficient_lm.mixers.ttt import LADDER, ladder
from efficient_lm.training.in_memory import equal_hidden_dim

# Beside the ladder: the two probes of the paper, and what attention within the window can do alone.
PROBES = {"ascent": {"direction": "ascent"}, "no_query": {"read_with": "key"}}
METHODS = (*LADDER, *PROBES, "window_only")


@dataclass(frozen=True)
class Run:
    """Sizes of a model and of its training on text. chunk: also the window of attention."""

    embed_dim: int
    num_layers: int
    head_dim: int  # of the fast weights; that of attention is `window_head_dim`
    window_head_dim: int
    hidden_dim: int
    length: int
    chunk: int
    rows: int
    steps: int
    rate: float
    evaluation_batches: int
    inner_steps: tuple[int, ...]  # tried at test with the model of the baseline
    seeds: tuple[int, ...] = (0,)
    dtype: str = "float32"


@dataclass(frozen=True)
class Layer:
    """Sizes of fast weights whose forms are timed: B rows of T tokens, N heads of D features."""

    B: int
    T: int
    N: int
    D: int
    C: int  # tokens of a chunk
    dtype: str


QUALITY = {
    "smoke": Run(16, 1, 8, 4, 32, 32, 8, 2, 4, 1e-2, 2, (1, 2)),
    "cpu": Run(64, 2, 32, 16, 160, 256, 64, 4, 600, 1e-2, 64, (1, 2, 4, 8)),
    "h200": Run(256, 4, 128, 64, 768, 2048, 256, 16, 200, 5e-3, 8, (1, 2, 4, 8, 16),
                dtype="bfloat16"),
}  # fmt: skip
SPEED = {
    "smoke": Layer(1, 32, 1, 4, 8, "float32"),
    "cpu": Layer(1, 4096, 2, 32, 64, "float32"),
    "h200": Layer(1, 32_768, 4, 384, 2048, "bfloat16"),  # LaCT-760M
}


def make_config(method: str, run: Run, seed: int = 0, inner_steps: int = 1) -> Config:
    """The config of a training; models have the same number of parameters, within 8 features."""
    fields = _fields(method, run, seed, inner_steps)
    hidden_dim = equal_hidden_dim(_model(method, run), _model("baseline", run))
    fields["model"]["ffns"]["dense"]["hidden_dim"] = hidden_dim
    return Config.from_dict(fields)


def _model(method: str, run: Run) -> ModelConfig:
    return Config.from_dict(_fields(method, run, 0, 1)).model


def _fields(method: str, run: Run, seed: int, inner_steps: int) -> dict:
    if method == "window_only":
        heads = run.embed_dim // run.window_head_dim
        one = layer("attention", num_heads=heads, window=run.chunk)
    else:
        rule = PROBES[method] if method in PROBES else ladder(method)
        one = layer(
            "ttt",
            num_heads=run.embed_dim // run.head_dim,
            chunk_size=run.chunk,
            window=run.chunk,
            window_head_dim=run.window_head_dim,
            inner_steps=inner_steps,
            **rule,
        )
    schedule = {"name": "wsd", "warmup_steps": max(1, run.steps // 20), "decay_fraction": 0.5,
                "final_fraction": 0.0}  # fmt: skip
    return {
        "model": {
            "embed_dim": run.embed_dim,
            "num_layers": run.num_layers,
            "max_length": run.length,
            "layers": (one,),
            "ffns": {"dense": {"hidden_dim": run.hidden_dim}},
            "dtype": run.dtype,
        },
        "data": {"sequence_length": run.length, "batch_size": run.rows,
                 "mask_across_documents": False},
        "optimizer": {"name": "muon", "learning_rate": run.rate, "schedule": schedule},
        "training": {"steps": run.steps, "seed": seed},
        "evaluation": {"batches": run.evaluation_batches},
        "parallel": {"data": 1},
    }  # fmt: skip
