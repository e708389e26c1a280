"""The arguments that relative attention accepts (K14)."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_size


def check_self(name: str, q: np.ndarray, x: np.ndarray) -> None:
    """K7, K14: keys or values fit the queries and stand at their positions."""
    check_array("q", q, ("heads", "L", "d"))
    check_array(name, x, ("kv_heads", "L", "d"))
    check_dtype(name, x, q, "q")
    if x.shape[:-3] != q.shape[:-3]:
        raise ValueError(f"{name}: got leading axes {x.shape[:-3]}, expected {q.shape[:-3]}")
    check_size(name, x.shape[-2], q.shape[-2], "L tokens, as in q")
    if name == "k":
        check_size(name, x.shape[-1], q.shape[-1], "d, as in q")
    if x.shape[-3] < 1 or q.shape[-3] % x.shape[-3]:
        raise ValueError(f"{name}: got {x.shape[-3]} kv heads, expected a divisor of the heads")


def check_square(name: str, x: np.ndarray) -> None:
    """S3, K14: `x` (..., L, L)."""
    check_array(name, x, ("L", "L"))
    check_size(name, x.shape[-1], x.shape[-2], "columns, as many as rows")


def check_table(name: str, E: np.ndarray, heads: int, width: int, causal: bool) -> None:
    """S1, K14: a table (heads, rows, width), or (rows, width) shared by all heads."""
    check_array(name, E, ("rows", "d"))
    if E.ndim > 3 or (E.ndim == 3 and E.shape[0] != heads):
        raise ValueError(
            f"{name}: got shape {E.shape}, expected ({heads}, rows, {width}) or (rows, {width})"
        )
    check_size(name, E.shape[-1], width, "the width of what it is multiplied with")
    check_rows(name, E, causal)


def check_rows(name: str, E: np.ndarray, causal: bool) -> None:
    """S1, K14: a table has a row, and without a causal order an odd number of them."""
    rows = E.shape[-2]
    if rows < 1 or (not causal and rows % 2 == 0):
        expected = "at least 1" if causal else "2 M - 1"
        raise ValueError(f"{name}: got {rows} rows, expected {expected}")


def check_local_rows(name: str, E: np.ndarray, L: int, b: int) -> None:
    """S5, K14: a table reaches as far as a query sees in blocks of `b`."""
    if E.shape[-2] < min(2 * b, L):
        raise ValueError(f"{name}: got {E.shape[-2]} rows, expected at least {min(2 * b, L)}")


def check_values_table(Ev: np.ndarray | None, q: np.ndarray, v: np.ndarray, causal: bool) -> None:
    """S7, K14: a table of values, if there is one, is as wide as the values."""
    if Ev is not None:
        check_table("Ev", Ev, q.shape[-3], v.shape[-1], causal)
        check_dtype("Ev", Ev, v, "v")


def check_weighed(logits: Any, mask: Any, v: Any) -> None:
    """S6, K7, K14: there is a value for every logit, and the mask broadcasts to the logits."""
    check_array("logits", logits, ("heads", "L", "L"))
    check_array("v", v, ("kv_heads", "L", "dv"))
    check_dtype("v", v, logits, "logits")
    if v.shape[:-3] != logits.shape[:-3]:
        raise ValueError(f"v: got leading axes {v.shape[:-3]}, expected {logits.shape[:-3]}")
    check_size("v", v.shape[-2], logits.shape[-1], "L tokens, as in logits")
    if v.shape[-3] < 1 or logits.shape[-3] % v.shape[-3]:
        raise ValueError(f"v: got {v.shape[-3]} kv heads, expected a divisor of the heads")
    if mask is not None:
        check_array("mask", mask, ("L",), dtype="bool")
        shape = (1,) * (logits.ndim - mask.ndim) + mask.shape
        if len(shape) > logits.ndim or any(
            a not in (1, n) for a, n in zip(shape, logits.shape, strict=True)
        ):
            raise ValueError(
                f"mask: got shape {mask.shape}, expected one that broadcasts to {logits.shape}"
            )


def check_dtype(name: str, x: np.ndarray, other: np.ndarray, other_name: str) -> None:
    """K14: `x` has the dtype of `other`."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected {other.dtype}, as {other_name}")
