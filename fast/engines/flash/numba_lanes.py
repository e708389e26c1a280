"""Vector registers as Numba values: the few operations the CPU kernels are written in.

LLVM's own vectoriser neither keeps a tile of a matrix product in registers nor uses the widest
registers of every processor, so the inner loops say what they mean: a `Lanes` value is one vector
register, a pointer is a typed address, and `multiply` is a register-blocked matrix product. LLVM
lowers the same code to AVX-512, AVX2 or NEON.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model


def _register_bytes() -> int:
    """Width of this processor's vector registers."""
    features = binding.get_host_cpu_features()
    if features.get("avx512f", False):
        return 64
    return 32 if features.get("avx", False) else 16


REGISTER_BYTES = _register_bytes()
ROWS = 4
"""Rows of the register tile of `multiply`."""
VECTORS = 2 if REGISTER_BYTES == 32 else 4
"""Vectors across the register tile: AVX2 has 16 registers, AVX-512 and NEON have 32."""
INNER: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
"""Options of the functions that only kernels call: no wrapper to compile for Python or C."""


class Lanes(types.Type):
    """The Numba type of one vector register of `dtype`."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self.count = REGISTER_BYTES // (dtype.bitwidth // 8)
        super().__init__(name=f"Lanes({dtype} x {self.count})")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    """A `Lanes` value is an LLVM vector."""

    def __init__(self, manager: Any, kind: Any) -> None:
        element = manager.lookup(kind.dtype).get_value_type()
        super().__init__(manager, kind, ir.VectorType(element, kind.count))


def call_llvm(builder: Any, name: str, kind: Any, arguments: list[Any]) -> Any:
    """Call LLVM's intrinsic `name` on arguments of LLVM type `kind`."""
    signature = ir.FunctionType(kind, [kind] * len(arguments))
    name = f"{name}.v{kind.count}{kind.element.intrinsic_name}"
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, arguments)


def vector_at(builder: Any, pointer: Any, index: Any, kind: Any) -> Any:
    """Address of the vector that starts `index` elements past `pointer`."""
    return builder.bitcast(builder.gep(pointer, [index]), kind.as_pointer())


def spread(builder: Any, scalar: Any, kind: Any) -> Any:
    """`scalar` in every lane."""
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), None)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)


@intrinsic
def lane_count(typing: Any, pointer: Any) -> Any:
    """How many of the numbers that `pointer` points to fill one vector register."""
    count = Lanes(pointer.dtype).count

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(types.int64, count)

    return types.int64(pointer), codegen


@intrinsic
def address(typing: Any, array: Any) -> Any:
    """Pointer to the first element of `array`, which the caller keeps alive."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return cgutils.create_struct_proxy(array)(context, builder, arguments[0]).data

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def offset(typing: Any, pointer: Any, elements: Any) -> Any:
    """`pointer` moved by a number of elements."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.int64), codegen


@intrinsic
def get(typing: Any, pointer: Any, index: Any) -> Any:
    """The number `index` elements past `pointer`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.gep(arguments[0], [arguments[1]]))

    return pointer.dtype(pointer, types.int64), codegen


@intrinsic
def put(typing: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Write one number `index` elements past `pointer`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], builder.gep(arguments[0], [arguments[1]]))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, pointer.dtype), codegen


@intrinsic
def load(typing: Any, pointer: Any, index: Any) -> Any:
    """The vector that starts `index` elements past `pointer`."""
    lanes: Any = Lanes(pointer.dtype)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = context.get_value_type(lanes)
        source = vector_at(builder, arguments[0], arguments[1], kind)
        return builder.load(source, align=lanes.dtype.bitwidth // 8)

    return lanes(pointer, types.int64), codegen


@intrinsic
def store(typing: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Write a vector `index` elements past `pointer`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target = vector_at(builder, arguments[0], arguments[1], arguments[2].type)
        builder.store(arguments[2], target, align=value.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, value), codegen


@intrinsic
def add(typing: Any, x: Any, y: Any) -> Any:
    """x + y."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments)

    return x(x, y), codegen


@intrinsic
def subtract(typing: Any, x: Any, y: Any) -> Any:
    """x - y."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fsub(*arguments)

    return x(x, y), codegen


@intrinsic
def times(typing: Any, x: Any, y: Any) -> Any:
    """x * y."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fmul(*arguments)

    return x(x, y), codegen


@intrinsic
def over(typing: Any, x: Any, y: Any) -> Any:
    """x / y."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fdiv(*arguments)

    return x(x, y), codegen


@intrinsic
def larger(typing: Any, x: Any, y: Any) -> Any:
    """The larger of x and y; y where they cannot be compared."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b = arguments
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    return x(x, y), codegen


@intrinsic
def finite_or_zero(typing: Any, x: Any) -> Any:
    """x with -inf replaced by 0: what a maximum over nothing is subtracted as."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = context.get_value_type(x)
        lowest = spread(builder, kind.element(-math.inf), kind)
        empty = builder.fcmp_ordered("==", arguments[0], lowest)
        return builder.select(empty, ir.Constant(kind, None), arguments[0])

    return x(x), codegen


@intrinsic
def exp2(typing: Any, x: Any) -> Any:
    """2**x without branches: 2**round(x) times the Taylor series of 2**(x - round(x)).

    Below the smallest normal number the result is 0, so -inf gives 0; NaN stays NaN.
    """
    double = x.dtype == types.float64
    bits, mantissa, terms = (64, 52, 14) if double else (32, 23, 8)
    bias = (1 << (bits - mantissa - 2)) - 1

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = context.get_value_type(x)

        def constant(value: float) -> Any:
            return spread(builder, kind.element(value), kind)

        below, above = constant(float(-bias)), constant(float(bias))
        power = arguments[0]
        power = builder.select(builder.fcmp_ordered("<", power, below), below, power)
        power = builder.select(builder.fcmp_ordered(">", power, above), above, power)
        whole = call_llvm(builder, "llvm.rint", kind, [power])
        rest = builder.fsub(power, whole)
        series = constant(math.log(2) ** (terms - 1) / math.factorial(terms - 1))
        for n in range(terms - 2, -1, -1):
            coefficient = constant(math.log(2) ** n / math.factorial(n))
            series = call_llvm(builder, "llvm.fmuladd", kind, [series, rest, coefficient])
        word = ir.VectorType(ir.IntType(32), kind.count)
        exponent = builder.fptosi(whole, word)
        if double:
            word = ir.VectorType(ir.IntType(64), kind.count)
            exponent = builder.sext(exponent, word)
        exponent = builder.add(exponent, ir.Constant(word, [bias] * kind.count))
        exponent = builder.shl(exponent, ir.Constant(word, [mantissa] * kind.count))
        return builder.fmul(series, builder.bitcast(exponent, kind))

    return x(x), codegen


def _register_tile(rows: int, vectors: int) -> Any:
    """The intrinsic that keeps `rows` x `vectors` registers of c in place while it adds a @ b."""

    @intrinsic
    def tile(
        typing: Any, a: Any, a_row: Any, a_step: Any, b: Any, b_step: Any, c: Any, c_row: Any,
        depth: Any, fresh: Any,
    ) -> Any:  # fmt: skip
        lanes: Any = Lanes(c.dtype)
        index = types.int64

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, a_row, a_step, b, b_step, c, c_row, depth, fresh = arguments
            kind = context.get_value_type(lanes)
            word = depth.type
            align = lanes.dtype.bitwidth // 8
            cells = [
                [cgutils.alloca_once(builder, kind) for _ in range(vectors)] for _ in range(rows)
            ]

            def place(row: int, vector: int) -> Any:
                at = builder.mul(c_row, word(row))
                at = builder.add(at, word(vector * lanes.count))
                return vector_at(builder, c, at, kind)

            with builder.if_else(fresh) as (then, otherwise):
                with then:
                    for row in range(rows):
                        for vector in range(vectors):
                            builder.store(ir.Constant(kind, None), cells[row][vector])
                with otherwise:
                    for row in range(rows):
                        for vector in range(vectors):
                            start = builder.load(place(row, vector), align=align)
                            builder.store(start, cells[row][vector])
            with cgutils.for_range(builder, depth) as loop:
                at = builder.mul(loop.index, b_step)
                across = [
                    builder.load(
                        vector_at(builder, b, builder.add(at, word(v * lanes.count)), kind),
                        align=align,
                    )
                    for v in range(vectors)
                ]
                down = builder.mul(loop.index, a_step)
                for row in range(rows):
                    at = builder.add(down, builder.mul(a_row, word(row)))
                    weight = spread(builder, builder.load(builder.gep(a, [at])), kind)
                    for vector in range(vectors):
                        cell = cells[row][vector]
                        total = call_llvm(
                            builder,
                            "llvm.fmuladd",
                            kind,
                            [weight, across[vector], builder.load(cell)],
                        )
                        builder.store(total, cell)
            for row in range(rows):
                for vector in range(vectors):
                    value = builder.load(cells[row][vector])
                    builder.store(value, place(row, vector), align=align)
            return context.get_dummy_value()

        signature = types.void(a, index, index, b, index, c, index, index, types.boolean)
        return signature, codegen

    return tile


_tile = _register_tile(ROWS, VECTORS)
_tile_row = _register_tile(1, VECTORS)
_tile_column = _register_tile(ROWS, 1)
_tile_cell = _register_tile(1, 1)


@njit(**INNER)
def multiply(a, a_row, a_step, b, b_step, c, c_row, rows, depth, columns, fresh):
    """c[row, :] (+)= sum over depth of a[row, step] * b[step, :]; `fresh` overwrites c.

    `a` has any strides; the rows of `b` and `c` are contiguous, and `columns` fill vectors.
    """
    lanes = lane_count(c)
    wide = VECTORS * lanes
    column = 0
    while column < columns:
        many = column + wide <= columns
        b_at, c_at = offset(b, column), offset(c, column)
        row = 0
        while row < rows:
            group = row + ROWS <= rows
            a_now, c_now = offset(a, row * a_row), offset(c_at, row * c_row)
            if many and group:
                _tile(a_now, a_row, a_step, b_at, b_step, c_now, c_row, depth, fresh)
            elif many:
                _tile_row(a_now, a_row, a_step, b_at, b_step, c_now, c_row, depth, fresh)
            elif group:
                _tile_column(a_now, a_row, a_step, b_at, b_step, c_now, c_row, depth, fresh)
            else:
                _tile_cell(a_now, a_row, a_step, b_at, b_step, c_now, c_row, depth, fresh)
            row += ROWS if group else 1
        column += wide if many else lanes
