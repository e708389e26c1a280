"""The arguments that RCMHA accepts on the fast path: tokens, filters, tables and a memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnspec.fast.backend import FLOATS, check_same, check_tensor


def check_like(name: str, x: Any, other: Tensor, shape: tuple[int, ...]) -> None:
    """A tensor of exactly this shape, with the dtype and device of `other`, the tokens."""
    check_tensor(name, x, ("size",) * len(shape), FLOATS)
    check_same(name, x, "the tokens", other)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {shape}")


def check_heads(name: str, x: Any, q: Tensor) -> None:
    """Keys or values (batch, heads, S, width) for queries q."""
    check_tensor(name, x, ("batch", "heads", "S", "width"), FLOATS)
    check_like(name, x, q, (*q.shape[:2], *x.shape[2:]))


def check_tables(R: Any, b: Any, tokens: Tensor, heads: int, dk: int, S: int) -> int:
    """Tables R (2 P, heads, dk) and b (2 P, heads), P at least the S = M + T tokens; returns P."""
    check_tensor("R", R, ("2 P", "heads", "dk"), FLOATS)
    check_like("R", R, tokens, (R.shape[0], heads, dk))
    P = R.shape[0] // 2
    if R.shape[0] % 2 or P < S:
        raise ValueError(
            f"R: got {R.shape[0]} rows, expected 2 P of them with P >= M + T = {S} tokens"
        )
    check_like("b", b, tokens, (R.shape[0], heads))
    return P


def check_filters(w: Any, c: Any, tokens: Tensor, dk: int) -> None:
    check_tensor("w", w, ("qkv", "dk", "K"), FLOATS)
    check_like("w", w, tokens, (3, dk, w.shape[2]))
    check_like("c", c, tokens, (3, dk))


def check_memory(name: str, memory: Any, x: Tensor) -> None:
    check_tensor(name, memory, ("batch", "M", "D"), FLOATS)
    check_like(name, memory, x, (x.shape[0], memory.shape[1], x.shape[2]))
