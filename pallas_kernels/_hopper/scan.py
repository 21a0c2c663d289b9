"""The state pass over chunks on Hopper: outputs and the final state.

Everything is kept transposed: the state S^T [64, K] of a warpgroup never leaves its registers. It
is the left operand of every product; right operands are tiles in shared memory, so warpgroups need
not speak to each other.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._hopper.frame import STAGES, Frame
from pallas_kernels._hopper.tiles import CHUNK, MATRIX, SQUARE, TILE, across, tiles


@functools.partial(jax.jit, static_argnames=("scale", "gives", "warpgroups", "pieces"))
def scan(q, k, v, gates, scores, inverse, initial_state, *, scale, gives, warpgroups, pieces=1):
    """(o, values, states, final state), of which `gives` says which come; the last comes always.

    q, k [B, T, H, K], v [B, T, N, V]; gates, scores and inverse from `prepare`, inverse None
    without the delta rule; initial and final state fp32 [B, N, V, K], transposed.
    gives: "out" o [B, T, N, V]; "final" none, without q and scores; "residuals" what the backward
    pass of the delta rule needs: o, the values [B, T, N, V] that it writes, and of more than one
    piece the state before each, fp32 [B, N, pieces, V, K]. The others are None.
    """
    B, T, H, K = k.shape
    N, V = v.shape[2:]
    chunks, dtype = T // CHUNK, k.dtype
    delta = inverse is not None
    reads, leaves = gives != "final", gives == "residuals"
    states = leaves and pieces > 1
    frame = Frame(B, H, N, V, chunks, warpgroups)

    def kernel(*refs):
        refs = iter(refs)
        k_ref, v_ref, gates_ref, initial_ref = (next(refs) for _ in range(4))
        inverse_ref = next(refs) if delta else None
        q_ref, scores_ref = (next(refs), next(refs)) if reads else (None, None)
        final_ref = next(refs)
        out_ref = next(refs) if reads else None
        values_ref = next(refs) if leaves else None
        states_ref = next(refs) if states else None

        def body(k_s, v_s, gates_s, q_s, scores_s, inverse_s, out_s, values_s, full, empty):
            def fetch(place, get):
                batch, n, head, chunk, tokens, slot = place
                get(k_ref.at[batch, tokens, head], k_s.at[slot])
                get(gates_ref.at[batch, n, chunk], gates_s.at[slot])
                for w in range(warpgroups):
                    get(v_ref.at[batch, tokens, n, frame.features(w)], v_s.at[slot, w])
                if delta:
                    get(inverse_ref.at[batch, n, chunk], inverse_s.at[slot])
                if reads:
                    get(q_ref.at[batch, tokens, head], q_s.at[slot])
                    get(scores_ref.at[batch, n, chunk], scores_s.at[slot])

            def step(place, me, features, state):
                batch, n, _, chunk, tokens, slot = place
                v_t = plgpu.load(v_s.at[slot, me].T, layout=MATRIX).astype(jnp.float32)
                before, after = (across(gates_s.at[slot, x], TILE) for x in (0, 1))
                whole = gates_s[slot, 0, CHUNK - 1]
                low = state.astype(dtype)

                if states:

                    @pl.when(lax.rem(chunk, chunks // pieces) == 0)
                    def _():
                        states_ref[batch, n, chunk // (chunks // pieces), features] = state

                def put(out):
                    """Copy the output while products run."""
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_s.at[me].T[...] = out
                    plgpu.commit_smem()
                    pairs = [(out_s, out_ref)] + [(values_s, values_ref)] * leaves
                    for source, target in pairs:
                        target = target.at[batch, tokens, n, features]
                        plgpu.copy_smem_to_gmem(source.at[me], target)

                def products(read=None, stored=None, written=None):
                    if delta:
                        plgpu.wgmma(stored, low, k_s.at[slot].T)
                    if reads:
                        plgpu.wgmma(read, low, q_s.at[slot].T)
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
                        elif delta:

                            def show(o_acc):
                                plgpu.wgmma(o_acc, low_value, scores_s.at[slot].T)
                                plgpu.wgmma(state_acc, kept, k_s.at[slot])
                                if leaves:  # while the products run
                                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                                    values_s.at[me].T[...] = low_value
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
                return pl.run_scoped(products, **scoped) if scoped else products()

            frame.walk(fetch, step, initial_ref, final_ref, full, empty)

        copies = 2 + warpgroups + delta + 2 * reads
        pl.run_scoped(
            body,
            tiles((STAGES, CHUNK, K), dtype),
            tiles((STAGES, warpgroups, CHUNK, TILE), dtype),
            plgpu.SMEM((STAGES, 2, CHUNK), jnp.float32),
            tiles((STAGES, CHUNK, K), dtype) if reads else None,
            tiles((STAGES, *SQUARE), dtype) if reads else None,
            tiles((STAGES, *SQUARE), dtype) if delta else None,
            tiles((warpgroups, CHUNK, TILE), dtype) if reads else None,
            tiles((warpgroups, CHUNK, TILE), dtype) if leaves else None,
            plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=STAGES),
            collective_axes="wg",
        )

    values = jax.ShapeDtypeStruct((B, T, N, V), dtype)
    out = [jax.ShapeDtypeStruct((B, N, V, K), jnp.float32)] + [values] * (reads + leaves)
    if states:
        out += [jax.ShapeDtypeStruct((B, N, pieces, V, K), jnp.float32)]
    operands = [k, v, gates, initial_state] + [inverse] * delta + [q, scores] * reads
    final, *rest = frame.launch(kernel, out)(*operands)
    return *rest, *[None] * (3 - len(rest)), final
