"""Floating-point operations a token costs, and what devices can do, for MFU."""

import math

import jax
from flax import nnx

from efficient_lm import registry
from efficient_lm.config import layer_options
from efficient_lm.model.definition import ModelDefinition

# Dense bf16 FLOP/s of one device by the vendors' data sheets, by a part of its device kind.
DATA_SHEET_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7": 2307e12,
}


def training_flops_per_token(definition: ModelDefinition, length: int) -> float:
    """Forward and backward FLOPs a token: 6 a matrix weight, and the cores of the mixers.

    The convention of PaLM (arXiv 2204.02311, appendix B) and nanoGPT: recomputation does not
    count, nor does masking, so causal attention counts all `length` keys (a window its own size).
    """
    config = definition.config
    parameters = jax.tree.leaves(
        definition.parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    weights = sum(math.prod(leaf.shape) for leaf in parameters if leaf.inputs)
    weights += config.vocabulary_size * config.embed_dim  # the unembedding
    pattern = layer_options(config)
    cores = 0.0
    for index in range(config.num_layers):
        layer, options, _ = pattern[index % len(pattern)]
        cores += registry.mixer(layer.mixer).core_flops(config, options, length)
    return 6.0 * weights + 3.0 * cores


def data_sheet_flops(device: jax.Device) -> float | None:
    """bf16 FLOP/s of a device by its data sheet; None for one that is not listed."""
    for part, flops in DATA_SHEET_FLOPS.items():
        if part.lower() in device.device_kind.lower():
            return flops
    return None
