"""Lean attention's work schedule in integers: for planning, reading and testing.

The decode engine works the same schedule out on the device. The functions that return Python
numbers wait for a CUDA tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import check_choice, check_integer, check_size

RULES = ("authors", "port")
ORDERS = ("natural", "paired")


class Segment(NamedTuple):
    """S8: the tiles [lo_tile, hi_tile) of output u, counted from its first, that worker g owns."""

    g: int
    u: int
    lo_tile: int
    hi_tile: int
    host: bool
    finishing: bool


def tile_size(d: int, rule: str = "authors") -> int:
    """S3: keys a tile for heads of width d."""
    check_integer("d", d, least=1)
    check_choice("rule", rule, RULES)
    if rule == "port" or d > 128:
        return 64
    return 256 if d <= 64 else 128


def line_order(
    Hkv: int, batch: int, blocks: int, order: str = "natural"
) -> list[tuple[int, int, int]]:
    """S5, S11: (kv head, sequence, query block) of each output, in the order of the line."""
    check_integer("Hkv", Hkv, least=1)
    check_integer("batch", batch, least=0)
    sequence = _block_order(blocks, order)
    return [(head, entry, i) for head in range(Hkv) for entry in range(batch) for i in sequence]


def tiles_per_output(
    lengths: Tensor,
    N: int,
    Hkv: int = 1,
    Tq: int = 1,
    M: int | None = None,
    causal: bool = False,
    order: str = "natural",
) -> Tensor:
    """S4: n (U,) int64, the tiles of each output in the order of the line.

    `lengths` int (batch,); N keys a tile; M queries a block, all Tq if it is None.
    """
    check_kind("lengths", lengths, ("batch",), "int")
    check_integer("N", N, least=1)
    check_integer("Hkv", Hkv, least=1)
    check_integer("Tq", Tq, least=0)
    check_lengths(lengths, None)
    M = block_rows(M, Tq)
    blocks = _block_order(-(-Tq // M), order)
    keys = lengths.to(torch.int64)[:, None].expand(-1, len(blocks))
    if causal:
        ends = [min((i + 1) * M, Tq) - Tq for i in blocks]
        seen = keys + torch.tensor(ends, dtype=torch.int64, device=lengths.device)
        keys = torch.minimum(seen.clamp(min=0), keys)
    return (-(-keys // N)).reshape(-1).repeat(Hkv)


def grid_size(n: Tensor, slots: int, rule: str = "authors") -> int:
    """S6: how many of `slots` workers are launched for outputs of n (U,) tiles."""
    _check_tiles(n)
    check_integer("slots", slots, least=1)
    check_choice("rule", rule, RULES)
    W = int(n.sum())
    if W == 0:
        return 0
    if (2 * slots if rule == "authors" else slots) >= W:
        return max(1, min(-(-W // 2), -(-32 * W // int(n.max())), slots))
    return min(slots, 32 * len(n)) if rule == "authors" else slots


def lean_schedule(n: Tensor, G: int) -> tuple[Tensor, Tensor]:
    """S7: start and end int64 (min(G, W),), the stretch of the line that each worker owns."""
    _check_tiles(n)
    check_integer("G", G, least=1)
    W = int(n.sum())
    if W == 0:
        none = torch.zeros(0, dtype=torch.int64, device=n.device)
        return none, none.clone()
    G = min(G, W)
    T = -(-W // G)
    hi = W - (T - 1) * G
    g = torch.arange(G + 1, dtype=torch.int64, device=n.device)
    edges = g.clamp(max=hi) * T + (g - hi).clamp(min=0) * (T - 1)
    return edges[:-1], edges[1:]


def split_bound(n: Tensor, G: int) -> int:
    """S9: no output of n (U,) tiles is split among more workers than this."""
    start, end = lean_schedule(n, G)
    if len(start) == 0:
        return 0
    longest, T = int(n.max()), int(end[0] - start[0])
    if int(n.sum()) % len(start) == 0:
        return 1 + (longest + T - 2) // T
    return 1 + (longest + T - 3) // (T - 1)


def segments(n: Tensor, start: Tensor, end: Tensor) -> list[Segment]:
    """S8: what each worker computes, worker by worker."""
    _check_schedule(n, start, end)
    sizes, found, u, base = n.tolist(), [], 0, 0
    for g, (position, stop) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        while position < stop:
            while base + sizes[u] <= position:
                u, base = u + 1, base + sizes[u]
            lo, hi = position - base, min(stop - base, sizes[u])
            found.append(Segment(g, u, lo, hi, lo == 0, hi == sizes[u]))
            position = base + hi
    return found


def helpers(n: Tensor, start: Tensor, end: Tensor, u: int) -> range:
    """S8: the workers whose triples the host of output u waits for; empty without tiles."""
    _check_schedule(n, start, end)
    check_integer("u", u, least=0)
    if u >= len(n):
        raise ValueError(f"u: got {u}, expected an integer below {len(n)} (outputs)")
    if int(n[u]) == 0:
        return range(0)
    first = n[:u].sum()
    tiles = torch.stack([first, first + n[u] - 1]).to(start.dtype)
    host, last = (torch.searchsorted(start, tiles, right=True) - 1).tolist()
    return range(host + 1, last + 1)


def block_rows(M: int | None, Tq: int) -> int:
    """S4: queries a block, all Tq if M is None."""
    if M is None:
        return max(Tq, 1)
    check_integer("M", M, least=1)
    return M


def check_kind(name: str, x: Any, axes: tuple[str, ...], kind: str = "float") -> None:
    """`x` is a tensor of at least the named axes and of a dtype of that kind."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected torch.Tensor")
    if x.dim() < len(axes):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (..., {', '.join(axes)})")
    kinds = {
        "float": x.is_floating_point(),
        "bool": x.dtype == torch.bool,
        "int": x.dtype in (torch.int32, torch.int64),
    }
    if not kinds[kind]:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected a {kind} dtype")


def check_lengths(lengths: Tensor, Tk: int | None) -> None:
    """Lengths in 0..Tk, where looking costs no wait; the engine cuts them to the cache anyway."""
    if lengths.is_cuda or torch.compiler.is_compiling() or lengths.numel() == 0:
        return
    least, most = int(lengths.min()), int(lengths.max())
    if least < 0 or (Tk is not None and most > Tk):
        expected = "lengths >= 0" if Tk is None else f"lengths in 0..{Tk} (Tk)"
        raise ValueError(f"lengths: got {lengths.tolist()}, expected {expected}")


def _block_order(blocks: int, order: str) -> list[int]:
    check_integer("blocks", blocks, least=0)
    check_choice("order", order, ORDERS)
    if order == "natural":
        return list(range(blocks))
    return [n // 2 if n % 2 == 0 else blocks - 1 - n // 2 for n in range(blocks)]


def _check_tiles(n: Tensor) -> None:
    check_kind("n", n, ("outputs",), "int")
    if bool((n < 0).any()):
        raise ValueError(f"n: got {n.tolist()}, expected numbers of tiles >= 0")


def _check_schedule(n: Tensor, start: Tensor, end: Tensor) -> None:
    _check_tiles(n)
    check_kind("start", start, ("workers",), "int")
    check_kind("end", end, ("workers",), "int")
    check_size("end", len(end), len(start), "workers, as in start")
    starts, ends, tiles = start.tolist(), end.tolist(), int(n.sum())
    if [*starts, tiles] != [0, *ends]:
        raise ValueError(
            f"end: got {ends} after the starts {starts}, expected stretches that follow one "
            f"another from 0 to {tiles}"
        )
