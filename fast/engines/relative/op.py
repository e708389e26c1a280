"""The relative engine's operation, its custom ops and their gradient.

It is an engine of its own beside flash, because the products of queries with table rows pass from
one tile of keys to the next: the tiles must follow one another without a gap, which masks, sinks
and block lists of the flash engine do not promise, and its loop stays as lean as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnspec.fast.backend import (
    check_device,
    check_integer,
    check_tensor,
    choose_backend,
    load,
    wide_dtype,
)
from attnspec.fast.engines.flash import checks
from attnspec.fast.engines.operation import operation


def relative(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    *,
    zero: int,
    scale: float | None = None,
    causal: bool = False,
    row_start: Tensor | None = None,
    table_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with scores scale * (q_i . k_j + q_i . table[zero + j - p]): out and lse.

    q (B, H, Tq, d), k (B, Hk, Tk, d), v (B, Hk, Tk, dv), table (H or 1, rows, d), one for all heads
    if 1; query i stands at position p = i + Tk - Tq (K3). A row outside the table adds nothing.
    `causal` hides the keys behind p, and `row_start`, integers (Tq,) that do not decrease, those
    before row_start[i]. out (B, H, Tq, dv) in q's dtype, lse (B, H, Tq) float32; rows that see
    nothing have out 0 and lse -inf.

    `table_bias` (as the table without d) is a number for each of its rows, `key_bias` (B, H, Tk)
    one for each key, both added to the sum that `scale` multiplies. They are float32, float64 for
    float64 inputs: what is learned or computed in fewer bits is to be widened.

    No product with the table is kept in memory. Differentiable in q, k, v, the table and the
    biases, once; the gradients are bitwise repeatable. Numba also takes float64, with lse in
    float64.
    """
    backend = choose_backend(backend, q) if isinstance(q, Tensor) else "numba"
    checks.check_inputs(q, k, v, backend)
    checks.check_ranges(q, causal, None, 0, row_start)
    check_tensor("table", table, ("heads", "rows", "d"), (q.dtype,))
    if table.shape[0] not in (1, q.shape[1]) or table.shape[2] != q.shape[3]:
        raise ValueError(
            f"table: got shape {tuple(table.shape)}, expected (1 or {q.shape[1]}, rows, "
            f"{q.shape[3]})"
        )
    check_device("table", table, "q", q)
    wide = wide_dtype(q)
    for name, bias, shape in (
        ("table_bias", table_bias, tuple(table.shape[:2])),
        ("key_bias", key_bias, (*q.shape[:2], k.shape[2])),
    ):
        if bias is not None:
            check_tensor(name, bias, ("axis",) * len(shape), (wide,))
            if tuple(bias.shape) != shape:
                raise ValueError(f"{name}: got shape {tuple(bias.shape)}, expected {shape}")
            check_device(name, bias, "q", q)
    check_integer("zero", zero, least=0)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if scale <= 0:
        # The kernels take the maximum of the scores before they scale them.
        sign, scale = (-1.0, -scale) if scale < 0 else (0.0, 1.0)
        q = q * sign
        table_bias, key_bias = (x if x is None else x * sign for x in (table_bias, key_bias))
    row_start, table_bias, key_bias = (
        x if x is None else x.contiguous() for x in (row_start, table_bias, key_bias)
    )
    return _forward(q, k, v, table, table_bias, key_bias, zero, scale, causal, row_start, backend)


def _kernel(backend: str, part: str) -> Any:
    """The function that computes `part` on `backend`; its module is imported on first use."""
    name = "numba_cpu" if backend == "numba" else f"triton_{part}"
    module = load(f"attnspec.fast.engines.relative.{name}")
    return getattr(module, part)


@operation("attnspec::relative_forward")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    table_bias: Tensor | None,
    key_bias: Tensor | None,
    zero: int,
    scale: float,
    causal: bool,
    row_start: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:
        lse = q.new_full(q.shape[:3], -float("inf"), dtype=wide_dtype(q))
        return q.new_zeros(*q.shape[:3], v.shape[3]), lse
    return _kernel(backend, "forward")(
        q, k, v, table, table_bias, key_bias, zero, scale, causal, row_start
    )


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide_dtype(q))


@operation("attnspec::relative_backward")
def _backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    table_bias: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    zero: int,
    scale: float,
    causal: bool,
    row_start: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the inputs; that of an absent bias is empty."""
    if q.numel() == 0 or k.numel() == 0:
        zeros = [x.new_zeros(x.shape) for x in (q, k, v, table)]
        for bias in (table_bias, key_bias):
            zeros.append(lse.new_zeros(0 if bias is None else bias.shape))
        return tuple(zeros)  # type: ignore[return-value]
    return _kernel(backend, "backward")(
        dout, dlse, q, k, v, table, table_bias, key_bias, out, lse, zero, scale, causal, row_start
    )


@_backward.register_fake
def _(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor,
    table_bias: Tensor | None, key_bias: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape),
        table.new_empty(table.shape),
        dlse.new_empty(0 if table_bias is None else table_bias.shape),
        dlse.new_empty(0 if key_bias is None else key_bias.shape),
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, zero, scale, causal, row_start, backend = inputs
    ctx.save_for_backward(*tensors, row_start, *output)
    ctx.plain = zero, scale, causal, backend


def _gradient(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, row_start, out, lse = ctx.saved_tensors
    zero, scale, causal, backend = ctx.plain
    grads = _backward(dout, dlse, *inputs, out, lse, zero, scale, causal, row_start, backend)
    present = (None if x is None else grad for x, grad in zip(inputs, grads, strict=True))
    return *present, None, None, None, None, None


def _refuse_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("relative attention is differentiable once: its gradient has none")


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(_refuse_gradient)
