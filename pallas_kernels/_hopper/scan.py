"""The state pass over chunks on Hopper: outputs and the final state, or the state of every chunk.

Everything is kept transposed: a warpgroup owns 64 value features, and its state S^T [64, K] never
leaves the registers. It is the left operand of every product; right operands are tiles in shared
memory, so warpgroups need not speak to each other. One more warpgroup fetches the tiles.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._hopper.tiles import CHUNK, MATRIX, SQUARE, TILE, across, tiles

STAGES = 2  # chunks in flight


def registers(warpgroups: int, fetches: bool) -> None:
    """Give the registers of the warpgroup that fetches to the two that compute."""
    if warpgroups == 2:  # of 65536: 128 * (232 + 232 + 40)
        plgpu.set_max_registers(*((40,) if fetches else (232,)),
                                action="decrease" if fetches else "increase")  # fmt: skip


@functools.partial(jax.jit, static_argnames=("scale", "gives", "warpgroups"))
def scan(q, k, v, gates, scores, inverse, initial_state, *, scale, gives, warpgroups):
    """(o, states, values, final state), of which `gives` names one; the final state comes always.

    q, k [B, T, H, K], v [B, T, N, V]; gates, scores and inverse from `prepare`, inverse None
    without the delta rule; initial and final state fp32 [B, N, V, K], transposed.
    gives: "out" o [B, T, N, V]; "states" those before each chunk, [B, N, T/64, V, K], and the
    values [B, T, N, V] that the delta rule writes; "final" neither. The others are None, and q and
    scores are read for "out" alone.
    """
    B, T, H, K = k.shape
    N, V = v.shape[2:]
    chunks, dtype = T // CHUNK, k.dtype
    delta = inverse is not None
    reads, states = gives == "out", gives == "states"
    leaves = reads or (states and delta)  # something [B, T, N, V]
    shared = N // H

    def kernel(*refs):
        refs = iter(refs)
        k_ref, v_ref, gates_ref, initial_ref = (next(refs) for _ in range(4))
        inverse_ref = next(refs) if delta else None
        q_ref, scores_ref = (next(refs), next(refs)) if reads else (None, None)
        final_ref = next(refs)
        states_ref = next(refs) if states else None
        out_ref = next(refs, None)  # o, or the values written

        def body(k_s, v_s, gates_s, q_s, scores_s, inverse_s, out_s, states_s, full, empty):
            row = lax.axis_index("row")
            batch, n = row // N, lax.rem(row, N)
            head = n // shared
            me = lax.axis_index("wg")

            @pl.when(me == warpgroups)
            def fetch():
                registers(warpgroups, fetches=True)

                @pl.loop(0, chunks)
                def _(i):
                    slot = lax.rem(i, STAGES)

                    @pl.when(i >= STAGES)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    tokens, barrier = pl.ds(i * CHUNK, CHUNK), full.at[slot]

                    def get(source, target):
                        plgpu.copy_gmem_to_smem(source, target, barrier)

                    get(k_ref.at[batch, tokens, head], k_s.at[slot])
                    get(gates_ref.at[batch, n, i], gates_s.at[slot])
                    for w in range(warpgroups):
                        features = pl.ds((lax.axis_index("v") * warpgroups + w) * TILE, TILE)
                        get(v_ref.at[batch, tokens, n, features], v_s.at[slot, w])
                    if delta:
                        get(inverse_ref.at[batch, n, i], inverse_s.at[slot])
                    if reads:
                        get(q_ref.at[batch, tokens, head], q_s.at[slot])
                        get(scores_ref.at[batch, n, i], scores_s.at[slot])

            @pl.when(me < warpgroups)
            def compute():
                registers(warpgroups, fetches=False)
                features = pl.ds((lax.axis_index("v") * warpgroups + me) * TILE, TILE)

                def step(i, state):
                    slot = lax.rem(i, STAGES)
                    tokens = pl.ds(i * CHUNK, CHUNK)
                    plgpu.barrier_wait(full.at[slot])
                    v_t = plgpu.load(v_s.at[slot, me].T, layout=MATRIX).astype(jnp.float32)
                    before, after = (across(gates_s.at[slot, x], TILE) for x in (0, 1))
                    whole = gates_s[slot, 0, CHUNK - 1]
                    low = state.astype(dtype)

                    def put(out):
                        """Copy the output, and the state where asked for, while products run."""
                        if reads:
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        if out is not None:
                            out_s.at[me].T[...] = out
                        plgpu.commit_smem()
                        if out is not None:
                            target = out_ref.at[batch, tokens, n, features]
                            plgpu.copy_smem_to_gmem(out_s.at[me], target)
                        if states:
                            target = states_ref.at[batch, n, i, features]
                            plgpu.copy_smem_to_gmem(states_s.at[me], target)

                    def products(read=None, stored=None, written=None):
                        if delta:
                            plgpu.wgmma(stored, low, k_s.at[slot].T)
                        if reads:
                            plgpu.wgmma(read, low, q_s.at[slot].T)
                        elif states:  # while the product runs
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            states_s[me] = low
                        value = v_t
                        if delta:
                            old = plgpu.wgmma_accumulator_load(stored, wait_n=int(reads))
                            error = (v_t - before * old).astype(dtype)
                            plgpu.wgmma(written, error, inverse_s.at[slot].T)
                            value = written[...]
                        low_value, kept = value.astype(dtype), (value * after).astype(dtype)

                        def update(state_acc):
                            if not reads:
                                plgpu.wgmma(state_acc, kept, k_s.at[slot])
                                if states:
                                    put(low_value if delta else None)
                            elif delta:

                                def show(o_acc):
                                    plgpu.wgmma(o_acc, low_value, scores_s.at[slot].T)
                                    plgpu.wgmma(state_acc, kept, k_s.at[slot])
                                    put(plgpu.wgmma_accumulator_load(o_acc, wait_n=1).astype(dtype))

                                pl.run_state(show)(plgpu.ACC.init(read[...] * before * scale))
                            else:  # the new state does not wait for what is read from the old one
                                plgpu.wgmma(state_acc, kept, k_s.at[slot])
                                old = plgpu.wgmma_accumulator_load(read, wait_n=1)

                                def show(o_acc):
                                    plgpu.wgmma(o_acc, low_value, scores_s.at[slot].T)

                                put(pl.run_state(show)(
                                    plgpu.ACC.init(old * before * scale)
                                ).astype(dtype))  # fmt: skip

                        return pl.run_state(update)(plgpu.ACC.init(state * whole))

                    square = plgpu.ACC((TILE, CHUNK), jnp.float32)
                    scoped = {"read": square} if reads else {}
                    scoped |= {"stored": square, "written": square} if delta else {}
                    state = pl.run_scoped(products, **scoped) if scoped else products()
                    plgpu.barrier_arrive(empty.at[slot])
                    return state

                state = plgpu.load(initial_ref.at[batch, n, features], layout=MATRIX,
                                   optimized=False)  # fmt: skip
                state = lax.fori_loop(0, chunks, step, state)
                final_ref[batch, n, features] = state
                plgpu.wait_smem_to_gmem(0)

        copies = 2 + warpgroups + delta + 2 * reads
        pl.run_scoped(
            body,
            tiles((STAGES, CHUNK, K), dtype),
            tiles((STAGES, warpgroups, CHUNK, TILE), dtype),
            plgpu.SMEM((STAGES, 2, CHUNK), jnp.float32),
            tiles((STAGES, CHUNK, K), dtype) if reads else None,
            tiles((STAGES, *SQUARE), dtype) if reads else None,
            tiles((STAGES, *SQUARE), dtype) if delta else None,
            tiles((warpgroups, CHUNK, TILE), dtype) if leaves else None,
            tiles((warpgroups, TILE, K), dtype) if states else None,
            plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=STAGES),
            collective_axes="wg",
        )

    values = jax.ShapeDtypeStruct((B, T, N, V), dtype)
    out = [jax.ShapeDtypeStruct((B, N, V, K), jnp.float32)]
    if states:
        out += [jax.ShapeDtypeStruct((B, N, chunks, V, K), dtype)]
    if leaves:
        out += [values]
    operands = [k, v, gates, initial_state] + [inverse] * delta + [q, scores] * reads
    final, *rest = plgpu.kernel(
        kernel,
        out_type=out,
        grid=(B * N, V // (TILE * warpgroups)),
        grid_names=("row", "v"),
        num_threads=warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)
    rest = iter(rest)
    states = next(rest) if states else None
    left = next(rest, None)
    return left if reads else None, states, None if reads else left, final
