"""How long each head's window is, and which pairs of tokens that leaves: plain CPU tensors.

A head's sizes are numbers that are known before the model runs; they stay on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import INTEGERS, check_integer, check_size

Sizes = Sequence[int] | Tensor
"""One integer a kv head; a tensor of them lies on the CPU."""


def span(
    alpha: float | Tensor, beta: float | Tensor, N: int, *, backend: str | None = None
) -> Tensor:
    """int64 (...), the span of the rules `alpha`, `beta` (...) at length `N`, cut towards 0."""
    check_integer("N", N, least=0)
    a, b = check_rules(alpha, beta)
    return torch.trunc(a + b * N).long()


def cache_sizes(
    alpha: float | Tensor,
    beta: float | Tensor,
    prompt: int,
    max_new: int,
    sink: int = 64,
    minimum: int = 128,
    split: int = 64,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """C, s and c, int64 (...): the slots of each head, static and circular among them.

    `alpha` and `beta` (...) are rules, `prompt` and `max_new` tokens.
    """
    for name, value, least in (
        ("prompt", prompt, 0),
        ("max_new", max_new, 0),
        ("sink", sink, 0),
        ("minimum", minimum, 1),
        ("split", split, 1),
    ):
        check_integer(name, value, least)
    smallest = -(-minimum // split) * split
    if sink >= smallest:
        raise ValueError(f"sink: got {sink}, expected less than the smallest cache, {smallest}")
    N = prompt + max_new
    wanted = span(alpha, beta, N).clamp(max=N).clamp(min=minimum)
    C = (wanted + (split - 1)) // split * split
    s = C.clamp(max=sink)
    return C, s, C - s


def moa_token_mask(T: int, s: Sizes, c: Sizes, *, backend: str | None = None) -> Tensor:
    """bool (heads, T, T), True where token t sees token u."""
    check_integer("T", T, least=0)
    static, local = (torch.tensor(x)[:, None, None] for x in check_plan(s, c))
    t, u = torch.arange(T)[:, None], torch.arange(T)
    return (u <= t) & ((u < static) | (t - u < local))


def moa_block_mask(
    T: int, s: Sizes, c: Sizes, block: int = 64, *, backend: str | None = None
) -> Tensor:
    """bool (heads, T, T), in blocks; `s` and `c` are multiples of `block`."""
    check_integer("T", T, least=0)
    plan = check_plan(s, c, block=block)
    static, local = (torch.tensor(x)[:, None, None] // block for x in plan)
    t, u = torch.arange(T)[:, None], torch.arange(T)
    row, column = t // block, u // block
    return (u <= t) & ((column < static) | (column > row - local))


def check_rules(alpha: Any, beta: Any) -> tuple[Tensor, Tensor]:
    """`alpha` and `beta`, finite numbers of the same shape, as float64 CPU tensors."""
    checked = []
    for name, x in (("alpha", alpha), ("beta", beta)):
        try:
            numbers = torch.as_tensor(x, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name}: got {x!r}, expected numbers") from None
        if numbers.dtype == torch.bool or numbers.is_complex():
            raise TypeError(f"{name}: got {x!r}, expected numbers")
        if isinstance(x, (float, tuple, list)):
            numbers = torch.tensor(x, dtype=torch.float64)
        if not bool(torch.isfinite(numbers).all()):
            raise ValueError(f"{name}: got {x!r}, expected finite numbers")
        checked.append(numbers.double())
    a, b = checked
    if a.shape != b.shape:
        raise ValueError(f"beta: got shape {tuple(b.shape)}, expected {tuple(a.shape)}, as alpha")
    return a, b


def check_plan(
    s: Any, c: Any, heads: int | None = None, block: int = 1
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`s` >= 0 and `c` >= 1 as integers, one for each of the `heads`, in whole blocks."""
    check_integer("block", block, least=1)
    plan = []
    for name, x, least in (("s", s, 0), ("c", c, 1)):
        if isinstance(x, Tensor):
            if x.dim() != 1 or x.dtype not in INTEGERS or x.device.type != "cpu":
                raise TypeError(
                    f"{name}: got {x.dtype} {tuple(x.shape)} on {x.device}, "
                    "expected one integer a kv head, on the CPU"
                )
            x = x.tolist()
        if not isinstance(x, (tuple, list)):
            raise TypeError(f"{name}: got {x!r}, expected one integer a kv head")
        for value in x:
            check_integer(name, value, least)
            if value % block:
                raise ValueError(f"{name}: got {value}, expected multiples of {block} (block)")
        plan.append(tuple(x))
    check_size("c", len(plan[1]), len(plan[0]), "heads, as in s")
    if heads is not None:
        check_size("s", len(plan[0]), heads, "kv_heads, as in k")
    return plan[0], plan[1]
