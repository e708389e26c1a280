"""The neighborhood engine on the host side of Triton: plans, operands and launches."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.engines import prepared
from attnspec.fast.engines.flash import triton_launch as host
from attnspec.fast.engines.flash.triton_backward import row_sums
from attnspec.fast.engines.neighborhood.configs import TABLE, NeighborhoodConfig, config
from attnspec.fast.engines.neighborhood.grid import Grid, make_plan, token_count, window_size
from attnspec.fast.engines.neighborhood.triton_backward import (
    dkdv_kernel,
    dq_kernel,
    extra_dkdv_kernel,
)
from attnspec.fast.engines.neighborhood.triton_forward import forward_kernel
from attnspec.fast.engines.neighborhood.triton_unfused import (
    keys_kernel,
    scores_kernel,
    values_kernel,
)
from attnspec.fast.engines.sizes import tile_width
from attnspec.fast.recent import Recent

REPAIRS = 128
"""Boxes that one program looks after, should a NaN have been met in them."""
PROGRAMS = 264
"""Programs that fill a large device: two for each multiprocessor of Hopper."""


class Forward:
    """The forward pass of calls of one kind: shapes, strides, dtypes, grid and scale."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, scale: float) -> None:
        chosen, how = choose("forward", q, v), access(q, k, v)
        arguments, self.programs = place(grid, chosen, q.shape[0] * q.shape[1], reverse=False)
        arguments |= {
            **operand("q", q, how), **operand("k", k, how), **operand("v", v, how),
            **shapes(q, k, v, grid, chosen, how), "out": q, "lse": q.new_empty(0).float(),
            "scale": scale, "EXTRA": k.shape[2] > q.shape[2], "programs": self.programs,
            "flags": torch.empty(0, dtype=torch.int32, device=q.device),
        }  # fmt: skip
        options = {"num_warps": chosen.warps, "num_stages": chosen.stages, **limits(chosen)}
        self.launches = [
            prepared.Prepared(
                forward_kernel, programs, {**arguments, "REPAIR": repair}, q.device, **options
            )
            for repair, programs in ((0, self.programs), (REPAIRS, -(-self.programs // REPAIRS)))
        ]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = q.new_empty(*q.shape[:3], v.shape[3])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        flags = q.new_empty(self.programs, dtype=torch.int32)
        for launched in self.launches:
            launched(q=q, k=k, v=v, out=out, lse=lse, flags=flags)
        return out, lse


_forwards: Recent[Hashable, Forward] = Recent()


def forward(q: Tensor, k: Tensor, v: Tensor, grid: Grid, scale: float) -> tuple[Tensor, Tensor]:
    """out (batch, heads, tokens, dv) in q's dtype and lse (batch, heads, tokens) in float32."""
    kind = (
        TABLE.state(), (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15, grid, scale, q.dtype,
        q.device, *((x.shape, x.stride()) for x in (q, k, v)),
    )  # fmt: skip
    known = _forwards.get(kind)
    if known is None:
        given = q, k, v
        q, k, v = host.readable(q, k, v)
        known = Forward(q, k, v, grid, scale)
        if q is given[0] and k is given[1] and v is given[2]:
            _forwards[kind] = known
    return known(q, k, v)


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grid: Grid,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the inputs' dtype.

    An upstream gradient whose rows are not aligned, such as the expanded one of a sum, is copied:
    it must not force q, k and v off the fast path.
    """
    if not host.aligned(dout):
        dout = dout.contiguous()
    q, k, v, dout = host.readable(q, k, v, dout)
    sums = torch.stack(row_sums(dout, out, lse, dlse), dim=-1)
    how = access(q, k, v, dout)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    common = {
        **operand("q", q, how), **operand("k", k, how), **operand("v", v, how),
        **operand("dout", dout, how), "sums": sums, "scale": scale,
    }  # fmt: skip
    chosen = choose("dq", q, v)
    arguments, programs = place(grid, chosen, q.shape[0] * q.shape[1], reverse=False)
    arguments |= {**common, **shapes(q, k, v, grid, chosen, how), "dq": dq}
    arguments["EXTRA"] = k.shape[2] > q.shape[2]
    launch_and_repair(dq_kernel, programs, chosen, arguments)
    chosen = choose("dkdv", q, v)
    arguments, programs = place(grid, chosen, k.shape[0] * k.shape[1], reverse=True)
    arguments |= {**common, **shapes(q, k, v, grid, chosen, how), "dk": dk, "dv": dv}
    arguments["EXTRA"] = False
    launch(dkdv_kernel, programs, chosen, arguments)
    if k.shape[2] > q.shape[2]:
        differentiate_extra(common, q, k, v, dk, dv, grid, chosen, how)
    return dq, dk, dv


def differentiate_extra(
    common: dict[str, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dk: Tensor,
    dv: Tensor,
    grid: Grid,
    chosen: NeighborhoodConfig,
    how: int,
) -> None:
    """Fill in dk and dv of the additional keys, which all queries see: shares of the queries are
    summed up one by one and then added in a fixed order.
    """
    extra = k.shape[2] - q.shape[2]
    tiles = k.shape[0] * k.shape[1] * -(-extra // chosen.owned)
    splits = max(1, min(PROGRAMS // tiles, q.shape[2] // (4 * chosen.walked)))
    parts = [
        x.new_empty(splits, *x.shape[:2], extra, x.shape[3], dtype=torch.float32) for x in (k, v)
    ]
    arguments = {
        **common, **shapes(q, k, v, grid, chosen, how), "dk": parts[0], "dv": parts[1],
        "splits": splits,
    }  # fmt: skip
    launch(extra_dkdv_kernel, tiles * splits, chosen, arguments)
    for gradient, part in zip((dk, dv), parts, strict=True):
        gradient[:, :, q.shape[2] :] = part.sum(0)


def scores(q: Tensor, k: Tensor, grid: Grid, scale: float) -> Tensor:
    """Scaled scores (batch, heads, tokens, window) in window order."""
    q, k = host.readable(q, k)
    s = q.new_empty(*q.shape[:3], window_size(grid))
    if any(axis.causal for axis in grid):
        s.fill_(-torch.inf)
    chosen, how = choose("scores", q, k), access(q, k)
    arguments, programs = place(grid, chosen, q.shape[0] * q.shape[1], reverse=False)
    arguments |= {
        **operand("q", q, how), **operand("k", k, how), **shapes(q, k, k, grid, chosen, how),
        "s": s, "scale": scale,
    }  # fmt: skip
    drop(arguments, "DV", "WIDTH_V", "extra")
    launch(scores_kernel, programs, chosen, arguments)
    return s


def values(p: Tensor, v: Tensor, grid: Grid, scale: float) -> Tensor:
    """scale * weighted values (batch, heads, tokens, dv) of each window."""
    (v,) = host.readable(v)
    out = p.new_empty(*p.shape[:3], v.shape[3])
    chosen, how = choose("values", v, v), access(v)
    arguments, programs = place(grid, chosen, p.shape[0] * p.shape[1], reverse=False)
    arguments |= {
        **weights(p), **operand("v", v, how), **shapes(p, v, v, grid, chosen, how), "out": out,
        "scale": scale,
    }  # fmt: skip
    drop(arguments, "D", "WIDTH", "extra")
    launch(values_kernel, programs, chosen, arguments)
    return out


def keys(p: Tensor, x: Tensor, grid: Grid, kv_heads: int, scale: float) -> Tensor:
    """scale * the weighted rows (batch, kv_heads, tokens, width) that see each key."""
    (x,) = host.readable(x)
    out = x.new_empty(x.shape[0], kv_heads, *x.shape[2:])
    chosen, how = choose("keys", x, x), access(x)
    arguments, programs = place(grid, chosen, x.shape[0] * kv_heads, reverse=True)
    arguments |= {
        **weights(p), **operand("x", x, how), **shapes(x, out, x, grid, chosen, how), "out": out,
        "scale": scale,
    }  # fmt: skip
    drop(arguments, "D", "WIDTH", "extra")
    launch(keys_kernel, programs, chosen, arguments)
    return out


def choose(kind: str, q: Tensor, v: Tensor) -> NeighborhoodConfig:
    """The configuration of a call."""
    width = tile_width(max(q.shape[3], v.shape[3]))
    return config(kind, host.arch(q), q.element_size(), width)


def access(*operands: Tensor) -> int:
    """How the kernels read `operands`: 1 rows aligned to 16 bytes, 0 any strides."""
    return int(all(host.aligned(x) for x in operands))


def operand(name: str, x: Tensor, how: int) -> dict[str, Any]:
    """The kernel arguments of one operand."""
    unit = 16 // x.element_size() if how == 1 else 1
    # The stride of an axis of size 1 is never used, but must be a whole number of units.
    strides = [x.stride(axis) // unit if x.shape[axis] > 1 else 0 for axis in range(3)]
    strides.append(x.stride(3))
    return {name: x, **{f"{name}_stride_{a}": s for a, s in zip("bhtd", strides, strict=True)}}


def weights(p: Tensor) -> dict[str, Any]:
    """The kernel arguments of weights in window order, read with any strides."""
    return {"p": p, **{f"p_stride_{a}": s for a, s in zip("bhtw", p.stride(), strict=True)}}


def place(
    grid: Grid, chosen: NeighborhoodConfig, heads: int, reverse: bool
) -> tuple[dict[str, Any], int]:
    """The arguments that say which boxes a program owns and walks over, and how many there are."""
    plan = make_plan(grid, chosen.owned, chosen.walked, reverse)
    arguments: dict[str, Any] = {"guards": plan.guards, "WORDS": plan.words}
    programs = heads
    for i, (name, axis) in enumerate(zip("zyx", grid, strict=True)):
        arguments |= {
            f"size_{name}": axis.X, f"kernel_{name}": axis.k, f"step_{name}": axis.s,
            f"dilation_{name}": axis.dil, f"causal_{name}": int(axis.causal),
            f"box_{name}": plan.box[i], f"walk_{name}": plan.walk[i],
            f"tiles_{name}": plan.tiles[i], f"shift_{name}": plan.shifts[i],
            f"bits_{name}": plan.bits[i],
        }  # fmt: skip
        programs *= plan.tiles[i] * axis.dil
    return arguments, programs


def shapes(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, chosen: NeighborhoodConfig, how: int
) -> dict[str, Any]:
    """Token counts, and the sizes a compilation depends on."""
    return {
        "tokens": token_count(grid),
        "extra": k.shape[2] - q.shape[2],
        "HEADS": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[3],
        "DV": v.shape[3],
        "WIDTH": tile_width(q.shape[3]),
        "WIDTH_V": tile_width(v.shape[3]),
        "OWNED": chosen.owned,
        "WALKED": chosen.walked,
        "ACCESS": how,
        # float32 means IEEE float32 (K10); products of 16-bit numbers are exact in either mode.
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def drop(arguments: dict[str, Any], *names: str) -> None:
    """Take out arguments that a kernel has no use for."""
    for name in names:
        del arguments[name]


def launch_and_repair(
    kernel: Any, programs: int, chosen: NeighborhoodConfig, arguments: dict[str, Any]
) -> None:
    """Start `programs` programs, then a few that do the boxes again in which a NaN was met.

    In one kernel the rare case would take the registers of the ordinary one.
    """
    flags = torch.empty(programs, dtype=torch.int32, device=arguments["q"].device)
    arguments |= {"flags": flags, "programs": programs}
    launch(kernel, programs, chosen, {**arguments, "REPAIR": 0})
    launch(kernel, -(-programs // REPAIRS), chosen, {**arguments, "REPAIR": REPAIRS})


def launch(
    kernel: Any, programs: int, chosen: NeighborhoodConfig, arguments: dict[str, Any]
) -> None:
    """Start `programs` programs."""
    prepared.launch(
        kernel, programs, **arguments, num_warps=chosen.warps, num_stages=chosen.stages,
        **limits(chosen),
    )  # fmt: skip


def limits(chosen: NeighborhoodConfig) -> dict[str, int]:
    """Triton's option for the most registers of a thread, if there is one."""
    return {"maxnreg": chosen.registers} if chosen.registers else {}
