"""Ring attention (arXiv 2310.01889): tokens stay on their devices, keys and values go round."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.attention import Mask, Term, attention, gradients
from pallas_kernels.attention.tile import merge


def ring_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    mask: Mask,
    axis_name: str,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    implementation: str | tuple[str, ...] = "auto",
) -> Float[Array, "B T N H"]:
    """`pallas_kernels.attention` over tokens that the mesh axis `axis_name` splits.

    To be called inside jax.shard_map(..., check_vma=False). The arrays, and the segments of `mask`,
    are each device's contiguous T tokens, in the order of the axis; the mask speaks of the whole
    sequence and has no index arrays. Its prefix lengths and `sinks` are the same on all devices.

    A causal mask would leave the first device idle for most of the time. So each of R devices takes
    two of 2R chunks of tokens, an early and a late one (zig-zag, as in the context parallelism of
    Llama 3, arXiv 2407.21783): every hop then costs every device two of four blocks, and kernels
    see causal and full masks alone.

    Nothing but q, k, v, the output and its log-sum-exp is kept for the backward pass, in which keys
    and values go round once more, with their gradients in fp32. A window ends the round when the
    keys are too far away. ValueError where T is odd under a causal mask, or the mask has indices.
    """
    if mask.query_index is not None or mask.key_index is not None:
        raise ValueError(
            "ring_attention: the mask has index arrays; tokens must be 0, 1, 2, ... in order"
        )
    mask.check(*query.shape[:2], key.shape[1])
    R, T = jax.lax.axis_size(axis_name), query.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if R == 1:
        return attention(
            query, key, value,
            mask=mask, scale=scale, soft_cap=soft_cap, sinks=sinks, implementation=implementation,
        )  # fmt: skip
    zigzag = mask.terms in ((Term(causal=True),), (Term(causal=True, segments=True),))
    if zigzag and T % 2:
        raise ValueError(
            f"ring_attention: a length of {R * T} over {R} devices; for a causal mask it must be a "
            f"multiple of {2 * R}, such as {2 * R * -(-T // 2)}"
        )
    options = (float(scale), soft_cap, implementation)
    reach = _reach(mask)
    hops = R if reach is None else min(R, 1 + -(-reach // T))
    ring = Ring(axis_name, R, reach, hops, zigzag, options)
    spread = functools.partial(_to_zigzag, axis_name, R) if zigzag else lambda x: x[None]
    parts = (spread(array) for array in (query, key, value))
    cut = mask.slice(spread, spread)
    out = _attend(ring, *parts, sinks, cut)
    return _from_zigzag(axis_name, R, out) if zigzag else out[0]


@dataclass(frozen=True)
class Ring:
    """What is static. Arrays have their parts of the tokens in front: one, or two in a zig-zag."""

    axis: str
    size: int
    reach: int | None  # tokens that a query looks back at most, where windows bound it
    hops: int  # of keys and values, those of the device itself included
    zigzag: bool
    options: tuple  # scale, soft-cap, implementation

    def blocks(self, mask: Mask, T: int, hop) -> Iterator[tuple]:
        """(queries, keys, mask) of what a device does at `hop`, as indices; T tokens in a part.

        At hop h a device has the keys of the h-th rank before its own. The first and the last hop
        are given as integers, so that they can be special.
        """
        rank = jax.lax.axis_index(self.axis)
        source = (rank - hop) % self.size
        own = isinstance(hop, int) and hop == 0
        if self.zigzag:
            causal, full = (
                replace(mask, terms=(replace(mask.terms[0], causal=flag),))
                for flag in (True, False)
            )
            yield 1, 0, full  # the late chunk of any rank follows the early chunk of any other
            if own:
                yield 0, 0, causal
                yield 1, 1, causal
            else:
                # The ranks before have earlier early chunks, those behind have earlier late ones.
                either = jnp.where(source < rank, 0, 1)
                yield either, either, full
        elif all(_relative(term, T) if own else _full(term) for term in mask.terms):
            yield 0, 0, mask
        else:
            near = T  # tokens of each side that can see, or be seen by, one of the other
            if self.reach is not None and isinstance(hop, int):
                near = min(T, self.reach - (hop - 1) * T)
            tokens = jnp.arange(T, dtype=jnp.int32)[None]
            indices = {
                "query_index": rank * T + tokens[:, :near],
                "key_index": source * T + tokens[:, T - near :],
            }
            every = slice(None)
            yield (0, every, slice(near)), (0, every, slice(T - near, T)), replace(mask, **indices)

    def send(self, arrays, distance: int = 1):
        """The arrays of the rank `distance` before one's own."""
        pairs = [(rank, (rank + distance) % self.size) for rank in range(self.size)]
        return jax.tree.map(lambda array: jax.lax.ppermute(array, self.axis, pairs), arrays)

    def around(self, visit: Callable, state, moving):
        """visit(state, moving, hop) -> state at every hop, with `moving` sent on meanwhile."""
        following = self.send(moving) if self.hops > 1 else None
        state = visit(state, moving, 0)

        def step(carry, hop):
            state, moving = carry
            following = self.send(moving)
            return (visit(state, moving, hop), following), None

        if self.hops > 2:
            hops = jnp.arange(1, self.hops - 1, dtype=jnp.int32)
            (state, following), _ = jax.lax.scan(step, (state, following), hops)
        return visit(state, following, self.hops - 1) if self.hops > 1 else state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: Ring, q, k, v, sinks, mask):
    """q [P, B, T, N, H], k and v [P, B, T, K, H] and segments [P, b, T] for P parts; out like q."""
    return _forward(ring, q, k, v, sinks, mask)[0]


def _forward(ring, q, k, v, sinks, mask):
    scale, soft_cap, implementation = ring.options

    def visit(state, moving, hop):
        out, lse = state
        k, v, key_segments = moving
        now = replace(mask, key_segments=key_segments)
        for i, j, block in ring.blocks(now, q.shape[2], hop):
            part = attention(
                q[i], k[j], v[j],
                mask=_of_parts(block, i, j), scale=scale, soft_cap=soft_cap,
                return_log_sum_exp=True, implementation=implementation,
            )  # fmt: skip
            merged = merge((out[i], lse[i]), part)
            out, lse = out.at[i].set(merged[0]), lse.at[i].set(merged[1])
        return out, lse

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
    out, lse = ring.around(visit, nothing, (k, v, mask.key_segments))
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32), lse.shape)
        out, lse = merge((out, lse), (jnp.zeros_like(out), sink))
    out, lse = checkpoint_name((out.astype(q.dtype), lse), "attention")
    return out, (q, k, v, sinks, mask, out, lse)


def _backward(ring, residuals, d_out):
    q, k, v, sinks, mask, out, lse = residuals
    scale, soft_cap, implementation = ring.options

    def visit(state, moving, hop):
        dq, dk, dv = state
        k, v, key_segments = moving
        if not (isinstance(hop, int) and hop == 0):
            dk, dv = ring.send((dk, dv))  # the gradients follow their keys
        now = replace(mask, key_segments=key_segments)
        for i, j, block in ring.blocks(now, q.shape[2], hop):
            parts = gradients(
                q[i], k[j], v[j], out[i], lse[i], d_out[i],
                mask=_of_parts(block, i, j), scale=scale, soft_cap=soft_cap,
                implementation=implementation,
            )  # fmt: skip
            dq, dk, dv = (
                whole.at[at].add(part)
                for whole, part, at in zip((dq, dk, dv), parts, (i, j, j), strict=True)
            )
        return dq, dk, dv

    nothing = tuple(jnp.zeros(array.shape, jnp.float32) for array in (q, k, v))
    dq, dk, dv = ring.around(visit, nothing, (k, v, mask.key_segments))
    if ring.hops > 1:
        dk, dv = ring.send((dk, dv), 1 - ring.hops)  # home
    d_sinks = None
    if sinks is not None:
        delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1)
        weight = jnp.exp(jnp.broadcast_to(sinks.astype(jnp.float32), lse.shape) - lse)
        d_sinks = -(weight * delta).sum(axis=(0, 1, 2)).astype(sinks.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_sinks, None


_attend.defvjp(_forward, _backward)


def _of_parts(mask: Mask, i, j) -> Mask:
    """The mask of queries i and keys j; index arrays are already those of them."""
    query_segments, key_segments = (
        None if array is None else array[at]
        for array, at in ((mask.query_segments, i), (mask.key_segments, j))
    )
    return replace(mask, query_segments=query_segments, key_segments=key_segments)


def _full(term: Term) -> bool:
    """Whether `term` asks for no more than the same segment."""
    return term == Term(segments=term.segments)


def _relative(term: Term, T: int) -> bool:
    """Whether `term` says the same of queries and keys that are moved by a multiple of T."""
    return not term.prefix and all(
        T % size == 0 for size in term.block_causal + term.block_diagonal
    )


def _reach(mask: Mask) -> int | None:
    """How many tokens before its own a query may see at most, None without a bound."""
    if not all(term.causal and term.window is not None for term in mask.terms):
        return None
    return max((term.window - 1 for term in mask.terms), default=0)


def _routes(R: int) -> tuple[list, list]:
    """(from, to) ranks of the first and the second halves: chunk c goes to c, or 2R - 1 - c."""
    target = lambda chunk: min(chunk, 2 * R - 1 - chunk)  # noqa: E731
    return tuple([(rank, target(2 * rank + half)) for rank in range(R)] for half in (0, 1))


def _to_zigzag(axis: str, R: int, array):
    """[B, T, ...] of contiguous tokens -> [2, B, T / 2, ...]: the early and the late chunk."""
    even, odd = (
        jax.lax.ppermute(half, axis, route)
        for half, route in zip(jnp.split(array, 2, axis=1), _routes(R), strict=True)
    )
    first = jax.lax.axis_index(axis) % 2 == 0  # rank r has chunks r and 2R - 1 - r
    return jnp.stack([jnp.where(first, even, odd), jnp.where(first, odd, even)])


def _from_zigzag(axis: str, R: int, parts):
    """The inverse of `_to_zigzag`."""
    early, late = parts
    first = jax.lax.axis_index(axis) % 2 == 0
    halves = jnp.where(first, early, late), jnp.where(first, late, early)
    return jnp.concatenate(
        [
            jax.lax.ppermute(half, axis, [(to, source) for source, to in route])
            for half, route in zip(halves, _routes(R), strict=True)
        ],
        axis=1,
    )
