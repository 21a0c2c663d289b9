"""What the delta rule's state pass needs of each chunk by itself, with a decay a key feature.

One warpgroup takes two chunks of a head, 64 features of a chunk at a time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels._hopper import levels
from pallas_kernels._hopper.arranged import LEAST
from pallas_kernels._hopper.prepare import PADDED, PAIR, substitute
from pallas_kernels._hopper.registers import turned
from pallas_kernels._hopper.tiles import (
    ACROSS,
    CHUNK,
    DOWN,
    MATRIX,
    SQUARE,
    TILE,
    across,
    down,
    places,
    product,
    tiles,
)

NARROW = CHUNK + 4  # floats of a row of squares, so that three programs fit on a multiprocessor


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
    scores: Float[Array, "B N n 64 64"]
    inverse: Float[Array, "B N n 64 64"]
    summed: Float[Array, "B T N K"] | None


@functools.partial(jax.jit, static_argnames=("scale", "sums"))
def prepare(q, k, g, beta, documents, *, scale, sums=True) -> Prepared:
    """q, k [B, T, H, K]; g fp32 [B, T, N, K]; beta fp32 [B, N, T]; documents int32 [B, T] or None.

    T is a multiple of 128, K of 64. Without `sums` `summed` is None: the state pass needs it not.
    """
    B, T, H, K = q.shape
    N, dtype, packed = g.shape[2], q.dtype, documents is not None

    def kernel(*refs):
        refs = iter(refs)
        q_ref, k_ref, g_ref, beta_ref = (next(refs) for _ in range(4))
        documents_ref = next(refs) if packed else None
        read_ref, predict_ref, write_ref, keep_ref, scores_ref, inverse_ref, *summed_ref = refs

        def body(operands_or_inverse, right_or_half, squares_s, exponents_or_out, full):
            (q_s, k_s), inverse_s = operands_or_inverse
            (right_s, half_s), (exponents_s, out_s) = right_or_half, exponents_or_out
            row = lax.axis_index("row")
            batch, n = row // N, lax.rem(row, N)
            head = n // (N // H)
            first = lax.axis_index("pair") * PAIR
            square = pl.ds(0, CHUNK)

            def of_features(c, tile, own):
                """Of a tile of features what is of one chunk's tokens alone; adds q . k to own."""
                chunk, features = first + c, pl.ds(tile * TILE, TILE)
                tokens = pl.ds(chunk * CHUNK, CHUNK)

                def here(ref):
                    return ref.at[batch, tokens, n, features]

                # What left the tile before is read, and by all threads.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.commit_smem()
                for source, target in ((q_ref, q_s), (k_ref, k_s)):
                    source = source.at[batch, tokens, head].at[:, features]
                    plgpu.copy_gmem_to_smem(source, target, full)
                kept = map(here, summed_ref)
                levels.cumulate(here(g_ref), half_s, exponents_s, *kept, least=LEAST)
                plgpu.commit_smem()
                plgpu.barrier_wait(full)
                q, k = (plgpu.load(x, layout=MATRIX).astype(jnp.float32) for x in (q_s, k_s))
                own = own + jnp.sum(q * k, axis=1)

                def of_size(_, size):
                    left = levels.operands(q_s, k_s, exponents_s, right_s, size)
                    plgpu.commit_smem()
                    products = product(left, right_s.T, (CHUNK, levels.HALF))
                    levels.put(products, squares_s.at[c], size, tile)
                    return 2 * size

                lax.fori_loop(0, len(levels.SIZES), of_size, jnp.int32(1))
                end = exponents_s.at[CHUNK - 1, square]
                keep = jnp.exp2(plgpu.load(end, layout=ACROSS, optimized=False))
                own_documents = ()
                if packed:
                    last, own_last = edges(documents_ref, batch, chunk)
                    own_documents = documents_ref.at[batch, tokens], last, own_last
                    keep = jnp.where(own_last == last, keep, 0.0)
                keep_ref[batch, n, chunk, features] = keep
                write = levels.decay(q_s, k_s, exponents_s, *own_documents)
                plgpu.commit_smem()  # in place of the exponents comes out_s
                out_s[...] = write
                plgpu.commit_smem()
                results = (q_s, read_ref), (k_s, predict_ref), (out_s, write_ref)
                for staged, target in results:
                    plgpu.copy_smem_to_gmem(staged, here(target))
                return own

            @pl.loop(0, PAIR)
            def _(c):
                none = plgpu.layout_cast(jnp.zeros((CHUNK,), jnp.float32), DOWN)
                own = lax.fori_loop(0, K // TILE, functools.partial(of_features, c), none)
                levels.store(own, squares_s.at[c, :, CHUNK], DOWN)

            @pl.loop(0, PAIR)
            def _(c):
                chunk = first + c
                tokens = pl.ds(chunk * CHUNK, CHUNK)
                i, j = places()
                same = i >= j
                if packed:
                    index = documents_ref.at[batch, tokens]
                    same = same & (down(index) == across(index))
                own_square = squares_s.at[c, :, square]
                # What lies on the diagonal and above it is not of this chunk, or of the other one.
                scores = turned(own_square)
                scores = jnp.where(i == j, down(squares_s.at[c, :, CHUNK]), scores)
                lower = plgpu.load(own_square, layout=MATRIX, optimized=False)
                lower = lower * down(beta_ref.at[batch, n, tokens])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.commit_smem()
                out_s[...] = jnp.where(same, scores * scale, 0.0).astype(dtype)
                levels.store(jnp.where(same, lower, 0.0), own_square, MATRIX)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s, scores_ref.at[batch, n, chunk])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            substitute(
                squares_s, beta_ref.at[batch, n, pl.ds(first * CHUNK, PAIR * CHUNK)], inverse_s
            )
            plgpu.commit_smem()
            for c in range(PAIR):
                plgpu.copy_smem_to_gmem(inverse_s.at[c], inverse_ref.at[batch, n, first + c])
            plgpu.wait_smem_to_gmem(0)

        operand = tiles(SQUARE, dtype)
        pl.run_scoped(
            body,
            plgpu.RefUnion((operand, operand), plgpu.SMEM((PAIR, *SQUARE), dtype)),
            plgpu.RefUnion(tiles((levels.HALF, TILE), dtype), plgpu.SMEM((2, TILE), jnp.float32)),
            plgpu.SMEM((PAIR, CHUNK, NARROW), jnp.float32),
            plgpu.RefUnion(plgpu.SMEM((CHUNK, PADDED), jnp.float32), operand),
            plgpu.Barrier(num_arrivals=2),
        )

    chunks = T // CHUNK
    of_token = jax.ShapeDtypeStruct((B, T, N, K), dtype)
    square = jax.ShapeDtypeStruct((B, N, chunks, *SQUARE), dtype)
    out = [
        *[of_token] * 3,
        jax.ShapeDtypeStruct((B, N, chunks, K), jnp.float32),
        *[square] * 2,
        *[jax.ShapeDtypeStruct((B, T, N, K), jnp.float32)] * sums,
    ]
    results = plgpu.kernel(
        kernel,
        out_type=out,
        grid=(B * N, T // (CHUNK * PAIR)),
        grid_names=("row", "pair"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*[x for x in (q, k, g, beta, documents) if x is not None])
    return Prepared(*results, *[None] * (not sums))


def edges(documents_ref, batch, chunk):
    """Documents of the token before a chunk, 0 before the first chunk, and of its last token."""
    start = chunk * CHUNK
    last = documents_ref[batch, jnp.maximum(start - 1, 0)]
    return jnp.where(start == 0, 0, last), documents_ref[batch, start + CHUNK - 1]
