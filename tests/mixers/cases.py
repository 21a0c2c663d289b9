"""Option sets for the suite that runs over the registry; every registered mixer needs some.

`{mixer: {case: options}}`. The suite's model has `EMBED_DIM` features and its rows have `LENGTH`
tokens, so choose sizes that fit, and windows, chunks and caches below and above `LENGTH`.
"""

from efficient_lm.config import ModelConfig, layer

EMBED_DIM = 16
LENGTH = 12


def one_layer(mixer: str, options: dict, **overrides) -> ModelConfig:
    """A model of one such mixer and no feed-forward."""
    fields = {
        "vocabulary_size": LENGTH * LENGTH,  # so that each token of a batch can be another one
        "embed_dim": EMBED_DIM,
        "num_layers": 1,
        "max_length": LENGTH,
        "layers": (layer(mixer, ffn="none", **options),),
        "initializer": "fan_in",
        "tie_embeddings": False,
    }
    return ModelConfig(**fields | overrides)


CASES = {
    "attention": {
        "full": {"num_heads": 2},
        "window_one": {"num_heads": 2, "window": 1, "sink": True},
        "window_small": {"num_heads": 2, "window": 3, "rope": {"fraction": 0.5}},
        "window_large": {"num_heads": 2, "window": LENGTH + 5},
        "grouped": {
            "num_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "qk_norm": True,
            "gate": "sigmoid",
            "window": 5,
        },
        "multi_query": {
            "num_heads": 4,
            "num_key_value_heads": 1,
            "soft_cap": 2.0,
            "sink": True,
            "scale": 1.0,
            "rope": {"scaling": "llama3", "factor": 8.0, "original_max_length": 16},
        },
        "bias": {"num_heads": 2, "bias": True, "output_bias": True, "rope": {"fraction": 0.0}},
        "yarn": {
            "num_heads": 2,
            "window": 4,
            "sink": True,
            "rope": {"scaling": "yarn", "factor": 4.0, "original_max_length": 16},
        },
    },
    "gated_deltanet": {
        "shared_keys": {"num_value_heads": 4, "num_key_heads": 2, "key_dim": 4, "value_dim": 6},
        "delta": {
            "num_value_heads": 2,
            "decay": False,
            "gate": False,
            "negative_eigenvalues": True,
            "convolution_width": 2,
        },
    },
    # Muon would raise noise in directions that few tokens leave open: tests of its own have it.
    "ttt": {
        "baseline": {
            "num_heads": 2,
            "chunk_size": 3,
            "window": 4,
            "window_head_dim": 4,
            "base_rate": 0.1,
            "orthogonalize": False,
        },
        "linear": {
            "num_heads": 2,
            "chunk_size": 2,
            "window": 3,
            "hidden_dim": 5,
            "base_rate": 0.1,
            "update": "last",
            "weight_norm": False,
            "orthogonalize": False,
        },
    },
    "two_mamba": {
        "square": {"num_heads": 2},
        "exponential": {"num_heads": 4, "score": "exponential", "decay": "step"},
        "linear": {"num_heads": 2, "score": "linear"},
    },
    "kda": {
        "shared_keys": {
            "num_value_heads": 4,
            "num_key_heads": 2,
            "key_dim": 4,
            "value_dim": 6,
            "rank": 3,
        },
    },
    "mamba2": {
        "groups": {"head_dim": 8, "state_dim": 6, "num_groups": 2, "convolution_width": 2},
    },
    "linear_attention": {
        "elu_vector_decay": {
            "num_heads": 2,
            "value_dim": 6,
            "decay": "vector",
            "decay_rank": 3,
            "gate": "silu",
            "convolution_width": 3,
        },
        "hedgehog_retention": {
            "num_heads": 2,
            "feature_map": "hedgehog",
            "decay": "retention",
            "normalize": "rms",
            "gate": "silu",
            "rope": {"fraction": 1.0},
        },
        "performer": {
            "num_heads": 2,
            "feature_map": "performer",
            "num_features": 12,
            "decay": "scalar",
        },
    },
}
