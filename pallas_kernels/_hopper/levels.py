"""Products of a chunk's tokens with a decay a key feature, by blocks of 1, 2, ..., 32 tokens.

Between tokens i and j feature d decays by exp(G_id - G_jd), which is no product of a number of i
and one of j that both fit in a float. So each size of blocks has a product of its own, of the
tokens in the later and in the earlier one of each pair of neighbouring blocks, with exponents from
the first token of the later block: none is above 0. Of 64 tokens 32 are in later blocks, so that
queries and keys of these together are the 64 rows of one matrix product, and keys of the 32 earlier
ones its columns. Token number m of the later or earlier ones is of pair m // size.

Thread t of a warpgroup holds rows 16 (t // 32) + t % 32 // 4 and 8 below that: of the later token
of number 8 (t // 32) + t % 32 // 4 the query and the key.
"""

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, scf, vector

from pallas_kernels._hopper.tiles import CHUNK, MATRIX, SQUARE, TILE, TILED

SIZES = (1, 2, 4, 8, 16, 32)  # tokens of a block
HALF = CHUNK // 2  # tokens in later blocks
LOG2E = 1.4426950408889634
THREADS = 128  # of a warpgroup


def cumulate(g, half, exponents, *summed):
    """Sums of g [64, 64] over the tokens up to each, as exponents of 2 in shared memory.

    Also as they are, where `summed` is given, in global memory.

    Each thread adds up a feature over one half of the tokens; half [2, 64] is for what they need
    of each other.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (3 + len(summed)))
    def run(ctx, g, half, exponents, *summed):
        del ctx
        thread = own_thread()
        later, feature = divide(thread, TILE)
        start = arith.muli(later, number(HALF))
        tokens = [indices(arith.addi(start, number(i)), feature) for i in range(HALF)]
        sums = []
        for addend in [memref.load(g, place) for place in tokens]:
            sums.append(arith.addf(sums[-1], addend) if sums else addend)
        memref.store(sums[-1], half, indices(later, feature))
        mgpu.utils.warpgroup_barrier()
        before = memref.load(half, indices(number(0), feature))
        is_later = arith.cmpi(arith.CmpIPredicate.ne, later, number(0))
        before = arith.select(is_later, before, real(0.0))
        for place, sum_ in zip(tokens, sums, strict=True):
            total = arith.addf(before, sum_)
            for target in summed:
                memref.store(total, target, place)
            memref.store(arith.mulf(total, real(LOG2E)), exponents, place)

    run(g, half, exponents, *summed)


def operands(q, k, exponents, right, size: int):
    """Decayed queries and keys of later tokens [64, 64], and in `right` keys of earlier [32, 64].

    q, k [64, 64], right: tiles of shared memory; exponents as of `cumulate`.
    """
    tiled = plgpu.RefType(TILED)

    @plgpu.inline_mgpu(
        arg_types=(tiled, tiled, plgpu.RefType(), tiled),
        return_type=plgpu.ShapeDtypeStruct(SQUARE, q.dtype, layout=MATRIX),
    )
    def run(ctx, q, k, exponents, right):
        del ctx
        m, column = own_place()
        earlier = of_number(m, size)
        later = arith.addi(earlier, number(size))
        middle = first_of(later, size)
        wide = ir.VectorType.get((2,), ir.F32Type.get())
        narrow = ir.VectorType.get((2,), ir.MemRefType(q.type).element_type)
        layout = MATRIX.to_mgpu()
        registers = np.empty(layout.registers_shape(SQUARE), dtype=object)
        for start in range(0, TILE, 8):
            here = arith.addi(column, number(start))

            def exponent(token, here=here):
                return vector.load(wide, exponents, indices(token, here))

            def decayed(matrix, token, decay, here=here):
                taken = vector.load(narrow, matrix, in_tile(token, here))
                return arith.mulf(taken, decay)

            between = exponent(middle)
            # Rounded, so that two numbers are multiplied at once.
            until = arith.truncf(narrow, exp2(arith.subf(between, exponent(earlier))))
            since = arith.truncf(narrow, exp2(arith.subf(exponent(later), between)))
            vector.store(decayed(k, earlier, until), right, in_tile(m, here))
            for down, matrix in ((0, q), (8, k)):
                place = register_at(layout, SQUARE, down, start)
                registers[place] = decayed(matrix, later, since)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return run(q, k, exponents, right)


def put(products, of_queries, of_keys, size: int, more: bool):
    """Products [64, 32] of `operands` to where their tokens are, those of one pair of blocks.

    more: add them to what is there.
    """

    @plgpu.inline_mgpu(arg_types=(MATRIX, plgpu.RefType(), plgpu.RefType()))
    def run(ctx, products, of_queries, of_keys):
        del ctx
        layout, shape = MATRIX.to_mgpu(), (CHUNK, HALF)
        m, column = own_place()
        later = arith.addi(of_number(m, size), number(size))
        block = arith.andi(m, number(-size))
        width = min(size, 2)  # tokens that are neighbours on both sides
        pair = ir.VectorType.get((width,), ir.F32Type.get())
        for start in range(0, HALF, 8):
            for e in range(0, 2, width):
                n = arith.addi(column, number(start + e))
                equal = arith.CmpIPredicate.eq
                paired = arith.cmpi(equal, arith.andi(n, number(-size)), block)
                place = indices(later, of_number(n, size))
                branch = scf.IfOp(paired)
                with ir.InsertionPoint(branch.then_block):
                    for down, target in ((0, of_queries), (8, of_keys)):
                        new = products.registers[register_at(layout, shape, down, start)]
                        if width == 1:
                            new = vector.extract_strided_slice(pair, new, [e], [1], [1])
                        if more:
                            new = arith.addf(new, vector.load(pair, target, place))
                        vector.store(new, target, place)
                    scf.yield_([])

    run(products, of_queries, of_keys)


def own_thread():
    """The number of a thread in its warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    # With side effects, or a loop would keep all that follows from it in registers.
    thread = mgpu.utils.inline_ptx("mov.u32 $0, %tid.x;", result_types=i32, has_side_effects=True)
    return arith.remui(thread, number(THREADS))


def own_place():
    """Of a thread the number of its later token, and its first column."""
    warp, lane = divide(own_thread(), 32)
    row, pair = divide(lane, 4)
    return arith.addi(arith.muli(warp, number(8)), row), arith.muli(pair, number(2))


def of_number(m, size: int):
    """The m-th token in earlier blocks."""
    block = arith.muli(arith.andi(m, number(-size)), number(2))
    return arith.addi(block, arith.andi(m, number(size - 1)))


def first_of(token, size: int):
    """The first token of a token's block."""
    return arith.andi(token, number(-size))


def in_tile(row, column):
    """Where a number is in memory of `tiles`: in swizzled tiles of 8 rows."""
    tile, row = divide(row, 8)
    column = arith.xori(column, arith.muli(row, number(8)))
    return indices(tile, number(0), row, column)


def register_at(layout, shape, down: int, right: int):
    """The register of a thread that is so far down and right of its first."""
    strides = layout.tiling.tile_strides((shape[1], 1))
    for place in np.ndindex(layout.registers_shape(shape)):
        if int(np.dot(place, strides)) == down * shape[1] + right:
            return place
    raise ValueError(f"no register {down} down and {right} right")


def exp2(pair):
    """2 to the power of both numbers of a vector."""
    f32 = ir.F32Type.get()
    for e in range(2):
        power = mgpu.utils.inline_ptx(
            "ex2.approx.ftz.f32 $0, $1;", vector.extract(pair, [], [e]), result_types=f32
        )
        pair = vector.insert(power, pair, [], [e])
    return pair


def divide(value, by: int):
    """Quotient and remainder."""
    return arith.divui(value, number(by)), arith.remui(value, number(by))


def indices(*values):
    return [arith.index_cast(ir.IndexType.get(), value) for value in values]


def number(value: int):
    return arith.constant(ir.IntegerType.get_signless(32), value)


def real(value: float):
    return arith.constant(ir.F32Type.get(), value)
