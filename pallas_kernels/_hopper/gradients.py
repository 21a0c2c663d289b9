"""Gradients of a chunk's queries, keys, values and gates on Hopper, all chunks at once.

Three warpgroups share the tiles of a chunk: one for the queries, one for the keys, and one for the
values or, with the delta rule, whose values' gradient is known already, for the inverse.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._hopper.tiles import (
    CHUNK, MATRIX, SQUARE, TILE, across, down, exp_where, places, product, tiles,
)  # fmt: skip

# Vectors from which the gradients of the decays are put together, see `combine`.
QUERY, KEY, BEFORE, AFTER, FROM_STATE, FROM_CHUNK = range(6)


def combine(dots, chunks):
    """Gradient of the log decay [B, N, T] from the vectors of `gradients`.

    The decays between two tokens of a chunk are exp(G_i - G_j); G_i takes q_i dq_i - k_i dk_i + 2 s_i
    (s_i: what the delta rule takes from the state), and the state after the chunk, which falls with
    every decay of it, its product with its gradient. A sum from the end makes g of G.
    """
    B, N, count, T = dots.shape
    dots = jnp.moveaxis(dots.reshape(B, N, count, chunks, -1), 2, 0)
    local = dots[QUERY] - dots[KEY]
    if count > FROM_STATE:
        local = local + 2.0 * (dots[FROM_STATE] + dots[FROM_CHUNK])
    total = jnp.sum(dots[BEFORE] + dots[AFTER], axis=-1, keepdims=True)
    return (jnp.cumsum(local[..., ::-1], axis=-1)[..., ::-1] + total).reshape(B, N, T)


@functools.partial(jax.jit, static_argnames="scale")
def gradients(q, k, values, d_out, d_v, states, d_states, summed, gates, beta, documents, *, scale):
    """(d_q, d_k [B, T, N, K], d_v or d_beta, dots fp32 [B, N, 4 or 6, T]) of every chunk.

    values [B, T, N, V]: what was written into the state. d_v, beta: with the delta rule alone, which
    gives d_beta fp32 [B, N, T]; without it the result has d_v instead. states, d_states [B, N, T/64,
    V, K] before and after each chunk; summed, gates from `prepare`.
    """
    B, T, H, K = q.shape
    N, V = values.shape[2:]
    chunks, dtype = T // CHUNK, q.dtype
    delta = d_v is not None
    shared, parts = N // H, V // TILE

    def kernel(*refs):
        refs = iter(refs)
        inputs = [next(refs) for _ in range(8)]
        q_ref, k_ref, values_ref, d_out_ref, states_ref, d_states_ref, summed_ref, gates_ref = (
            inputs
        )
        d_v_ref, beta_ref = (next(refs) if delta else None for _ in range(2))
        documents_ref = next(refs) if documents is not None else None
        d_q_ref, d_k_ref, dots_ref, last_ref = (next(refs) for _ in range(4))

        def body(
            q_s, k_s, values_s, d_out_s, states_s, d_states_s, d_v_s, both_s, out_s,
            tokens_ready, part_ready, both_ready,
        ):  # fmt: skip
            row, chunk = lax.axis_index("row"), lax.axis_index("chunk")
            batch, n = row // N, lax.rem(row, N)
            head = n // shared
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            me = lax.axis_index("wg")

            @pl.when(me == 0)
            def _():
                for part in range(parts):
                    features, barrier = pl.ds(part * TILE, TILE), part_ready.at[part]

                    def get(source, target):
                        plgpu.copy_gmem_to_smem(source, target, barrier)

                    get(d_out_ref.at[batch, tokens, n, features], d_out_s.at[part])
                    get(values_ref.at[batch, tokens, n, features], values_s.at[part])
                    get(states_ref.at[batch, n, chunk, features], states_s.at[part])
                    get(d_states_ref.at[batch, n, chunk, features], d_states_s.at[part])
                    if delta:
                        get(d_v_ref.at[batch, tokens, n, features], d_v_s.at[part])
                plgpu.copy_gmem_to_smem(q_ref.at[batch, tokens, head], q_s, tokens_ready)
                plgpu.copy_gmem_to_smem(k_ref.at[batch, tokens, head], k_s, tokens_ready)

            i, j = places()

            def decay(transposed=False, strict=False):
                """exp(G_i - G_j) for j <= i of one document, or its transpose."""
                source = summed_ref.at[batch, n, tokens]
                difference = down(source) - across(source)
                keep = (
                    (i < j if strict else i <= j) if transposed else (i > j if strict else i >= j)
                )
                if documents is not None:
                    index = documents_ref.at[batch, tokens]
                    keep = keep & (down(index) == across(index))
                return exp_where(keep, -difference if transposed else difference)

            def rows(source):
                return plgpu.load(source, layout=MATRIX).astype(jnp.float32)

            def gate(which, columns):
                return down(gates_ref.at[batch, n, chunk, which], columns)

            def finish(result, target, place):
                """Copy [C, K or V] to the output, through shared memory."""
                out_s.at[place][...] = result.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s.at[place], target)
                plgpu.wait_smem_to_gmem(0)

            def put_dot(which, vector):
                dots_ref[batch, n, which, tokens] = vector

            @pl.when(me == 0)
            def queries():
                def over_parts(read, shown):
                    overlap = None
                    for part in range(parts):
                        plgpu.barrier_wait(part_ready.at[part])
                        plgpu.wgmma(read, d_out_s.at[part], states_s.at[part])
                        plgpu.wgmma(shown, d_out_s.at[part], values_s.at[part].T)
                        one = jnp.sum(rows(states_s.at[part]) * rows(d_states_s.at[part]), axis=1)
                        overlap = one if overlap is None else overlap + one
                    return read[...], shown[...], overlap

                read, shown, overlap = pl.run_scoped(
                    over_parts, plgpu.ACC((CHUNK, K), jnp.float32), plgpu.ACC(SQUARE, jnp.float32)
                )
                put_dot(BEFORE, overlap * gates_ref[batch, n, chunk, 0, CHUNK - 1])
                d_scores = (shown * decay() * scale).astype(dtype)
                plgpu.barrier_wait(tokens_ready)

                def update(accumulator):
                    plgpu.wgmma(accumulator, d_scores, k_s)

                d_q = pl.run_state(update)(plgpu.ACC.init(read * gate(0, K) * scale))
                put_dot(QUERY, jnp.sum(d_q * rows(q_s), axis=1))
                finish(d_q, d_q_ref.at[batch, tokens, n], 0)

            @pl.when(me == 1)
            def keys():
                def over_parts(written, shown, *replaced):
                    for part in range(parts):
                        plgpu.barrier_wait(part_ready.at[part])
                        plgpu.wgmma(written, values_s.at[part], d_states_s.at[part])
                        plgpu.wgmma(shown, values_s.at[part], d_out_s.at[part].T)
                        if delta:
                            plgpu.wgmma(replaced[0], d_v_s.at[part], states_s.at[part])
                    return [x[...] for x in (written, shown, *replaced)]

                wide = plgpu.ACC((CHUNK, K), jnp.float32)
                written, shown, *replaced = pl.run_scoped(
                    over_parts, wide, plgpu.ACC(SQUARE, jnp.float32), *[wide] * delta
                )
                d_scores = (shown * decay(transposed=True) * scale).astype(dtype)
                d_k = written * gate(1, K)
                plgpu.barrier_wait(tokens_ready)
                put_dot(AFTER, jnp.sum(d_k * rows(k_s), axis=1))
                if delta:
                    taken = replaced[0] * gate(0, K)
                    put_dot(FROM_STATE, -jnp.sum(taken * rows(k_s), axis=1))
                    d_k = d_k - taken
                    plgpu.barrier_wait(both_ready)

                def update(accumulator):
                    plgpu.wgmma(accumulator, d_scores, q_s)
                    if delta:
                        plgpu.wgmma(accumulator, both_s, k_s)

                d_k = pl.run_state(update)(plgpu.ACC.init(d_k))
                put_dot(KEY, jnp.sum(d_k * rows(k_s), axis=1))
                finish(d_k, d_k_ref.at[batch, tokens, n], 1)

            def of_inverse():
                """Gradient of k_i . k_j through the inverse, and d_beta from its diagonal."""

                def over_parts(lower, upper):
                    for part in range(parts):
                        plgpu.barrier_wait(part_ready.at[part])
                        plgpu.wgmma(lower, d_v_s.at[part], values_s.at[part].T)
                        plgpu.wgmma(upper, values_s.at[part], d_v_s.at[part].T)
                    return lower[...], upper[...]

                square = plgpu.ACC(SQUARE, jnp.float32)
                lower, upper = pl.run_scoped(over_parts, square, square)
                weight = plgpu.load(
                    beta_ref.at[batch, n, tokens], layout=plgpu.Layout.WGMMA.reduce(1),
                    optimized=False,
                )  # fmt: skip
                diagonal = jnp.sum(jnp.where(i == j, lower, 0.0), axis=1)
                last_ref[batch, n, tokens] = diagonal / (weight * weight)
                lower = -lower * decay(strict=True)
                upper = -upper * decay(transposed=True, strict=True)
                both_s[...] = (lower + upper).astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(both_ready)
                plgpu.barrier_wait(tokens_ready)
                put_dot(FROM_CHUNK, jnp.sum(lower * product(k_s, k_s.T), axis=1))

            def of_values():
                plgpu.barrier_wait(tokens_ready)
                scores = product(k_s, q_s.T) * decay(transposed=True) * scale
                scores = scores.astype(dtype)
                for part in range(parts):
                    plgpu.barrier_wait(part_ready.at[part])
                    kept = product(k_s, d_states_s.at[part].T, (CHUNK, TILE)) * gate(1, TILE)

                    def update(accumulator, part=part):
                        plgpu.wgmma(accumulator, scores, d_out_s.at[part])

                    d_value = pl.run_state(update)(plgpu.ACC.init(kept))
                    both_s.at[part][...] = d_value.astype(dtype)
                plgpu.commit_smem()
                for part in range(parts):
                    features = pl.ds(part * TILE, TILE)
                    target = last_ref.at[batch, tokens, n, features]
                    plgpu.copy_smem_to_gmem(both_s.at[part], target)
                plgpu.wait_smem_to_gmem(0)

            pl.when(me == 2)(of_inverse if delta else of_values)

        operand, part = tiles((CHUNK, K), dtype), tiles((parts, CHUNK, TILE), dtype)
        state = tiles((parts, TILE, K), dtype)
        pl.run_scoped(
            body,
            operand,
            operand,
            part,
            part,
            state,
            state,
            part if delta else None,
            tiles(SQUARE, dtype) if delta else part,
            tiles((2, CHUNK, K), dtype),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=4 + delta, num_barriers=parts),
            plgpu.Barrier(num_arrivals=1),
            collective_axes="wg",
        )

    queries = jax.ShapeDtypeStruct((B, T, N, K), dtype)
    last = jax.ShapeDtypeStruct((B, N, T), jnp.float32) if delta else values
    operands = [q, k, values, d_out, states, d_states, summed, gates]
    operands += [d_v, beta] * delta + [documents] * (documents is not None)
    d_q, d_k, dots, last = plgpu.kernel(
        kernel,
        out_type=[
            queries,
            queries,
            jax.ShapeDtypeStruct((B, N, 4 + 2 * delta, T), jnp.float32),
            jax.ShapeDtypeStruct(last.shape, last.dtype),
        ],
        grid=(B * N, chunks),
        grid_names=("row", "chunk"),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*operands)
    return d_q, d_k, last, dots
