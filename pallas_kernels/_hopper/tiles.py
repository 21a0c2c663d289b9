"""What the Hopper kernels of the recurrent ops have in common: sizes, layouts, vectors."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64  # tokens
TILE = 64  # features of a warpgroup: the rows of a Hopper matrix product
SQUARE = (CHUNK, CHUNK)
SUMS = 1024  # floats in which the warps of a warpgroup add up columns

MATRIX = plgpu.Layout.WGMMA
DOWN = plgpu.Layout.WGMMA.reduce(1)  # a vector along the rows of a matrix
ACROSS = plgpu.Layout.WGMMA.reduce(0)  # a vector along its columns
TILED = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # of memory for products


def tiles(shape, dtype):
    """Shared memory for operands of matrix products."""
    return plgpu.SMEM(shape, dtype, transforms=TILED)


def down(ref, columns: int = CHUNK):
    """A vector [R] of memory as a matrix [R, columns] whose columns are equal."""
    vector = plgpu.load(ref, layout=DOWN, optimized=False)
    return lax.broadcast_in_dim(vector, (vector.shape[0], columns), [0])


def across(ref, rows: int = CHUNK):
    """A vector [C] of memory as a matrix [rows, C] whose rows are equal."""
    vector = plgpu.load(ref, layout=ACROSS, optimized=False)
    return lax.broadcast_in_dim(vector, (rows, vector.shape[0]), [1])


def places():
    """Row and column numbers of a chunk's square."""
    return tuple(plgpu.broadcasted_iota(jnp.int32, SQUARE, axis, layout=MATRIX) for axis in (0, 1))


def product(left, right, shape=SQUARE):
    """left @ right in fp32, waited for."""

    def run(accumulator):
        plgpu.wgmma(accumulator, left, right)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def exp_where(mask, difference):
    """exp(difference) where the mask holds, else 0; nothing overflows where it does not."""
    return jnp.exp(jnp.where(mask, difference, -jnp.inf))


def column_sums(matrix, scratch):
    """The sums of a matrix's columns, by way of shared memory of the warpgroup's own."""
    result = plgpu.ShapeDtypeStruct((matrix.shape[1],), jnp.float32, layout=ACROSS)

    @plgpu.inline_mgpu(arg_types=(MATRIX, plgpu.RefType()), return_type=result)
    def run(ctx, matrix, scratch):
        del ctx
        return matrix.reduce("add", 0, scratch)

    return run(matrix, scratch)
