"""What the state pass needs of each chunk by itself: decays, scores, and the delta rule's inverse.

One warpgroup takes two chunks of a head: products on the tensor cores, then a forward substitution
in fp32 in which each thread keeps one column of an inverse in its registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, memref, scf, vector

from pallas_kernels._hopper.tiles import (
    ACROSS,
    CHUNK,
    SQUARE,
    across,
    down,
    exp_where,
    places,
    product,
    tiles,
)

PAIR = 2  # chunks of a program: 128 threads, 64 columns each
PADDED = CHUNK + 8  # floats of a row in shared memory; rows 8 banks apart do not collide


@functools.partial(jax.jit, static_argnames=("scale", "pieces"))
def prepare(q, k, g, beta, documents, *, scale, pieces=1):
    """(summed [B, N, T], gates [B, N, T/64, 2, 64], scores, inverse [B, N, T/64, 64, 64]).

    pieces: of each row, which are rows of what comes for chunks: there B is B pieces, T T / pieces.
    q, k [B, T, H, K]; g, beta fp32 [B, N, T]; documents int32 [B, T]. Without beta there is no
    inverse, without documents there is one. T is a multiple of 128.
    summed: log decay G from the start of each chunk. gates: exp(G_i), 0 where i is of another
    document than the token before the chunk; exp(G_64 - G_j), 0 where j is of another than the
    last.
    scores_ij = scale (q_i . k_j) exp(G_i - G_j) for j <= i of one document;
    inverse = (I + L)^-1 diag(beta), L_ij = beta_i (k_i . k_j) exp(G_i - G_j) for j < i likewise.
    """
    B, T, H, K = q.shape
    N = g.shape[1]
    dtype = q.dtype
    shared = N // H
    delta = beta is not None
    chunks = T // CHUNK // pieces

    def kernel(*refs):
        refs = list(refs)
        q_ref, k_ref, g_ref = refs[:3]
        del refs[:3]
        beta_ref = refs.pop(0) if delta else None
        documents_ref = refs.pop(0) if documents is not None else None
        summed_ref, gates_ref, scores_ref = refs[:3]
        inverse_ref = refs[3] if delta else None

        def body(k_or_inverse, q_or_lower, scores_s, summed_s, full):
            k_s, inverse_s = k_or_inverse if delta else (*k_or_inverse, None)
            q_s, lower_s = q_or_lower if delta else (*q_or_lower, None)
            row = lax.axis_index("row")
            batch, n = row // N, lax.rem(row, N)
            head = n // shared
            first = lax.axis_index("pair") * PAIR

            def place(c):
                """Where a chunk's results go."""
                return batch * pieces + (first + c) // chunks, n, lax.rem(first + c, chunks)

            for c in range(PAIR):
                tokens = pl.ds((first + c) * CHUNK, CHUNK)
                plgpu.copy_gmem_to_smem(k_ref.at[batch, tokens, head], k_s.at[c], full)
                plgpu.copy_gmem_to_smem(q_ref.at[batch, tokens, head], q_s.at[c], full)

            i, j = places()
            for c in range(PAIR):  # while the copies are under way
                tokens = pl.ds((first + c) * CHUNK, CHUNK)
                summed = jnp.sum(jnp.where(j <= i, across(g_ref.at[batch, n, tokens]), 0.0), axis=1)
                summed_s[c] = summed
                summed_ref[batch, n, tokens] = summed
            plgpu.commit_smem()
            decays = []
            for c in range(PAIR):
                start = (first + c) * CHUNK
                tokens = pl.ds(start, CHUNK)
                total = plgpu.load(summed_s.at[c], layout=ACROSS, optimized=False)
                before, after = jnp.exp(total), jnp.exp(summed_s[c, CHUNK - 1] - total)
                difference = down(summed_s.at[c]) - across(summed_s.at[c])
                keep = i >= j
                if documents is not None:
                    index = documents_ref.at[batch, tokens]
                    keep = keep & (down(index) == across(index))
                    own = plgpu.load(index, layout=ACROSS, optimized=False)
                    last = documents_ref[batch, jnp.maximum(start - 1, 0)]
                    last = jnp.where(start == 0, 0, last)
                    before = jnp.where(own == last, before, 0.0)
                    after = jnp.where(own == documents_ref[batch, start + CHUNK - 1], after, 0.0)
                gates_ref[(*place(c), 0)] = before
                gates_ref[(*place(c), 1)] = after
                decays.append(exp_where(keep, difference))
            plgpu.barrier_wait(full)
            for c in range(PAIR):
                scores = product(q_s.at[c], k_s.at[c].T) * decays[c] * scale
                scores_s[c] = scores.astype(dtype)
            plgpu.commit_smem()
            for c in range(PAIR):
                plgpu.copy_smem_to_gmem(scores_s.at[c], scores_ref.at[place(c)])
            if delta:
                for c in range(PAIR):
                    weight = down(beta_ref.at[batch, n, pl.ds((first + c) * CHUNK, CHUNK)])
                    lower = product(k_s.at[c], k_s.at[c].T) * decays[c] * weight
                    lower_s[c, :, pl.ds(0, CHUNK)] = lower
                plgpu.commit_smem()
                pair = pl.ds(first * CHUNK, PAIR * CHUNK)
                substitute(lower_s, beta_ref.at[batch, n, pair], inverse_s)
                plgpu.commit_smem()
                for c in range(PAIR):
                    plgpu.copy_smem_to_gmem(inverse_s.at[c], inverse_ref.at[place(c)])
            plgpu.wait_smem_to_gmem(0)

        operand = tiles((PAIR, CHUNK, K), dtype)
        inverse = plgpu.SMEM((PAIR, *SQUARE), dtype)
        lower = plgpu.SMEM((PAIR, CHUNK, PADDED), jnp.float32)
        pl.run_scoped(
            body,
            plgpu.RefUnion(operand, inverse) if delta else (operand,),
            plgpu.RefUnion(operand, lower) if delta else (operand,),
            tiles((PAIR, *SQUARE), dtype),
            plgpu.SMEM((PAIR, CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=2 * PAIR),
        )

    operands = [x for x in (q, k, g, beta, documents) if x is not None]
    squares = jax.ShapeDtypeStruct((B * pieces, N, chunks, *SQUARE), dtype)
    summed, gates, scores, *inverse = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
            jax.ShapeDtypeStruct((B * pieces, N, chunks, 2, CHUNK), jnp.float32),
            *[squares] * (1 + delta),
        ],
        grid=(B * N, T // (CHUNK * PAIR)),
        grid_names=("row", "pair"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*operands)
    return summed, gates, scores, inverse[0] if delta else None


def substitute(lower, beta, inverse):
    """inverse[c] = (I + L)^-1 diag(beta) for lower[c, i, j] = L_ij below the diagonal.

    Thread t has column t % 64 of matrix t // 64, x = e_column, and takes for each row i in turn
    x_i -= sum_j<i L_ij x_j, in four partial sums so that additions need not wait for each other.
    Half of the warps have columns whose upper half is zero, and begin in the middle.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType()))
    def run(ctx, lower, beta, inverse):
        del ctx
        f32, index = ir.F32Type.get(), ir.IndexType.get()
        four = ir.VectorType.get((4,), f32)
        element = ir.MemRefType(inverse.type).element_type

        def at(value):
            return arith.constant(index, value)

        thread = arith.index_cast(index, mgpu.utils.thread_idx())
        thread = arith.remui(thread, at(PAIR * CHUNK))
        matrix, column = arith.divui(thread, at(CHUNK)), arith.remui(thread, at(CHUNK))
        zero, one = arith.constant(f32, 0.0), arith.constant(f32, 1.0)

        def solve(first):
            weight = memref.load(beta, [thread])
            x = [zero] * first
            for i in range(first, CHUNK):
                here = arith.cmpi(arith.CmpIPredicate.eq, column, at(i))
                sums = [arith.select(here, one, zero), zero, zero, zero]
                for start in range(first, i, 4):
                    taken = vector.load(four, lower, [matrix, at(i), at(start)])
                    for j in range(start, min(start + 4, i)):
                        coefficient = arith.negf(vector.extract(taken, [], [j - start]))
                        sums[j % 4] = math.fma(coefficient, x[j], sums[j % 4])
                x.append(arith.addf(arith.addf(sums[0], sums[1]), arith.addf(sums[2], sums[3])))
            for i in range(CHUNK):  # last, so that no load has to wait for a store
                scaled = arith.truncf(element, arith.mulf(x[i], weight))
                memref.store(scaled, inverse, [matrix, at(i), column])
            scf.yield_([])

        middle = CHUNK // 2
        left = arith.cmpi(arith.CmpIPredicate.ult, column, at(middle))
        branch = scf.IfOp(left, has_else=True)
        with ir.InsertionPoint(branch.then_block):
            solve(0)
        with ir.InsertionPoint(branch.else_block):
            solve(middle)

    run(lower, beta, inverse)
