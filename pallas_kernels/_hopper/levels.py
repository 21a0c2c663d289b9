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

from pallas_kernels._hopper.registers import divide, indices, number, own_thread, real
from pallas_kernels._hopper.tiles import CHUNK, MATRIX, SQUARE, TILE, TILED

SIZES = (1, 2, 4, 8, 16, 32)  # tokens of a block
HALF = CHUNK // 2  # tokens in later blocks
LOG2E = 1.4426950408889634
SCALAR = plgpu.Layout.WG_SPLAT(())  # a number that all threads have


def cumulate(g, half, exponents, *summed, least: float):
    """Sums of g [64, 64] over the tokens up to each, as exponents of 2 in shared memory.

    Also as they are, where `summed` is given, in global memory. What is below `least` counts as
    that.

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
            addend = arith.maximumf(addend, real(least))
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


def operands(q, k, exponents, right, size):
    """Decayed queries and keys of later tokens [64, 64], and in `right` keys of earlier [32, 64].

    q, k [64, 64], right: tiles of shared memory; exponents as of `cumulate`; size int32.
    """
    tiled = plgpu.RefType(TILED)

    @plgpu.inline_mgpu(
        arg_types=(tiled, tiled, plgpu.RefType(), tiled, SCALAR),
        return_type=plgpu.ShapeDtypeStruct(SQUARE, q.dtype, layout=MATRIX),
    )
    def run(ctx, q, k, exponents, right, size):
        del ctx
        size = size.registers.item()
        m, column = own_place()
        earlier = of_number(m, size)
        later = arith.addi(earlier, size)
        middle = first_of(later, size)
        wide = ir.VectorType.get((2,), ir.F32Type.get())
        narrow = ir.VectorType.get((2,), ir.MemRefType(q.type).element_type)
        layout = MATRIX.to_mgpu()
        registers = np.empty(layout.registers_shape(SQUARE), dtype=object)

        def taken(start):
            """Exponents of the tokens, and the numbers that are decayed, of two features."""
            here = arith.addi(column, number(start))
            tokens = earlier, middle, later
            logs = [vector.load(wide, exponents, indices(token, here)) for token in tokens]
            pairs = (k, earlier), (q, later), (k, later)
            return logs, [vector.load(narrow, x, in_tile(i, column, start)) for x, i in pairs]

        # All loads come before the first store, behind which the compiler moves none.
        loaded = [(start, taken(start)) for start in range(0, TILE, 8)]
        for start, ((from_earlier, between, from_later), (earlier_key, *later_ones)) in loaded:
            # Rounded, so that two numbers are multiplied at once.
            until = arith.truncf(narrow, exp2(arith.subf(between, from_earlier)))
            since = arith.truncf(narrow, exp2(arith.subf(from_later, between)))
            place = in_tile(m, column, start)
            vector.store(arith.mulf(earlier_key, until), right, place)
            for down, one in zip((0, 8), later_ones, strict=True):
                registers[register_at(layout, SQUARE, down, start)] = arith.mulf(one, since)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return run(q, k, exponents, right, size)


def put(products, square, size, tile):
    """Products [64, 32] of `operands` to where their tokens are, those of one pair of blocks.

    Those of keys go below the diagonal of `square`, those of queries above it, [earlier, later].
    They are added to those of the tiles of features before, if `tile`, int32 as `size`, is not 0.
    """

    @plgpu.inline_mgpu(arg_types=(MATRIX, plgpu.RefType(), SCALAR, SCALAR))
    def run(ctx, products, square, size, tile):
        del ctx
        size, tile = (x.registers.item() for x in (size, tile))
        layout, shape = MATRIX.to_mgpu(), (CHUNK, HALF)
        equal = arith.CmpIPredicate.eq
        first = arith.cmpi(equal, tile, number(0))
        m, column = own_place()
        later = arith.addi(of_number(m, size), size)

        def summed(start, e):
            """Whether a column is of the pair of the row, and new sums with their places."""
            n = arith.addi(column, number(start + e))
            paired = arith.cmpi(equal, first_of(n, size), first_of(m, size))
            earlier, sums = of_number(n, size), []
            for down, place in ((0, (earlier, later)), (8, (later, earlier))):
                place = indices(*place)
                old = arith.select(first, real(0.0), memref.load(square, place))
                register = products.registers[register_at(layout, shape, down, start)]
                sums.append((arith.addf(old, vector.extract(register, [], [e])), place))
            return paired, sums

        mgpu.utils.warpgroup_barrier()  # no warp's product needs its operands any more
        # Eight rows are a warp's, and of eight columns all or none are of blocks of their pairs.
        wide = arith.maxui(size, number(8))
        for start in range(0, HALF, 8):
            near = arith.cmpi(equal, first_of(number(start), wide), first_of(m, wide))
            with ir.InsertionPoint(scf.IfOp(near).then_block):
                for paired, sums in [summed(start, e) for e in (0, 1)]:
                    with ir.InsertionPoint(scf.IfOp(paired).then_block):
                        for value, place in sums:
                            memref.store(value, square, place)
                        scf.yield_([])
                scf.yield_([])

    run(products, square, size, tile)


def decay(q, k, exponents, *documents):
    """Decays queries and keys [64, 64] from the chunk's start; gives keys decayed to its end.

    documents: [64], of the token before the chunk, whose tokens alone q and k keep, and of the last
    token, whose tokens alone the keys that are given keep.
    """
    tiled = plgpu.RefType(TILED)
    of_documents = (plgpu.RefType(), SCALAR, SCALAR) if documents else ()

    @plgpu.inline_mgpu(
        arg_types=(tiled, tiled, plgpu.RefType(), *of_documents),
        return_type=plgpu.ShapeDtypeStruct(SQUARE, q.dtype, layout=MATRIX),
    )
    def run(ctx, q, k, exponents, *documents):
        del ctx
        warp, lane = divide(own_thread(), 32)
        row, pair = divide(lane, 4)
        row, column = arith.addi(arith.muli(warp, number(16)), row), arith.muli(pair, number(2))
        wide = ir.VectorType.get((2,), ir.F32Type.get())
        narrow = ir.VectorType.get((2,), ir.MemRefType(q.type).element_type)
        none = vector.from_elements(wide, [real(0.0)] * 2)
        layout = MATRIX.to_mgpu()
        registers = np.empty(layout.registers_shape(SQUARE), dtype=object)
        for down in (0, 8):
            token = arith.addi(row, number(down))
            if documents:
                own = memref.load(documents[0], indices(token))
                edges = (x.registers.item() for x in documents[1:])
                from_start, to_end = (arith.cmpi(arith.CmpIPredicate.eq, own, x) for x in edges)
            loaded = []
            for start in range(0, TILE, 8):
                here = arith.addi(column, number(start))
                ends = (token, number(CHUNK - 1))
                logs = [vector.load(wide, exponents, indices(i, here)) for i in ends]
                place = in_tile(token, column, start)
                loaded.append((start, place, logs, [vector.load(narrow, x, place) for x in (q, k)]))
            for start, place, (log, end), pairs in loaded:
                before, after = exp2(log), exp2(arith.subf(end, log))
                if documents:
                    before = arith.select(from_start, before, none)
                    after = arith.select(to_end, after, none)
                query, key = (arith.extf(wide, x) for x in pairs)
                for value, matrix in ((query, q), (key, k)):
                    decayed = arith.truncf(narrow, arith.mulf(value, before))
                    vector.store(decayed, matrix, place)
                result = arith.truncf(narrow, arith.mulf(key, after))
                registers[register_at(layout, SQUARE, down, start)] = result
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return run(q, k, exponents, *documents)


def store(x, target, layout):
    """Store where rows or numbers of a row lie so that banks of shared memory may collide."""

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))
    def run(ctx, x, target):
        del ctx
        x.store_untiled(target, optimized=False)

    run(x, target)


def own_place():
    """Of a thread the number of its later token, and its first column."""
    warp, lane = divide(own_thread(), 32)
    row, pair = divide(lane, 4)
    return arith.addi(arith.muli(warp, number(8)), row), arith.muli(pair, number(2))


def of_number(m, size):
    """The m-th token in earlier blocks."""
    block = first_of(m, size)
    return arith.addi(m, block)


def first_of(token, size):
    """The first token of a token's block."""
    return arith.andi(token, arith.subi(number(0), size))


def in_tile(row, column, start: int):
    """Where column + start is in memory of `tiles`: in swizzled tiles of 8 rows.

    column < 8; start, a multiple of 8, so meets the swizzle alone, and is the same for all rows.
    """
    swizzled = arith.xori(column, arith.muli(arith.remui(row, number(8)), number(8)))
    place = arith.addi(arith.muli(row, number(TILE)), swizzled)
    return indices(number(0), number(0), number(0), arith.xori(place, number(start)))


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
