"""StreamingLLM, the rows of the cache: which stay, and where attention sees them.

Rows and positions are int64 tensors on the CPU; only `rope` reads queries or keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    INTEGERS,
    check_integer,
    check_size,
    check_tensor,
)
from attnspec.fast.engines.rows import turn
from attnspec.fast.growing import checkable


def evict_rows(T: int, S: int = 4, R: int = 512, *, backend: str | None = None) -> Tensor:
    """int64 (kept), the rows that stay of `T`, ascending."""
    return evict_rows_for_space(T, 0, S, R)


def evict_rows_for_space(
    T: int, m: int, S: int = 4, R: int = 512, *, backend: str | None = None
) -> Tensor:
    """int64 (kept), the rows that stay of `T` before `m` tokens come, ascending."""
    for name, value in (("T", T), ("m", m), ("S", S), ("R", R)):
        check_integer(name, value, least=0)
    rows = torch.arange(T)
    if T + m <= S + R:
        return rows
    return torch.cat([rows[:S], rows[T - R + m :]])


def evict_rows_range(T: int, a: int, b: int, *, backend: str | None = None) -> Tensor:
    """int64 (kept), the rows of `T` outside [a, b), ascending. ValueError unless a <= b <= T."""
    for name, value in (("T", T), ("a", a), ("b", b)):
        check_integer(name, value, least=0)
    if not a <= b <= T:
        raise ValueError(f"b: got {b}, expected a <= b <= T with a = {a} and T = {T}")
    rows = torch.arange(T)
    return torch.cat([rows[:a], rows[b:]])


def cache_positions(n: int, w: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Cache-relative positions, int64 (w) of the new queries and int64 (n + w) of all rows."""
    check_integer("n", n, least=0)
    check_integer("w", w, least=0)
    return torch.arange(n, n + w), torch.arange(n + w)


def rope(
    x: Tensor,
    pos: Tensor,
    base: float = 10000.0,
    rotary_dims: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """`x` (..., T, d) rotated to the positions `pos` int (T).

    `rotary_dims` channels turn, the first ones, an even number; all d if None. Angles are float64,
    the rotation is float32 (float64 for float64), the result has x's dtype.
    """
    _check_rows("x", x, "T")
    check_tensor("pos", pos, ("T",), INTEGERS)
    check_size("pos", pos.shape[0], x.shape[-2], "T, as in x")
    check_rotary("x", x, "base", base, rotary_dims)
    heads = x[(None,) * max(0, 4 - x.dim())].flatten(0, -4)
    turned, _ = turn(
        heads, None, pos.to(x.device), base=base, rotary_dims=rotary_dims, backend=backend
    )  # fmt: skip
    return turned.reshape(x.shape)


def unrounded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """What is about to be rotated, wide on the CPU: its kernels widen 16-bit inputs in any case, so
    rotated queries and keys need not be rounded before.
    """
    half = q.dtype in (torch.float16, torch.bfloat16) and not q.is_cuda
    return tuple(x.float() if half else x for x in (q, k, v))


def alibi_bias(
    alibi_slopes: Tensor, p_q: Tensor, p_k: Tensor, *, backend: str | None = None
) -> Tensor:
    """The bias (heads, queries, rows) added to scores, for slopes (heads) above 0."""
    check_slopes(alibi_slopes)
    check_tensor("p_q", p_q, ("queries",), INTEGERS)
    check_tensor("p_k", p_k, ("rows",), INTEGERS)
    return alibi_slopes[:, None, None] * (p_k[None, :] - p_q[:, None])


def sink_window_mask(T: int, S: int = 4, R: int = 512, *, backend: str | None = None) -> Tensor:
    """bool (T, T), True where token t sees token j when a stream comes token by token."""
    for name, value in (("T", T), ("S", S), ("R", R)):
        check_integer(name, value, least=0)
    t, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    return (j <= t) & ((j < S) | (t - j <= R))


def sink_window_distances(
    T: int, S: int = 4, R: int = 512, *, backend: str | None = None
) -> Tensor:
    """int64 (T, T), the distance at which token t sees token j, -1 where it does not."""
    mask = sink_window_mask(T, S, R)
    t, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    row = torch.where(j < S, j, j - (t - (S + R)).clamp(min=0))
    return torch.where(mask, t.clamp(max=S + R) - row, -1)


class Calls(NamedTuple):
    """Where the calls that a stream of T tokens comes in begin: a range where all are as long."""

    starts: Sequence[int]
    T: int

    def end(self, call: int) -> int:
        """Behind the last token of the call."""
        number = range(len(self.starts))[call] + 1
        return self.starts[number] if number < len(self.starts) else self.T

    def until(self, place: int) -> int:
        """How many calls begin at `place` or before."""
        if isinstance(self.starts, range):
            return min(len(self.starts), place // self.starts.step + 1)
        return sum(start <= place for start in self.starts)

    @property
    def single(self) -> bool:
        """Whether every token comes in a call of its own."""
        return len(self.starts) == self.T

    def begins(self, first: int, device: torch.device) -> Tensor:
        """int64: the first token of each token's call, from `first` on, where a call begins."""
        if isinstance(self.starts, range):
            tokens = torch.arange(first, self.T, device=device)
            return tokens - tokens % self.starts.step
        starts = self.starts[self.until(first - 1) :]
        sizes = torch.tensor([*starts[1:], self.T]) - torch.tensor(starts)
        begins = torch.tensor(starts).repeat_interleave(sizes, output_size=self.T - first)
        return begins.to(device)

    def ranges(self, first: int, low: int, S: int, R: int, device: torch.device) -> dict[str, Any]:
        """The flash engine's ranges of the tokens from `first` on over those from `low` on."""
        if self.single:
            return {"window": R + 1}
        begin = self.begins(first, device)
        return {"row_start": torch.where(begin > S + R, begin - (R + low), 0)}


def calls_of(T: int, chunk: int | Sequence[int]) -> Calls:
    """`chunk` tokens at a time, or as many as the list says."""
    check_integer("T", T, least=0)
    if not isinstance(chunk, Sequence):
        check_integer("chunk", chunk, least=1)
        return Calls(range(0, T, chunk), T)
    for size in chunk:
        check_integer("chunk", size, least=1)
    check_size("chunk", sum(chunk), T, "the sum of the sizes is the number of tokens")
    return Calls([end - size for end, size in zip(accumulate(chunk), chunk, strict=True)], T)


class Trace(list[Tensor]):
    """For each call the numbers of the tokens kept after it, int64 (kept), made when asked for."""

    def __init__(self, calls: Calls, S: int, R: int) -> None:
        super().__init__()
        self.calls, self.S, self.R = calls, S, R

    def __len__(self) -> int:
        return len(self.calls.starts)

    def __iter__(self) -> Iterator[Tensor]:
        return (self._kept(call) for call in range(len(self)))

    def __getitem__(self, call: Any) -> Any:
        if isinstance(call, slice):
            return [self._kept(one) for one in range(len(self))[call]]
        return self._kept(call)

    def _kept(self, call: int) -> Tensor:
        return evict_rows(self.calls.end(call), self.S, self.R)


def check_rotary(name: str, x: Tensor, base_name: str, base: Any, rotary_dims: Any = None) -> None:
    """`x` has an even number of channels to rotate and `base` is a positive number."""
    if isinstance(base, bool) or not isinstance(base, (int, float)):
        raise TypeError(f"{base_name}: got {base!r}, expected a number > 0")
    if not base > 0:
        raise ValueError(f"{base_name}: got {base!r}, expected a number > 0")
    d = x.shape[-1]
    if rotary_dims is None:
        if d % 2:
            raise ValueError(f"{name}: got d = {d}, expected an even d for rotary positions")
        return
    check_integer("rotary_dims", rotary_dims, least=2)
    if rotary_dims % 2 or rotary_dims > d:
        raise ValueError(
            f"rotary_dims: got {rotary_dims}, expected an even integer of at most d = {d}"
        )


def check_slopes(alibi_slopes: Any) -> None:
    """One slope above 0 a head; their signs are looked at on the CPU only."""
    check_tensor("alibi_slopes", alibi_slopes, ("heads",), FLOATS)
    if checkable(alibi_slopes) and not bool((alibi_slopes > 0).all()):
        raise ValueError("alibi_slopes: got a slope that is not positive, expected all > 0")


def _check_rows(name: str, x: Any, tokens: str) -> None:
    """`x` is a floating-point tensor (..., tokens, d)."""
    leading = ("...",) * max(0, x.dim() - 2) if isinstance(x, Tensor) else ("...",)
    check_tensor(name, x, (*leading, tokens, "d"), FLOATS)
