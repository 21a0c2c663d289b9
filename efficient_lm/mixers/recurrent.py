"""What recurrent mixers share: projections, the parameters of a decay, norms, and their memory."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from efficient_lm.mixers.short_convolution import short_convolution
from efficient_lm.model.context import Context
from efficient_lm.model.parameter import cast, parameter

# Keeps the inputs of a function for the backward pass, and nothing that it computes in fp32. Where
# the compiler still has the latter, it may use it.
kept_inputs = functools.partial(jax.checkpoint, prevent_cse=False)


def project(
    x: Float[Array, "B T D"], weights: Mapping[str, nnx.Param], context: Context
) -> dict[str, Array]:
    """x times each weight [D, ...], as [B, T, ...]; in one product where that is faster."""
    groups: dict[tuple[int, ...], list[str]] = {}  # by the sizes of a head
    for name, weight in weights.items():
        groups.setdefault(weight[...].shape[2:], []).append(name)
    if context.split.features > 1 or x.shape[0] * x.shape[1] < 2 * x.shape[2]:
        # Where heads are split, or weights are more than tokens, joining costs more than it gains.
        groups = {(name,): [name] for name in weights}
    projected = {}
    for names in groups.values():
        arrays = [cast(weights[name], x.dtype) for name in names]
        product = jnp.tensordot(x, jnp.concatenate(arrays, axis=1), axes=1)
        ends = np.cumsum([array.shape[1] for array in arrays])
        for name, y in zip(names, jnp.split(product, ends[:-1], axis=2), strict=True):
            axes = weights[name].axes[2 - y.ndim :]  # without that of x, and that of layers
            projected[name] = context.shard(y, "batch", "length", *axes)
    return projected


def log_rate(rngs: nnx.Rngs, sizes: dict[str, int], low: float, high: float) -> nnx.Param:
    """log A of a decay exp(-A step), with A uniform in [low, high] (Mamba-2); no weight decay."""
    shape = tuple(sizes.values())
    return parameter(
        jnp.log(jax.random.uniform(rngs.params(), shape, jnp.float32, low, high)), tuple(sizes)
    )


def step_bias(rngs: nnx.Rngs, sizes: dict[str, int]) -> nnx.Param:
    """b with softplus(b) log-uniform in [0.001, 0.1], steps as Mamba starts; no weight decay."""
    low, high = np.log(1e-3), np.log(1e-1)
    shape = tuple(sizes.values())
    step = jnp.exp(jax.random.uniform(rngs.params(), shape, jnp.float32, low, high))
    return parameter(step + jnp.log(-jnp.expm1(-step)), tuple(sizes))


def convolve(
    mixer: nnx.Module,
    names: Sequence[str],
    projected: Mapping[str, Array],
    context: Context,
    state: Mapping[str, Any] | None,
    unit: Sequence[str] = (),
) -> tuple[list[Array], dict[str, Any]]:
    """SiLU of the short convolutions of these entries, and the new state of each by name.

    `mixer` has their weights as NAME_convolution, and may have biases as NAME_convolution_bias.
    unit: those whose heads are then brought to norm 1.
    """
    convolved, new = [], {}
    for name in names:
        bias = getattr(mixer, f"{name}_convolution_bias", None)
        y, new[name] = short_convolution(
            projected[name],
            getattr(mixer, f"{name}_convolution")[...],
            bias=None if bias is None else bias[...],
            silu=True,
            unit_norm=name in unit,
            segment_ids=context.segment_ids,
            state=None if state is None else state[name],
            fresh=context.fresh,
        )
        convolved.append(y)
    return convolved, new


def gated_norm(
    x: Float[Array, "B T N H"],
    scale: Float[Array, "H"],
    gate: Float[Array, "B T N H"] | None,
    activation: Callable[[Array], Array],
    epsilon: float,
) -> Float[Array, "B T N H"]:
    """x / rms(x) * scale * activation(gate) for each head, in fp32."""

    @kept_inputs
    def run(x, scale, gate):
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        y = (
            wide
            * jax.lax.rsqrt(mean_square + epsilon)
            * scale.astype(jnp.float32)[None, None, None]
        )
        if gate is not None:
            y = y * activation(gate.astype(jnp.float32))
        return y.astype(x.dtype)

    return run(x, scale, gate)


def init_memory(*shape: int) -> dict[str, Array]:
    """The state of the recurrence before any token, [B, N, K, V], and the segment that it is of."""
    return {
        "memory": jnp.zeros(shape, jnp.float32),
        "segment": jnp.zeros(shape[:1], jnp.int32),
    }


def memory_for(
    state: Mapping[str, Any] | None, segment_ids: Int[Array, "B T"] | None
) -> tuple[Float[Array, "B N K V"] | None, Int[Array, "B"] | None]:
    """(the memory that the first document of each row starts from, the segment of its last token).

    It is that of the state where the document goes on, else zeros; padding goes on with it.
    """
    if state is None:
        return None, None
    segment = state["segment"]
    if segment_ids is None:
        segment_ids = jnp.ones((len(segment), 1), jnp.int32)

    def first_real(segments):
        place = jnp.argmax(segments > 0, axis=1)[:, None]
        return jnp.take_along_axis(segments, place, axis=1)[:, 0]

    first, last = first_real(segment_ids), first_real(segment_ids[:, ::-1])
    goes_on = (first == segment) | (first == 0)
    memory = jnp.where(goes_on[:, None, None, None], state["memory"], 0.0)
    return memory, jnp.where(last > 0, last, segment)
