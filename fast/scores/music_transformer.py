"""Music Transformer on the relative engine: the band is computed inside the kernel, sheared there.

The steps that hand out whole matrices of logits are products and views of torch; the headline
operations keep nothing larger than their inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnspec.fast.backend import (
    FLOATS,
    check_bool,
    check_integer,
    check_same,
    check_scale,
    check_size,
    check_tensor,
    product,
    wide_dtype,
)
from attnspec.fast.engines.relative import relative
from attnspec.fast.engines.weights import average

CLAIMS: dict[str, dict[str, Any]] = {
    "global_attention": {
        "gradient": True,
        "limits": {"Ev": (False,)},
        "blocks": (16, 64),
        "compiled": True,
        "triton": {"graph": True},
    },
    "local_attention": {"gradient": True, "limits": {"Ev": (False,)}, "blocks": (16, 64)},
    **{
        name: {"launches": None}
        for name in (
            "relative_table_slice", "relative_logits", "relative_logits_gather", "skew", "unskew",
            "skew_full", "global_logits", "local_visibility", "local_logits", "attend",
            "decode_relative", "relative_values", "table_gradient",
        )
    },
}  # fmt: skip


def _check_table(name: str, E: Any, heads: int, width: int, causal: bool) -> None:
    if isinstance(E, Tensor) and E.dim() == 2:
        check_tensor(name, E, ("rows", "d"), FLOATS)
    else:
        check_tensor(name, E, ("heads", "rows", "d"), FLOATS)
        check_size(name, E.shape[0], heads, "heads")
    check_size(name, E.shape[-1], width, "the width of what it is multiplied with")
    _check_rows(name, E.shape[-2], causal)


def _check_rows(name: str, rows: int, causal: bool) -> None:
    if rows < 1 or (not causal and rows % 2 == 0):
        expected = "at least 1" if causal else "2 M - 1"
        raise ValueError(f"{name}: got {rows} rows, expected {expected}")


def _check_self(q: Any, k: Any, v: Any = None) -> None:
    check_tensor("q", q, ("batch", "heads", "L", "d"), FLOATS)
    for name, x in (("k", k), ("v", v)):
        if x is None and name == "v":
            continue
        check_tensor(name, x, ("batch", "kv_heads", "L", "d"), FLOATS)
        check_same(name, x, "q", q)
        check_size(name, x.shape[0], q.shape[0], "batch, as in q")
        check_size(name, x.shape[2], q.shape[2], "L tokens, as in q")
        if name == "k":
            check_size(name, x.shape[3], q.shape[3], "d, as in q")
        if x.shape[1] < 1 or q.shape[1] % x.shape[1]:
            raise ValueError(f"{name}: got {x.shape[1]} kv heads, expected a divisor of the heads")


def relative_table_slice(E: Tensor, L: int, causal: bool = True, clip: bool = False) -> Tensor:
    """The rows for L tokens, (heads, L or 2 L - 1, d); E (heads, M or 2 M - 1, d) or without heads.

    What is missing is 0, or with `clip` the farthest row; what is too much is cut. Differentiable.
    """
    shared = isinstance(E, Tensor) and E.dim() == 2
    check_tensor("E", E, ("rows", "d") if shared else ("heads", "rows", "d"), FLOATS)
    check_integer("L", L, least=1)
    check_bool("causal", causal)
    check_bool("clip", clip)
    rows = E.shape[-2]
    _check_rows("E", rows, causal)
    zero = rows - 1 if causal else rows // 2
    index = torch.arange(1 - L, 1 if causal else L, device=E.device) + zero
    kept = E[..., index.clamp(0, rows - 1), :]
    there = ((index >= 0) & (index < rows))[:, None]
    return kept if clip else torch.where(there, kept, 0.0)


def relative_logits(qs: Tensor, Eused: Tensor) -> Tensor:
    """R (batch, heads, L, rows) of scaled queries (batch, heads, L, d) with each row of a table."""
    check_tensor("qs", qs, ("batch", "heads", "L", "d"), FLOATS)
    _check_table("Eused", Eused, qs.shape[1], qs.shape[3], causal=True)
    check_same("Eused", Eused, "qs", qs)
    return product(qs, Eused.transpose(-1, -2))


def _check_square(name: str, x: Any) -> None:
    check_tensor(name, x, ("batch", "heads", "L", "L"), FLOATS)
    check_size(name, x.shape[3], x.shape[2], "columns, as many as rows")


def skew(R: Tensor) -> Tensor:
    """S (batch, heads, L, L) with S[i, j] = R[i, L - 1 - (i - j)] for j <= i."""
    _check_square("R", R)
    L = R.shape[3]
    return pad(R, (1, 0)).reshape(*R.shape[:2], L + 1, L)[..., 1:, :]


def unskew(S: Tensor) -> Tensor:
    """The inverse of `skew` for the pairs with j <= i."""
    _check_square("S", S)
    L = S.shape[3]
    return pad(S, (0, 0, 1, 0)).reshape(*S.shape[:2], L, L + 1)[..., 1:]


def skew_full(R: Tensor) -> Tensor:
    """S (batch, heads, L, L) with S[i, j] = R[i, L - 1 + (j - i)], R having 2 L - 1 columns."""
    check_tensor("R", R, ("batch", "heads", "L", "columns"), FLOATS)
    L = R.shape[2]
    check_size("R", R.shape[3], max(2 * L - 1, 0), "columns, 2 L - 1")
    if L == 0:
        return R.clone()
    flat = pad(pad(R, (0, 1)).flatten(2), (0, L - 1))
    return flat.reshape(*R.shape[:2], L + 1, 2 * L - 1)[..., :L, L - 1 :]


def _pairs(rows: int, L: int, causal: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The table row of each pair (L, L), kept inside, and whether there is one."""
    zero = rows - 1 if causal else rows // 2
    at = torch.arange(L, device=device)
    index = zero + at[None, :] - at[:, None]
    return index.clamp(0, rows - 1), (index >= 0) & (index < rows)


def relative_logits_gather(qs: Tensor, E: Tensor, L: int, causal: bool = True) -> Tensor:
    """The relative logits (batch, heads, L, L) looked up pair by pair, 0 where the table ends."""
    check_tensor("qs", qs, ("batch", "heads", "L", "d"), FLOATS)
    check_integer("L", L, least=0)
    check_size("qs", qs.shape[2], L, "L tokens")
    check_bool("causal", causal)
    _check_table("E", E, qs.shape[1], qs.shape[3], causal)
    check_same("E", E, "qs", qs)
    index, there = _pairs(E.shape[-2], L, causal, qs.device)
    looked_up = product(qs, E.transpose(-1, -2)).gather(-1, index.expand(*qs.shape[:2], -1, -1))
    return torch.where(there, looked_up, 0.0)


def _scaled(q: Tensor, scale: float | None) -> float:
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def _logits(q: Tensor, k: Tensor, E: Tensor, scale: float | None, causal: bool) -> Tensor:
    """Both terms in float32, rounded once."""
    wide = wide_dtype(q)
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    content = product(q.to(wide), keys.to(wide).transpose(-1, -2))
    index, there = _pairs(E.shape[-2], q.shape[2], causal, q.device)
    rel = product(q.to(wide), E.to(wide).transpose(-1, -2))
    rel = rel.gather(-1, index.expand(*q.shape[:2], -1, -1))
    return ((content + torch.where(there, rel, 0.0)) * _scaled(q, scale)).to(q.dtype)


def global_logits(
    q: Tensor, k: Tensor, E: Tensor, scale: float | None = None, causal: bool = True
) -> Tensor:
    """Logits (batch, heads, L, L); in the causal order those with j > i are to be masked."""
    _check_self(q, k)
    check_scale(scale)
    check_bool("causal", causal)
    _check_table("E", E, q.shape[1], q.shape[3], causal)
    check_same("E", E, "q", q)
    return _logits(q, k, E, scale, causal)


def local_visibility(L: int, b: int) -> Tensor:
    """bool (L, L) on the CPU: the keys up to a query in its block of `b` and in the one before."""
    check_integer("L", L, least=0)
    check_integer("b", b, least=1)
    at = torch.arange(L)
    i, j = at[:, None], at[None, :]
    seen = j <= i
    if 2 * b <= L:
        seen = seen & (j // b >= i // b - 1)
    return seen


def _check_local_rows(E: Tensor, L: int, b: int) -> None:
    if E.shape[-2] < min(2 * b, L):
        raise ValueError(f"E: got {E.shape[-2]} rows, expected at least {min(2 * b, L)}")


def local_logits(q: Tensor, k: Tensor, E: Tensor, b: int, scale: float | None = None) -> Tensor:
    """Logits (batch, heads, L, L), -inf where nothing is seen."""
    _check_self(q, k)
    check_scale(scale)
    _check_table("E", E, q.shape[1], q.shape[3], causal=True)
    check_same("E", E, "q", q)
    seen = local_visibility(q.shape[2], b).to(q.device)
    _check_local_rows(E, q.shape[2], b)
    return torch.where(seen, _logits(q, k, E, scale, True), -float("inf"))


def attend(logits: Tensor, mask: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (batch, heads, L, dv) and weights P (batch, heads, L, L) of a matrix of logits."""
    check_tensor("logits", logits, ("batch", "heads", "L", "L"), FLOATS)
    check_tensor("v", v, ("batch", "kv_heads", "L", "dv"), FLOATS)
    check_same("v", v, "logits", logits)
    check_size("v", v.shape[0], logits.shape[0], "batch, as in logits")
    check_size("v", v.shape[2], logits.shape[3], "L tokens, as in logits")
    if v.shape[1] < 1 or logits.shape[1] % v.shape[1]:
        raise ValueError(f"v: got {v.shape[1]} kv heads, expected a divisor of the heads")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: got {type(mask).__name__}, expected a bool tensor")
        shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
        if len(shape) > 4 or any(a not in (1, n) for a, n in zip(shape, logits.shape, strict=True)):
            raise ValueError(
                f"mask: got shape {tuple(mask.shape)}, expected one that broadcasts to "
                f"{tuple(logits.shape)}"
            )
        logits = torch.where(mask, logits, -float("inf"))
    return average(logits, v.repeat_interleave(logits.shape[1] // v.shape[1], 1))


def decode_relative(q_row: Tensor, E: Tensor, n_keys: int, scale: float | None = None) -> Tensor:
    """The newest query's relative logits (batch, heads, n_keys) of q_row (batch, heads, d)."""
    check_tensor("q_row", q_row, ("batch", "heads", "d"), FLOATS)
    check_integer("n_keys", n_keys, least=1)
    check_scale(scale)
    _check_table("E", E, q_row.shape[1], q_row.shape[2], causal=True)
    check_same("E", E, "q_row", q_row)
    used = relative_table_slice(E, n_keys)
    logits = product(q_row[:, :, None], used.transpose(-1, -2))[:, :, 0]
    return logits * _scaled(q_row, scale)


def relative_values(P: Tensor, Ev: Tensor, causal: bool = True) -> Tensor:
    """What a table of values adds, (batch, heads, L, dv), for weights P (batch, heads, L, L)."""
    _check_square("P", P)
    check_bool("causal", causal)
    _check_table("Ev", Ev, P.shape[1], Ev.shape[-1] if isinstance(Ev, Tensor) else 0, causal)
    check_same("Ev", Ev, "P", P)
    return product(_by_distance(P, Ev.shape[-2], causal), Ev)


def _by_distance(x: Tensor, rows: int, causal: bool) -> Tensor:
    """x (batch, heads, L, L) moved to the table rows of its pairs: each (row, pair) is met once."""
    index, there = _pairs(rows, x.shape[2], causal, x.device)
    moved = x.new_zeros(*x.shape[:3], rows)
    index = index.expand(*x.shape[:2], -1, -1)
    return moved.scatter_add(-1, index, torch.where(there, x, 0.0))


def table_gradient(dlogits: Tensor, qs: Tensor, M: int, causal: bool = True) -> Tensor:
    """dE (heads, M or 2 M - 1, d) from dlogits (batch, heads, L, L), 0 where hidden."""
    _check_square("dlogits", dlogits)
    check_tensor("qs", qs, ("batch", "heads", "L", "d"), FLOATS)
    check_integer("M", M, least=1)
    check_same("dlogits", dlogits, "qs", qs)
    check_bool("causal", causal)
    if dlogits.shape[:3] != qs.shape[:3]:
        raise ValueError(
            f"dlogits: got shape {tuple(dlogits.shape)}, expected {qs.shape[:3]} first"
        )
    wide = wide_dtype(qs)
    by_row = _by_distance(dlogits.to(wide), M if causal else 2 * M - 1, causal)
    return product(by_row.transpose(-1, -2), qs.to(wide)).sum(0).to(qs.dtype)


def _engine_table(E: Tensor, L: int, causal: bool) -> tuple[Tensor, int]:
    """The rows that L tokens can use, as the engine takes them, and the one of distance 0."""
    rows = E.shape[-2]
    zero = rows - 1 if causal else rows // 2
    first, stop = max(zero - max(L - 1, 0), 0), min(zero + (1 if causal else max(L, 1)), rows)
    used = E[..., first:stop, :]
    return (used[None] if E.dim() == 2 else used), zero - first


def _refuse_values(Ev: Any) -> None:
    if Ev is not None:
        raise ValueError("Ev: got one, expected None: the relative engine has no table of values")


def global_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    E: Tensor,
    *,
    Ev: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Outputs (batch, heads, L, dv) of global relative attention, in linear memory.

    q (batch, heads, L, d), k (batch, kv_heads, L, d), v (batch, kv_heads, L, dv), d and dv up to
    256; E (heads, M, d), or (heads, 2 M - 1, d) if not causal, without heads if shared.
    Differentiable in q, k, v and E. A table of values `Ev` is refused.
    """
    _check_self(q, k, v)
    check_scale(scale)
    check_bool("causal", causal)
    _check_table("E", E, q.shape[1], q.shape[3], causal)
    check_same("E", E, "q", q)
    _refuse_values(Ev)
    table, zero = _engine_table(E, q.shape[2], causal)
    return relative(q, k, v, table, zero=zero, scale=scale, causal=causal, backend=backend)[0]


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    E: Tensor,
    b: int,
    *,
    Ev: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Outputs (batch, heads, L, dv) of relative attention in blocks of `b`, in O(L b) time.

    Arguments as in `global_attention`; E needs min(2 b, L) rows.
    """
    _check_self(q, k, v)
    check_scale(scale)
    _check_table("E", E, q.shape[1], q.shape[3], causal=True)
    check_same("E", E, "q", q)
    check_integer("b", b, least=1)
    _refuse_values(Ev)
    L = q.shape[2]
    _check_local_rows(E, L, b)
    table, zero = _engine_table(E, min(L, 2 * b) if 2 * b <= L else L, True)
    row_start = None
    if 2 * b <= L:
        block = torch.arange(L, device=q.device) // b
        row_start = (block - 1).clamp(min=0) * b
    return relative(
        q, k, v, table, zero=zero, scale=scale, causal=True, row_start=row_start, backend=backend
    )[0]
