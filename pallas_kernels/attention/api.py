"""Attention for training and decoding: one function, several implementations."""

from jaxtyping import Array, Float

from pallas_kernels._core import compat, dispatch
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.support import GRADIENTS, TABLE, Facts


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    return_log_sum_exp: bool = False,
    implementation: str | tuple[str, ...] = "auto",
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Grouped-query attention; `ref.attention` is its definition.

    mask: which keys a query may attend to (tokens).
    scale: of the dot products; None: 1 / sqrt(H).
    soft_cap: logits become soft_cap * tanh(logits / soft_cap).
    sinks: one logit a head that takes part in the softmax and has no value.
    return_log_sum_exp: also return the logarithm of the softmax's denominator, fp32, -inf for a
    query without keys: what merges the outputs over parts of the keys.
    implementation: "auto", a name ("cudnn", "splash", "splash_parts", "xla", "ref"), or names in
    order of preference; `explain` tells the choice.
    Differentiable in q, k, v and sinks; with the log-sum-exp by "xla" and "ref" alone ("cudnn" has
    no gradient of it, "splash" and "splash_parts" of neither). ValueError for shapes, dtypes or
    masks that do not fit, and for an implementation that cannot run here.
    """
    choice = explain(
        q, k, v, mask=mask, soft_cap=soft_cap, sinks=sinks, implementation=implementation
    )
    run = choice.implementation.load()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return run(
        q, k, v, mask=mask, scale=scale, soft_cap=soft_cap, sinks=sinks,
        return_log_sum_exp=return_log_sum_exp,
    )  # fmt: skip


def gradients(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    out: Float[Array, "B T N H"],
    log_sum_exp: Float[Array, "B T N"],
    d_out: Float[Array, "B T N H"],
    *,
    mask: Mask,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str | tuple[str, ...] = "auto",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """The backward pass over a part of the keys: fp32 terms of dq, dk and dv.

    k, v and mask are of the part; out, its cotangent d_out and log_sum_exp are of all keys (with
    any sinks). dq is to be summed over the parts. `ref.gradients` is its definition; the rest as
    in `attention`.
    """
    _check(q, k, v, mask, None)
    facts = _facts(q, k, mask, soft_cap, sinks=None)
    choice = dispatch.choose("attention.gradients", GRADIENTS, facts, implementation)
    run = choice.implementation.load()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return run(q, k, v, out, log_sum_exp, d_out, mask=mask, scale=scale, soft_cap=soft_cap)


def explain(
    q,
    k,
    v,
    *,
    mask: Mask,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks=None,
    implementation: str | tuple[str, ...] = "auto",
) -> dispatch.Choice:
    """Which implementation `attention` takes for these arguments, and why not the others.

    Arrays may be jax.ShapeDtypeStruct. `str()` of the result is one line for people.
    """
    _check(q, k, v, mask, sinks)
    facts = _facts(q, k, mask, soft_cap, sinks)
    return dispatch.choose("attention", TABLE, facts, implementation)


def _facts(q, k, mask, soft_cap, sinks) -> Facts:
    B, T, N, H = q.shape
    return Facts(
        compat.target(), q.dtype.name, B, T, k.shape[1], N, k.shape[2], H,
        mask, soft_cap is not None, sinks is not None,
    )  # fmt: skip


def _check(q, k, v, mask, sinks) -> None:
    """Raise one-line ValueErrors for arguments that do not fit together."""
    if not isinstance(mask, Mask):
        raise ValueError(
            f"mask is of type {type(mask).__name__}; it must be a pallas_kernels.Mask, which "
            "expressions give by .lower()"
        )
    shapes = (q.shape, k.shape, v.shape)
    same = q.shape[:1] + q.shape[3:] == k.shape[:1] + k.shape[3:] and k.shape == v.shape
    if not same or any(len(shape) != 4 for shape in shapes):
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not fit; q must be [B, T, N, H], k and v "
            "[B, S, K, H]"
        )
    if any(0 in shape for shape in shapes):
        raise ValueError(f"q {q.shape} or k {k.shape} is empty; give at least one token")
    if q.shape[2] % k.shape[2] != 0:
        raise ValueError(
            f"{q.shape[2]} query heads cannot share {k.shape[2]} key heads; "
            "the number of key heads must divide the number of query heads"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; cast them to one dtype"
        )
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(f"sinks has shape {sinks.shape}; it must be ({q.shape[2]},), one a head")
    mask.check(q.shape[0], q.shape[1], k.shape[1])
