"""The delta rule's state pass backwards on Hopper: the gradient of what each chunk writes.

As in `scan`, a warpgroup owns 64 value features and keeps the transposed gradient in registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._hopper.frame import STAGES, Frame
from pallas_kernels._hopper.tiles import CHUNK, MATRIX, SQUARE, TILE, across, tiles


@functools.partial(jax.jit, static_argnames=("scale", "warpgroups", "pieces"))
def reverse(q, k, d_out, gates, scores, inverse, d_final, *, scale, warpgroups, pieces):
    """(d_v, d_states, d_initial) from the gradients of the output and of the final state.

    d_out, d_v [B, T, N, V]; d_final, d_initial fp32 [B, N, V, K], transposed; the rest as in
    `scan`. d_states fp32 [B, N, pieces, V, K] of the state after each piece; None of one piece.
    """
    B, T, H, K = q.shape
    N, V = d_out.shape[2:]
    chunks, dtype = T // CHUNK, q.dtype
    length = chunks // pieces
    frame = Frame(B, H, N, V, chunks, warpgroups)

    def kernel(*refs):
        refs = iter(refs)
        q_ref, k_ref, d_out_ref, gates_ref, scores_ref, inverse_ref, d_final_ref = (
            next(refs) for _ in range(7)
        )
        d_initial_ref, d_v_ref = next(refs), next(refs)
        d_states_ref = next(refs) if pieces > 1 else None

        def body(q_s, k_s, d_out_s, gates_s, scores_s, inverse_s, d_v_s, full, empty):
            def fetch(place, get):
                batch, n, head, chunk, tokens, slot = place
                get(q_ref.at[batch, tokens, head], q_s.at[slot])
                get(k_ref.at[batch, tokens, head], k_s.at[slot])
                get(gates_ref.at[batch, n, chunk], gates_s.at[slot])
                get(scores_ref.at[batch, n, chunk], scores_s.at[slot])
                get(inverse_ref.at[batch, n, chunk], inverse_s.at[slot])
                for w in range(warpgroups):
                    get(d_out_ref.at[batch, tokens, n, frame.features(w)], d_out_s.at[slot, w])

            def step(place, me, features, d_state):
                batch, n, _, chunk, tokens, slot = place
                d_out_t = plgpu.load(d_out_s.at[slot, me].T, layout=MATRIX)
                before = across(gates_s.at[slot, 0], TILE)
                whole = gates_s[slot, 0, CHUNK - 1]
                low = d_state.astype(dtype)
                if pieces > 1:

                    @pl.when(lax.rem(chunk, length) == length - 1)
                    def _():
                        d_states_ref[batch, n, chunk // length, features] = d_state

                def products(stored, shown, out):
                    """Gradient of the values that the chunk's queries and its end have read."""
                    plgpu.wgmma(stored, low, k_s.at[slot].T)
                    plgpu.wgmma(shown, d_out_t, scores_s.at[slot])
                    # While the products run. Also orders what follows after the chunk before.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    after = across(gates_s.at[slot, 1], TILE)
                    written = (stored[...] * after + shown[...]).astype(dtype)
                    plgpu.wgmma(out, written, inverse_s.at[slot])
                    return out[...]

                d_v = pl.run_scoped(products, *[plgpu.ACC((TILE, CHUNK), jnp.float32)] * 3)
                to_key = (-d_v * before).astype(dtype)
                to_query = (d_out_t.astype(jnp.float32) * before * scale).astype(dtype)

                def update(accumulator):
                    plgpu.wgmma(accumulator, to_query, q_s.at[slot])
                    plgpu.wgmma(accumulator, to_key, k_s.at[slot])
                    d_v_s.at[me].T[...] = d_v.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(d_v_s.at[me], d_v_ref.at[batch, tokens, n, features])

                return pl.run_state(update)(plgpu.ACC.init(d_state * whole))

            frame.walk(fetch, step, d_final_ref, d_initial_ref, full, empty, backwards=True)

        operand = tiles((STAGES, CHUNK, K), dtype)
        square = tiles((STAGES, *SQUARE), dtype)
        pl.run_scoped(
            body,
            operand,
            operand,
            tiles((STAGES, warpgroups, CHUNK, TILE), dtype),
            plgpu.SMEM((STAGES, 2, CHUNK), jnp.float32),
            square,
            square,
            tiles((warpgroups, CHUNK, TILE), dtype),
            plgpu.Barrier(num_arrivals=5 + warpgroups, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=STAGES),
            collective_axes="wg",
        )

    d_state = jax.ShapeDtypeStruct((B, N, V, K), jnp.float32)
    out = [d_state, jax.ShapeDtypeStruct((B, T, N, V), dtype)]
    if pieces > 1:
        out += [jax.ShapeDtypeStruct((B, N, pieces, V, K), jnp.float32)]
    operands = q, k, d_out, gates, scores, inverse, d_final
    d_initial, d_v, *d_states = frame.launch(kernel, out)(*operands)
    return d_v, d_states[0] if d_states else None, d_initial
