"""Gradients of the delta rule's queries, keys, decays of each key feature and beta on Hopper.

With u, delta, S and dS as in `delta`, E_ijd = exp(G_id - G_jd), P_ij = scale d_out_i . u_j,
R_ij = delta_i . u_j, all products but the first ones by feature d:
d_q_i = scale exp(G_i) S d_out_i + sum_j<=i P_ij E_ij k_j
d_k_i = -exp(G_i) S delta_i - sum_j<i R_ij E_ij k_j                                    as it reads
d_k_j += exp(G_64 - G_j) dS u_j + sum_i>=j P_ij E_ij q_i - sum_i>j R_ij E_ij k_i      as it writes
A decay of token t is in all that goes over t, from j < t to i >= t. d_g_t sums just that, without
differences. The sums within a chunk go by blocks of 1, 2, 4, ... tokens, as `chunk._levels` has it,
so that no exponent is positive. Everything is transposed: features by tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, nvvm, vector

from pallas_kernels._hopper.tiles import (
    ACROSS,
    CHUNK,
    DOWN,
    MATRIX,
    SQUARE,
    TILE,
    across,
    down,
    exp_where,
    places,
    tiles,
)

HALF = CHUNK // 2  # tokens; only the largest blocks are not within a half
SIZES = (1, 2, 4, 8, 16)  # tokens of such blocks
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

        def body(q_s, k_s, shared, diagonal_s, full, sums_full):
            (values_s, d_out_s, d_v_s, states_s, d_states_s), later_use = shared
            shown_s, replaced_s, sums_s, out_s = later_use
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

            def logs(token):
                """G of one token, by feature."""
                return plgpu.load(
                    summed_ref.at[batch, start + token, n, features], layout=DOWN, optimized=False
                )

            G = turned(summed_ref.at[batch, tokens, n, features])
            into = out_of = through = None
            if packed:
                own_ref = documents_ref.at[batch, tokens]
                own = plgpu.load(own_ref, layout=ACROSS, optimized=False)
                before = documents_ref[batch, jnp.maximum(start - 1, 0)]
                before = jnp.where(start == 0, 0, before)
                last = documents_ref[batch, start + CHUNK - 1]
                into, out_of, through = own == before, own == last, last == before
            plgpu.barrier_wait(full)

            def of_states(shown, replaced, read, stored, written):
                """What goes by the states, and the squares as the blocks take them."""
                plgpu.wgmma(shown, d_out_s, values_s.T)
                plgpu.wgmma(replaced, d_v_s, values_s.T)
                plgpu.wgmma(read, states_s.T, d_out_s.T)
                plgpu.wgmma(stored, states_s.T, d_v_s.T)
                plgpu.wgmma(written, d_states_s.T, values_s.T)
                overlap = overlaps(states_s, d_states_s)
                shown = plgpu.wgmma_accumulator_load(shown, wait_n=4) * scale
                replaced = plgpu.wgmma_accumulator_load(replaced, wait_n=3)
                i, j = places()

                def diagonal(square):
                    return jnp.sum(jnp.where(i == j, square, 0.0), axis=1)

                diagonal_s[...] = diagonal(shown)

                @pl.when(tile == 0)
                def _():
                    weight = plgpu.load(beta_ref.at[batch, n, tokens], layout=DOWN, optimized=False)
                    d_beta_ref[batch, n, tokens] = diagonal(replaced) / (weight * weight)

                if packed:
                    same = down(own_ref) == across(own_ref)
                    shown, replaced = (jnp.where(same, x, 0.0) for x in (shown, replaced))
                read, stored, written = (
                    plgpu.wgmma_accumulator_load(x, wait_n=0) for x in (read, stored, written)
                )
                plgpu.commit_smem()  # all warps are done with what the squares replace
                plgpu.copy_gmem_to_smem(sums_ref, sums_s, sums_full)
                put(shown, shown_s)
                put(-replaced, replaced_s)
                plgpu.commit_smem()
                return overlap, read, stored, written

            def put(square, target):
                """The pairs of blocks of each size, both halves in 32 columns."""
                i, j = (plgpu.broadcasted_iota(jnp.int32, BROAD, x, layout=MATRIX) for x in (0, 1))
                left, right = square[:, :HALF], square[:, HALF:]
                target[LARGEST] = left.astype(dtype)
                within = jnp.where(i < HALF, left, right)
                i = lax.rem(i, HALF)
                for level, size in enumerate(SIZES):
                    pairs = (lax.rem(i // size, 2) == 1) & (i // size == j // size + 1)
                    target[level] = jnp.where(pairs, within, 0.0).astype(dtype)

            def part(ref, half):
                """Half of the tokens."""
                rows = ref.at[pl.ds(half * HALF, HALF)]
                return plgpu.load(rows.T, layout=MATRIX).astype(jnp.float32)

            def columns(x, half):
                return x[:, half * HALF : (half + 1) * HALF]

            def rows_of(ref, level, half):
                return ref.at[level, pl.ds(half * HALF, HALF)]

            def summing(which):
                return sums_s.at[which // 2, pl.ds(which % 2 * HALF, HALF)]

            accumulator = plgpu.ACC(SQUARE, jnp.float32)
            narrow = plgpu.ACC(BROAD, jnp.float32)
            overlap, read, stored, written = pl.run_scoped(of_states, *[accumulator] * 5)
            end = logs(CHUNK - 1)
            kept = overlap * jnp.exp(end)
            if packed:
                kept = jnp.where(through, kept, 0.0)

            def wide(vector, size=HALF):
                return lax.broadcast_in_dim(vector, (TILE, size), [0])

            def gate(log, allowed, half):
                if allowed is None:
                    return jnp.exp(log)
                allowed = lax.broadcast_in_dim(allowed, SQUARE, [1])
                return exp_where(columns(allowed, half), log)

            d_qs, d_ks, reads, writes = [], [], [], []
            for half in (0, 1):
                q, k, log = part(q_s, half), part(k_s, half), columns(G, half)
                before = gate(log, into, half)
                d_q = columns(read, half) * before * scale
                d_k = columns(stored, half) * -before
                reads.append(q * d_q + k * d_k)
                inter = columns(written, half) * gate(wide(end) - log, out_of, half)
                writes.append(k * inter)
                itself = across(diagonal_s.at[pl.ds(half * HALF, HALF)], TILE)
                d_qs.append(d_q + itself * k)
                d_ks.append(d_k + inter + itself * q)
            goes_over = [kept + jnp.sum(reads[1], axis=1), kept + jnp.sum(writes[0], axis=1)]

            def largest(of_q, of_k, of_key):
                """Of blocks of half a chunk."""
                decay = jnp.exp(-jnp.abs(G - wide(logs(HALF), CHUNK)))
                first, second = columns(decay, 0), columns(decay, 1)
                k_0, k_1, q_1 = part(k_s, 0), part(k_s, 1), part(q_s, 1)
                early, late = (first * k_0).astype(dtype), (second * k_1).astype(dtype)
                plgpu.wgmma(of_q, early, rows_of(shown_s, LARGEST, 1).T)
                plgpu.wgmma(of_k, early, rows_of(replaced_s, LARGEST, 1).T)
                plgpu.wgmma(of_key, (second * q_1).astype(dtype), rows_of(shown_s, LARGEST, 1))
                plgpu.wgmma(of_key, late, rows_of(replaced_s, LARGEST, 1))
                d_q = plgpu.wgmma_accumulator_load(of_q, wait_n=3) * second
                d_k = plgpu.wgmma_accumulator_load(of_k, wait_n=2) * second
                d_key = plgpu.wgmma_accumulator_load(of_key, wait_n=0) * first
                return d_q, d_k, d_key, q_1 * d_q + k_1 * d_k, k_0 * d_key

            added = pl.run_scoped(largest, narrow, narrow, narrow)
            for targets, half, x in zip(
                (d_qs, d_ks, d_ks, reads, writes), (1, 1, 0, 1, 0), added, strict=True
            ):
                targets[half] = targets[half] + x
            plgpu.barrier_wait(sums_full)
            for half in (0, 1):
                place = pl.ds(half * HALF, HALF)

                def within(d_g, half=half, place=place):
                    d_q, d_k, log = d_qs[half], d_ks[half], columns(G, half)
                    plgpu.wgmma(d_g, reads[half].astype(dtype), summing(UPTO))
                    plgpu.wgmma(d_g, writes[half].astype(dtype), summing(AFTER))
                    for level, size in enumerate(SIZES):
                        decay = jnp.exp(-jnp.abs(log - reference(log, size)))
                        added_q, added_k = pl.run_scoped(
                            functools.partial(of_blocks, decay, half, level), narrow, narrow
                        )
                        d_q, d_k = d_q + added_q, d_k + added_k
                        dots = part(q_s, half) * added_q + part(k_s, half) * added_k
                        plgpu.wgmma(d_g, dots.astype(dtype), summing(level))
                    out_s.at[0, place].T[...] = d_q.astype(dtype)
                    out_s.at[1, place].T[...] = d_k.astype(dtype)

                def of_blocks(decay, half, level, of_q, of_k):
                    key = (decay * part(k_s, half)).astype(dtype)
                    query = (decay * part(q_s, half)).astype(dtype)
                    shown, replaced = (rows_of(x, level, half) for x in (shown_s, replaced_s))
                    plgpu.wgmma(of_q, key, shown.T)
                    plgpu.wgmma(of_k, key, replaced.T)
                    plgpu.wgmma(of_k, query, shown)
                    plgpu.wgmma(of_k, key, replaced)
                    d_q = plgpu.wgmma_accumulator_load(of_q, wait_n=3) * decay
                    return d_q, plgpu.wgmma_accumulator_load(of_k, wait_n=0) * decay

                d_g = pl.run_state(within)(plgpu.ACC.init(wide(goes_over[half])))
                place = pl.ds(start + half * HALF, HALF)
                put_turned(d_g, d_g_ref.at[batch, place, n, features])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s.at[0], d_q_ref.at[batch, tokens, n, features])
            plgpu.copy_smem_to_gmem(out_s.at[1], d_k_ref.at[batch, tokens, n, features])
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
                (squares, squares, narrow_tiles((4, *BROAD), dtype), tiles((2, *SQUARE), dtype)),
            ),
            plgpu.SMEM((CHUNK,), jnp.float32),
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
    above each other: [4, 64, 32].
    """
    s, t = np.arange(HALF)[:, None], np.arange(HALF)
    of = [(s // size == t // size) & ((s // size % 2 == 1) == (t <= s)) for size in SIZES]
    of += [t <= s, t > s, t > s]  # one more, for an even number
    return jnp.asarray(np.stack(of).reshape(-1, *BROAD), dtype)


def overlaps(left, right):
    """The sums over rows of left * right [V, 64] in memory, by column."""
    total = None
    for start in range(0, left.shape[0], CHUNK):
        a, b = (
            plgpu.load(x.at[pl.ds(start, CHUNK)].T, layout=MATRIX).astype(jnp.float32)
            for x in (left, right)
        )
        added = jnp.sum(a * b, axis=1)
        total = added if total is None else total + added
    return total


def turned(source):
    """A matrix [64, 64] of fp32 in global memory, transposed: of each row whole sectors."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(SQUARE, jnp.float32, layout=MATRIX),
    )
    def run(ctx, source):
        del ctx
        layout = MATRIX.to_mgpu()
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        registers = np.empty(layout.registers_shape(SQUARE), dtype=object)
        for place in np.ndindex(registers.shape):
            numbers = [memref.load(source, at) for at in own_places(place)]
            registers[place] = vector.from_elements(pair, numbers)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return run(source)


def put_turned(matrix, target):
    """Store the transposed matrix of fp32 in global memory."""

    @plgpu.inline_mgpu(arg_types=(MATRIX, plgpu.RefType()))
    def run(ctx, matrix, target):
        del ctx
        for place in np.ndindex(matrix.registers.shape):
            for number, at in enumerate(own_places(place)):
                memref.store(vector.extract(matrix.registers[place], [], [number]), target, at)

    run(matrix, target)


def own_places(place):
    """[column, row] of the two numbers that a thread has in a register of a matrix."""
    index = ir.IndexType.get()

    def c(value):
        return arith.constant(index, value)

    thread = arith.remui(arith.index_cast(index, mgpu.utils.thread_idx()), c(128))
    warp, lane = arith.divui(thread, c(32)), arith.remui(thread, c(32))
    row = arith.addi(arith.muli(warp, c(16)), arith.divui(lane, c(4)))
    row = arith.addi(row, c(8 * place[4]))
    column = arith.muli(arith.remui(lane, c(4)), c(2))
    return [[arith.addi(column, c(8 * place[1] + number)), row] for number in (0, 1)]


def reference(matrix, size: int):
    """For each column, that with which the later block of `size` of its pair of blocks begins.

    Four threads have a row, each two neighbours of every eight columns.
    """

    @plgpu.inline_mgpu(
        arg_types=(MATRIX,), return_type=plgpu.ShapeDtypeStruct(matrix.shape, matrix.dtype, MATRIX)
    )
    def run(ctx, matrix):
        del ctx
        i32 = ir.IntegerType.get_signless(32)

        def c(value):
            return arith.constant(i32, value)

        lane = arith.andi(mgpu.utils.thread_idx(), c(31))
        first = arith.andi(lane, c(28))
        sources = {2: arith.ori(arith.andi(lane, c(30)), c(1)), 4: arith.ori(first, c(2))}
        source = sources.get(size, first)
        result = np.empty_like(matrix.registers)
        for place in np.ndindex(result.shape):
            block = 8 * place[1]
            found = block // (2 * size) * 2 * size + size if size >= 8 else block
            pair = matrix.registers[(place[0], found // 8, *place[2:])]
            number = vector.extract(pair, [], [int(size == 1)])
            if size > 1:
                bits = arith.bitcast(i32, number)
                bits = nvvm.shfl_sync(c(0xFFFFFFFF), bits, source, c(31), nvvm.ShflKind.idx)
                number = arith.bitcast(ir.F32Type.get(), bits)
            result[place] = vector.broadcast(pair.type, number)
        return mgpu.FragmentedArray(
            _registers=result, _layout=matrix.layout, _is_signed=matrix.is_signed
        )

    return run(matrix)
