"""Matrices in registers of Hopper, number by number, for what Pallas has no word for."""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, nvvm, scf, vector

from pallas_kernels._hopper.tiles import MATRIX

THREADS = 128  # of a warpgroup


def each(matrix, change):
    """The fp32 matrix of change(register, its place) for all registers of two numbers."""

    @plgpu.inline_mgpu(
        arg_types=(MATRIX,),
        return_type=plgpu.ShapeDtypeStruct(matrix.shape, jnp.float32, layout=MATRIX),
    )
    def run(ctx, matrix):
        del ctx
        registers = np.empty_like(matrix.registers)
        for place in np.ndindex(registers.shape):
            registers[place] = pair(*change(matrix.registers, place))
        return mgpu.FragmentedArray(_registers=registers, _layout=matrix.layout, _is_signed=None)

    return run(matrix)


def widened(matrix):
    """bf16 as fp32 by an instruction a number; LLVM takes two."""

    def change(registers, place):
        one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
        bits = vector.extract(vector.bitcast(one, registers[place]), [], [0])
        return as_float(arith.shli(bits, number(16))), as_float(arith.andi(bits, number(-(2**16))))

    return each(matrix, change)


def decays(log, other):
    """2^-|log - other|."""

    def change(registers, place):
        return (decayed(x) for x in numbers(registers[place]))

    return each(log - other, change)


def neighbours(log, q, k, shown, replaced):
    """d_q, d_k, d_g [64, 32] of what goes between tokens 2 m and 2 m + 1, which a thread has both.

    shown, replaced: P and -R of such tokens in the columns 2 m + 1.
    """
    kind = plgpu.ShapeDtypeStruct(log.shape, jnp.float32, layout=MATRIX)

    @plgpu.inline_mgpu(arg_types=(MATRIX,) * 5, return_type=(kind,) * 3)
    def run(ctx, *matrices):
        del ctx
        given = [matrix.registers for matrix in matrices]
        results = [np.empty_like(given[0]) for _ in range(3)]
        zero = real(0.0)
        for place in np.ndindex(given[0].shape):
            logs, queries, keys, (_, p), (_, r) = (numbers(x[place]) for x in given)
            decay = decayed(arith.subf(*logs))
            key = arith.mulf(decay, keys[0])
            shown = arith.addf(arith.mulf(p, queries[1]), arith.mulf(r, keys[1]))
            results[0][place] = pair(zero, arith.mulf(p, key))
            results[1][place] = pair(arith.mulf(decay, shown), arith.mulf(r, key))
            results[2][place] = pair(zero, arith.mulf(key, shown))
        return tuple(
            mgpu.FragmentedArray(_registers=x, _layout=matrices[0].layout, _is_signed=None)
            for x in results
        )

    return run(log, q, k, shown, replaced)


def put_diagonals(square, target):
    """To target [2, 64] in shared memory the diagonal, and left of it in odd rows."""

    @plgpu.inline_mgpu(arg_types=(MATRIX, plgpu.RefType()))
    def run(ctx, square, target):
        del ctx
        equal = arith.CmpIPredicate.eq
        warp, lane = divide(own_thread(), 32)
        row, column = divide(lane, 4)
        half, odd = divide(row, 2)
        odd = arith.cmpi(equal, odd, number(1))
        branch = scf.IfOp(arith.cmpi(equal, half, column))
        with ir.InsertionPoint(branch.then_block):
            for down in range(2):
                found = [numbers(square.registers[0, 2 * w + down, 0, 0, down, 0, 0, 0, 0])
                         for w in range(4)]  # fmt: skip
                first, second = found[0]
                for w in range(1, 4):
                    own = arith.cmpi(equal, warp, number(w))
                    first = arith.select(own, found[w][0], first)
                    second = arith.select(own, found[w][1], second)
                at = arith.addi(arith.muli(warp, number(16)), arith.addi(row, number(8 * down)))
                memref.store(arith.select(odd, second, first), target, indices(number(0), at))
                memref.store(first, target, indices(number(1), at))
            scf.yield_([])

    run(square, target)


def of_pairs(matrix, size: int):
    """What is in rows of later and columns of earlier blocks of a pair of blocks of `size`, else 0.

    matrix [64, 32] in 16 bits, of which two times 32 rows are a square each.
    """

    @plgpu.inline_mgpu(
        arg_types=(MATRIX,),
        return_type=plgpu.ShapeDtypeStruct(matrix.shape, matrix.dtype, layout=MATRIX),
    )
    def run(ctx, matrix):
        del ctx
        one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
        equal = arith.CmpIPredicate.eq
        # By bits, so that LLVM knows where a register has nothing.
        thread = own_thread()
        column = arith.andi(arith.shli(thread, number(1)), number(6))
        row = arith.andi(arith.shrui(thread, number(2)), number(7))
        row = arith.ori(row, arith.andi(arith.shrui(thread, number(1)), number(16)))
        registers = np.empty_like(matrix.registers)
        for place, register in np.ndenumerate(matrix.registers):
            i, mask = arith.ori(row, number(8 * place[4])), number(0)
            later = arith.cmpi(equal, arith.andi(i, number(size)), number(size))
            for e, part in enumerate((0xFFFF, -0x10000)):
                j = arith.ori(column, number(8 * place[1] + e))
                apart = arith.andi(arith.xori(i, j), number(-size))
                paired = arith.andi(later, arith.cmpi(equal, apart, number(size)))
                mask = arith.ori(mask, arith.select(paired, number(part), number(0)))
            bits = vector.extract(vector.bitcast(one, register), [], [0])
            bits = vector.from_elements(one, [arith.andi(bits, mask)])
            registers[place] = vector.bitcast(register.type, bits)
        return mgpu.FragmentedArray(_registers=registers, _layout=matrix.layout, _is_signed=None)

    return run(matrix)


def reference(matrix, size: int):
    """For each column, that with which the later block of `size` of its pair of blocks begins.

    size: more than 1. Four threads have a row, each two neighbours of every eight columns.
    """

    def change(registers, place):
        block = 8 * place[1]
        found = block // (2 * size) * 2 * size + size if size >= 8 else block
        first, _ = numbers(registers[(place[0], found // 8, *place[2:])])
        lane = arith.andi(own_thread(), number(31))
        source = arith.andi(lane, number(28))
        if size == 4:
            source = arith.ori(source, number(2))
        if size == 2:
            source = arith.ori(arith.andi(lane, number(30)), number(1))
        bits = arith.bitcast(ir.IntegerType.get_signless(32), first)
        bits = nvvm.shfl_sync(number(-1), bits, source, number(31), nvvm.ShflKind.idx)
        return as_float(bits), as_float(bits)

    return each(matrix, change)


def turned(source):
    """A matrix of fp32 in global memory, transposed: whole sectors of each of its rows."""
    shape = source.shape[::-1]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=MATRIX),
    )
    def run(ctx, source):
        del ctx
        layout = MATRIX.to_mgpu()
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        for place in np.ndindex(registers.shape):
            registers[place] = pair(*(memref.load(source, at) for at in turned_places(place)))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return run(source)


def put_turned(matrix, target):
    """Store the transposed matrix of fp32 in global memory."""

    @plgpu.inline_mgpu(arg_types=(MATRIX, plgpu.RefType()))
    def run(ctx, matrix, target):
        del ctx
        for place, register in np.ndenumerate(matrix.registers):
            for value, at in zip(numbers(register), turned_places(place), strict=True):
                memref.store(value, target, at)

    run(matrix, target)


def turned_places(place):
    """[column, row] of the two numbers that a thread has in a register of a matrix."""
    warp, lane = divide(own_thread(), 32)
    row, column = divide(lane, 4)
    row = arith.addi(arith.addi(arith.muli(warp, number(16)), row), number(8 * place[4]))
    column = arith.addi(arith.muli(column, number(2)), number(8 * place[1]))
    return [indices(arith.addi(column, number(e)), row) for e in (0, 1)]


def decayed(log):
    """2^-|log|, by an instruction that takes the negative magnitude on its way."""
    text = "{.reg .f32 x; abs.f32 x, $1; neg.f32 x, x; ex2.approx.ftz.f32 $0, x;}"
    return mgpu.utils.inline_ptx(text, log, result_types=ir.F32Type.get())


def numbers(register):
    return [vector.extract(register, [], [e]) for e in (0, 1)]


def pair(first, second):
    return vector.from_elements(ir.VectorType.get((2,), ir.F32Type.get()), [first, second])


def as_float(bits):
    return arith.bitcast(ir.F32Type.get(), bits)


def held_shape(rows: int, columns: int) -> tuple[int, int]:
    """Registers of two numbers, and numbers of all threads in such a register."""
    return rows * columns // (2 * THREADS), 2 * THREADS


def keep(matrix, target):
    """Store a matrix of 16-bit numbers in global memory as the threads hold it, `held_shape`."""

    @plgpu.inline_mgpu(arg_types=(MATRIX, plgpu.RefType()))
    def run(ctx, matrix, target):
        del ctx
        for index, register in enumerate(matrix.registers.flat):
            vector.store(register, target, [at(index), own_column()])

    run(matrix, target)


def kept(source, shape):
    """The matrix that `keep` has stored."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(shape, source.dtype, layout=MATRIX),
    )
    def run(ctx, source):
        del ctx
        layout = MATRIX.to_mgpu()
        two = ir.VectorType.get((2,), ir.MemRefType(source.type).element_type)
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        for index, place in enumerate(np.ndindex(registers.shape)):
            registers[place] = vector.load(two, source, [at(index), own_column()])
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return run(source)


def own_column():
    """Where a thread has its two numbers in a register of all."""
    index = ir.IndexType.get()
    thread = arith.index_cast(index, mgpu.utils.thread_idx())
    return arith.muli(arith.remui(thread, at(THREADS)), at(2))


def at(value: int):
    return arith.constant(ir.IndexType.get(), value)


def own_thread():
    """The number of a thread in its warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    # With side effects, or a loop would keep all that follows from it in registers.
    thread = mgpu.utils.inline_ptx("mov.u32 $0, %tid.x;", result_types=i32, has_side_effects=True)
    return arith.remui(thread, number(THREADS))


def divide(value, by: int):
    """Quotient and remainder."""
    return arith.divui(value, number(by)), arith.remui(value, number(by))


def indices(*values):
    return [arith.index_cast(ir.IndexType.get(), value) for value in values]


def number(value: int):
    return arith.constant(ir.IntegerType.get_signless(32), value)


def real(value: float):
    return arith.constant(ir.F32Type.get(), value)
