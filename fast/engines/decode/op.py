"""The decode engine's operation: argument checks, the custom op and its refusal of gradients.

A call is checked and planned once for its kind: a later one that differs in addresses, strides and
the number of cached tokens alone finds its launch in a dictionary. Where nobody looks on (no graph,
no gradient, no tracer), it goes there directly; else through the custom op.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    DTYPES,
    FLOATS,
    INTEGERS,
    check_choice,
    check_device,
    check_integer,
    check_same,
    check_scale,
    check_size,
    check_tensor,
    choose_backend,
    load,
    unobserved,
    wide_dtype,
)
from attnspec.fast.engines.decode.configs import TABLE
from attnspec.fast.recent import Recent

MODULES = {"numba": "numba_cpu", "triton": "triton_forward"}
LARGEST_HEAD = 256

_launches: Recent[Hashable, Callable[..., tuple[Tensor, Tensor]]] = Recent()


def _kernels(backend: str) -> ModuleType:
    """The implementation on `backend`, imported on first use."""
    return load(f"attnspec.fast.engines.decode.{MODULES[backend]}")


@torch.library.custom_op("attnspec::decode", mutates_args=())
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    index: Tensor | None,
    counts: Tensor | None,
    block_table: Tensor | None,
    bias: Tensor | None,
    sink_logit: Tensor | None,
    scale: float,
    causal: bool,
    page: int,
    rows: int,
    tile: int,
    workers: int,
    paired: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tensors = (q, k, v, lengths, index, counts, block_table, bias, sink_logit)
    options = (scale, causal, page, rows, tile, workers, paired, backend)
    kind = _kind(*tensors, options)
    return (_known(kind) or _plan(kind, tensors, options))(*tensors)


def _known(kind: Hashable) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The launch of this kind of call, if there was one; an option without a hash is a wrong one,
    which the checks will name.
    """
    try:
        return _launches.get(kind)
    except TypeError:
        return None


def _plan(
    kind: Hashable, tensors: tuple[Any, ...], options: tuple[Any, ...]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The launch of this kind of call, from arguments that have been checked."""
    *rest, backend = options
    launch = _launches[kind] = _kernels(backend).prepare(*tensors, *rest)
    return launch


def _kind(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    index: Tensor | None,
    counts: Tensor | None,
    block_table: Tensor | None,
    bias: Tensor | None,
    sink_logit: Tensor | None,
    options: tuple[Any, ...],
) -> Hashable:
    """What checks and launches depend on: all but addresses, strides and the cached tokens."""
    k_pages, k_heads, k_tokens, k_d = k.shape
    v_pages, v_heads, v_tokens, v_d = v.shape
    rest: list[Any] = [TABLE.state()]
    for x in (lengths, index, counts, block_table, sink_logit):
        rest.append(None if x is None else (x.shape, x.dtype, x.device))
    if bias is not None:
        grows = index is None and block_table is None and bias.shape[2:] == k.shape[2:3]
        rest += [bias.shape[:2] if grows else bias.shape, bias.dtype, bias.device]
    return (
        q.shape, k_pages, k_heads, k_d, v_pages, v_heads, v_d, v_tokens - k_tokens,
        None if block_table is None else k_tokens, q.dtype, k.dtype, v.dtype, q.device, k.device,
        v.device, options, *map(type, options), *rest,
    )  # fmt: skip


@_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = wide_dtype(q)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _refuse_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "decode has no gradient: it is for inference. Use attnspec.fast.attention to train."
    )


_decode.register_autograd(_refuse_gradient)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    index: Tensor | None = None,
    counts: Tensor | None = None,
    page: int = 1,
    block_table: Tensor | None = None,
    bias: Tensor | None = None,
    sink_logit: Tensor | None = None,
    rows: int | None = None,
    tile: int | None = None,
    workers: int | None = None,
    order: str = "natural",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a few queries to a long cache: out (B, H, Tq, dv) and lse (B, H, Tq) float32.

    q (B, H, Tq, d); any strides everywhere. The cache is one of

    - contiguous: k (B, Hk, Tk, d), v (B, Hv, Tk, dv); a key head serves Hv / Hk value heads, one
      as a rule, and these serve H / Hv query heads each;
    - paged: `block_table` int (B, max_pages) names the pages of each sequence in k
      (pages, Hk, page size, d) and v likewise; a (pages, page size, Hk, d) pool is passed as
      ``pool.transpose(1, 2)``. Entries beyond the length are not read.

    `lengths` int (B,) or (B, Hk): keys in the cache, the newest query's own included; all it can
    hold if None. It stays on the device: a captured graph serves any lengths. Larger lengths are
    cut to what the cache holds. Causal (K3): query i sees token j iff j <= i + length - Tq.

    `index` int (B, Hk, n) restricts the reading to chosen tokens, or with `page` > 1 to chosen runs
    of `page` tokens aligned to it, in any order; -1 chooses nothing, tokens beyond the length are
    skipped, and a token listed twice counts twice. `counts` int (B, Hk): how many entries of each
    list there are, from the first; the others are not read and cost nothing.

    `bias` (B, Hk, slots), floating, is added to the scores of all heads of the group; a slot is
    a token of the cache, or with `index` a place in the list (n * page slots); -inf hides the key.
    `sink_logit` (H,) adds exp(sink_logit) to the softmax denominator.

    Rows that see nothing have output 0 and lse -inf (K4). Hidden keys are never read (K11).

    How the work is split: query heads of a group and tokens are packed as at most `rows` rows; at
    most `tile` keys, for Triton a power of two from 16 on, are one step; `workers` share all tiles
    evenly; `order` "paired" alternates early and late query blocks. None takes the tuned choice.
    None of them changes the result beyond rounding, and two calls give the same bits. One launch,
    no host synchronisation. Numba also takes float64, with lse in float64. For inference: there is
    no gradient.
    """
    tensors = (q, k, v, lengths, index, counts, block_table, bias, sink_logit)
    direct = unobserved(*tensors)
    kind: Hashable = None
    if direct and q is not None and k is not None and v is not None and k.dim() == v.dim() == 4:
        options = (scale, causal, page, rows, tile, workers, order, backend)
        kind = _kind(*tensors, options)
        launch = _known(kind)
        if launch is not None:
            return launch(*tensors)
    backend = choose_backend(backend, q) if isinstance(q, Tensor) else "numba"
    kv_heads, slots = _check_cache(q, k, v, block_table, backend)
    check_integer("page", page, least=1)
    batch, heads = q.shape[0], q.shape[1]
    for name, size, value in (("d", q.shape[3], "q"), ("dv", v.shape[3], "v")):
        if not 1 <= size <= LARGEST_HEAD:
            raise ValueError(f"{value}: got {name} {size}, expected 1..{LARGEST_HEAD}")
    if lengths is not None:
        shapes = ((batch,), (batch, kv_heads))
        _check_integers("lengths", lengths, q)
        if tuple(lengths.shape) not in shapes:
            raise ValueError(
                f"lengths: got shape {tuple(lengths.shape)}, expected {shapes[0]} or {shapes[1]}"
            )
    if index is not None:
        _check_integers("index", index, q)
        check_tensor("index", index, ("batch", "kv_heads", "entries"), INTEGERS)
        check_size("index", index.shape[0], batch, "batch, as in q")
        check_size("index", index.shape[1], kv_heads, "kv_heads, as in k")
        slots = index.shape[2] * page
    if counts is not None:
        _check_integers("counts", counts, q)
        if index is None:
            raise ValueError("counts: got a tensor without index, expected both or neither")
        if tuple(counts.shape) != (batch, kv_heads):
            raise ValueError(f"counts: got shape {tuple(counts.shape)}, expected {batch, kv_heads}")
    if bias is not None:
        check_tensor("bias", bias, ("batch", "kv_heads", "slots"), FLOATS)
        check_device("bias", bias, "q", q)
        for got, expected, what in zip(
            bias.shape, (batch, kv_heads, slots), ("batch", "kv_heads", "slots"), strict=True
        ):
            check_size("bias", got, expected, what)
    if sink_logit is not None:
        check_tensor("sink_logit", sink_logit, ("heads",), FLOATS)
        check_size("sink_logit", sink_logit.shape[0], heads, "heads, as in q")
        check_device("sink_logit", sink_logit, "q", q)
    for name, count in (("rows", rows), ("tile", tile), ("workers", workers)):
        if count is not None:
            check_integer(name, count, least=1)
    if tile is not None and backend == "triton" and (tile < 16 or tile & (tile - 1)):
        raise ValueError(f"tile: got {tile}, expected a power of two >= 16")
    check_choice("order", order, ("natural", "paired"))
    check_scale(scale)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    resolved = (
        float(scale), causal, page, rows or 0, tile or 0, workers or 0, order == "paired", backend
    )  # fmt: skip
    if direct:
        return _plan(kind, tensors, resolved)(*tensors)
    return _decode(*tensors, *resolved)


def _check_cache(q: Any, k: Any, v: Any, block_table: Any, backend: str) -> tuple[int, int]:
    """kv heads and tokens of a cache that fits q; TypeError or ValueError otherwise."""
    dtypes = FLOATS if backend == "numba" else DTYPES
    check_tensor("q", q, ("batch", "heads", "q_tokens", "d"), dtypes)
    if block_table is None:
        check_tensor("k", k, ("batch", "kv_heads", "k_tokens", "d"), dtypes)
        check_tensor("v", v, ("batch", "kv_heads", "k_tokens", "dv"), dtypes)
        check_size("k", k.shape[0], q.shape[0], "batch, as in q")
    else:
        check_tensor("k", k, ("pages", "kv_heads", "page_tokens", "d"), dtypes)
        check_tensor("v", v, ("pages", "kv_heads", "page_tokens", "dv"), dtypes)
        _check_integers("block_table", block_table, q)
        check_tensor("block_table", block_table, ("batch", "max_pages"), INTEGERS)
        check_size("block_table", block_table.shape[0], q.shape[0], "batch, as in q")
    check_same("k", k, "q", q)
    check_same("v", v, "q", q)
    check_size("k", k.shape[3], q.shape[3], "d, as in q")
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"k: got {kv_heads} kv heads for {heads} query heads, expected a divisor of {heads}"
        )
    for axis, what in ((0, "first axis"), (2, "tokens")):
        check_size("v", v.shape[axis], k.shape[axis], f"{what}, as in k")
    if v.shape[1] % kv_heads or heads % max(v.shape[1], 1):
        raise ValueError(
            f"v: got {v.shape[1]} heads beside {kv_heads} of k, expected a multiple of these that "
            f"divides {heads}"
        )
    pages = 1 if block_table is None else block_table.shape[1]
    return kv_heads, pages * k.shape[2]


def _check_integers(name: str, x: Any, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected torch.Tensor")
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected int32 or int64")
    check_device(name, x, "q", q)
