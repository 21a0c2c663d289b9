"""What the TPU kernels of the gated delta rule, forward and backward, do with one chunk."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._core.decay_sums import Sums
from pallas_kernels.gated_delta_rule import chunk

ROWS = ("coarse", "G", "beta", "documents")  # of the array of numbers a token and value head
BLOCK = 16  # rows of the diagonal blocks that are inverted by substitution
VMEM = 32 * 2**20  # bytes, of at least 64 MiB that chips have


@dataclass(frozen=True)
class Sizes:
    """Sizes of the padded problem; one step of the grid takes C tokens of `group` key heads."""

    B: int
    T: int
    H: int
    N: int
    K: int
    V: int
    C: int
    group: int
    decay: str
    documents: bool
    dtype: str
    scale: float
    interpret: object  # False, True or InterpretParams

    @property
    def n(self) -> int:
        """Chunks of a row."""
        return self.T // self.C

    @property
    def heads(self) -> int:
        """Value heads of a step of the grid."""
        return self.group * self.N // self.H

    def specs(self, reverse: bool = False) -> dict[str, pl.BlockSpec]:
        """The blocks of each kind of array; `reverse`: chunks from the last to the first."""

        def spec(block, *order):  # the places in the array of: row, chunk, heads
            def index(b, h, c):
                where = {"b": b, "h": h, "c": self.n - 1 - c if reverse else c, "0": 0}
                return tuple(where[name] for name in order)

            return pl.BlockSpec(block, index)

        K, V, C, heads = self.K, self.V, self.C, self.heads
        return {
            "keys": spec((1, C, self.group * K), *"bch"),
            "values": spec((1, C, heads * V), *"bch"),
            "features": spec((1, C, heads * K), *"bch"),
            "rows": spec((1, 1, heads, len(ROWS), C), *"bch00"),
            "state": spec((1, heads, K, V), *"bh00"),
            "states": spec((1, 1, heads, K, V), *"bch00"),
        }

    def shape(self, kind: str, dtype) -> jax.ShapeDtypeStruct:
        """Of the whole array of a kind."""
        B, T, H, N, K, V = self.B, self.T, self.H, self.N, self.K, self.V
        shapes = {
            "keys": (B, T, H * K),
            "values": (B, T, N * V),
            "features": (B, T, N * K),
            "rows": (B, self.n, N, len(ROWS), self.C),
            "state": (B, N, K, V),
            "states": (B, self.n, N, K, V),
        }
        return jax.ShapeDtypeStruct(shapes[kind], dtype)

    def call(self, kernel, inputs: dict, kinds: dict, outputs: dict, reverse: bool = False) -> dict:
        """Run `kernel(inputs, outputs, state)` over the grid, with a state [heads, K, V] kept.

        kinds: of the inputs; outputs: (kind, dtype) by name.
        """
        specs = self.specs(reverse)
        return pl.pallas_call(
            kernel,
            grid=(self.B, self.H // self.group, self.n),
            in_specs=[{name: specs[kinds[name]] for name in inputs}],
            out_specs={name: specs[kind] for name, (kind, _) in outputs.items()},
            out_shape={name: self.shape(*kind) for name, kind in outputs.items()},
            scratch_shapes=[pltpu.VMEM((self.heads, self.K, self.V), jnp.float32)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=VMEM,
            ),
            interpret=self.interpret,
        )(inputs)


KINDS = {
    "q": "keys",
    "k": "keys",
    "v": "values",
    "coarse": "features",
    "G": "features",
    "rows": "rows",
    "state": "state",
    "states": "states",
    "d_o": "values",
    "d_state": "state",
}


def read(sizes: Sizes, refs: dict) -> dict:
    """What a chunk's step differentiates in, as lists over heads: q, k, v, beta and G, all fp32."""
    tokens = {name: _split(refs, name, sizes.K, sizes.group) for name in ("q", "k")}
    tokens["v"] = _split(refs, "v", sizes.V, sizes.heads)
    tokens["beta"] = [row(refs["rows"], head, "beta")[...] for head in range(sizes.heads)]
    if sizes.decay != "none":
        tokens["G"] = _decays(sizes, refs, "G")
    return tokens


def constants(sizes: Sizes, refs: dict) -> dict:
    """What it does not: `documents` started [1, C], and `coarse` parts of G over heads, if any."""
    given = {}
    if sizes.documents:
        given["documents"] = row(refs["rows"], 0, "documents")[...]
    if sizes.decay != "none":
        given["coarse"] = _decays(sizes, refs, "coarse")
    return given


def _split(refs: dict, name: str, width: int, heads: int) -> list:
    ref = refs[name]
    return [ref[0, :, h * width : (h + 1) * width].astype(jnp.float32) for h in range(heads)]


def _decays(sizes: Sizes, refs: dict, name: str) -> list:
    if sizes.decay == "vector":
        return _split(refs, name, sizes.K, sizes.heads)
    return [row(refs["rows"], head, name)[...] for head in range(sizes.heads)]


def row(ref, head: int, name: str):
    """The part [1, C] of an array of numbers a token that has those called `name`."""
    place = ROWS.index(name)
    return ref.at[0, 0, head, place : place + 1]


def advance(sizes: Sizes, tokens: dict, states: list, given: dict) -> tuple[list, list]:
    """(states after the chunk, o) of each value head."""
    new_states, outputs = [], []
    for head in range(sizes.heads):
        of_key = head * sizes.group // sizes.heads
        parts = chunk.prepare(
            tokens["q"][of_key],
            tokens["k"][of_key],
            Sums(given["coarse"][head], tokens["G"][head]) if "G" in tokens else None,
            tokens["beta"][head],
            given.get("documents"),
            scale=sizes.scale,
            dtype=jnp.dtype(sizes.dtype),
            invert=invert,
        )
        state, o = chunk.advance(states[head], parts, tokens["v"][head], jnp.dtype(sizes.dtype))
        new_states.append(state)
        outputs.append(o)
    return new_states, outputs


def invert(lower):
    """(I + lower)^-1 [C, C]: substitution in diagonal blocks of 16, which are then merged.

    The blocks are eliminated column by column, all at once; a merge adds -X L X where L has the
    blocks between neighbours. The doubling product would lose all digits for similar keys.
    """
    C, block = lower.shape[0], BLOCK
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    inverse = jnp.where(row == column, 1.0, 0.0)
    diagonal = jnp.where(row // block == column // block, lower, 0.0)
    for i in range(block - 1):
        factors = jnp.sum(jnp.where(column % block == i, diagonal, 0.0), axis=1, keepdims=True)
        blocks = inverse.reshape(C // block, block, C)
        rows = jnp.broadcast_to(blocks[:, i : i + 1], blocks.shape).reshape(C, C)
        inverse = inverse - factors * rows
    while block < C:
        between = (row // block % 2 == 1) & (column // block == row // block - 1)
        product = chunk.dot(jnp.where(between, lower, 0.0), inverse, "nn", jnp.float32)
        inverse = inverse - chunk.dot(inverse, product, "nn", jnp.float32)
        block *= 2
    return inverse
