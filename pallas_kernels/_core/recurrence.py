"""What the recurrent ops share: shapes, packed documents, and checks of their arguments.

Sizes: B rows, T tokens, H heads of q and k, N = r H heads of v and the gates (value head n uses
query and key head n // r), K key features, V value features.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels._core import compat


@dataclass(frozen=True)
class Facts:
    """What the choice of an implementation depends on. decay: "none", "scalar" or "vector"."""

    target: compat.Target
    dtype: str
    B: int
    T: int
    H: int
    N: int
    K: int
    V: int
    decay: str
    segments: bool


class Documents(NamedTuple):
    """Packed documents of the rows.

    index: number of each token's document in its row, from 0, never falling; padding has that of
    the token before it. The initial state belongs to document 0. real: False for padding.
    """

    index: Int[Array, "B T"]
    real: Bool[Array, "B T"]


def documents(segment_ids: Int[Array, "B T"]) -> Documents:
    """Documents from segment ids: 0 is padding; each change between two real tokens starts one."""
    real = segment_ids > 0
    place = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    last_real = jax.lax.cummax(jnp.where(real, place, -1), axis=1)
    before = jnp.pad(last_real, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    id_before = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    starts = real & (before >= 0) & (segment_ids != id_before)
    return Documents(jnp.cumsum(starts, axis=1, dtype=jnp.int32), real)


def over_heads(x: Float[Array, "B T H *K"], heads: int) -> Float[Array, "B T N *K"]:
    """q or k with one head for each of `heads` value heads."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def decay_kind(g) -> str:
    """ "none", "scalar" (a number a head and token) or "vector" (one a key feature)."""
    return "none" if g is None else {3: "scalar", 4: "vector"}[g.ndim]


def facts(q, v, g, segment_ids) -> Facts:
    """The facts of the arguments, here."""
    B, T, H, K = q.shape
    return Facts(
        compat.target(), jax.dtypes.canonicalize_dtype(q.dtype).name, B, T, H, v.shape[2], K,
        v.shape[3], decay_kind(g), segment_ids is not None,
    )  # fmt: skip


def check_kind(op: str, name: str, x, kind=jnp.floating) -> None:
    """Raise a one-line ValueError if `x` is no array, or not of `kind` (None: any)."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise ValueError(f"{op}: {name} must be an array, as of jnp.asarray; it is {_shown(x)}")
    if kind is not None and not jnp.issubdtype(x.dtype, kind):
        kinds = {jnp.floating: "a floating-point dtype", jnp.integer: "integers"}
        raise ValueError(f"{op}: {name} has dtype {x.dtype}; cast it to {kinds[kind]}")


def _shown(x) -> str:
    """The beginning of what Python shows, in one line."""
    return " ".join(repr(x).split())[:40]


def alike(*arrays):
    """The arrays (None stays) as JAX's, of types that it has, NumPy's too.

    Each varies over every manual mesh axis that one of them varies over: in jax.shard_map scans ask
    that of what they carry, and rules of gradients of what they return.
    """
    arrays = jax.tree.map(jnp.asarray, arrays)

    def axes(x) -> frozenset[str]:
        return jax.typeof(x).manual_axis_type.varying

    every = frozenset().union(*map(axes, jax.tree.leaves(arrays)))

    def cast(x):
        missing = tuple(sorted(every - axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, arrays)


def number(op: str, scale, features: int) -> float:
    """`scale`, or features ** -0.5 for None; kernels are compiled for one number."""
    if scale is None:
        return features**-0.5
    known = not isinstance(scale, jax.core.Tracer) and np.ndim(scale) == 0
    if not known or not np.isreal(scale) or isinstance(scale, str) or not np.isfinite(scale):
        raise ValueError(
            f"{op}: scale must be one finite number that is known outside of jax.jit, or None for "
            f"K ** -0.5; it is {_shown(scale)}; multiply q by any other"
        )
    return float(scale)


def check(op: str, q, k, v, g, initial_state, segment_ids, *, vector=True, **gates) -> None:
    """Raise one-line ValueErrors for arguments that do not fit together, or decays above 0.

    vector: whether a decay of each key feature is known. gates: others [B, T, N], by name.
    Values are looked at where they are known, that is outside of jax.jit.
    """
    for name, x in {"q": q, "k": k, "v": v}.items():
        check_kind(op, name, x, None)  # their dtypes are told together, below
    for name, x in (gates | {"g": g, "initial_state": initial_state}).items():
        if x is not None or name in gates:
            check_kind(op, name, x)
    if segment_ids is not None:
        check_kind(op, "segment_ids", segment_ids, jnp.integer)
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"{op}: q {q.shape}, k {k.shape} and v {v.shape} do not fit; "
            "q and k must be [B, T, H, K] and v [B, T, N, V]"
        )
    (B, T, H, K), (N, V) = q.shape, v.shape[2:]
    if T == 0:
        raise ValueError(f"{op}: no tokens (T = 0); give at least one")
    if 0 in (B, H, K, N, V):
        raise ValueError(
            f"{op}: q {q.shape} and v {v.shape} are empty; rows, heads and features must be at "
            "least 1"
        )
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"{op}: q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; "
            "cast them to one floating-point dtype"
        )
    if N % H:
        raise ValueError(
            f"{op}: {N} value heads cannot share {H} key heads; "
            "the number of key heads must divide the number of value heads"
        )
    if g is not None and g.shape != (B, T, N) and not (vector and g.shape == (B, T, N, K)):
        other = f", or {(B, T, N, K)} for a decay of each key feature" if vector else ""
        raise ValueError(
            f"{op}: the log decay g has shape {g.shape}; it must be {(B, T, N)}{other}"
        )
    for name, gate in gates.items():
        if gate.shape != (B, T, N):
            raise ValueError(f"{op}: {name} has shape {gate.shape}; it must be {(B, T, N)}")
    if initial_state is not None and initial_state.shape != (B, N, K, V):
        raise ValueError(
            f"{op}: initial_state has shape {initial_state.shape}; it must be {(B, N, K, V)}"
        )
    if segment_ids is not None and segment_ids.shape != (B, T):
        raise ValueError(f"{op}: segment_ids has shape {segment_ids.shape}; it must be {(B, T)}")
    if isinstance(g, jax.Array | np.ndarray) and not isinstance(g, jax.core.Tracer):
        with jax.ensure_compile_time_eval():  # a constant of a function that is being traced
            largest = float(jnp.max(g))  # NaN if there is one
        if not largest <= 0:
            raise ValueError(
                f"{op}: the log decay g has a value of {largest}; it must be at most 0 and "
                "not NaN: give the logarithm of a decay in (0, 1], such as -softplus(x)"
            )
