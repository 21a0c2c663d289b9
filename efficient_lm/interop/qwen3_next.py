"""Qwen3-Next, as far as its layers are dense: Qwen3.5's, with projections packed by key head.

The published models have mixtures of experts, which are refused; the definition is
`models/qwen3_next` of transformers.
"""

import dataclasses

from efficient_lm.interop import qwen3_5

# Each key head is followed by what belongs to its value heads.
PACKED = "linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"
KEYS = "(key_value_heads head_dim)+key_value_heads embed"
VALUES = "(heads head_dim)+key_value_heads embed"
GATED_DELTANET_TENSORS = qwen3_5.GATED_DELTANET_TENSORS | {
    "mixer.query": (PACKED[0], KEYS),
    "mixer.key": (PACKED[0], KEYS),
    "mixer.value": (PACKED[0], VALUES),
    "mixer.gate": (PACKED[0], VALUES),
    "mixer.beta": (PACKED[1], "heads+key_value_heads embed"),
    "mixer.step": (PACKED[1], "heads+key_value_heads embed"),
}

FAMILY = dataclasses.replace(
    qwen3_5.FAMILY,
    architecture="Qwen3NextForCausalLM",
    model_type="qwen3_next",
    defaults=qwen3_5.FAMILY.defaults | {"num_experts": 512},
    only={"hidden_act": ("silu",), "attention_bias": (False,), "num_experts": (0,)},
    unwritten=(),
    ignored=frozenset(
        {
            "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob",
            "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef",
            "shared_expert_intermediate_size",
        }
    ),
    tensors=qwen3_5.FAMILY.tensors | {"gated_deltanet": GATED_DELTANET_TENSORS},
    whole=None,
    prefix="model.",
    other_tensors=r"mtp\..*",
)  # fmt: skip
