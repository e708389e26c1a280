"""Music Transformer's steps as matrices: products and views of torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnspec.fast.backend import (
    FLOATS,
    check_bool,
    check_group,
    check_integer,
    check_mask,
    check_same,
    check_scale,
    check_size,
    check_tensor,
    product,
    wide_dtype,
)
from attnspec.fast.engines.weights import average
from attnspec.fast.scores.music_transformer_checks import (
    check_local_rows,
    check_rows,
    check_self,
    check_square,
    check_table,
)


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
    check_rows("E", rows, causal)
    zero = rows - 1 if causal else rows // 2
    index = torch.arange(1 - L, 1 if causal else L, device=E.device) + zero
    kept = E[..., index.clamp(0, rows - 1), :]
    there = ((index >= 0) & (index < rows))[:, None]
    return kept if clip else torch.where(there, kept, 0.0)


def relative_logits(qs: Tensor, Eused: Tensor) -> Tensor:
    """R (batch, heads, L, rows) of scaled queries (batch, heads, L, d) with each row of a table."""
    check_tensor("qs", qs, ("batch", "heads", "L", "d"), FLOATS)
    check_table("Eused", Eused, qs.shape[1], qs.shape[3], causal=True)
    check_same("Eused", Eused, "qs", qs)
    return product(qs, Eused.transpose(-1, -2))


def skew(R: Tensor) -> Tensor:
    """S (batch, heads, L, L) with S[i, j] = R[i, L - 1 - (i - j)] for j <= i."""
    check_square("R", R)
    L = R.shape[3]
    return pad(R, (1, 0)).reshape(*R.shape[:2], L + 1, L)[..., 1:, :]


def unskew(S: Tensor) -> Tensor:
    """The inverse of `skew` for the pairs with j <= i."""
    check_square("S", S)
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
    check_table("E", E, qs.shape[1], qs.shape[3], causal)
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
    check_self(q, k)
    check_scale(scale)
    check_bool("causal", causal)
    check_table("E", E, q.shape[1], q.shape[3], causal)
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


def local_logits(q: Tensor, k: Tensor, E: Tensor, b: int, scale: float | None = None) -> Tensor:
    """Logits (batch, heads, L, L), -inf where nothing is seen."""
    check_self(q, k)
    check_scale(scale)
    check_table("E", E, q.shape[1], q.shape[3], causal=True)
    check_same("E", E, "q", q)
    seen = local_visibility(q.shape[2], b).to(q.device)
    check_local_rows(E, q.shape[2], b)
    return torch.where(seen, _logits(q, k, E, scale, True), -float("inf"))


def attend(logits: Tensor, mask: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (batch, heads, L, dv) and weights P (batch, heads, L, L) of a matrix of logits."""
    check_tensor("logits", logits, ("batch", "heads", "L", "L"), FLOATS)
    check_tensor("v", v, ("batch", "kv_heads", "L", "dv"), FLOATS)
    check_same("v", v, "logits", logits)
    check_size("v", v.shape[0], logits.shape[0], "batch, as in logits")
    check_size("v", v.shape[2], logits.shape[3], "L tokens, as in logits")
    check_group("v", v, logits.shape[1])
    if mask is not None:
        check_mask("mask", mask, "logits", logits, logits.shape)
        logits = torch.where(mask, logits, -float("inf"))
    return average(logits, v.repeat_interleave(logits.shape[1] // v.shape[1], 1))


def decode_relative(q_row: Tensor, E: Tensor, n_keys: int, scale: float | None = None) -> Tensor:
    """The newest query's relative logits (batch, heads, n_keys) of q_row (batch, heads, d)."""
    check_tensor("q_row", q_row, ("batch", "heads", "d"), FLOATS)
    check_integer("n_keys", n_keys, least=1)
    check_scale(scale)
    check_table("E", E, q_row.shape[1], q_row.shape[2], causal=True)
    check_same("E", E, "q_row", q_row)
    used = relative_table_slice(E, n_keys)
    logits = product(q_row[:, :, None], used.transpose(-1, -2))[:, :, 0]
    return logits * _scaled(q_row, scale)


def relative_values(P: Tensor, Ev: Tensor, causal: bool = True) -> Tensor:
    """What a table of values adds, (batch, heads, L, dv), for weights P (batch, heads, L, L)."""
    check_square("P", P)
    check_bool("causal", causal)
    check_table("Ev", Ev, P.shape[1], Ev.shape[-1] if isinstance(Ev, Tensor) else 0, causal)
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
    check_square("dlogits", dlogits)
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
