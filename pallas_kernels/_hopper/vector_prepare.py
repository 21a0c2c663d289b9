"""What the delta rule's state pass needs of each chunk by itself, with a decay a key feature.

One warpgroup takes two chunks of a head, 64 features of a chunk at a time. Between tokens i and j
feature d decays by exp(G_id - G_jd), which is no product of a number of i and one of j that both
fit in a float. So the pairs of neighbouring blocks of 1, 2, ..., 32 tokens each have a product of
their own, with exponents from the first token of the later block: none is above 0.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector
from jaxtyping import Array, Float

from pallas_kernels._hopper.prepare import PADDED, PAIR, substitute
from pallas_kernels._hopper.tiles import (
    ACROSS,
    CHUNK,
    MATRIX,
    SQUARE,
    TILE,
    across,
    down,
    places,
    product,
    tiles,
)

HALF = CHUNK // 2
LEVELS = (1, 2, 4, 8, 16, 32)  # tokens of a block; an even number of levels


class Prepared(NamedTuple):
    """G = `summed`: log decay from the start of each chunk. The rest is as in `chunk.Parts`.

    read: exp(G_i) q_i, predict: exp(G_i) k_i, both 0 where i is of another document than the token
    before the chunk; write: exp(G_64 - G_j) k_j, 0 where j is of another than the last; keep:
    exp(G_64), 0 where a document starts in the chunk. n = T / 64 chunks of 64 tokens:
    scores_ij = scale sum_d q_id k_jd exp(G_id - G_jd) for j <= i of one document;
    inverse = (I + L)^-1 diag(beta), L_ij = beta_i sum_d k_id k_jd exp(G_id - G_jd) for j < i.
    """

    read: Float[Array, "B T N K"]
    predict: Float[Array, "B T N K"]
    write: Float[Array, "B T N K"]
    keep: Float[Array, "B N n K"]
    summed: Float[Array, "B T N K"]
    scores: Float[Array, "B N n 64 64"]
    inverse: Float[Array, "B N n 64 64"]


@functools.partial(jax.jit, static_argnames=("scale",))
def prepare(q, k, g, beta, documents, *, scale) -> Prepared:
    """q, k [B, T, H, K]; g fp32 [B, T, N, K]; beta fp32 [B, N, T]; documents int32 [B, T] or None.

    T is a multiple of 128, K of 64.
    """
    B, T, H, K = q.shape
    N, dtype, packed = g.shape[2], q.dtype, documents is not None

    def kernel(*refs):
        refs = iter(refs)
        q_ref, k_ref, g_ref, beta_ref = (next(refs) for _ in range(4))
        documents_ref = next(refs) if packed else None
        read_ref, predict_ref, write_ref, keep_ref, summed_ref, scores_ref, inverse_ref = refs

        def body(operands_or_inverse, right_s, scores_s, lower_s, summed_s, half_s, full):
            (q_s, k_s), inverse_s = operands_or_inverse
            row = lax.axis_index("row")
            batch, n = row // N, lax.rem(row, N)
            head = n // (N // H)
            first = lax.axis_index("pair") * PAIR

            @pl.loop(0, PAIR)
            def _(c):
                chunk = first + c
                tokens = pl.ds(chunk * CHUNK, CHUNK)
                i, j = places()

                def of_features(number, sums):
                    features = pl.ds(number * TILE, TILE)

                    def here(ref):
                        return ref.at[batch, tokens, n, features]

                    # What left the tiles before is read, and by all threads.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.commit_smem()
                    for source, target in ((q_ref, q_s), (k_ref, k_s)):
                        source = source.at[batch, tokens, head].at[:, features]
                        plgpu.copy_gmem_to_smem(source, target, full)
                    cumulate(here(g_ref), half_s, summed_s, here(summed_ref))
                    plgpu.commit_smem()
                    plgpu.barrier_wait(full)

                    def operands():
                        return (
                            plgpu.load(x, layout=MATRIX).astype(jnp.float32) for x in (q_s, k_s)
                        )

                    for level, size in enumerate(LEVELS):
                        slot = right_s.at[level % 2]
                        # Loaded anew at each level, for want of registers.
                        decay = jnp.exp(-jnp.abs(rows(summed_s, 0) - rows(summed_s, size)))
                        left, right = ((decay * x).astype(dtype) for x in operands())
                        slot[...] = right
                        plgpu.commit_smem()
                        sums = [
                            plus_pairs(total, product(x, slot.T), size)
                            for x, total in zip((left, right), sums, strict=True)
                        ]
                    G, (q, k) = rows(summed_s, 0), operands()
                    own = lax.broadcast_in_dim(jnp.sum(q * k, axis=1), SQUARE, [0])
                    sums[0] = sums[0] + jnp.where(i == j, own, 0.0)
                    end = summed_s.at[CHUNK - 1, pl.ds(0, TILE)]
                    before, after = G, across(end) - G
                    keep = jnp.exp(plgpu.load(end, layout=ACROSS, optimized=False))
                    if packed:
                        last, own_last = edges(documents_ref, batch, chunk)
                        index = down(documents_ref.at[batch, tokens], TILE)
                        before = jnp.where(index == last, before, -jnp.inf)
                        after = jnp.where(index == own_last, after, -jnp.inf)
                        keep = jnp.where(own_last == last, keep, 0.0)
                    keep_ref[batch, n, chunk, features] = keep
                    before, after = jnp.exp(before), jnp.exp(after)
                    results = (
                        (q * before, q_s, read_ref),
                        (k * before, k_s, predict_ref),
                        (k * after, right_s.at[0], write_ref),
                    )
                    for result, staged, _ in results:
                        staged[...] = result.astype(dtype)
                    plgpu.commit_smem()
                    for _, staged, target in results:
                        plgpu.copy_smem_to_gmem(staged, here(target))
                    return tuple(sums)

                zeros = plgpu.layout_cast(jnp.zeros(SQUARE, jnp.float32), MATRIX)
                scores, lower = lax.fori_loop(0, K // TILE, of_features, (zeros, zeros))
                if packed:
                    index = documents_ref.at[batch, tokens]
                    same = down(index) == across(index)
                    scores, lower = (jnp.where(same, x, 0.0) for x in (scores, lower))
                scores_s[...] = (scores * scale).astype(dtype)
                lower_s[c, :, pl.ds(0, CHUNK)] = lower * down(beta_ref.at[batch, n, tokens])
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(scores_s, scores_ref.at[batch, n, chunk])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            substitute(
                lower_s, beta_ref.at[batch, n, pl.ds(first * CHUNK, PAIR * CHUNK)], inverse_s
            )
            plgpu.commit_smem()
            for c in range(PAIR):
                plgpu.copy_smem_to_gmem(inverse_s.at[c], inverse_ref.at[batch, n, first + c])
            plgpu.wait_smem_to_gmem(0)

        operand = tiles(SQUARE, dtype)
        pl.run_scoped(
            body,
            plgpu.RefUnion((operand, operand), plgpu.SMEM((PAIR, *SQUARE), dtype)),
            tiles((2, *SQUARE), dtype),
            operand,
            plgpu.SMEM((PAIR, CHUNK, PADDED), jnp.float32),
            plgpu.SMEM((CHUNK, PADDED), jnp.float32),
            plgpu.SMEM((2, TILE), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
        )

    chunks = T // CHUNK
    of_token = jax.ShapeDtypeStruct((B, T, N, K), dtype)
    square = jax.ShapeDtypeStruct((B, N, chunks, *SQUARE), dtype)
    out = Prepared(
        of_token,
        of_token,
        of_token,
        jax.ShapeDtypeStruct((B, N, chunks, K), jnp.float32),
        jax.ShapeDtypeStruct((B, T, N, K), jnp.float32),
        square,
        square,
    )
    operands = [x for x in (q, k, g, beta, documents) if x is not None]
    return Prepared(
        *plgpu.kernel(
            kernel,
            out_type=list(out),
            grid=(B * N, T // (CHUNK * PAIR)),
            grid_names=("row", "pair"),
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
            ),
        )(*operands)
    )


def edges(documents_ref, batch, chunk):
    """Documents of the token before a chunk, 0 before the first chunk, and of its last token."""
    start = chunk * CHUNK
    last = documents_ref[batch, jnp.maximum(start - 1, 0)]
    return jnp.where(start == 0, 0, last), documents_ref[batch, start + CHUNK - 1]


def cumulate(g, half, summed, out):
    """Sums of g [64, 64] over the tokens up to each, to memory that is shared and that is not.

    Each thread adds up a feature over one half of the tokens; half [2, 64] is for what they need
    of each other.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 4)
    def run(ctx, g, half, summed, out):
        del ctx
        index = ir.IndexType.get()

        def at(value):
            return constant(index, value)

        thread = arith.remui(arith.index_cast(index, mgpu.utils.thread_idx()), at(2 * TILE))
        later, feature = arith.divui(thread, at(TILE)), arith.remui(thread, at(TILE))
        start = arith.muli(later, at(HALF))
        places = [arith.addi(start, at(i)) for i in range(HALF)]
        sums = []
        for number in [memref.load(g, [place, feature]) for place in places]:
            sums.append(arith.addf(sums[-1], number) if sums else number)
        memref.store(sums[-1], half, [later, feature])
        mgpu.utils.warpgroup_barrier()
        before = memref.load(half, [at(0), feature])
        zero = arith.constant(before.type, 0.0)
        is_later = arith.cmpi(arith.CmpIPredicate.ne, later, at(0))
        before = arith.select(is_later, before, zero)
        for place, number in zip(places, sums, strict=True):
            total = arith.addf(before, number)
            memref.store(total, summed, [place, feature])
            memref.store(total, out, [place, feature])

    run(g, half, summed, out)


def rows(summed, size: int):
    """For each of 64 tokens a row of `summed`: of the token itself for size 0, else of the first in
    the later block of its pair of blocks of so many tokens.
    """
    result = plgpu.ShapeDtypeStruct(SQUARE, jnp.float32, layout=MATRIX)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    def run(ctx, summed):
        del ctx
        index, pair = ir.IndexType.get(), ir.VectorType.get((2,), ir.F32Type.get())

        def load(place, down, right):
            row, column = (arith.index_cast(index, x) for x in place)
            row = arith.addi(row, constant(index, down))
            if size:
                row = arith.andi(row, constant(index, CHUNK - 2 * size))
                row = arith.ori(row, constant(index, size))
            column = arith.addi(column, constant(index, right))
            return vector.load(pair, summed, [row, column])

        return by_register(load)

    return run(summed)


def plus_pairs(total, square, size: int):
    """total, and square where i is in the later and j in the earlier of a pair of blocks."""

    @plgpu.inline_mgpu(
        arg_types=(MATRIX, MATRIX),
        return_type=plgpu.ShapeDtypeStruct(SQUARE, jnp.float32, layout=MATRIX),
    )
    def run(ctx, total, square):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        given = zip(total.registers.flat, square.registers.flat, strict=True)

        def add(place, down, right):
            row, column = place
            before, new = next(given)
            row = arith.addi(row, constant(i32, down))
            is_later = arith.andi(row, constant(i32, size))
            is_later = arith.cmpi(arith.CmpIPredicate.ne, is_later, constant(i32, 0))
            earlier = arith.subi(arith.andi(row, constant(i32, -size)), constant(i32, size))
            earlier = arith.select(is_later, earlier, constant(i32, -CHUNK))
            for e in range(2):
                # Of the columns of a thread the high bits are known.
                low = arith.andi(arith.addi(column, constant(i32, e)), constant(i32, -size & 7))
                own = arith.cmpi(
                    arith.CmpIPredicate.eq,
                    arith.subi(earlier, low),
                    constant(i32, right & -size),
                )
                old = vector.extract(before, [], [e])
                number = arith.addf(old, vector.extract(new, [], [e]))
                number = arith.select(own, number, old)
                before = vector.insert(number, before, [], [e])
            return before

        return by_register(add)

    return run(total, square)


def by_register(function):
    """A matrix [64, 64] whose pairs of numbers are function(place, down, right).

    place: row and column of the thread's first, from which the others are so far down and right.
    """
    i32 = ir.IntegerType.get_signless(32)
    # With side effects, or the loop would keep all that follows from it in registers.
    thread = mgpu.utils.inline_ptx("mov.u32 $0, %tid.x;", result_types=i32, has_side_effects=True)
    warp, lane = (
        arith.divui(arith.remui(thread, constant(i32, 2 * TILE)), constant(i32, 32)),
        arith.remui(thread, constant(i32, 32)),
    )
    row = arith.addi(arith.muli(warp, constant(i32, 16)), arith.divui(lane, constant(i32, 4)))
    column = arith.muli(arith.remui(lane, constant(i32, 4)), constant(i32, 2))
    layout = MATRIX.to_mgpu()
    registers = np.empty(layout.registers_shape(SQUARE), dtype=object)
    strides = layout.tiling.tile_strides((TILE, 1))
    for number in np.ndindex(registers.shape):
        down, right = divmod(int(np.dot(number, strides)), TILE)
        registers[number] = function((row, column), down, right)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def constant(kind, value: int):
    return arith.constant(kind, value)
