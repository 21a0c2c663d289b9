"""The TPU kernels of linear attention: rows and key heads in parallel, chunks in their order.

A program does one chunk of one value head, or of several that fill the lanes. The states of the
value heads of a key head stay in VMEM from chunk to chunk; the backward pass writes those that the
chunks meet, and goes back over them.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.gated_linear_attention import mosaic_tpu_scalar, mosaic_tpu_vector
from pallas_kernels.gated_linear_attention.mosaic_tpu_scalar import ROWS
from pallas_kernels.gated_linear_attention.support import TPU_CHUNK as CHUNK
from pallas_kernels.gated_linear_attention.support import VMEM_BYTES


class Layout(NamedTuple):
    """Blocks of the arrays for a program of the grid [B, H, M, R]: one chunk of one value head.

    The R value heads of a key head come one after the other, while its q and k stay in VMEM.
    """

    B: int
    T: int
    H: int
    N: int
    K: int
    V: int
    reverse: bool  # over the chunks

    @property
    def grid(self) -> tuple[int, int, int, int]:
        return self.B, self.H, self.T // CHUNK, self.N // self.H

    def _spec(self, block, index):
        _, _, M, R = self.grid
        at = lambda m: M - 1 - m if self.reverse else m  # noqa: E731
        return pl.BlockSpec(block, lambda b, h, m, r: index(b, h, h * R + r, at(m)))

    @property
    def keys(self) -> pl.BlockSpec:
        """Of q or k [B, T, H K]."""
        return self._spec((None, CHUNK, self.K), lambda b, h, n, m: (b, m, h))

    @property
    def values(self) -> pl.BlockSpec:
        """Of v or o [B, T, N V]."""
        return self._spec((None, CHUNK, self.V), lambda b, h, n, m: (b, m, n))

    @property
    def log_decays(self) -> pl.BlockSpec:
        """Of those of features [B, T, N K]."""
        return self._spec((None, CHUNK, self.K), lambda b, h, n, m: (b, m, n))

    def rows(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """Of gates [B or 1, P N or 1, ROWS, T]."""
        return self._spec(
            (None, max(1, shape[1] // self.N), ROWS, CHUNK),
            lambda b, h, n, m: (b if shape[0] > 1 else 0, n if shape[1] > 1 else 0, 0, m),
        )

    @property
    def states(self) -> pl.BlockSpec:
        """Of the state before each chunk [B, N, M, K, V]."""
        block = (None, None, None, self.K, self.V)
        return self._spec(block, lambda b, h, n, m: (b, n, m, 0, 0))

    @property
    def carry(self) -> pl.BlockSpec:
        """Of one state a value head [B, N, K, V]; in VMEM for all chunks."""
        block = (None, self.N // self.H, self.K, self.V)
        return self._spec(block, lambda b, h, n, m: (b, h, 0, 0))


class Kernels(NamedTuple):
    """The kernels for some arguments. sizes: B, T, H, N, K and V, where N heads of V features may
    each be P heads side by side.

    decay: "none", "scalar" or "vector". gates: (rows,), or (log decays, rows) for "vector".
    """

    sizes: tuple[int, ...]
    q: Float[Array, "B T HK"]
    k: Float[Array, "B T HK"]
    v: Float[Array, "B T NV"]
    gates: tuple
    decay: str
    scale: float
    interpret: bool | pltpu.InterpretParams

    @property
    def chunk(self):
        """The module with the functions of one chunk."""
        return mosaic_tpu_vector if self.decay == "vector" else mosaic_tpu_scalar

    def forward(self, state):
        """Outputs and final state."""
        layout = Layout(*self.sizes, reverse=False)
        return self._run(
            functools.partial(_forward, self.chunk, self.scale),
            layout,
            [(self.q, layout.keys), (self.k, layout.keys), (self.v, layout.values),
             (state, layout.carry)],
            [(self.v, layout.values), (state, layout.carry)],
        )  # fmt: skip

    def states(self, state):
        """The state before each chunk [B, N, M, K, V], in the dtype of k."""
        layout = Layout(*self.sizes, reverse=False)
        shape = (layout.B, layout.N, layout.grid[2], layout.K, layout.V)
        return self._run(
            functools.partial(_states, self.chunk),
            layout,
            [(self.k, layout.keys), (self.v, layout.values), (state, layout.carry)],
            [(jax.ShapeDtypeStruct(shape, self.k.dtype), layout.states)],
            [pltpu.VMEM(layout.carry.block_shape[1:], jnp.float32)],
        )[0]

    def backward(self, states, d_o, d_final):
        """Gradients of q, k, v and the first state, and with a decay of g, as its functions do."""
        layout = Layout(*self.sizes, reverse=True)
        d_gates = {
            "none": [],
            "scalar": [(self.gates[-1], layout.rows(self.gates[-1].shape))],
            "vector": [(self.gates[0], layout.log_decays)],
        }[self.decay]
        gradients = self.chunk.gradients
        if self.decay != "vector":
            gradients = functools.partial(gradients, with_gates=self.decay == "scalar")
        return self._run(
            functools.partial(_backward, gradients, self.scale),
            layout,
            [(self.q, layout.keys), (self.k, layout.keys), (self.v, layout.values),
             (d_o, layout.values), (states, layout.states), (d_final, layout.carry)],
            [(self.q, layout.keys), (self.k, layout.keys), (self.v, layout.values),
             (d_final, layout.carry), *d_gates],
            [pltpu.VMEM((CHUNK, layout.K), jnp.float32)] * 2,
        )  # fmt: skip

    def _run(self, kernel, layout, inputs, outputs, scratch=()):
        """kernel(gates, inputs, outputs, scratch) over the grid, each a tuple of references."""
        *g, rows = self.gates
        gates = [(x, layout.log_decays) for x in g] + [(rows, layout.rows(rows.shape))]
        counts = (len(gates), len(inputs), len(outputs), len(scratch))
        inputs = gates + inputs

        def body(*references):
            references = iter(references)
            kernel(*(tuple(itertools.islice(references, count)) for count in counts))

        return pl.pallas_call(
            body,
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
            grid=layout.grid,
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            scratch_shapes=list(scratch),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=VMEM_BYTES,
            ),
            interpret=self.interpret,
            name="gated_linear_attention",
        )(*(x for x, _ in inputs))


def _read(gates):
    """Gates as the functions of a chunk take them."""
    values = tuple(reference[...] for reference in gates)
    return values if len(values) > 1 else values[0]


def _start(carry, first):
    """Put a value head's state before its first chunk into `carry`, and return its place there."""
    head = pl.program_id(3)

    @pl.when(pl.program_id(2) == 0)
    def _():
        carry[head] = first[head]

    return head


def _forward(chunk, scale, gates, inputs, outputs, scratch):
    q, k, v, first = inputs
    o, carry = outputs
    head = _start(carry, first)
    out, carry[head] = chunk.attend(q[...], k[...], v[...], _read(gates), carry[head], scale)
    o[...] = out.astype(o.dtype)


def _states(chunk, gates, inputs, outputs, scratch):
    k, v, first = inputs
    (states,), (carry,) = outputs, scratch
    head = _start(carry, first)
    states[...] = carry[head].astype(states.dtype)
    carry[head] = chunk.advance(k[...], v[...], _read(gates), carry[head])


def _backward(gradients, scale, gates, inputs, outputs, scratch):
    q, k, v, d_o, state, last = inputs
    d_q, d_k, d_v, carry, *d_gates = outputs
    head = _start(carry, last)
    part_q, part_k, d_value, d_state, *d_gate = gradients(
        q[...], k[...], v[...], _read(gates), d_o[...], state[...], carry[head], scale
    )
    d_v[...] = d_value.astype(d_v.dtype)
    for reference, value in zip(d_gates, d_gate, strict=True):
        reference[...] = value
    carry[head] = d_state

    @pl.when(head == 0)
    def _():
        for total, part in zip(scratch, (part_q, part_k), strict=True):
            total[...] = part

    @pl.when(head > 0)
    def _():
        for total, part in zip(scratch, (part_q, part_k), strict=True):
            total[...] += part

    @pl.when(head == pl.num_programs(3) - 1)
    def _():
        d_q[...] = scratch[0][...].astype(d_q.dtype)
        d_k[...] = scratch[1][...].astype(d_k.dtype)
