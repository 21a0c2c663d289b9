"""The short convolution: one function, several implementations."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._core import compat, dispatch, recurrence
from pallas_kernels.short_convolution.support import TABLE, Facts


def short_convolution(
    x: Float[Array, "B T N H"],
    weight: Float[Array, "N H W"],
    bias: Float[Array, "N H"] | None = None,
    *,
    silu: bool = False,
    unit_norm: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | tuple[str, ...] = "auto",
) -> Float[Array, "B T N H"]:
    """y_t = bias + sum_i weight[..., W - 1 - i] x_(t - i) of each feature; `ref` defines it.

    weight: its last tap is of the token itself, as in PyTorch. Sums are in fp32.
    silu: then SiLU. unit_norm: then each head is brought to norm 1 (of all but zeros).
    segment_ids: document of each token, of which alone it sees slots; padding, 0, is one like
    others. None: every slot of its row that is before it.
    implementation: "auto", a name, or names in order of preference; `explain` tells the choice.
    Returns y in the dtype of x. Differentiable in x, weight and bias. ValueError for shapes and
    dtypes that do not fit, and for an implementation that cannot run here.
    """
    choice = explain(
        x, weight, bias, unit_norm=unit_norm, segment_ids=segment_ids, implementation=implementation
    )
    x, weight, bias, segment_ids = recurrence.alike(x, weight, bias, segment_ids)
    y = choice.implementation.load()(x, weight, bias, segment_ids, silu=silu, unit_norm=unit_norm)
    return y.astype(x.dtype)


def explain(
    x, weight, bias=None, *, unit_norm=False, segment_ids=None, implementation="auto"
) -> dispatch.Choice:
    """Which implementation `short_convolution` takes for these arguments, and why not the others.

    Arrays may be jax.ShapeDtypeStruct. `str()` of the result is one line for people.
    """
    op = "short_convolution"
    for name, array in {"x": x, "weight": weight, "bias": bias}.items():
        if array is not None or name != "bias":
            recurrence.check_kind(op, name, array)
    if x.ndim != 4 or weight.ndim != 3 or weight.shape[:2] != x.shape[2:] or 0 in weight.shape:
        raise ValueError(
            f"{op}: x {x.shape} and weight {weight.shape} do not fit; they must be [B, T, N, H] "
            "and [N, H, W], with at least one head, feature and tap"
        )
    if bias is not None and bias.shape != x.shape[2:]:
        raise ValueError(f"{op}: bias has shape {bias.shape}; it must be {x.shape[2:]}")
    if segment_ids is not None:
        recurrence.check_kind(op, "segment_ids", segment_ids, jnp.integer)
        if segment_ids.shape != x.shape[:2]:
            raise ValueError(
                f"{op}: segment_ids has shape {segment_ids.shape}; it must be {x.shape[:2]}"
            )
    _, T, N, H = x.shape
    dtype = jax.dtypes.canonicalize_dtype(x.dtype).name
    facts = Facts(compat.target(), dtype, T, N, H, weight.shape[-1], unit_norm)
    return dispatch.choose(op, TABLE, facts, implementation)
