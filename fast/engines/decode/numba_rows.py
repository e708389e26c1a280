"""Products of one vector with many rows that come from memory, in the Numba decode engine.

A row is read from its first channel to its last before the next one is begun, which is how memory
gives it fastest; the vector, or what the rows add up to, stays in registers meanwhile. That takes
so little time that a core would wait for each line: rows are asked for ahead of their use.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from attnspec.fast.engines.flash.numba_lanes import (
    INNER,
    Lanes,
    address,
    call_llvm,
    lane_count,
    offset,
    spread,
    vector_at,
)

PLACES = types.CPointer(types.uint64)
AHEAD = 8
"""Rows between the one that is read and the one that is asked for."""
LINE = 64
"""Bytes that memory hands over at once."""
SECOND_CACHE = 1
"""What is asked for, in LLVM's words, is kept near, but not nearest."""


def _vectors(builder: Any, pointer: Any, lanes: Any, kind: Any, count: int) -> list[Any]:
    """Addresses of the `count` vectors from `pointer` on."""
    word = ir.IntType(64)
    return [vector_at(builder, pointer, word(v * lanes.count), kind) for v in range(count)]


def _sum(builder: Any, kind: Any, x: Any) -> Any:
    """The sum of a vector's lanes, in any order."""
    name = f"llvm.vector.reduce.fadd.v{kind.count}{kind.element.intrinsic_name}"
    signature = ir.FunctionType(kind.element, [kind.element, kind])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, [kind.element(0.0), x], fastmath=("reassoc",))


def _row(
    builder: Any, rows: Any, places: Any, index: Any, count: Any, lanes: Any, kind: Any,
    vectors: int,
) -> list[Any]:  # fmt: skip
    """Addresses of the vectors of the row at place `index`; a later row is asked for."""
    word, small, byte = index.type, ir.IntType(32), ir.IntType(8).as_pointer()
    later, last = builder.add(index, word(AHEAD)), builder.sub(count, word(1))
    later = builder.select(builder.icmp_signed("<", later, last), later, last)
    ahead = builder.gep(rows, [builder.load(builder.gep(places, [later]))])
    ask = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [byte, *[small] * 3]), "llvm.prefetch.p0"
    )
    for at in range(0, vectors * lanes.count * lanes.dtype.bitwidth // 8, LINE):
        line = builder.gep(builder.bitcast(ahead, byte), [word(at)])
        builder.call(ask, [line, small(0), small(SECOND_CACHE), small(1)])
    first = builder.load(builder.gep(places, [index]))
    return _vectors(builder, builder.gep(rows, [first]), lanes, kind, vectors)


def _dots(vectors: int) -> Any:
    """The intrinsic for dot products over the channels that fill so many registers."""

    @intrinsic
    def dots_of(
        typing: Any, query: Any, rows: Any, places: Any, count: Any, scores: Any, fresh: Any
    ) -> Any:
        lanes: Any = Lanes(query.dtype)

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            query, rows, places, count, scores, fresh = arguments
            kind, align = context.get_value_type(lanes), lanes.dtype.bitwidth // 8
            held = [
                builder.load(x, align=align) for x in _vectors(builder, query, lanes, kind, vectors)
            ]
            with cgutils.for_range(builder, count) as loop:
                row = _row(builder, rows, places, loop.index, count, lanes, kind, vectors)
                total = ir.Constant(kind, None)
                for x, at in zip(held, row, strict=True):
                    value = builder.load(at, align=align)
                    total = call_llvm(builder, "llvm.fmuladd", kind, [x, value, total])
                place = builder.gep(scores, [loop.index])
                score = _sum(builder, kind, total)
                more = builder.fadd(builder.load(place), score)
                builder.store(builder.select(fresh, score, more), place)
            return context.get_dummy_value()

        signature = types.void(query, rows, PLACES, types.int64, scores, types.boolean)
        return signature, codegen

    return dots_of


def _sums(vectors: int) -> Any:
    """The intrinsic for weighted sums of the channels that fill so many registers."""

    @intrinsic
    def sums_of(typing: Any, weights: Any, rows: Any, places: Any, count: Any, out: Any) -> Any:
        lanes: Any = Lanes(out.dtype)

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, rows, places, count, out = arguments
            kind, align = context.get_value_type(lanes), lanes.dtype.bitwidth // 8
            cells = [cgutils.alloca_once(builder, kind) for _ in range(vectors)]
            targets = _vectors(builder, out, lanes, kind, vectors)
            for cell, at in zip(cells, targets, strict=True):
                builder.store(builder.load(at, align=align), cell)
            with cgutils.for_range(builder, count) as loop:
                row = _row(builder, rows, places, loop.index, count, lanes, kind, vectors)
                weight = builder.load(builder.gep(weights, [loop.index]))
                weights_now = spread(builder, weight, kind)
                for cell, at in zip(cells, row, strict=True):
                    terms = [weights_now, builder.load(at, align=align), builder.load(cell)]
                    builder.store(call_llvm(builder, "llvm.fmuladd", kind, terms), cell)
            for cell, at in zip(cells, targets, strict=True):
                builder.store(builder.load(cell), at, align=align)
            return context.get_dummy_value()

        signature = types.void(weights, rows, PLACES, types.int64, out)
        return signature, codegen

    return sums_of


_dots_8, _dots_4, _dots_2, _dots_1 = map(_dots, (8, 4, 2, 1))
_sums_8, _sums_4, _sums_2, _sums_1 = map(_sums, (8, 4, 2, 1))


@njit(**INNER)
def fills_registers(line, channels):
    """Whether so many channels of `line`'s dtype are whole vector registers."""
    return channels % lane_count(address(line)) == 0


@njit(**INNER)
def dots_from_memory(query, source, at, count, d, scores):
    """What `dots` computes, of rows that are in no cache yet and fill vector registers."""
    q, rows, places, out = address(query), address(source), address(at), address(scores)
    lanes, c = lane_count(q), 0
    while c < d:
        left = (d - c) // lanes
        q_now, rows_now = offset(q, c), offset(rows, c)
        if left >= 8:
            _dots_8(q_now, rows_now, places, count, out, c == 0)
            c += 8 * lanes
        elif left >= 4:
            _dots_4(q_now, rows_now, places, count, out, c == 0)
            c += 4 * lanes
        elif left >= 2:
            _dots_2(q_now, rows_now, places, count, out, c == 0)
            c += 2 * lanes
        else:
            _dots_1(q_now, rows_now, places, count, out, c == 0)
            c += lanes


@njit(**INNER)
def accumulate_from_memory(weights, source, at, count, dv, o):
    """What `accumulate` computes, of such rows."""
    w, rows, places, out = address(weights), address(source), address(at), address(o)
    lanes, c = lane_count(out), 0
    while c < dv:
        left = (dv - c) // lanes
        rows_now, out_now = offset(rows, c), offset(out, c)
        if left >= 8:
            _sums_8(w, rows_now, places, count, out_now)
            c += 8 * lanes
        elif left >= 4:
            _sums_4(w, rows_now, places, count, out_now)
            c += 4 * lanes
        elif left >= 2:
            _sums_2(w, rows_now, places, count, out_now)
            c += 2 * lanes
        else:
            _sums_1(w, rows_now, places, count, out_now)
            c += lanes
