"""Qwen3.5, dense text models: three Gated DeltaNet layers for each gated attention layer.

There is no paper; the definition is `models/qwen3_5` of transformers. The published checkpoints
also hold a vision tower and a head that predicts two tokens ahead (mtp); both are left out.
"""

from collections.abc import Mapping
from typing import Any

from efficient_lm.interop.family import (
    ATTENTION_FIELDS,
    ATTENTION_TENSORS,
    QK_NORM_TENSORS,
    Family,
)

GATED_DELTANET_FIELDS = {
    "num_value_heads": "linear_num_value_heads",
    "num_key_heads": "linear_num_key_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "convolution_width": "linear_conv_kernel_dim",
}
KEYS, VALUES = "(key_value_heads head_dim)", "(heads head_dim)"
GATED_DELTANET_TENSORS = {
    "mixer.query": ("linear_attn.in_proj_qkv.weight", f"{KEYS}+ embed"),
    "mixer.key": ("linear_attn.in_proj_qkv.weight", f"{KEYS}+ embed"),
    "mixer.value": ("linear_attn.in_proj_qkv.weight", f"{VALUES}+ embed"),
    "mixer.query_convolution": ("linear_attn.conv1d.weight", f"{KEYS}+ 1 width"),
    "mixer.key_convolution": ("linear_attn.conv1d.weight", f"{KEYS}+ 1 width"),
    "mixer.value_convolution": ("linear_attn.conv1d.weight", f"{VALUES}+ 1 width"),
    "mixer.gate": ("linear_attn.in_proj_z.weight", f"{VALUES} embed"),
    "mixer.beta": ("linear_attn.in_proj_b.weight", "heads embed"),
    "mixer.step": ("linear_attn.in_proj_a.weight", "heads embed"),
    "mixer.step_bias": ("linear_attn.dt_bias", "heads"),
    "mixer.log_rate": ("linear_attn.A_log", "heads"),
    "mixer.norm": ("linear_attn.norm.weight", "head_dim"),
    "mixer.out": ("linear_attn.out_proj.weight", f"embed {VALUES}"),
}
# Each head's query is followed by its gate.
GATED_ATTENTION_TENSORS = ATTENTION_TENSORS | {
    "mixer.query": ("self_attn.q_proj.weight", "(heads head_dim)+heads embed"),
    "mixer.gate": ("self_attn.q_proj.weight", "(heads head_dim)+heads embed"),
}


def kind_of(index: int, values: Mapping[str, Any]) -> str:
    """The kind of a layer where config.json has no `layer_types`."""
    attends = (index + 1) % values["full_attention_interval"] == 0
    return "full_attention" if attends else "linear_attention"


FAMILY = Family(
    architecture="Qwen3_5ForCausalLM",
    model_type="qwen3_5_text",
    defaults={
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "partial_rotary_factor": 0.25,
        "linear_num_value_heads": 32,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "layer_types": None,
        "full_attention_interval": 4,
    },
    only={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "attn_output_gate": (True,),
        "mamba_ssm_dtype": ("float32",),
    },
    unwritten=("attn_output_gate", "mamba_ssm_dtype"),
    model={"norm": "zero_centered_rms_norm"},
    attention={"qk_norm": True, "gate": "sigmoid"},
    fields={"gated_deltanet": GATED_DELTANET_FIELDS, "attention": ATTENTION_FIELDS},
    tensors={
        "gated_deltanet": GATED_DELTANET_TENSORS,
        "attention": GATED_ATTENTION_TENSORS | QK_NORM_TENSORS,
    },
    kinds={"linear_attention": "gated_deltanet", "full_attention": "attention"},
    kind_of=kind_of,
    partial_rope=True,
    whole=("Qwen3_5ForConditionalGeneration", "qwen3_5"),
    prefix="model.language_model.",
    other_tensors=r"(model\.visual|mtp)\..*",
)
