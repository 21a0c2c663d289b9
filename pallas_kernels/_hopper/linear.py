"""Gradients of linear attention on Hopper: each is a linear attention, with its state in registers.

With decay_ij = exp(G_i - G_j) between tokens of a chunk, S the state before it, dS the gradient of
the state after it:
d_q_i = scale sum_j<=i decay_ij (d_out_i . v_j) k_j + scale exp(G_i) S d_out_i
d_k_j = scale sum_i>=j decay_ij (d_out_i . v_j) q_i + exp(G_64 - G_j) dS v_j
d_v_j = scale sum_i>=j decay_ij (q_i . k_j) d_out_i + exp(G_64 - G_j) dS^T k_j
So one kernel serves, forwards for d_q, backwards for d_k and d_v, and no pass keeps its states.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._hopper.frame import PROGRAMS, STAGES, Frame
from pallas_kernels._hopper.tiles import (
    CHUNK,
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

EVERY = 8  # chunks: before each eighth the pass of d_q keeps the state, for the gradient of g
FORGOTTEN = 2.0**-8  # decay over a chunk, below which nothing of an earlier state is counted


def gradients(q, k, v, d_out, summed, gates, documents, state, d_final, *, scale, decays):
    """(d_q, d_k [B, T, N, K], d_v [B, T, N, V], d_g [B, N, T], d_state [B, N, K, V]) of rows.

    q, k [B, T, H, K]; v, d_out [B, T, N, V]; summed, gates from `prepare`; documents [B, T] or
    None; state before a row, and d_final of the state after it, fp32 [B, N, K, V]. d_g is None
    without decays.
    """
    heads, (K, V) = state.shape[0] * state.shape[1], state.shape[2:]
    run = functools.partial(attend, summed, gates, documents, scale=scale)
    forwards = functools.partial(run, backwards=False, warpgroups=warpgroups(K, heads))
    backwards = functools.partial(run, backwards=True, warpgroups=warpgroups(K, heads))
    dotted = (q, k) if decays else (None, None)
    d_q, _, *of_query = forwards(d_out, v, k, dotted[0], state, None)
    states = of_query[1] if decays else None
    d_k, d_state, *of_key = backwards(v, d_out, q, dotted[1], d_final, states)
    d_g = of_decay(of_query[0], *of_key, gates[:, :, :, 0, -1]) if decays else None
    d_final = jnp.swapaxes(d_final, 2, 3)
    d_v, _ = run(k, q, d_out, None, d_final, None, backwards=True, warpgroups=warpgroups(V, heads))
    return d_q, d_k, d_v, d_g, d_state


def warpgroups(features: int, heads: int) -> int:
    """Tiles of features a program takes: two where programs of one would have to queue.

    heads: of all rows together.
    """
    return 2 if features % (2 * TILE) == 0 and heads * (features // TILE) > PROGRAMS else 1


def added(gates, d_out, q, *, scale):
    """What rows [B, T] add to the gradient of the state before them: fp32 [B, N, K, V]."""
    (B, _, N, V), K = d_out.shape, q.shape[3]
    zeros, many = jnp.zeros((B, N, K, V), jnp.float32), warpgroups(K, B * N)
    return attend(
        None, gates, None, None, d_out, q, None, zeros, None,
        scale=scale, backwards=True, warpgroups=many,
    )[1]  # fmt: skip


def of_decay(query_dots, key_dots, written, overlaps, kept):
    """Gradient of the log decay [B, N, T] from what the passes of d_q and d_k give.

    The decay between two tokens of a chunk is exp(G_i - G_j), so G_i gets q_i dq_i - k_i dk_i, in
    which the products of a pair cancel; and all of the chunk get the overlap of the state after it
    with its gradient: what the chunk has `written`, and what is `kept` of the state before it. Of
    the latter one in EVERY is from the states, the others follow from chunk to chunk.
    """
    B, N, chunks = kept.shape
    local = jnp.sum(query_dots, axis=2) - jnp.sum(key_dots, axis=2)
    local = local.reshape(B, N, chunks, CHUNK)
    written = jnp.sum(written, axis=3)
    pad = ((0, 0), (0, 0), (0, -chunks % EVERY))
    total, added, kept = (
        jnp.pad(x, pad).reshape(B, N, -1, EVERY) for x in (jnp.sum(local, axis=3), written, kept)
    )
    overlap, after = jnp.sum(overlaps, axis=3), []
    for c in range(EVERY):
        survived = overlap - total[..., c] - added[..., c]
        # A difference: of what is as good as forgotten only rounding errors would be left.
        survived = jnp.where(kept[..., c] < FORGOTTEN, 0.0, survived)
        overlap = survived + added[..., c]
        after.append(overlap)
    after = jnp.stack(after, axis=3).reshape(B, N, -1)[:, :, :chunks, None]
    later = np.tril(np.ones(SQUARE, np.float32))
    from_end = jnp.einsum("bncs,st->bnct", local, later, precision="highest")
    return (from_end + after).reshape(B, N, -1)


@functools.partial(jax.jit, static_argnames=("scale", "backwards", "warpgroups"))
def attend(
    summed, gates, documents, queries, keys, values, dotted, first, states,
    *, scale, backwards, warpgroups,
):  # fmt: skip
    """Linear attention with a decay and the state [V, K] after it: (out, last, ...).

    queries, keys [B, T, N or H, K] and values [B, T, N or H, V] of this pass, which are not those
    of the op; first, last fp32 [B, N, V, K]; out [B, T, N, V]; summed, gates from `prepare`.
    backwards: the state is that of the tokens after, and gates change places.
    queries None: out is None, for the state alone.
    dotted [B, T, N or H, V]: also gives what `of_decay` takes, of features as they come:
    dots [B, N, V/64, T] of it with out; then forwards the state before each chunk that EVERY
    divides [B, N, ., V, K], which backwards is `states`, and backwards its product with what is in
    out from the state, summed over a chunk [B, N, T/64, V], and the products of the states with
    the gradients [B, N, ., V].
    """
    B, T, _, K = keys.shape
    N, V = first.shape[1], values.shape[3]
    H = min(x.shape[2] for x in (queries, keys, values) if x is not None)
    chunks, dtype = T // CHUNK, keys.dtype
    reads, packed, dots = queries is not None, documents is not None, dotted is not None
    frame = Frame(B, H, N, V, chunks, warpgroups)

    def kernel(*refs):
        refs = iter(refs)
        keys_ref, values_ref, gates_ref, first_ref = (next(refs) for _ in range(4))
        queries_ref, summed_ref = (next(refs) if reads else None for _ in range(2))
        documents_ref = next(refs) if packed and reads else None
        dotted_ref = next(refs) if dots else None
        states_ref = next(refs) if dots and backwards else None
        last_ref = next(refs)
        out_ref = next(refs) if reads else None
        dots_ref = next(refs) if dots else None
        written_ref, overlaps_ref = (next(refs) if dots and backwards else None for _ in range(2))
        states_ref = next(refs) if dots and not backwards else states_ref

        def body(
            keys_s, values_s, gates_s, queries_s, summed_s, documents_s, dotted_s, scores_s, out_s,
            sums_s, states_s, full, empty, states_full,
        ):  # fmt: skip
            def fetch(place, get):
                batch, n, head, chunk, tokens, slot = place

                def row(ref):
                    return ref.at[batch, tokens, n if ref.shape[2] == N else head]

                get(row(keys_ref), keys_s.at[slot])
                get(gates_ref.at[batch, n, chunk], gates_s.at[slot])
                for w in range(warpgroups):
                    get(row(values_ref).at[:, frame.features(w)], values_s.at[slot, w])
                    if dots:
                        get(row(dotted_ref).at[:, frame.features(w)], dotted_s.at[slot, w])
                if reads:
                    get(row(queries_ref), queries_s.at[slot])
                    get(summed_ref.at[batch, n, tokens], summed_s.at[slot])
                if packed and reads:
                    get(documents_ref.at[batch, tokens], documents_s.at[slot])
                if dots and backwards:

                    @pl.when(lax.rem(chunk, EVERY) == 0)
                    def _():
                        for w in range(warpgroups):
                            source = states_ref.at[batch, n, chunk // EVERY, frame.features(w)]
                            plgpu.copy_gmem_to_smem(source, states_s.at[w], states_full)

            def step(place, me, features, state):
                batch, n, _, chunk, tokens, slot = place
                keeps = dots and not backwards  # its states

                def operands():
                    """The chunk's values, as they are and as the state takes them; read's gate."""
                    value_t = plgpu.load(values_s.at[slot, me].T, layout=MATRIX)
                    before, after = (across(gates_s.at[slot, x], TILE) for x in (0, 1))
                    before = before * scale
                    read_gate, write_gate = (after, before) if backwards else (before, after)
                    kept = (value_t.astype(jnp.float32) * write_gate).astype(dtype)
                    return value_t, kept, read_gate

                def added(kept, between=None):
                    def update(state_acc):
                        plgpu.wgmma(state_acc, kept, keys_s.at[slot])
                        if between is not None:
                            between()

                    whole = gates_s[slot, 0, CHUNK - 1]
                    return pl.run_state(update)(plgpu.ACC.init(state * whole))

                def decay():
                    i, j = places()
                    keep = i >= j
                    if packed:
                        index = documents_s.at[slot]
                        keep = keep & (down(index) == across(index))
                    sums = summed_s.at[slot]
                    return exp_where(keep, down(sums) - across(sums))

                def read(shown, old):
                    low = state.astype(dtype)
                    i_s, j_s = (keys_s, queries_s) if backwards else (queries_s, keys_s)
                    plgpu.wgmma(shown, i_s.at[slot], j_s.at[slot].T)
                    plgpu.wgmma(old, low, queries_s.at[slot].T)
                    scores = plgpu.wgmma_accumulator_load(shown, wait_n=1) * decay() * scale
                    # Also orders what follows after all reads of the chunk before.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    scores_s[me] = scores.astype(dtype)
                    if keeps:

                        @pl.when(lax.rem(chunk, EVERY) == 0)
                        def _():
                            states_s[me] = low

                    plgpu.commit_smem()
                    if keeps:

                        @pl.when(lax.rem(chunk, EVERY) == 0)
                        def _():
                            target = states_ref.at[batch, n, chunk // EVERY, features]
                            plgpu.copy_smem_to_gmem(states_s.at[me], target)

                    value_t, kept, gate = operands()

                    def between():
                        inter = plgpu.wgmma_accumulator_load(old, wait_n=1) * gate

                        def show(out_acc):
                            right = scores_s.at[me] if backwards else scores_s.at[me].T
                            plgpu.wgmma(out_acc, value_t, right)

                        finish(pl.run_state(show)(plgpu.ACC.init(inter)), inter)

                    return added(kept, between)

                def finish(out, inter):
                    out_s.at[me].T[...] = out.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out_s.at[me], out_ref.at[batch, tokens, n, features])
                    if not dots:
                        return
                    right = plgpu.load(dotted_s.at[slot, me].T, layout=MATRIX).astype(jnp.float32)
                    if backwards:
                        written_ref[batch, n, chunk, features] = jnp.sum(inter * right, axis=1)
                    tile = lax.axis_index("v") * warpgroups + me
                    dots_ref[batch, n, tile, tokens] = column_sums(out * right, sums_s.at[me])

                if not reads:
                    return added(operands()[1])
                square = plgpu.ACC(SQUARE, jnp.float32)
                state = pl.run_scoped(read, square, square)
                if dots and backwards:

                    @pl.when(lax.rem(chunk, EVERY) == 0)
                    def _():
                        plgpu.barrier_wait(states_full)
                        kept = plgpu.load(states_s.at[me], layout=MATRIX).astype(jnp.float32)
                        sums = jnp.sum(kept * state, axis=1)
                        overlaps_ref[batch, n, chunk // EVERY, features] = sums

                return state

            frame.walk(fetch, step, first_ref, last_ref, full, empty, backwards=backwards)

        copies = 2 + warpgroups * (1 + dots) + (2 + packed) * reads
        operand = tiles((STAGES, CHUNK, K), dtype)
        parts = tiles((STAGES, warpgroups, CHUNK, TILE), dtype)
        squares = tiles((warpgroups, *SQUARE), dtype)
        pl.run_scoped(
            body,
            operand,
            parts,
            plgpu.SMEM((STAGES, 2, CHUNK), jnp.float32),
            operand if reads else None,
            plgpu.SMEM((STAGES, CHUNK), jnp.float32) if reads else None,
            plgpu.SMEM((STAGES, CHUNK), jnp.int32) if reads and packed else None,
            parts if dots else None,
            squares if reads else None,
            squares if reads else None,
            plgpu.SMEM((warpgroups, SUMS), jnp.float32) if dots else None,
            tiles((warpgroups, TILE, K), dtype) if dots else None,
            plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=warpgroups) if dots and backwards else None,
            collective_axes="wg",
        )

    def full(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    operands, out = [keys, values, gates, first], [full(*first.shape)]
    if reads:
        operands += [queries, summed] + [documents] * packed
        out += [jax.ShapeDtypeStruct((B, T, N, V), dtype)]
    if dots:
        operands += [dotted]
        groups = -(-chunks // EVERY)
        out += [full(B, N, V // TILE, T)]
        if backwards:
            operands += [states]
            out += [full(B, N, chunks, V), full(B, N, groups, V)]
        else:
            out += [jax.ShapeDtypeStruct((B, N, groups, V, K), dtype)]
    last, *rest = frame.launch(kernel, out, lowering_semantics=plgpu.LoweringSemantics.Lane)(
        *operands
    )
    rest = rest if reads else [None]
    return rest[0], last, *rest[1:]
