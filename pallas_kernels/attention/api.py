"""Attention for training and decoding: one function, several implementations."""

from jaxtyping import Array, Float

from pallas_kernels._core import compat, dispatch
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.support import TABLE, Facts


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    implementation: str | tuple[str, ...] = "auto",
) -> Float[Array, "B T N H"]:
    """Grouped-query attention; `ref.attention` is its definition.

    mask: which keys a query may attend to (tokens).
    scale: of the dot products; None: 1 / sqrt(H).
    soft_cap: logits become soft_cap * tanh(logits / soft_cap).
    sinks: one logit a head that takes part in the softmax and has no value.
    implementation: "auto", a name ("cudnn", "splash", "xla", "ref"), or names in order of
    preference; `explain` tells the choice.
    Differentiable in q, k, v and sinks. ValueError for shapes, dtypes or masks that do not fit,
    and for an implementation that cannot run here.
    """
    choice = explain(
        q, k, v, mask=mask, soft_cap=soft_cap, sinks=sinks, implementation=implementation
    )
    run = choice.implementation.load()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return run(q, k, v, mask=mask, scale=scale, soft_cap=soft_cap, sinks=sinks)


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
    B, T, N, H = q.shape
    facts = Facts(
        compat.target(), q.dtype.name, B, T, k.shape[1], N, k.shape[2], H,
        mask, soft_cap is not None, sinks is not None,
    )  # fmt: skip
    return dispatch.choose("attention", TABLE, facts, implementation)


def _check(q, k, v, mask, sinks) -> None:
    """Raise one-line ValueErrors for arguments that do not fit together."""
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
