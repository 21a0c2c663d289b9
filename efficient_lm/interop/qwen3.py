"""Qwen3, dense models (arXiv 2505.09388): Llama's layers with QK-norm and an explicit head size."""

from collections.abc import Mapping
from typing import Any

from efficient_lm.interop.family import ATTENTION_TENSORS, QK_NORM_TENSORS, Family


def kind_of(index: int, values: Mapping[str, Any]) -> str:
    """The kind of a layer where config.json has no `layer_types`."""
    return "sliding_attention" if index >= values["max_window_layers"] else "full_attention"


FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    defaults={
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    only={"hidden_act": ("silu",)},
    attention={"qk_norm": True},
    tensors={"attention": ATTENTION_TENSORS | QK_NORM_TENSORS},
    kinds={"full_attention": "attention", "sliding_attention": "attention"},
    kind_of=kind_of,
)
