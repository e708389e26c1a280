"""The CPU kernel of the scan: the recurrence itself, a few tokens at a time in vector registers.

For a group of tokens and of value channels, the values and the outputs stay in registers while one
pass over the rows of the state decays each row, adds the keys and reads it, token by token. LLVM's
own vectoriser does not keep them there, so the pass is written as vector instructions, which LLVM
lowers to AVX-512, AVX2 or NEON alike.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic


def _register_bytes() -> int:
    """Width of this processor's vector registers."""
    features = binding.get_host_cpu_features()
    if features.get("avx512f", False):
        return 64
    return 32 if features.get("avx", False) else 16


REGISTER_BYTES = _register_bytes()
VECTORS = 1 if REGISTER_BYTES == 32 else 2
"""Registers across a group of value channels: AVX2 has 16 registers, AVX-512 and NEON have 32."""
TOKENS = 4
"""Tokens of a group."""


class _Vectors:
    """Emits loads, stores and arithmetic of one kind of vector register."""

    def __init__(self, builder: Any, number: Any) -> None:
        self.builder = builder
        self.lanes = REGISTER_BYTES * 8 // number.bitwidth
        self.align = number.bitwidth // 8
        self.kind = ir.VectorType(
            ir.DoubleType() if number.bitwidth == 64 else ir.FloatType(), self.lanes
        )

    def at(self, pointer: Any, stride: Any, n: int, column: int = 0) -> Any:
        """`pointer` moved by `n` strides and `column` registers."""
        word = stride.type
        moved = self.builder.mul(stride, word(n))
        return self.builder.gep(pointer, [self.builder.add(moved, word(column * self.lanes))])

    def load(self, pointer: Any) -> Any:
        pointer = self.builder.bitcast(pointer, self.kind.as_pointer())
        return self.builder.load(pointer, align=self.align)

    def store(self, value: Any, pointer: Any) -> None:
        pointer = self.builder.bitcast(pointer, self.kind.as_pointer())
        self.builder.store(value, pointer, align=self.align)

    def spread(self, pointer: Any) -> Any:
        """The number at `pointer` in every lane."""
        empty, word = ir.Constant(self.kind, ir.Undefined), ir.IntType(32)
        first = self.builder.insert_element(empty, self.builder.load(pointer), word(0))
        zeros = ir.Constant(ir.VectorType(word, self.lanes), None)
        return self.builder.shuffle_vector(first, empty, zeros)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        name = f"llvm.fmuladd.v{self.lanes}f{self.align * 8}"
        shape = ir.FunctionType(self.kind, [self.kind] * 3)
        function = cgutils.get_or_insert_function(self.builder.module, shape, name)
        return self.builder.call(function, [x, y, z])


def _emit_pass(
    builder: Any, number: Any, tokens: int, vectors: int, lanewise: bool, arguments: Any
) -> None:
    """One pass over the rows of the state for `tokens` tokens and `vectors` registers of columns;
    a decay is one for each column if `lanewise`, else one for each row.
    """
    (state, state_row, rows, q, q_token, k, k_token, v, v_token, out, out_token, decay,
     decay_token, decay_row) = arguments  # fmt: skip
    vec = _Vectors(builder, number)
    pairs = [(t, c) for t in range(tokens) for c in range(vectors)]
    values = {(t, c): vec.load(vec.at(v, v_token, t, c)) for t, c in pairs}
    kept = {}
    if lanewise:
        kept = {(t, c): vec.load(vec.at(decay, decay_token, t, c)) for t, c in pairs}
    sums = {pair: cgutils.alloca_once(builder, vec.kind) for pair in pairs}
    for cell in sums.values():
        builder.store(ir.Constant(vec.kind, None), cell)
    with cgutils.for_range(builder, rows) as loop:
        row = builder.gep(state, [builder.mul(loop.index, state_row)])
        q_row, k_row = builder.gep(q, [loop.index]), builder.gep(k, [loop.index])
        decay_at = builder.gep(decay, [builder.mul(loop.index, decay_row)])
        now = [vec.load(vec.at(row, state_row, 0, c)) for c in range(vectors)]
        for t in range(tokens):
            key = vec.spread(vec.at(k_row, k_token, t))
            query = vec.spread(vec.at(q_row, q_token, t))
            same = None if lanewise else vec.spread(vec.at(decay_at, decay_token, t))
            for c in range(vectors):
                old = builder.fmul(now[c], kept[t, c] if lanewise else same)
                now[c] = vec.fma(key, values[t, c], old)
                total = vec.fma(query, now[c], builder.load(sums[t, c]))
                builder.store(total, sums[t, c])
        for c in range(vectors):
            vec.store(now[c], vec.at(row, state_row, 0, c))
    for t, c in pairs:
        vec.store(builder.load(sums[t, c]), vec.at(out, out_token, t, c))


@intrinsic
def _over_rows(
    typing: Any, state: Any, state_row: Any, rows: Any, q: Any, q_token: Any, k: Any, k_token: Any,
    v: Any, v_token: Any, out: Any, out_token: Any, decay: Any, decay_token: Any, decay_row: Any,
    many: Any, wide: Any, lanewise: Any,
) -> Any:  # fmt: skip
    """Move the state on by TOKENS tokens if `many`, else one, and write their outputs, for VECTORS
    registers of columns if `wide`, else one.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *arguments, many, wide, lanewise = arguments

        def emit(chosen: list[bool], open_flags: list[Any]) -> None:
            if open_flags:
                with builder.if_else(open_flags[0]) as (then, otherwise):
                    with then:
                        emit([*chosen, True], open_flags[1:])
                    with otherwise:
                        emit([*chosen, False], open_flags[1:])
            else:
                tokens, vectors = TOKENS if chosen[0] else 1, VECTORS if chosen[1] else 1
                _emit_pass(builder, state.dtype, tokens, vectors, chosen[2], arguments)

        emit([], [many, wide, lanewise])
        return context.get_dummy_value()

    index, flag = types.int64, types.boolean
    return types.void(
        state, index, index, q, index, k, index, v, index, out, index, decay, index, index,
        flag, flag, flag,
    ), codegen  # fmt: skip


@intrinsic
def _address(typing: Any, array: Any, index: Any) -> Any:
    """Pointer to element `index` of a contiguous array, which the caller keeps alive."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = cgutils.create_struct_proxy(array)(context, builder, arguments[0]).data
        return builder.gep(data, [arguments[1]])

    return types.CPointer(array.dtype)(array, types.int64), codegen


@njit(cache=True, nogil=True, parallel=True)
def walk(q, k, v, decay, state, out, starts, ends, batches, splits, backward, lanewise):
    """out_t = sum_j decay(j, t) (q_t . k_j) v_j over j <= t, or j >= t if `backward`.

    q, k (batch, their heads, tokens, rows), v (batch, its heads, tokens, columns), out (batch,
    heads, tokens, columns) and decay (batch, heads, tokens, 1 or rows, or columns if `lanewise`):
    contiguous, the columns a whole number of registers. A step multiplies the state (sequences,
    heads, rows, columns), updated in place, by the token's decay, adds k v^T, then reads it.
    Sequence n is rows starts[n] .. ends[n] of batches[n]; `splits` programs share its columns.
    """
    heads, rows, columns = state.shape[1], state.shape[2], state.shape[3]
    tokens, width = q.shape[2], decay.shape[3]
    lanes = REGISTER_BYTES // q.itemsize
    step = -1 if backward else 1
    decay_row = 1 if width > 1 and not lanewise else 0
    registers = columns // lanes
    for task in prange(starts.size * heads * splits):
        split = task % splits
        head = (task // splits) % heads
        n = task // (splits * heads)
        first, last = split * registers // splits * lanes, (split + 1) * registers // splits * lanes
        q_base = (batches[n] * q.shape[1] + head // (heads // q.shape[1])) * tokens
        k_base = (batches[n] * k.shape[1] + head // (heads // k.shape[1])) * tokens
        v_base = (batches[n] * v.shape[1] + head // (heads // v.shape[1])) * tokens
        base = (batches[n] * heads + head) * tokens
        done, length = 0, ends[n] - starts[n]
        while done < length:
            many = done + TOKENS <= length
            t = ends[n] - 1 - done if backward else starts[n] + done
            for column in range(first, last, VECTORS * lanes):
                wide = column + VECTORS * lanes <= last
                _over_rows(
                    _address(state, (n * heads + head) * rows * columns + column), columns, rows,
                    _address(q, (q_base + t) * rows), step * rows,
                    _address(k, (k_base + t) * rows), step * rows,
                    _address(v, (v_base + t) * columns + column), step * columns,
                    _address(out, (base + t) * columns + column), step * columns,
                    _address(decay, (base + t) * width + (column if lanewise else 0)),
                    step * width, decay_row, many, wide, lanewise,
                )  # fmt: skip
            done += TOKENS if many else 1
