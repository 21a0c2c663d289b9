"""Llama 3 (arXiv 2407.21783): grouped-query attention with Llama-3 RoPE scaling, SwiGLU."""

from efficient_lm.interop.family import Family

FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
    },
    only={"hidden_act": ("silu",), "mlp_bias": (False,)},
)
