"""Option sets of mixers for the suite over meshes; every registered mixer needs some.

`{mixer: {case: options}}`. The model has `EMBED_DIM` features, its rows `LENGTH` tokens, and up to
eight devices share the heads, so give at least eight.
"""

EMBED_DIM = 32
LENGTH = 32

CASES = {
    "attention": {
        "multi_head": {"num_heads": 8},
        "grouped_2": {"num_heads": 8, "num_key_value_heads": 2, "sink": True, "window": 7},
        "grouped_4": {
            "num_heads": 16, "num_key_value_heads": 4, "head_dim": 4, "gate": "sigmoid",
            "qk_norm": True, "bias": True, "output_bias": True,
        },
        "grouped_8": {"num_heads": 16, "num_key_value_heads": 8, "head_dim": 4, "soft_cap": 2.0},
    },
    "gated_deltanet": {
        "shared_keys": {"num_value_heads": 16, "num_key_heads": 4, "key_dim": 4, "value_dim": 6},
    },
    "ttt": {
        "single_layer": {
            "num_heads": 8, "head_dim": 8, "chunk_size": 5, "window": None, "update": "last",
            "base_rate": 0.1, "weight_norm": False, "features": "identity",
            "orthogonalize": False,
        },
    },
    # Squares of scores near zero would lose digits that the comparison needs.
    "two_mamba": {
        "linear": {"num_heads": 8, "score": "linear", "norm": "head", "implementation": "ref"},
    },
    # The specification compiles fastest, and what is asked here are places of heads and parameters.
    "kda": {
        "shared_keys": {
            "num_value_heads": 16, "num_key_heads": 4, "key_dim": 4, "value_dim": 6,
            "implementation": "ref",
        },
    },
    "mamba2": {
        "norm_by_head": {
            "head_dim": 4, "state_dim": 6, "num_groups": 2, "norm": "head", "implementation": "ref",
        },
    },
    "linear_attention": {
        "hedgehog": {
            "num_heads": 8, "feature_map": "hedgehog", "decay": "vector", "convolution_width": 2,
            "implementation": "ref",
        },
    },
}  # fmt: skip
