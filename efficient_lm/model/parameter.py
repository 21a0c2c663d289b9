"""Parameters: an array, the logical names of its axes, and which of them a hidden matrix maps."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient_lm.config import ModelConfig


def parameter(
    value: Float[Array, "..."],
    axes: Sequence[str],
    *,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
) -> nnx.Param:
    """A trainable array with a logical name for each axis.

    `inputs` and `outputs` name the fan-in and fan-out axes of a hidden matrix; axes in neither
    (layers, experts) are batch axes. Both are empty for embeddings, norms, biases and heads. The
    sharding rules read `axes`; Muon and weight decay read `inputs` and `outputs`.
    """
    if len(axes) != value.ndim:
        raise ValueError(f"{len(axes)} axis names {tuple(axes)} for an array of {value.ndim} axes")
    return nnx.Param(value, axes=tuple(axes), inputs=tuple(inputs), outputs=tuple(outputs))


def matrix(
    rngs: nnx.Rngs,
    model: ModelConfig,
    sizes: dict[str, int],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    residual: bool = False,
) -> nnx.Param:
    """A hidden matrix whose axes are the keys of `sizes` in order, drawn by `model.initializer`.

    normal: standard deviation `initializer_scale`; depth_scaled_normal: the same, with matrices
    that write to the residual stream (`residual`) scaled by 1/sqrt(2 num_layers), as in GPT-2;
    fan_in: standard deviation 1/sqrt(fan-in).
    """
    scale = model.initializer_scale
    if model.initializer == "fan_in":
        fan_in = 1
        for name in inputs:
            fan_in *= sizes[name]
        scale = fan_in**-0.5
    elif model.initializer == "depth_scaled_normal" and residual:
        scale *= (2 * model.num_layers) ** -0.5
    value = scale * jax.random.normal(rngs.params(), tuple(sizes.values()), jnp.float32)
    return parameter(value, tuple(sizes), inputs=inputs, outputs=outputs)


def constant(value: float, sizes: dict[str, int]) -> nnx.Param:
    """A vector-like parameter (norm scale, bias, sink) that starts at `value`."""
    return parameter(jnp.full(tuple(sizes.values()), value, jnp.float32), tuple(sizes))


def cast(parameter: nnx.Param, dtype) -> Float[Array, "..."]:
    """The array of a parameter in the compute dtype."""
    return parameter[...].astype(dtype)
