"""Matrices in registers of Hopper, number by number, for what Pallas has no word for."""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, nvvm, vector

from pallas_kernels._hopper.levels import divide, indices, number, own_thread
from pallas_kernels._hopper.tiles import MATRIX


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
    """2^-|log - other|, by an instruction that takes the negative magnitude on its way."""

    def change(registers, place):
        text = "{.reg .f32 x; abs.f32 x, $1; neg.f32 x, x; ex2.approx.ftz.f32 $0, x;}"
        return (
            mgpu.utils.inline_ptx(text, x, result_types=ir.F32Type.get())
            for x in numbers(registers[place])
        )

    return each(log - other, change)


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

    Four threads have a row, each two neighbours of every eight columns.
    """

    def change(registers, place):
        block = 8 * place[1]
        found = block // (2 * size) * 2 * size + size if size >= 8 else block
        first, second = numbers(registers[(place[0], found // 8, *place[2:])])
        if size == 1:
            return second, second
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


def numbers(register):
    return (vector.extract(register, [], [e]) for e in (0, 1))


def pair(first, second):
    return vector.from_elements(ir.VectorType.get((2,), ir.F32Type.get()), [first, second])


def as_float(bits):
    return arith.bitcast(ir.F32Type.get(), bits)
