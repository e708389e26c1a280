"""The arguments that Music Transformer accepts on the fast path: tokens, and tables for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnspec.fast.backend import FLOATS, check_group, check_same, check_size, check_tensor


def check_table(name: str, E: Any, heads: int, width: int, causal: bool) -> None:
    if isinstance(E, Tensor) and E.dim() == 2:
        check_tensor(name, E, ("rows", "d"), FLOATS)
    else:
        check_tensor(name, E, ("heads", "rows", "d"), FLOATS)
        check_size(name, E.shape[0], heads, "heads")
    check_size(name, E.shape[-1], width, "the width of what it is multiplied with")
    check_rows(name, E.shape[-2], causal)


def check_rows(name: str, rows: int, causal: bool) -> None:
    if rows < 1 or (not causal and rows % 2 == 0):
        expected = "at least 1" if causal else "2 M - 1"
        raise ValueError(f"{name}: got {rows} rows, expected {expected}")


def check_self(q: Any, k: Any, v: Any = None) -> None:
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
        check_group(name, x, q.shape[1])


def check_square(name: str, x: Any) -> None:
    check_tensor(name, x, ("batch", "heads", "L", "L"), FLOATS)
    check_size(name, x.shape[3], x.shape[2], "columns, as many as rows")


def check_local_rows(E: Tensor, L: int, b: int) -> None:
    if E.shape[-2] < min(2 * b, L):
        raise ValueError(f"E: got {E.shape[-2]} rows, expected at least {min(2 * b, L)}")
