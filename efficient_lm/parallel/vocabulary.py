"""Embedding and loss on a mesh: each device takes its own tokens, and the vocabulary whole."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from efficient_lm.parallel.rules import PRESETS, ROWS, TOKENS, partition_spec


def over_tokens(
    mesh: Mesh,
    preset: str,
    function: Callable,
    weight: Float[Array, "V D"],
    *arrays: Array,
    dtype: Any,
    summed: bool,
) -> Any:
    """function(weight, *arrays [B, T, ...]) with each device's part of the arrays.

    Its results are summed over the devices, or stay [B, T]. `weight` has the axes ("vocabulary",
    "embed") and is gathered in `dtype`; its gradient is summed in float32 and scattered to where
    the parameter is.
    """
    if arrays[0].shape[1] == 1 and not summed:
        # A step of decoding reads a few rows of the table; these are moved, and not the table.
        return function(weight.astype(dtype), *arrays)
    tokens = (*TOKENS, "tensor")
    if arrays[0].shape[1] % math.prod(mesh.shape[axis] for axis in tokens):
        tokens = TOKENS
    rules = PRESETS[preset].parameters
    weight_spec = partition_spec(rules, mesh, ("vocabulary", "embed"), weight.shape)
    token_spec = PartitionSpec(ROWS, tokens)

    def local(weight, *arrays):
        result = function(gather(weight, weight_spec, dtype), *arrays)
        return jax.lax.psum(result, (*ROWS, *tokens)) if summed else result

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(weight_spec, *(token_spec for _ in arrays)),
        out_specs=PartitionSpec() if summed else token_spec,
        check_vma=False,
    )(weight, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(x: Array, spec: PartitionSpec, dtype: Any) -> Array:
    """The whole of an array that is split as `spec` says, in `dtype`; for use inside shard_map."""
    x = x.astype(dtype)
    for place, axes in enumerate(spec):
        if axes is not None:
            x = jax.lax.all_gather(x, axes, axis=place, tiled=True)
    return x


def _gather_forward(x, spec, dtype):
    return gather(x, spec, dtype), jnp.zeros((0,), x.dtype)


def _gather_backward(spec, dtype, residual, gradient):
    gradient = gradient.astype(jnp.float32)
    for place, axes in enumerate(spec):
        if axes is not None:
            gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=place, tiled=True)
    return (gradient.astype(residual.dtype),)


gather.defvjp(_gather_forward, _gather_backward)
