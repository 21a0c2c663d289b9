"""Short convolution on Hopper: one pass over x forwards, one over x and the gradient backwards.

A program takes some chunks of 64 tokens of 64 or 128 features, one after another. Tokens come to
shared memory with the few before (and, backwards, after) them, from where each tap is read at an
offset of rows. Eight features of a token are a thread's, so that rows are read and written whole.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels._core import compat
from pallas_kernels.short_convolution.ref import EPSILON
from pallas_kernels.short_convolution.support import TOKENS, Facts, features_together

VECTOR = 8  # features of a thread, 16 bytes
CHUNKS = 4  # of a program, which writes what they add to the gradient of the weight once


def short_convolution(
    x: Float[Array, "B T N H"],
    weight: Float[Array, "N H W"],
    bias: Float[Array, "N H"] | None,
    segment_ids: Int[Array, "B T"] | None,
    *,
    silu: bool,
    unit_norm: bool,
) -> Float[Array, "B T N H"]:
    """As `ref.short_convolution`, in fp32 from the inputs to the result."""
    B, T, N, H = x.shape
    W = weight.shape[-1]
    size = features_together(Facts(compat.target(), x.dtype.name, T, N, H, W, unit_norm))
    whole = jnp.pad(x, ((0, 0), (0, -T % TOKENS), (0, 0), (0, 0)))
    rows = whole.reshape(B, -1, N * H // size, size)
    taps = jnp.moveaxis(weight.astype(jnp.float32), -1, 0)[::-1].reshape(W, -1, size)
    bias = None if bias is None else bias.astype(jnp.float32).reshape(-1, size)
    sees = None if segment_ids is None else which_taps(segment_ids, W, rows.shape[1] + VECTOR * 2)
    y = convolved(rows, taps, bias, sees, silu, unit_norm)
    return y[:, :T].reshape(x.shape)


def which_taps(segment_ids: Int[Array, "B T"], width: int, length: int) -> Int[Array, "B length"]:
    """Bit i of each token: whether the slot i before it is of its document."""
    bits = 1
    for i in range(1, width):
        before = jnp.pad(segment_ids, ((0, 0), (i, 0)))[:, : segment_ids.shape[1]]
        bits |= (segment_ids == before).astype(jnp.int32) << i
    return jnp.pad(bits, ((0, 0), (0, length - bits.shape[1])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def convolved(x, taps, bias, sees, silu, unit_norm):
    """x [B, T, G, F], fp32 taps [W, G, F] and bias [G, F] -> [B, T, G, F]."""
    return call(x, taps, bias, sees, None, silu, unit_norm)[0]


def _forward(x, taps, bias, sees, silu, unit_norm):
    return convolved(x, taps, bias, sees, silu, unit_norm), (x, taps, bias, sees)


def _backward(silu, unit_norm, kept, gradient):
    x, taps, bias, sees = kept
    d_x, parts = call(x, taps, bias, sees, gradient.astype(x.dtype), silu, unit_norm)
    sums = jnp.swapaxes(jnp.sum(parts, axis=(0, 1)), 0, 1)  # [W, with a bias + 1, G, F]
    d_bias = None if bias is None else sums[-1]
    return d_x, sums[: len(taps)], d_bias, None


convolved.defvjp(_forward, _backward)


def layout(features: int):
    """Rows of `features` over the threads of a warpgroup, in fours a warp or in twos."""
    rows = VECTOR * 128 // features
    tiling = plgpu.Tiling(((rows, features), (rows // 4, features), (VECTOR,)))
    return plgpu.Layout.TILED(tiling, (-5,), (-3, -2), -1)


@functools.partial(jax.jit, static_argnames=("silu", "unit_norm"))
def call(x, taps, bias, sees, gradient, silu, unit_norm):
    """(y,) or, with the gradient of y, (that of x, its products with x [B, P, G, W, F])."""
    B, T, G, F = x.shape
    W, chunks, back = len(taps), T // TOKENS, gradient is not None
    programs, rows = pl.cdiv(chunks, CHUNKS), layout(F)
    step = VECTOR * 128 // F  # rows that the threads hold at once
    matrix, vector, column = (step, F), rows.reduce(0), rows.reduce(1)
    sums = W + (bias is not None)

    def kernel(*refs):
        refs = iter(refs)
        x_ref, taps_ref = next(refs), next(refs)
        bias_ref = next(refs) if bias is not None else None
        sees_ref = next(refs) if sees is not None else None
        gradient_ref = next(refs) if back else None
        out_ref = next(refs)
        sums_ref = next(refs) if back else None
        batch, part, group = (lax.axis_index(name) for name in ("row", "part", "group"))

        def load(ref, layout):
            return plgpu.load(ref, layout=layout, optimized=False)

        def spread(values):
            """A vector of the features in all rows."""
            return plgpu.layout_cast(lax.broadcast_in_dim(values, matrix, [1]), rows)

        def down(values):
            """A number a row for all features."""
            return plgpu.layout_cast(lax.broadcast_in_dim(values, matrix, [0]), rows)

        def body(x_s, gradient_s, scratch, full):
            weights = [load(taps_ref.at[i, group], vector) for i in range(W)]
            offset = None if bias is None else load(bias_ref.at[group], vector)

            def seen(tap, start, i):
                """`tap`, of i rows before those from `start`, where their document has it."""
                if sees is None or i == 0:
                    return tap
                bits = load(sees_ref.at[batch, pl.ds(start, step)], column)
                return jnp.where(down((bits >> i) & 1) > 0, tap, 0.0)

            def before(start, row):
                """What the tokens see: x of `row` and of those before it."""
                found = []
                for i in range(W):
                    tap = load(x_s.at[pl.ds(step + row - i, step)], rows).astype(jnp.float32)
                    found.append(seen(tap, start + row, i))
                return found

            def mixed(found):
                y = sum(tap * spread(w) for tap, w in zip(found, weights, strict=True))
                return y if bias is None else y + spread(offset)

            def square_sum(values):
                return down(jnp.sum(values, axis=1))

            def fetch(chunk):
                start = chunk * TOKENS
                ahead, after = jnp.maximum(start - step, 0), jnp.minimum(start + TOKENS, T - step)

                def get(source, at, size, target, place):
                    source = source.at[batch, pl.ds(at, size), group]
                    plgpu.copy_gmem_to_smem(source, target.at[pl.ds(place, size)], full)

                get(x_ref, ahead, step, x_s, 0)
                get(x_ref, start, TOKENS, x_s, step)
                if back:
                    get(x_ref, after, step, x_s, step + TOKENS)
                    get(gradient_ref, start, TOKENS, gradient_s, 0)
                    get(gradient_ref, after, step, gradient_s, TOKENS)
                plgpu.barrier_wait(full)
                zeros = plgpu.layout_cast(jnp.zeros(matrix, x.dtype), rows)

                @pl.when(chunk == 0)
                def _():
                    x_s[pl.ds(0, step)] = zeros

                if back:

                    @pl.when(chunk == chunks - 1)
                    def _():
                        gradient_s[pl.ds(TOKENS, step)] = zeros

                plgpu.commit_smem()
                return start

            def forwards(chunk, carry):
                start = fetch(chunk)
                for row in range(0, TOKENS, step):
                    y = mixed(before(start, row))
                    if silu:
                        y = y * sigmoid(y)
                    if unit_norm:
                        y = y * lax.rsqrt(square_sum(y * y) + EPSILON)
                    out_ref[batch, pl.ds(start + row, step), group] = y.astype(x.dtype)
                plgpu.commit_smem()  # all have read what is fetched next
                return carry

            def of_sum(y, gradient):
                """The gradient of the weighted sum y from that of the result."""
                share = sigmoid(y) if silu else None
                if unit_norm:
                    result = y * share if silu else y
                    inverse = lax.rsqrt(square_sum(result * result) + EPSILON)
                    along = square_sum(result * gradient) * inverse * inverse
                    gradient = (gradient - result * along) * inverse
                return gradient * share * (1.0 + y * (1.0 - share)) if silu else gradient

            def backwards(chunk, totals):
                start = fetch(chunk)

                def of_rows(row):
                    """The gradient of the sum in `row` and later ones, and what they saw."""
                    found = before(start, row)
                    place = pl.ds(row, step)
                    of_result = load(gradient_s.at[place], rows).astype(jnp.float32)
                    change = of_sum(mixed(found), of_result)
                    gradient_s[place] = change.astype(x.dtype)
                    return change, found

                def add(i, totals):
                    change, found = of_rows(i * step)
                    added = [change * tap for tap in found] + [change] * (sums - W)
                    return [total + new for total, new in zip(totals, added, strict=True)]

                totals = lax.fori_loop(0, TOKENS // step, add, totals)
                of_rows(TOKENS)
                plgpu.commit_smem()

                @pl.loop(0, TOKENS // step)
                def _(i):
                    row, total = i * step, 0.0
                    for later, w in enumerate(weights):
                        change = load(gradient_s.at[pl.ds(row + later, step)], rows)
                        change = seen(change.astype(jnp.float32), start + row + later, later)
                        total += change * spread(w)
                    out_ref[batch, pl.ds(start + row, step), group] = total.astype(x.dtype)

                plgpu.commit_smem()
                return totals

            first = part * CHUNKS
            last = jnp.minimum(first + CHUNKS, chunks)
            if not back:
                lax.fori_loop(first, last, forwards, 0)
                return
            zeros = [plgpu.layout_cast(jnp.zeros(matrix, jnp.float32), rows) for _ in range(sums)]
            for i, total in enumerate(lax.fori_loop(first, last, backwards, zeros)):
                put(scratch, total)
                plgpu.commit_smem()
                each = [load(scratch.at[row], vector) for row in range(step)]
                put(sums_ref.at[batch, part, group, i], sum(each[1:], start=each[0]))
                plgpu.commit_smem()

        copies = 5 if back else 2
        pl.run_scoped(
            body,
            plgpu.SMEM((step + TOKENS + back * step, F), x.dtype),
            plgpu.SMEM((TOKENS + step, F), x.dtype) if back else None,
            plgpu.SMEM((step, F), jnp.float32) if back else None,
            plgpu.Barrier(num_arrivals=copies),
        )

    operands = [x, taps, bias, sees, gradient]
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    if back:
        out += [jax.ShapeDtypeStruct((B, programs, G, sums, F), jnp.float32)]
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(B, programs, G),
        grid_names=("row", "part", "group"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*(operand for operand in operands if operand is not None))


def put(target, values):
    """Assign, by whole vectors of numbers."""
    if hasattr(plgpu, "store"):  # JAX 0.12, whose assignment is stricter than that of 0.11
        plgpu.store(target, values, optimized=False)
    else:
        target[...] = values


def sigmoid(y):
    """1 / (1 + exp(-y))."""
    return 1.0 / (1.0 + jnp.exp(-y))
