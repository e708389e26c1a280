"""The columns engine's operations: argument checks and custom ops.

None of them is differentiable: they feed selections, or targets that are constants.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    DTYPES,
    FLOATS,
    check_choice,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    choose_backend,
    load,
    wide_dtype,
)

POOLS = ("avg", "max")
REDUCTIONS = ("mean", "max")


def _kernels(backend: str) -> ModuleType:
    """The implementation on `backend`, imported on first use."""
    module = "numba_cpu" if backend == "numba" else "triton_gpu"
    return load(f"attnspec.fast.engines.columns.{module}")


def _check(q: Any, k: Any, backend: str | None) -> str:
    """The backend, after q (batch, heads, q_tokens, d) and k are found to fit."""
    backend = choose_backend(backend, q) if isinstance(q, Tensor) else "numba"
    dtypes = FLOATS if backend == "numba" else DTYPES
    check_tensor("q", q, ("batch", "heads", "q_tokens", "d"), dtypes)
    check_tensor("k", k, ("batch", "kv_heads", "k_tokens", "d"), dtypes)
    check_same("k", k, "q", q)
    check_size("k", k.shape[0], q.shape[0], "batch, as in q")
    check_size("k", k.shape[3], q.shape[3], "d, as in q")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: got {k.shape[1]} kv heads for {q.shape[1]} query heads, "
            f"expected a divisor of {q.shape[1]}"
        )
    return backend


def _check_key_mask(key_mask: Any, k: Tensor) -> None:
    if key_mask is None:
        return
    check_tensor("key_mask", key_mask, ("batch", "k_tokens"), (torch.bool,))
    expected = (k.shape[0], k.shape[2])
    if tuple(key_mask.shape) != expected:
        raise ValueError(f"key_mask: got shape {tuple(key_mask.shape)}, expected {expected}")


def _check_lse(lse: Any, q: Tensor) -> None:
    check_tensor("lse", lse, ("batch", "heads", "q_tokens"), (wide_dtype(q),))
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse: got shape {tuple(lse.shape)}, expected {tuple(q.shape[:3])}")


def positive(q: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """q and a positive scale that give the same scores: kernels look for the largest product."""
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    # A scale of 0 is a tiny one: all scores are 0 to rounding, and 0 * inf does not arise.
    return (q if scale >= 0 else -q), max(abs(scale), 1e-30)


@torch.library.custom_op("attnspec::row_norms", mutates_args=())
def _row_norms(
    q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, causal: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return _kernels(backend).row_norms(q, k, key_mask, scale, causal)


@_row_norms.register_fake
def _(
    q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, causal: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return (
        q.new_empty(q.shape[:3], dtype=wide_dtype(q)),
        q.new_empty(q.shape[:3], dtype=wide_dtype(q)),
    )


def row_lse(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log of the softmax denominators (batch, heads, q_tokens) of the last queries over all keys.

    For few queries against many keys: the keys are split among programs. `key_mask` bool (batch,
    k_tokens), True = real key. float32 (float64 for float64); -inf where nothing is visible (K4).
    """
    backend = _check(q, k, backend)
    _check_key_mask(key_mask, k)
    q, scale = positive(q.detach(), scale)
    top, total = _row_norms(q, k.detach(), key_mask, scale, causal, backend)
    return top * scale + total.log()


def _norms(
    q: Tensor, k: Tensor, lse: Tensor | None, key_mask: Tensor | None, scale: float, causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The given lse, or each row's largest product and the denominator relative to it."""
    if lse is None:
        return _row_norms(q, k, key_mask, scale, causal, backend)
    _check_lse(lse, q)
    return lse.detach(), None


@torch.library.custom_op("attnspec::column_sums", mutates_args=())
def _column_sums(
    q: Tensor, k: Tensor, norm: Tensor, total: Tensor | None, key_mask: Tensor | None,
    scale: float, causal: bool, columns: int, backend: str,
) -> Tensor:  # fmt: skip
    return _kernels(backend).column_sums(q, k, norm, total, key_mask, scale, causal, columns)


@_column_sums.register_fake
def _(
    q: Tensor, k: Tensor, norm: Tensor, total: Tensor | None, key_mask: Tensor | None,
    scale: float, causal: bool, columns: int, backend: str,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:2], columns, dtype=wide_dtype(q))


def column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    key_mask: Tensor | None = None,
    columns: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """What each of the first `columns` keys receives: the sum over q's rows of their weights.

    q (batch, heads, q_tokens, d) are the last rows (K3), k (batch, kv_heads, k_tokens, d), `lse`
    their log denominators over *all* keys. Without it a pass of its own comes first, and nothing
    is lost to the rounding of a large lse. Returns (batch, heads, columns), float32 (float64 for
    float64), from one pass over k and no buffer of weights; the heads of a group share what is
    read.
    """
    backend = _check(q, k, backend)
    _check_key_mask(key_mask, k)
    if columns is None:
        columns = k.shape[2]
    check_integer("columns", columns, least=0)
    if columns > k.shape[2]:
        raise ValueError(f"columns: got {columns}, expected at most the {k.shape[2]} keys")
    (q, scale), k = positive(q.detach(), scale), k.detach()
    norm, total = _norms(q, k, lse, key_mask, scale, causal, backend)
    return _column_sums(q, k, norm, total, key_mask, scale, causal, columns, backend)


@torch.library.custom_op("attnspec::weight_rows", mutates_args=())
def _weight_rows(
    q: Tensor, k: Tensor, norm: Tensor, total: Tensor | None, key_mask: Tensor | None,
    scale: float, causal: bool, backend: str,
) -> Tensor:  # fmt: skip
    return _kernels(backend).weight_rows(q, k, norm, total, key_mask, scale, causal)


@_weight_rows.register_fake
def _(
    q: Tensor, k: Tensor, norm: Tensor, total: Tensor | None, key_mask: Tensor | None,
    scale: float, causal: bool, backend: str,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:3], k.shape[2], dtype=wide_dtype(q))


def weight_rows(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The softmax weights (batch, heads, q_tokens, k_tokens) of the last few rows.

    Arguments as in `column_sums`; float32 (float64 for float64), 0 where a key is not visible.
    """
    backend = _check(q, k, backend)
    _check_key_mask(key_mask, k)
    (q, scale), k = positive(q.detach(), scale), k.detach()
    norm, total = _norms(q, k, lse, key_mask, scale, causal, backend)
    return _weight_rows(q, k, norm, total, key_mask, scale, causal, backend)


@torch.library.custom_op("attnspec::block_max", mutates_args=())
def _block_max(
    q: Tensor, k: Tensor, block: int, scale: float, causal: bool, backend: str
) -> Tensor:
    return _kernels(backend).block_max(q, k, block, scale, causal)


@_block_max.register_fake
def _(q: Tensor, k: Tensor, block: int, scale: float, causal: bool, backend: str) -> Tensor:
    rows, columns = ((x.shape[2] + block - 1) // block for x in (q, k))
    return q.new_empty(*q.shape[:2], rows, columns, dtype=wide_dtype(q))


def block_max(
    q: Tensor,
    k: Tensor,
    block: int,
    *,
    scale: float | None = None,
    causal: bool = True,
    backend: str | None = None,
) -> Tensor:
    """The largest weight in every block of `block` queries and `block` keys.

    Returns (batch, heads, ceil(q_tokens/block), ceil(k_tokens/block)), 0 where nothing is visible.
    A program walks over the keys twice, for the norms of its rows and then for the maxima: both
    see the very same products, so that a weight of 1 comes out as 1 whatever the logits.
    """
    backend = _check(q, k, backend)
    check_integer("block", block, least=1)
    q, scale = positive(q.detach(), scale)
    return _block_max(q, k.detach(), block, scale, causal, backend)


@torch.library.custom_op("attnspec::smooth", mutates_args=())
def _smooth(s: Tensor, width: int, kind: str, heads: int, reduce: str, backend: str) -> Tensor:
    return _kernels(backend).smooth(s, width, kind, heads, reduce)


@_smooth.register_fake
def _(s: Tensor, width: int, kind: str, heads: int, reduce: str, backend: str) -> Tensor:
    return s.new_empty(s.shape[0], heads, s.shape[2])


def smooth(
    s: Tensor,
    width: int,
    kind: str,
    *,
    heads: int | None = None,
    reduce: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """`s` (batch, heads, n) pooled along n with stride 1 and odd `width`, then over head groups.

    `kind` "avg" divides by `width` everywhere, "max" looks at the entries that exist. `heads`
    is the number of heads left by `reduce` ("mean" or "max") over contiguous groups (K7); None
    keeps all.
    """
    backend = choose_backend(backend, s) if isinstance(s, Tensor) else "numba"
    dtypes = FLOATS if backend == "numba" else DTYPES
    check_tensor("s", s, ("batch", "heads", "n"), dtypes)
    check_integer("width", width, least=1)
    if width % 2 == 0:
        raise ValueError(f"width: got {width}, expected an odd number")
    check_choice("kind", kind, POOLS)
    check_choice("reduce", reduce, REDUCTIONS)
    heads = s.shape[1] if heads is None else heads
    check_integer("heads", heads, least=1)
    if s.shape[1] % heads:
        raise ValueError(f"heads: got {heads}, expected a divisor of the {s.shape[1]} of s")
    return _smooth(s.detach(), width, kind, heads, reduce, backend)
