"""Attention for training and decoding: one function, several implementations."""

from jaxtyping import Array, Float

from pallas_kernels.attention import ref
from pallas_kernels.attention.mask import Mask


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
    implementation: "auto", a name, or names in the order of preference.
    Differentiable in q, k, v and sinks. ValueError for shapes, dtypes or masks that do not fit.
    """
    _check(q, k, v, mask, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ref.attention(q, k, v, mask=mask, scale=scale, soft_cap=soft_cap, sinks=sinks)


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
