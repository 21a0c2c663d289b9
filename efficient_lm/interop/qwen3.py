"""Qwen3, dense models (arXiv 2505.09388): Llama's layers with QK-norm and an explicit head size."""

from efficient_lm.interop.family import LAYER_TENSORS, Family

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
    layer_tensors=LAYER_TENSORS
    | {
        "mixer.query_norm.scale": ("self_attn.q_norm.weight", "head_dim"),
        "mixer.key_norm.scale": ("self_attn.k_norm.weight", "head_dim"),
    },
    qk_norm=True,
    sliding_window=True,
)
