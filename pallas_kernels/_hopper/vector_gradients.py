"""Gradients of the delta rule's queries, keys, decays of each key feature and beta on Hopper.

With u, delta, S and dS as in `delta`, E_ijd = exp(G_id - G_jd), P_ij = scale d_out_i . u_j,
R_ij = delta_i . u_j, all products but the first ones by feature d:
d_q_i = scale exp(G_i) S d_out_i + sum_j<=i P_ij E_ij k_j
d_k_i = -exp(G_i) S delta_i - sum_j<i R_ij E_ij k_j                                    as it reads
d_k_j += exp(G_64 - G_j) dS u_j + sum_i>=j P_ij E_ij q_i - sum_i>j R_ij E_ij k_i      as it writes
A decay of token t is in all that goes over t, from j < t to i >= t. d_g_t sums just that, without
differences. The sums within a chunk go by blocks of 1, 2, 4, ... tokens, as in `levels`, so
that no exponent is positive. Everything is transposed: features by tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._hopper.levels import HALF, LOG2E
from pallas_kernels._hopper.registers import (
    decays,
    held_shape,
    keep,
    kept,
    neighbours,
    of_pairs,
    put_diagonals,
    put_turned,
    reference,
    turned,
    widened,
)
from pallas_kernels._hopper.tiles import (
    ACROSS,
    CHUNK,
    DOWN,
    MATRIX,
    SQUARE,
    TILE,
    across,
    down,
    tiles,
)
from pallas_kernels._hopper.vector_prepare import edges

SIZES = (2, 4, 8, 16)  # tokens of a block within a half of the chunk; neighbours are apart
LARGEST = len(SIZES)  # where the squares of the largest are
UPTO, AFTER = len(SIZES), len(SIZES) + 1  # among `sums`
BROAD = (CHUNK, HALF)


@functools.partial(jax.jit, static_argnames=("scale",))
def gradients(q, k, summed, documents, beta, values, d_out, d_v, states, d_states, *, scale):
    """(d_q, d_k [B, T, N, K], d_g fp32 [B, T, N, K], d_beta fp32 [B, N, T]).

    q, k [B, T, H, K]; summed fp32 [B, T, N, K], log decay from the start of each chunk; documents
    [B, T] or None; beta [B, N, T]; values, d_out, d_v [B, T, N, V]: values are what was written
    into the state, d_v is of `vector_reverse`; states, d_states [B, N, T/64, V, K]: the state
    before each chunk, and the gradient of that after it. A program has a chunk and 64 features.
    """
    B, T, H, K = q.shape
    N, V = values.shape[2:]
    dtype, packed = q.dtype, documents is not None

    def kernel(*refs):
        refs = iter(refs)
        q_ref, k_ref, summed_ref, beta_ref, values_ref, d_out_ref, d_v_ref, states_ref = (
            next(refs) for _ in range(8)
        )
        d_states_ref, sums_ref = next(refs), next(refs)
        documents_ref = next(refs) if packed else None
        d_q_ref, d_k_ref, d_g_ref, d_beta_ref = refs

        def body(q_s, k_s, shared, diagonals_s, full, sums_full):
            (values_s, d_out_s, d_v_s, states_s, d_states_s), later_use = shared
            shown_s, replaced_s, sums_s, parked_s, low_s = later_use
            row, chunk, tile = (lax.axis_index(x) for x in ("row", "chunk", "tile"))
            batch, n = row // N, lax.rem(row, N)
            head, start = n // (N // H), chunk * CHUNK
            tokens, features = pl.ds(start, CHUNK), pl.ds(tile * TILE, TILE)
            for source, target in (
                (d_out_ref.at[batch, tokens, n], d_out_s),
                (values_ref.at[batch, tokens, n], values_s),
                (d_v_ref.at[batch, tokens, n], d_v_s),
                (states_ref.at[batch, n, chunk, :, features], states_s),
                (d_states_ref.at[batch, n, chunk, :, features], d_states_s),
                (q_ref.at[batch, tokens, head, features], q_s),
                (k_ref.at[batch, tokens, head, features], k_s),
            ):
                plgpu.copy_gmem_to_smem(source, target, full)

            def log_of(token):
                """Of one token, by feature."""
                ref = summed_ref.at[batch, start + token, n, features]
                return plgpu.load(ref, layout=DOWN, optimized=False) * LOG2E

            def logs(half):
                rows = pl.ds(start + half * HALF, HALF)
                return turned(summed_ref.at[batch, rows, n, features]) * LOG2E

            into = out_of = through = None
            if packed:
                own_ref = documents_ref.at[batch, tokens]
                own = plgpu.load(own_ref, layout=ACROSS, optimized=False)
                before, last = edges(documents_ref, batch, chunk)
                into, out_of, through = own == before, own == last, last == before
            plgpu.barrier_wait(full)

            def of_states(shown, replaced, read, stored, written):
                """What goes by the states, and the squares as the blocks take them."""
                plgpu.wgmma(shown, d_out_s, values_s.T)
                plgpu.wgmma(replaced, d_v_s, values_s.T)
                plgpu.wgmma(read, states_s.T, d_out_s.T)
                plgpu.wgmma(stored, states_s.T, d_v_s.T)
                plgpu.wgmma(written, d_states_s.T, values_s.T)
                shown = plgpu.wgmma_accumulator_load(shown, wait_n=4) * scale
                replaced = -plgpu.wgmma_accumulator_load(replaced, wait_n=3)
                if packed:
                    same = down(own_ref) == across(own_ref)
                    shown, replaced = (jnp.where(same, x, 0.0) for x in (shown, replaced))
                put_diagonals(shown, diagonals_s.at[0])
                put_diagonals(replaced, diagonals_s.at[1])
                overlap = overlaps(states_s, d_states_s)
                G = logs(0), logs(1)  # on their way while the squares are stored
                read, stored, written = (
                    plgpu.wgmma_accumulator_load(x, wait_n=0) for x in (read, stored, written)
                )
                plgpu.commit_smem()  # all warps are done with what the squares replace
                plgpu.copy_gmem_to_smem(sums_ref, sums_s, sums_full)
                put(shown, shown_s)
                put(replaced, replaced_s)
                plgpu.commit_smem()

                @pl.when(tile == 0)
                def _():
                    weight = plgpu.load(beta_ref.at[batch, n, tokens], layout=DOWN, optimized=False)
                    itself = plgpu.load(diagonals_s.at[1, 0], layout=DOWN, optimized=False)
                    d_beta_ref[batch, n, tokens] = -itself / (weight * weight)

                return G, overlap, (read, stored, written)

            def put(square, target):
                """The pairs of blocks of each size, both halves in 32 columns."""
                left, right = square[:, :HALF], square[:, HALF:]
                target[LARGEST] = left.astype(dtype)
                i = plgpu.broadcasted_iota(jnp.int32, BROAD, 0, layout=MATRIX)
                within = jnp.where(i < HALF, left, right).astype(dtype)
                for level, size in enumerate(SIZES):
                    target[level] = of_pairs(within, size)

            def part(ref, half):
                """Half of the tokens."""
                rows = ref.at[pl.ds(half * HALF, HALF)]
                return widened(plgpu.load(rows.T, layout=MATRIX))

            def diagonal(which, below, half):
                """Of `shown` or `replaced`, in all rows."""
                return across(diagonals_s.at[which, below, pl.ds(half * HALF, HALF)], TILE)

            def columns(x, half):
                return x[:, half * HALF : (half + 1) * HALF]

            def rows_of(ref, level, half):
                return ref.at[level, pl.ds(half * HALF, HALF)]

            def summing(which):
                return sums_s.at[which // 2, pl.ds(which % 2 * HALF, HALF)]

            def wide(vector):
                return lax.broadcast_in_dim(vector, BROAD, [0])

            def gate(log, allowed, half):
                if allowed is not None:
                    allowed = lax.broadcast_in_dim(allowed, SQUARE, [1])
                    log = jnp.where(columns(allowed, half), log, -jnp.inf)
                return jnp.exp2(log)

            accumulator = plgpu.ACC(SQUARE, jnp.float32)
            narrow = plgpu.ACC(BROAD, jnp.float32)
            G, overlap, inter = pl.run_scoped(of_states, *[accumulator] * 5)
            end, middle = log_of(CHUNK - 1), log_of(HALF)
            over = overlap * jnp.exp2(end)
            if packed:
                over = jnp.where(through, over, 0.0)

            def by_states(half):
                """d_q, d_k, dots of what is read and what is written, by the states alone."""
                q, k, log = part(q_s, half), part(k_s, half), G[half]
                read, stored, written = (columns(x, half) for x in inter)
                before = gate(log, into, half)
                d_q, d_read = read * before * scale, stored * -before
                d_written = written * gate(wide(end) - log, out_of, half)
                itself = diagonal(0, 0, half)
                dots = q * d_q + k * d_read, k * d_written
                return d_q + itself * k, d_read + d_written + itself * q, *dots

            d_q, d_k, reads, writes = by_states(1)
            keep(d_q, parked_s.at[0])
            keep(d_k, parked_s.at[1])
            keep(reads.astype(dtype), low_s.at[0])
            keep(writes.astype(dtype), low_s.at[1])
            first_over = over + jnp.sum(reads, axis=1)
            d_q, d_k, reads, writes = by_states(0)
            over = over + jnp.sum(writes, axis=1)
            reads, writes = reads.astype(dtype), writes.astype(dtype)

            decay, late_decay = (decays(log, wide(middle)) for log in G)
            key = decay * part(k_s, 0)
            keep(key.astype(dtype), low_s.at[2])
            queries, keys = ((late_decay * part(x, 1)).astype(dtype) for x in (q_s, k_s))

            def written_in_first(of_key):
                plgpu.wgmma(of_key, queries, rows_of(shown_s, LARGEST, 1))
                plgpu.wgmma(of_key, keys, rows_of(replaced_s, LARGEST, 1))
                return of_key[...]

            def read_in_second(of_q, of_k):
                key = kept(low_s.at[2], BROAD)
                plgpu.wgmma(of_q, key, rows_of(shown_s, LARGEST, 1).T)
                plgpu.wgmma(of_k, key, rows_of(replaced_s, LARGEST, 1).T)
                return of_q[...], of_k[...]

            of_key = pl.run_scoped(written_in_first, narrow)
            d_k, dots = d_k + decay * of_key, (key * of_key).astype(dtype)
            plgpu.barrier_wait(sums_full)

            def finish(half, log, d_q, d_k, reads, writes, more, over):
                """Adds what goes between tokens of the half. Results replace queries and keys."""
                place = pl.ds(half * HALF, HALF)

                def of_blocks(level, key, query, of_q, of_k):
                    shown, replaced = (rows_of(x, level, half) for x in (shown_s, replaced_s))
                    plgpu.wgmma(of_q, key, shown.T)
                    plgpu.wgmma(of_k, key, replaced.T)
                    plgpu.wgmma(of_k, query, shown)
                    plgpu.wgmma(of_k, key, replaced)
                    of_q = plgpu.wgmma_accumulator_load(of_q, wait_n=3)
                    return of_q, plgpu.wgmma_accumulator_load(of_k, wait_n=0)

                by_one = neighbours(
                    log,
                    part(q_s, half),
                    part(k_s, half),
                    diagonal(0, 1, half),
                    diagonal(1, 1, half),
                )

                def within(d_g):
                    new_q, new_k = d_q + by_one[0], d_k + by_one[1]
                    plgpu.wgmma(d_g, reads, summing(UPTO))
                    plgpu.wgmma(d_g, writes, summing(AFTER))
                    plgpu.wgmma(d_g, more, summing((AFTER, UPTO)[half]))
                    for level, size in enumerate(SIZES):
                        decay = decays(log, reference(log, size))
                        key, query = decay * part(k_s, half), decay * part(q_s, half)
                        of_q, of_k = pl.run_scoped(
                            functools.partial(
                                of_blocks, level, key.astype(dtype), query.astype(dtype)
                            ),
                            narrow,
                            narrow,
                        )
                        new_q, new_k = new_q + decay * of_q, new_k + decay * of_k
                        dots = query * of_q + key * of_k
                        plgpu.wgmma(d_g, dots.astype(dtype), summing(level))
                    q_s.at[place].T[...] = new_q.astype(dtype)
                    k_s.at[place].T[...] = new_k.astype(dtype)

                d_g = pl.run_state(within)(plgpu.ACC.init(wide(over) + by_one[2]))
                place = pl.ds(start + half * HALF, HALF)
                put_turned(d_g, d_g_ref.at[batch, place, n, features])

            finish(0, G[0], d_q, d_k, reads, writes, dots, first_over)
            d_q, d_k = (kept(parked_s.at[x], BROAD) for x in (0, 1))
            of_q, of_k = pl.run_scoped(read_in_second, narrow, narrow)
            log = logs(1)  # anew, for want of registers
            decay = decays(log, wide(middle))
            d_q, d_k = d_q + decay * of_q, d_k + decay * of_k
            dots = (decay * (part(q_s, 1) * of_q + part(k_s, 1) * of_k)).astype(dtype)
            finish(1, log, d_q, d_k, *(kept(low_s.at[x], BROAD) for x in (0, 1)), dots, over)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s, d_q_ref.at[batch, tokens, n, features])
            plgpu.copy_smem_to_gmem(k_s, d_k_ref.at[batch, tokens, n, features])
            plgpu.wait_smem_to_gmem(0)

        value, state = tiles((CHUNK, V), dtype), tiles((V, TILE), dtype)
        operand = tiles((CHUNK, TILE), dtype)
        squares = narrow_tiles((1 + len(SIZES), *BROAD), dtype)
        pl.run_scoped(
            body,
            operand,
            operand,
            plgpu.RefUnion(
                (value, value, value, state, state),
                (
                    squares,
                    squares,
                    narrow_tiles((3, *BROAD), dtype),
                    plgpu.SMEM((2, *held_shape(*BROAD)), jnp.float32),
                    plgpu.SMEM((3, *held_shape(*BROAD)), dtype),
                ),
            ),
            plgpu.SMEM((2, 2, CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=7),
            plgpu.Barrier(num_arrivals=1),
        )

    operands = [q, k, summed, beta, values, d_out, d_v, states, d_states, sums(dtype)]
    of_key = jax.ShapeDtypeStruct((B, T, N, K), dtype)
    return plgpu.kernel(
        kernel,
        out_type=[
            of_key,
            of_key,
            jax.ShapeDtypeStruct((B, T, N, K), jnp.float32),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ],
        grid=(B * N, T // CHUNK, K // TILE),
        grid_names=("row", "chunk", "tile"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*operands, *[documents] * packed)


def narrow_tiles(shape, dtype):
    """As `tiles`, for operands of 32 columns."""
    transforms = (plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(2 * HALF))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def sums(dtype):
    """Matrices [s, t] of ones where a decay of t is in what token s reads, or else writes.

    Of each size of blocks within their pair, then of all that a half reads, and writes. Two are
    above each other: [3, 64, 32].
    """
    s, t = np.arange(HALF)[:, None], np.arange(HALF)
    of = [(s // size == t // size) & ((s // size % 2 == 1) == (t <= s)) for size in SIZES]
    of += [t <= s, t > s]
    return jnp.asarray(np.stack(of).reshape(-1, *BROAD), dtype)


def overlaps(left, right):
    """The sums over rows of left * right [V, 64] in memory, by column."""
    total = None
    for start in range(0, left.shape[0], CHUNK):
        a, b = (
            widened(plgpu.load(x.at[pl.ds(start, CHUNK)].T, layout=MATRIX)) for x in (left, right)
        )
        added = jnp.sum(a * b, axis=1)
        total = added if total is None else total + added
    return total
