"""The state pass over chunks on Hopper, with a decay a key feature: outputs and the final state.

As in `scan`, the transposed state [64, K] of a warpgroup stays in its registers. Decays and
documents are in what `vector_prepare` gives, and in the rows of the state that it keeps.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._hopper.frame import STAGES, Frame
from pallas_kernels._hopper.tiles import CHUNK, MATRIX, SQUARE, TILE, across, tiles


@functools.partial(jax.jit, static_argnames=("scale", "gives", "warpgroups"))
def scan(prepared, v, initial_state, *, scale, gives, warpgroups):
    """(o, values, states, final state), of which `gives` says which come; the last comes always.

    prepared: of `vector_prepare`; v [B, T, N, V]; initial and final state fp32 [B, N, V, K],
    transposed.
    gives: "out" o [B, T, N, V]; "states" for the backward pass the values [B, T, N, V] that are
    written, and the state before each chunk [B, N, T/64, V, K] in the dtype of v. The others are
    None.
    """
    B, T, N, V = v.shape
    K, dtype, chunks = initial_state.shape[3], v.dtype, T // CHUNK
    reads = gives == "out"
    frame = Frame(B, N, N, V, chunks, warpgroups)

    def kernel(*refs):
        refs = iter(refs)
        v_ref, predict_ref, write_ref, keep_ref, inverse_ref, initial_ref = (
            next(refs) for _ in range(6)
        )
        read_ref, scores_ref = (next(refs), next(refs)) if reads else (None, None)
        final_ref, out_ref = next(refs), next(refs)  # the values where nothing is read
        states_ref = None if reads else next(refs)

        def body(
            v_s, predict_s, write_s, keep_s, inverse_s, read_s, scores_s, out_s, states_s,
            full, empty,
        ):  # fmt: skip
            def fetch(place, get):
                batch, n, _, chunk, tokens, slot = place
                get(predict_ref.at[batch, tokens, n], predict_s.at[slot])
                for w in range(warpgroups):
                    get(v_ref.at[batch, tokens, n, frame.features(w)], v_s.at[slot, w])
                get(inverse_ref.at[batch, n, chunk], inverse_s.at[slot])
                get(write_ref.at[batch, tokens, n], write_s.at[slot])
                get(keep_ref.at[batch, n, chunk], keep_s.at[slot])
                if reads:
                    get(read_ref.at[batch, tokens, n], read_s.at[slot])
                    get(scores_ref.at[batch, n, chunk], scores_s.at[slot])

            def step(place, me, features, state):
                batch, n, _, chunk, tokens, slot = place
                v_t = plgpu.load(v_s.at[slot, me].T, layout=MATRIX).astype(jnp.float32)
                low = state.astype(dtype)

                def put(out):
                    """Copy what goes out, while products run."""
                    if reads:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_s.at[me].T[...] = out
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out_s.at[me], out_ref.at[batch, tokens, n, features])
                    if not reads:
                        target = states_ref.at[batch, n, chunk, features]
                        plgpu.copy_smem_to_gmem(states_s.at[me], target)

                def products(stored, written, read=None):
                    plgpu.wgmma(stored, low, predict_s.at[slot].T)
                    if reads:
                        plgpu.wgmma(read, low, read_s.at[slot].T)
                    else:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        states_s[me] = low
                    old = plgpu.wgmma_accumulator_load(stored, wait_n=int(reads))
                    plgpu.wgmma(written, (v_t - old).astype(dtype), inverse_s.at[slot].T)
                    value = written[...].astype(dtype)

                    def update(state_acc):
                        if not reads:
                            plgpu.wgmma(state_acc, value, write_s.at[slot])
                            put(value)
                            return

                        def show(o_acc):
                            plgpu.wgmma(o_acc, value, scores_s.at[slot].T)
                            plgpu.wgmma(state_acc, value, write_s.at[slot])
                            put(plgpu.wgmma_accumulator_load(o_acc, wait_n=1).astype(dtype))

                        pl.run_state(show)(plgpu.ACC.init(read[...] * scale))

                    keep = across(keep_s.at[slot], TILE)
                    return pl.run_state(update)(plgpu.ACC.init(state * keep))

                square = plgpu.ACC(SQUARE, jnp.float32)
                return pl.run_scoped(products, *[square] * (2 + reads))

            frame.walk(fetch, step, initial_ref, final_ref, full, empty)

        operand = tiles((STAGES, CHUNK, K), dtype)
        square = tiles((STAGES, *SQUARE), dtype)
        pl.run_scoped(
            body,
            tiles((STAGES, warpgroups, CHUNK, TILE), dtype),
            operand,
            operand,
            plgpu.SMEM((STAGES, K), jnp.float32),
            square,
            operand if reads else None,
            square if reads else None,
            tiles((warpgroups, CHUNK, TILE), dtype),
            None if reads else tiles((warpgroups, TILE, K), dtype),
            plgpu.Barrier(num_arrivals=4 + warpgroups + 2 * reads, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=STAGES),
            collective_axes="wg",
        )

    out = [
        jax.ShapeDtypeStruct((B, N, V, K), jnp.float32),
        jax.ShapeDtypeStruct((B, T, N, V), dtype),
    ]
    if not reads:
        out += [jax.ShapeDtypeStruct((B, N, chunks, V, K), dtype)]
    p = prepared
    operands = [v, p.predict, p.write, p.keep, p.inverse, initial_state]
    final, *rest = frame.launch(kernel, out)(*operands, *[p.read, p.scores] * reads)
    return (rest[0], None, None, final) if reads else (None, *rest, final)
