"""The state pass backwards on Hopper: the gradient of the state after each chunk.

As in `scan`, a warpgroup owns 64 value features and keeps the transposed gradient in registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._hopper.frame import STAGES, Frame
from pallas_kernels._hopper.tiles import CHUNK, MATRIX, SQUARE, TILE, across, tiles


@functools.partial(jax.jit, static_argnames=("scale", "warpgroups"))
def reverse(q, k, d_out, gates, scores, inverse, d_final, *, scale, warpgroups):
    """(d_states, d_v, d_initial) from the gradients of the output and of the final state.

    d_out [B, T, N, V]; d_final, d_initial fp32 [B, N, V, K], transposed; the rest as in `scan`.
    d_states [B, N, T/64, V, K] is of the state after each chunk; d_v [B, T, N, V] with the delta
    rule, whose inverse is then given, else None (and k and scores are not read).
    """
    B, T, H, K = q.shape
    N, V = d_out.shape[2:]
    chunks, dtype = T // CHUNK, q.dtype
    delta = inverse is not None
    frame = Frame(B, H, N, V, chunks, warpgroups)

    def kernel(*refs):
        refs = iter(refs)
        q_ref, d_out_ref, gates_ref, d_final_ref = (next(refs) for _ in range(4))
        k_ref, scores_ref, inverse_ref = (next(refs) if delta else None for _ in range(3))
        d_initial_ref, d_states_ref = next(refs), next(refs)
        d_v_ref = next(refs) if delta else None

        def body(q_s, d_out_s, gates_s, k_s, scores_s, inverse_s, d_states_s, d_v_s, full, empty):
            def fetch(place, get):
                batch, n, head, chunk, tokens, slot = place
                get(q_ref.at[batch, tokens, head], q_s.at[slot])
                get(gates_ref.at[batch, n, chunk], gates_s.at[slot])
                for w in range(warpgroups):
                    get(d_out_ref.at[batch, tokens, n, frame.features(w)], d_out_s.at[slot, w])
                if delta:
                    get(k_ref.at[batch, tokens, head], k_s.at[slot])
                    get(scores_ref.at[batch, n, chunk], scores_s.at[slot])
                    get(inverse_ref.at[batch, n, chunk], inverse_s.at[slot])

            def step(place, me, features, d_state):
                batch, n, _, chunk, tokens, slot = place
                d_out_t = plgpu.load(d_out_s.at[slot, me].T, layout=MATRIX)
                before = across(gates_s.at[slot, 0], TILE)
                whole = gates_s[slot, 0, CHUNK - 1]
                low = d_state.astype(dtype)

                def put_state():
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    d_states_s[me] = low

                def products(stored, shown, out):
                    """Gradient of the values that the chunk's queries and its end have read."""
                    plgpu.wgmma(stored, low, k_s.at[slot].T)
                    plgpu.wgmma(shown, d_out_t, scores_s.at[slot])
                    put_state()  # while the products run
                    after = across(gates_s.at[slot, 1], TILE)
                    written = (stored[...] * after + shown[...]).astype(dtype)
                    plgpu.wgmma(out, written, inverse_s.at[slot])
                    return out[...]

                if delta:
                    d_v = pl.run_scoped(products, *[plgpu.ACC((TILE, CHUNK), jnp.float32)] * 3)
                    to_key = (-d_v * before).astype(dtype)
                to_query = (d_out_t.astype(jnp.float32) * before * scale).astype(dtype)

                def update(accumulator):
                    plgpu.wgmma(accumulator, to_query, q_s.at[slot])
                    if delta:
                        plgpu.wgmma(accumulator, to_key, k_s.at[slot])
                        d_v_s.at[me].T[...] = d_v.astype(dtype)
                    else:
                        put_state()
                    plgpu.commit_smem()
                    target = d_states_ref.at[batch, n, chunk, features]
                    plgpu.copy_smem_to_gmem(d_states_s.at[me], target)
                    if delta:
                        target = d_v_ref.at[batch, tokens, n, features]
                        plgpu.copy_smem_to_gmem(d_v_s.at[me], target)

                return pl.run_state(update)(plgpu.ACC.init(d_state * whole))

            frame.walk(fetch, step, d_final_ref, d_initial_ref, full, empty, backwards=True)

        pl.run_scoped(
            body,
            tiles((STAGES, CHUNK, K), dtype),
            tiles((STAGES, warpgroups, CHUNK, TILE), dtype),
            plgpu.SMEM((STAGES, 2, CHUNK), jnp.float32),
            tiles((STAGES, CHUNK, K), dtype) if delta else None,
            tiles((STAGES, *SQUARE), dtype) if delta else None,
            tiles((STAGES, *SQUARE), dtype) if delta else None,
            tiles((warpgroups, TILE, K), dtype),
            tiles((warpgroups, CHUNK, TILE), dtype) if delta else None,
            plgpu.Barrier(num_arrivals=2 + warpgroups + 3 * delta, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=STAGES),
            collective_axes="wg",
        )

    out = [
        jax.ShapeDtypeStruct((B, N, V, K), jnp.float32),
        jax.ShapeDtypeStruct((B, N, chunks, V, K), dtype),
    ]
    if delta:
        out += [jax.ShapeDtypeStruct((B, T, N, V), dtype)]
    operands = [q, d_out, gates, d_final] + [k, scores, inverse] * delta
    d_initial, d_states, *d_v = frame.launch(kernel, out)(*operands)
    return d_states, d_v[0] if delta else None, d_initial
