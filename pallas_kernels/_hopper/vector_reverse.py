"""`reverse` with a decay a key feature, which also leaves the gradients of all states.

As in `reverse`, a warpgroup owns 64 value features and keeps the transposed gradient in registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._hopper.frame import STAGES, Frame
from pallas_kernels._hopper.tiles import CHUNK, MATRIX, SQUARE, TILE, across, tiles


@functools.partial(jax.jit, static_argnames=("scale", "warpgroups"))
def reverse(prepared, d_out, d_final, *, scale, warpgroups):
    """(d_v, d_states, d_initial) from the gradients of the output and of the final state.

    prepared: of `vector_prepare`; d_out, d_v [B, T, N, V]; d_final, d_initial fp32 [B, N, V, K],
    transposed; d_states [B, N, T/64, V, K] of the state after each chunk, in the dtype of d_out.
    """
    B, T, N, V = d_out.shape
    K, dtype = d_final.shape[3], d_out.dtype
    frame = Frame(B, N, N, V, T // CHUNK, warpgroups)

    def kernel(
        read_ref, predict_ref, write_ref, keep_ref, d_out_ref, scores_ref, inverse_ref, d_final_ref,
        d_initial_ref, d_v_ref, d_states_ref,
    ):  # fmt: skip
        def body(
            read_s, predict_s, write_s, keep_s, d_out_s, scores_s, inverse_s, d_v_s, d_state_s,
            full, empty,
        ):  # fmt: skip
            def fetch(place, get):
                batch, n, _, chunk, tokens, slot = place
                get(read_ref.at[batch, tokens, n], read_s.at[slot])
                get(predict_ref.at[batch, tokens, n], predict_s.at[slot])
                get(write_ref.at[batch, tokens, n], write_s.at[slot])
                get(keep_ref.at[batch, n, chunk], keep_s.at[slot])
                get(scores_ref.at[batch, n, chunk], scores_s.at[slot])
                get(inverse_ref.at[batch, n, chunk], inverse_s.at[slot])
                for w in range(warpgroups):
                    get(d_out_ref.at[batch, tokens, n, frame.features(w)], d_out_s.at[slot, w])

            def step(place, me, features, d_state):
                batch, n, _, chunk, tokens, slot = place
                d_out_t = plgpu.load(d_out_s.at[slot, me].T, layout=MATRIX)
                low = d_state.astype(dtype)

                def products(written, out):
                    """Gradient of the values that the chunk's queries and its end have read."""
                    plgpu.wgmma(written, low, write_s.at[slot].T)
                    plgpu.wgmma(written, d_out_t, scores_s.at[slot])
                    # While the products run. Also orders what follows after the chunk before.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    d_state_s[me] = low
                    plgpu.commit_smem()
                    target = d_states_ref.at[batch, n, chunk, features]
                    plgpu.copy_smem_to_gmem(d_state_s.at[me], target)
                    plgpu.wgmma(out, written[...].astype(dtype), inverse_s.at[slot])
                    return out[...]

                d_v = pl.run_scoped(products, *[plgpu.ACC((TILE, CHUNK), jnp.float32)] * 2)
                to_key = (-d_v).astype(dtype)
                to_query = (d_out_t.astype(jnp.float32) * scale).astype(dtype)

                def update(accumulator):
                    plgpu.wgmma(accumulator, to_query, read_s.at[slot])
                    plgpu.wgmma(accumulator, to_key, predict_s.at[slot])
                    d_v_s.at[me].T[...] = d_v.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(d_v_s.at[me], d_v_ref.at[batch, tokens, n, features])

                return pl.run_state(update)(plgpu.ACC.init(d_state * across(keep_s.at[slot], TILE)))

            frame.walk(fetch, step, d_final_ref, d_initial_ref, full, empty, backwards=True)

        operand = tiles((STAGES, CHUNK, K), dtype)
        square = tiles((STAGES, *SQUARE), dtype)
        pl.run_scoped(
            body,
            operand,
            operand,
            operand,
            plgpu.SMEM((STAGES, K), jnp.float32),
            tiles((STAGES, warpgroups, CHUNK, TILE), dtype),
            square,
            square,
            tiles((warpgroups, CHUNK, TILE), dtype),
            tiles((warpgroups, TILE, K), dtype),
            plgpu.Barrier(num_arrivals=6 + warpgroups, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=STAGES),
            collective_axes="wg",
        )

    out = [
        jax.ShapeDtypeStruct((B, N, V, K), jnp.float32),
        jax.ShapeDtypeStruct((B, T, N, V), dtype),
        jax.ShapeDtypeStruct((B, N, T // CHUNK, V, K), dtype),
    ]
    p = prepared
    operands = p.read, p.predict, p.write, p.keep, d_out, p.scores, p.inverse, d_final
    d_initial, d_v, d_states = frame.launch(kernel, out)(*operands)
    return d_v, d_states, d_initial
