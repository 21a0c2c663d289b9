"""Gradients of the delta rule's queries, keys, gates and beta on Hopper, with states in registers.

Let u be what a chunk writes, delta = d_u that of `reverse`, both [B, T, N, V], S the state before
the chunk, dS the gradient of that after it, decay_ij = exp(G_i - G_j). Then
d_q_i = scale (exp(G_i) S d_out_i + sum_j<=i decay_ij (d_out_i . u_j) k_j)
d_k_i = -exp(G_i) S delta_i - sum_j<i decay_ij (delta_i . u_j) k_j                    as it reads
d_k_j += exp(G_64 - G_j) dS u_j + sum_i>=j scale decay_ij (d_out_i . u_j) q_i
         - sum_i>j decay_ij (delta_i . u_j) k_i                                      as it writes
dS' = exp(G_64) dS + sum_i exp(G_i) (scale q_i d_out_i^T - k_i delta_i^T)
One pass forwards for the first two, one backwards for the rest: two linear attentions each, which
share a state.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._hopper.frame import STAGES, Frame
from pallas_kernels._hopper.linear import EVERY, of_decay, warpgroups
from pallas_kernels._hopper.registers import held_shape, keep, kept
from pallas_kernels._hopper.tiles import (
    CHUNK,
    DOWN,
    MATRIX,
    SQUARE,
    SUMS,
    TILE,
    across,
    column_sums,
    down,
    exp_where,
    places,
    tiles,
)


def gradients(
    q, k, values, d_out, d_v, beta, summed, gates, documents, first, last, *, scale, pieces
):
    """(d_q, d_k [B, T, N, K], d_g, d_beta [B, N, T]).

    q, k [B, T, H, K]; values, d_out, d_v [B, T, N, V]: values are what was written into the state,
    d_v is of `reverse`; beta [B, N, T]; summed, gates from `prepare`; documents [B, T] or None.
    first, last fp32 [B pieces, N, K, V]: the state before each of the pieces into which rows are
    cut, and the gradient of the state after it.
    """
    heads = first.shape[0] * first.shape[1]
    run = functools.partial(
        attend, q, k, values, d_out, d_v, summed, gates, documents,
        scale=scale, warpgroups=warpgroups(q.shape[3], heads), pieces=pieces,
    )  # fmt: skip
    d_q, d_k, query_dots, states, d_beta = run(beta, None, None, first, backwards=False)
    d_k, key_dots, written, overlaps = run(None, d_k, states, last, backwards=True)
    d_g = of_decay(query_dots, key_dots, written, overlaps, gates[:, :, :, 0, -1])
    return d_q, d_k, d_g, d_beta


@functools.partial(jax.jit, static_argnames=("scale", "backwards", "warpgroups", "pieces"))
def attend(
    q, k, values, d_out, d_v, summed, gates, documents, beta, d_k, states, first,
    *, scale, backwards, warpgroups, pieces,
):  # fmt: skip
    """The pass forwards (d_q, d_k, dots, states, d_beta), backwards (d_k, dots, written, overlaps).

    Forwards: d_q, d_k [B, T, N, K], d_k only of what the chunks read; dots fp32 [B, N, K/64, T],
    q.d_q + k.d_k by feature tile; the state before each chunk that EVERY divides, by tile as of
    `keep` [B, N, ., K/64, ...]; d_beta fp32 [B, N, T]. It takes beta, and as `first` the state
    before each piece.
    Backwards: d_k of both, dots k.d_k of what the chunks write alone; the dots with that from the
    state alone, summed over a chunk [B, N, T/64, K]; products of the states with their gradients,
    [B, N, ., K]. It takes d_k and states from forwards, `first` is the gradient after each piece.
    """
    B, T, H, K = q.shape
    N, V = values.shape[2:]
    chunks, dtype = T // CHUNK // pieces, q.dtype
    packed, split = documents is not None, warpgroups == 2
    frame = Frame(B, H, N, K, chunks, warpgroups, pieces)

    def kernel(*refs):
        refs = iter(refs)
        q_ref, k_ref, values_ref, d_out_ref, d_v_ref, summed_ref, gates_ref, first_ref = (
            next(refs) for _ in range(8)
        )
        documents_ref = next(refs) if packed else None
        if backwards:
            earlier_ref, states_ref, d_k_ref, dots_ref, written_ref, overlaps_ref = refs
        else:
            beta_ref, d_q_ref, d_k_ref, dots_ref, states_ref, d_beta_ref = refs

        def body(
            q_s, k_s, values_s, sides_s, summed_s, gates_s, documents_s, beta_s, scores_s, out_s,
            sums_s, full, empty, scores_ready, scores_free, earlier_ready,
        ):  # fmt: skip
            def fetch(place, get):
                batch, n, head, chunk, tokens, slot = place
                get(values_ref.at[batch, tokens, n], values_s.at[slot])
                get(d_out_ref.at[batch, tokens, n], sides_s.at[slot, 0])
                get(d_v_ref.at[batch, tokens, n], sides_s.at[slot, 1])
                get(summed_ref.at[batch, n, tokens], summed_s.at[slot])
                get(gates_ref.at[batch, n, chunk], gates_s.at[slot])
                for w in range(warpgroups):
                    get(q_ref.at[batch, tokens, head].at[:, frame.features(w)], q_s.at[slot, w])
                    get(k_ref.at[batch, tokens, head].at[:, frame.features(w)], k_s.at[slot, w])
                if packed:
                    get(documents_ref.at[batch, tokens], documents_s.at[slot])
                if not backwards:
                    get(beta_ref.at[batch, n, tokens], beta_s.at[slot])

            def step(place, me, features, state):
                batch, n, _, chunk, tokens, slot = place
                low = state.astype(dtype)
                # Of d_out and of delta. Two warpgroups take the square of one each.
                streams = (
                    [(me, jnp.where(me == 0, scale, -1.0))] if split else [(0, scale), (1, -1.0)]
                )
                tile = lax.axis_index("v") * warpgroups + me

                def products(read, *shown):
                    for (stream, _), square in zip(streams, shown, strict=True):
                        plgpu.wgmma(square, sides_s.at[slot, stream], values_s.at[slot].T)
                    reader = values_s.at[slot] if backwards else sides_s.at[slot, 0]
                    plgpu.wgmma(read, low, reader.T)
                    # Also orders what follows after all reads of the chunk before.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    if backwards:
                        earlier = earlier_ref.at[batch, tokens, n, features]
                        plgpu.copy_gmem_to_smem(earlier, out_s.at[me, 0], earlier_ready.at[me])
                    if split:

                        @pl.when(lax.rem(chunk, chunks) != (chunks - 1 if backwards else 0))
                        def _():
                            plgpu.barrier_wait(scores_free)

                    for left, square in zip(range(len(shown), 0, -1), shown, strict=True):
                        square = plgpu.wgmma_accumulator_load(square, wait_n=left)
                        put_scores(*streams[len(shown) - left], square)
                    plgpu.commit_smem()
                    if split:
                        plgpu.barrier_arrive(scores_ready)
                    if backwards:
                        return of_keys(read)
                    return pl.run_scoped(functools.partial(of_queries, read), square_acc)

                def put_scores(stream, factor, square):
                    # Numbered in the row: numbers in the chunk would be kept from chunk to chunk.
                    i, j = (x + chunk * CHUNK for x in places())
                    if not backwards:

                        @pl.when((stream == 1) & (lax.axis_index("v") == 0))
                        def _():
                            weight = plgpu.load(beta_s.at[slot], layout=DOWN, optimized=False)
                            diagonal = jnp.sum(jnp.where(i == j, square, 0.0), axis=1)
                            d_beta_ref[batch, n, tokens] = diagonal / (weight * weight)

                    keep = i >= j + stream  # delta sees only what was written before
                    if packed:
                        index = documents_s.at[slot]
                        keep = keep & (down(index) == across(index))
                    sums = summed_s.at[slot]
                    decay = exp_where(keep, down(sums) - across(sums))
                    scores_s[stream] = (square * decay * factor).astype(dtype)

                # Loaded anew where they are needed, for want of registers.
                def gate(which):
                    return across(gates_s.at[slot, which], TILE)

                def operand(ref):
                    return plgpu.load(ref.at[slot, me].T, layout=MATRIX)

                def fine(ref):
                    return operand(ref).astype(jnp.float32)

                def whole(state):
                    return plgpu.ACC.init(state * gates_s[slot, 0, CHUNK - 1])

                def wait_for_scores():
                    if split:
                        plgpu.barrier_wait(scores_ready)

                def free_scores():
                    if split:
                        plgpu.barrier_arrive(scores_free)

                def put(out, place):
                    out_s.at[me, place].T[...] = out.astype(dtype)

                def send(place, target_ref):
                    target = target_ref.at[batch, tokens, n, features]
                    plgpu.copy_smem_to_gmem(out_s.at[me, place], target)

                def put_dots(dots):
                    dots_ref[batch, n, tile, tokens] = column_sums(dots, sums_s.at[me])

                def of_queries(read, replaced):
                    inter = plgpu.wgmma_accumulator_load(read, wait_n=0) * gate(0) * scale
                    plgpu.wgmma(replaced, low, sides_s.at[slot, 1].T)
                    wait_for_scores()
                    old = plgpu.wgmma_accumulator_load(replaced, wait_n=0) * -gate(0)

                    def update(accumulators):
                        d_q_acc, d_k_acc, state_acc = accumulators
                        k_t = operand(k_s)
                        plgpu.wgmma(d_q_acc, k_t, scores_s.at[0].T)
                        plgpu.wgmma(d_k_acc, k_t, scores_s.at[1].T)
                        d_q = plgpu.wgmma_accumulator_load(d_q_acc, wait_n=1)
                        put(d_q, 0)
                        dots = d_q * fine(q_s)
                        d_k = plgpu.wgmma_accumulator_load(d_k_acc, wait_n=0)
                        free_scores()
                        after = (fine(k_s) * gate(1)).astype(dtype)
                        plgpu.wgmma(state_acc, after, values_s.at[slot])
                        put(d_k, 1)
                        plgpu.commit_smem()
                        send(0, d_q_ref)
                        send(1, d_k_ref)
                        put_dots(dots + d_k * fine(k_s))

                    first = plgpu.ACC.init(inter), plgpu.ACC.init(old), whole(state)
                    return pl.run_state(update)(first)[2]

                def of_keys(read):
                    inter = plgpu.wgmma_accumulator_load(read, wait_n=0) * gate(1)
                    sums = jnp.sum(inter * fine(k_s), axis=1)
                    written_ref[batch, n, chunk, features] = sums
                    wait_for_scores()

                    def update(accumulators):
                        d_k_acc, state_acc = accumulators
                        plgpu.wgmma(d_k_acc, operand(q_s), scores_s.at[0])
                        plgpu.wgmma(d_k_acc, operand(k_s), scores_s.at[1])
                        d_k = plgpu.wgmma_accumulator_load(d_k_acc, wait_n=0)
                        free_scores()
                        to_query = (fine(q_s) * gate(0) * scale).astype(dtype)
                        plgpu.wgmma(state_acc, to_query, sides_s.at[slot, 0])
                        to_key = (fine(k_s) * -gate(0)).astype(dtype)
                        plgpu.wgmma(state_acc, to_key, sides_s.at[slot, 1])
                        plgpu.barrier_wait(earlier_ready.at[me])
                        earlier = plgpu.load(out_s.at[me, 0].T, layout=MATRIX).astype(jnp.float32)
                        put(d_k + earlier, 0)
                        plgpu.commit_smem()
                        send(0, d_k_ref)
                        put_dots(d_k * fine(k_s))

                    return pl.run_state(update)((plgpu.ACC.init(inter), whole(state)))[1]

                if not backwards:

                    @pl.when(lax.rem(chunk, EVERY) == 0)
                    def _():
                        keep(low, states_ref.at[batch, n, chunk // EVERY, tile])

                square_acc = plgpu.ACC(SQUARE, jnp.float32)
                state = pl.run_scoped(products, *[square_acc] * (1 + len(streams)))
                if backwards:

                    @pl.when(lax.rem(chunk, EVERY) == 0)
                    def _():
                        source = states_ref.at[batch, n, chunk // EVERY, tile]
                        before = kept(source, state.shape).astype(jnp.float32)
                        sums = jnp.sum(before * state, axis=1)
                        overlaps_ref[batch, n, chunk // EVERY, features] = sums

                return state

            frame.walk(fetch, step, first_ref, None, full, empty, backwards=backwards)

        copies = 5 + 2 * warpgroups + packed + (not backwards)
        operand = tiles((STAGES, warpgroups, CHUNK, TILE), dtype)
        vector = plgpu.SMEM((STAGES, CHUNK), jnp.float32)
        barrier = plgpu.Barrier(num_arrivals=warpgroups) if split else None
        pl.run_scoped(
            body,
            operand,
            operand,
            tiles((STAGES, CHUNK, V), dtype),
            tiles((STAGES, 2, CHUNK, V), dtype),
            vector,
            plgpu.SMEM((STAGES, 2, CHUNK), jnp.float32),
            plgpu.SMEM((STAGES, CHUNK), jnp.int32) if packed else None,
            None if backwards else vector,
            tiles((2, *SQUARE), dtype),
            tiles((warpgroups, 1 if backwards else 2, CHUNK, TILE), dtype),
            plgpu.SMEM((warpgroups, SUMS), jnp.float32),
            plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=STAGES),
            barrier,
            barrier,
            plgpu.Barrier(num_arrivals=1, num_barriers=warpgroups) if backwards else None,
            collective_axes="wg",
        )

    def full(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    count = T // CHUNK
    groups = -(-count // EVERY)
    by_token = jax.ShapeDtypeStruct((B, T, N, K), dtype)
    operands = [q, k, values, d_out, d_v, summed, gates, first] + [documents] * packed
    if backwards:
        operands += [d_k, states]
        out = [by_token, full(B, N, K // TILE, T), full(B, N, count, K), full(B, N, groups, K)]
    else:
        operands += [beta]
        held = (B, N, groups, K // TILE, *held_shape(TILE, V))
        out = [
            by_token,
            by_token,
            full(B, N, K // TILE, T),
            jax.ShapeDtypeStruct(held, dtype),
            full(B, N, T),
        ]
    launch = functools.partial(frame.launch, lowering_semantics=plgpu.LoweringSemantics.Lane)
    return launch(kernel, out)(*operands)
