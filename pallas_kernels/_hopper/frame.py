"""The frame of the state passes on Hopper: who fetches, who computes, and in which order.

A warpgroup owns 64 value features, and keeps its state [64, K] in registers from chunk to chunk.
One more warpgroup fetches the tiles of the next chunks.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._hopper.tiles import CHUNK, MATRIX, TILE

STAGES = 2  # chunks in flight
PROGRAMS = 132  # multiprocessors of an H100 or H200


class Place(NamedTuple):
    """A chunk of a value head n and its query and key head; its tiles are in `slot`."""

    batch: jax.Array
    n: jax.Array
    head: jax.Array
    chunk: jax.Array
    tokens: pl.Slice
    slot: jax.Array


class Frame(NamedTuple):
    """Sizes of a state pass: B rows, N value heads of V features, N / H of them a key head.

    Rows run in `pieces` of so many chunks each, side by side.
    """

    B: int
    H: int
    N: int
    V: int
    chunks: int
    warpgroups: int
    pieces: int = 1

    def features(self, warpgroup):
        """The value features of a warpgroup."""
        return pl.ds((lax.axis_index("v") * self.warpgroups + warpgroup) * TILE, TILE)

    def walk(self, fetch: Callable, step: Callable, first, last, full, empty, backwards=False):
        """From the state of `first` to that of `last` [B pieces, N, V, K], over all chunks.

        last None: for what the steps do alone.
        fetch(place, get): get(source, target) each tile, as many as `full` counts.
        step(place, warpgroup, features, state) -> state.
        """
        row, start = lax.axis_index("row"), 0
        if self.pieces > 1:
            row, piece = row // self.pieces, lax.rem(row, self.pieces)
            start = piece * self.chunks
        batch, n = row // self.N, lax.rem(row, self.N)
        head = n // (self.N // self.H)
        me = lax.axis_index("wg")
        own = batch if self.pieces == 1 else batch * self.pieces + piece

        def chunk(i):
            i = self.chunks - 1 - i if backwards else i
            return i if self.pieces == 1 else start + i

        def place(chunk, slot):
            return Place(batch, n, head, chunk, pl.ds(chunk * CHUNK, CHUNK), slot)

        @pl.when(me == self.warpgroups)
        def fetches():
            if self.warpgroups == 2:  # of 65536 registers: 128 * (232 + 232 + 40)
                plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, self.chunks)
            def _(i):
                slot, here = lax.rem(i, STAGES), chunk(i)

                @pl.when(i >= STAGES)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                def get(source, target):
                    plgpu.copy_gmem_to_smem(source, target, full.at[slot])

                fetch(place(here, slot), get)

        @pl.when(me < self.warpgroups)
        def computes():
            if self.warpgroups == 2:
                plgpu.set_max_registers(232, action="increase")
            features = self.features(me)

            def advance(i, state):
                slot = lax.rem(i, STAGES)
                here = place(chunk(i), slot)
                plgpu.barrier_wait(full.at[slot])
                state = step(here, me, features, state)
                plgpu.barrier_arrive(empty.at[slot])
                return state

            state = plgpu.load(first.at[own, n, features], layout=MATRIX, optimized=False)
            state = lax.fori_loop(0, self.chunks, advance, state)
            if last is not None:
                last[own, n, features] = state
            plgpu.wait_smem_to_gmem(0)

    def launch(self, kernel: Callable, out: list, **options):
        """`kernel` as a function of arrays, for all rows, heads and value features."""
        return plgpu.kernel(
            kernel,
            out_type=out,
            grid=(self.B * self.N * self.pieces, self.V // (TILE * self.warpgroups)),
            grid_names=("row", "v"),
            num_threads=self.warpgroups + 1,
            thread_name="wg",
            compiler_params=plgpu.CompilerParams(approx_math=True, **options),
        )
