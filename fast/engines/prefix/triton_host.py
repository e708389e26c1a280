"""The prefix engine on the host side of Triton: tiles of rows, grids and launches, each worked out
once for its kind of call: shapes, strides and dtypes.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from attnspec.fast.backend import interpreting
from attnspec.fast.engines.flash.triton_launch import arch
from attnspec.fast.engines.prefix.configs import TABLE, PrefixConfig, config
from attnspec.fast.engines.prefix.triton_backward import (
    prefix_reduce_kernel,
    prefix_rows_kernel,
    prefix_sums_kernel,
)
from attnspec.fast.engines.prefix.triton_forward import prefix_forward_kernel
from attnspec.fast.engines.prefix.triton_parts import prefix_split_kernel
from attnspec.fast.engines.prepared import Prepared
from attnspec.fast.engines.sizes import tile_width
from attnspec.fast.recent import Recent

ITEMS = 1024
"""Numbers of Z and k that a program splits, or whose sums it adds."""
FEW = PrefixConfig(0, 0, 4, 1)
PARTS = torch.bfloat16
"""What products of 16-bit calls are taken in."""
SYNCHRONOUS = 32
"""Products with no more rows are not asynchronous, and may have computed first operands."""

_kinds: Recent[Hashable, Any] = Recent()


class Tiles:
    """How the rows of a head, those of the whole batch, are dealt out to programs."""

    def __init__(self, kind: str, chosen: PrefixConfig, q: Tensor, per_head: int = 1) -> None:
        batch, heads, tokens, _ = q.shape
        span = min(chosen.rows.bit_length() - 1, max(tokens - 1, 0).bit_length())
        tiles = -(-batch // (chosen.rows >> span)) * -(-tokens // (1 << span))
        each = max(1, -(-tiles * heads * per_head // chosen.programs))
        each = max(each, chosen.tiles) if kind == "sums" else min(each, chosen.tiles)
        self.groups = -(-tiles // each)
        self.programs = self.groups * heads * per_head
        self.arguments = {
            "batch": batch, "tokens": tokens, "span": span, "tiles": tiles, "each": each,
        }  # fmt: skip


def choose_config(kind: str, q: Tensor, dv: int) -> PrefixConfig:
    """The configuration of a call, whose chunks are no wider than what is summed over."""
    width = tile_width(max(q.shape[3], dv))
    return config(kind, arch(q), q.element_size(), width, q.shape[0] * q.shape[2])


def math_type(q: Tensor) -> Any:
    """What products are taken in. The interpreter's bfloat16 ones are wrong."""
    return tl.float32 if q.element_size() == 4 or interpreting() else tl.bfloat16


def exact(x: Tensor, math: Any) -> bool:
    """Whether products hold numbers of x as they are."""
    return bool(math == tl.float32) or (x.dtype == torch.bfloat16 and bool(math == tl.bfloat16))


def rows_apart(**operands: Tensor) -> dict[str, Any]:
    """Strides of tensors (batch, heads, tokens, channels) with contiguous rows, in units of 16
    bytes if all of them are multiples of that."""
    unit = 16 // next(iter(operands.values())).element_size()
    # The stride of an axis of size 1 is never used.
    strides = {
        f"{name}_{axis}": x.stride(i) if x.shape[i] > 1 else 0
        for name, x in operands.items()
        for i, axis in enumerate("bht")
    }
    if any(stride % unit for stride in strides.values()):
        return {**strides, "UNIT": 1}
    return {**{name: stride // unit for name, stride in strides.items()}, "UNIT": unit}


def readable(x: Tensor) -> Tensor:
    """`x` with contiguous rows."""
    return x if x.stride(3) == 1 else x.contiguous()


def sizes(q: Tensor, dv: int, chosen: PrefixConfig, math: Any) -> dict[str, Any]:
    """What all compilations depend on."""
    return {
        "HEADS": q.shape[1], "D": q.shape[3], "DV": dv, "INVERSE": q.shape[3] ** -0.25,
        "ROWS": chosen.rows, "MATH": math, "PRECISION": "ieee",
    }  # fmt: skip


def prepare(
    kernel: Any, programs: int, chosen: PrefixConfig, arguments: dict[str, Any], device: Any
) -> Prepared:
    """`programs` programs, for launches of one kind."""
    how = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    # Rows that are not aligned take an address a number, and would be spilled.
    if chosen.registers and arguments.get("UNIT") != 1:
        how["maxnreg"] = chosen.registers
    return Prepared(kernel, programs, arguments, device, **how)


class Split:
    """The launch that splits Z in two parts of what products are taken in, unless it is exact."""

    def __init__(self, Z: Tensor, math: Any) -> None:
        self.exact, self.shape = exact(Z, math), (2, *Z.shape)
        arguments = {"Z": Z, "parts": Z, "count": Z.numel(), "ITEMS": ITEMS}
        programs = -(-Z.numel() // ITEMS)
        self.launch = prepare(prefix_split_kernel, programs, FEW, arguments, Z.device)

    def __call__(self, Z: Tensor) -> Tensor:
        """Z (heads, d, dv), or its parts (2, heads, d, dv)."""
        if self.exact:
            return Z
        parts = Z.new_empty(self.shape, dtype=PARTS)
        self.launch(Z=Z, parts=parts)
        return parts


class Forward:
    """The forward pass of calls of one kind; `keep` what the gradient needs."""

    def __init__(self, q: Tensor, soft: Tensor, Z: Tensor, softplus: bool, keep: bool) -> None:
        d, dv, math = q.shape[3], soft.shape[3], math_type(q)
        chosen = choose_config("forward", q, dv)
        tiles = Tiles("forward", chosen, q)
        self.split = Split(Z, math)
        numbers = torch.empty(0, dtype=torch.float32, device=q.device)
        arguments = {
            "q": q, "soft": soft, "lse": numbers, "Z": Z, "k": Z, "out": soft,
            "share": numbers, "part": numbers, **rows_apart(q=q), **tiles.arguments,
            **sizes(q, dv, chosen, math), "BD": tile_width(d), "BDV": tile_width(dv),
            "CHUNK": min(chosen.chunk, tile_width(d)), "SOFTPLUS": softplus, "KEEP": keep,
            "Z_EXACT": self.split.exact, "PHI_EXACT": bool(math == tl.float32),
        }  # fmt: skip
        self.keep = keep
        self.launch = prepare(prefix_forward_kernel, tiles.programs, chosen, arguments, q.device)

    def __call__(
        self, q: Tensor, soft: Tensor, lse: Tensor, Z: Tensor, k: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """out (batch, heads, tokens, dv), and what soft and num are multiplied by in each row,
        float32 (batch, heads, tokens), without numbers unless they are kept.
        """
        out = torch.empty_like(soft)
        share, part = (lse.new_empty(lse.shape if self.keep else 0) for _ in range(2))
        self.launch(q=q, soft=soft, lse=lse, Z=self.split(Z), k=k, out=out, share=share, part=part)
        return out, share, part


class Backward:
    """The gradients of calls of one kind, those of Z and k if they are `wanted`."""

    def __init__(
        self, dout: Tensor, q: Tensor, soft: Tensor, Z: Tensor, softplus: bool, wanted: bool
    ) -> None:
        heads, d, dv, math = q.shape[1], q.shape[3], soft.shape[3], math_type(q)
        self.wanted, self.split = wanted, Split(Z, math)
        numbers = torch.empty(0, dtype=torch.float32, device=q.device)
        shared = {
            "dout": dout, "q": q, "part": numbers, "dden": numbers, **rows_apart(q=q, g=dout),
            "G_EXACT": exact(dout, math),
        }  # fmt: skip

        chosen = choose_config("rows", q, dv)
        tiles = Tiles("rows", chosen, q)
        arguments = {
            **shared, "soft": soft, "Z": Z, "k": Z, "share": numbers, "dq": q, "dsoft": soft,
            "dlse": numbers, **tiles.arguments, **sizes(q, dv, chosen, math), "BD": tile_width(d),
            "BDV": tile_width(dv), "CHUNK": min(chosen.chunk, tile_width(dv)), "SOFTPLUS": softplus,
            "Z_EXACT": self.split.exact,
        }  # fmt: skip
        self.rows = prepare(prefix_rows_kernel, tiles.programs, chosen, arguments, q.device)

        chosen = choose_config("sums", q, dv)
        features, columns = min(chosen.chunk, tile_width(d)), min(chosen.columns, tile_width(dv))
        if not shared["G_EXACT"]:
            columns = min(columns, SYNCHRONOUS)
        tiles = Tiles("sums", chosen, q, -(-d // features) * -(-dv // columns))
        self.sums_shape = tiles.groups, heads, d * dv + d
        arguments = {
            **shared, "sums": numbers, **tiles.arguments, **sizes(q, dv, chosen, math),
            "FEATURES": features, "COLUMNS": columns, "PHI_EXACT": bool(math == tl.float32),
        }  # fmt: skip
        self.sums = prepare(prefix_sums_kernel, tiles.programs, chosen, arguments, q.device)
        arguments = {
            "sums": numbers, "k": Z, "dZ": Z, "dk": Z, "groups": tiles.groups, "HEADS": heads,
            "D": d, "DV": dv, "SOFTPLUS": softplus, "ITEMS": ITEMS,
        }  # fmt: skip
        blocks = heads * -(-(d * dv + d) // ITEMS)
        self.reduce = prepare(prefix_reduce_kernel, blocks, FEW, arguments, q.device)

    def __call__(
        self,
        dout: Tensor,
        q: Tensor,
        soft: Tensor,
        Z: Tensor,
        k: Tensor,
        share: Tensor,
        part: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients of q, soft, lse, Z and k; without numbers where they are not wanted."""
        dq, dsoft = q.new_empty(q.shape), torch.empty_like(soft)
        dlse, dden = torch.empty_like(share), torch.empty_like(share)
        self.rows(
            dout=dout, q=q, soft=soft, Z=self.split(Z), k=k, share=share, part=part, dq=dq,
            dsoft=dsoft, dlse=dlse, dden=dden,
        )  # fmt: skip
        if not self.wanted:
            return dq, dsoft, dlse, Z.new_empty(0), k.new_empty(0)
        dZ, dk = Z.new_empty(Z.shape), k.new_empty(k.shape)
        sums = share.new_empty(self.sums_shape)
        self.sums(dout=dout, q=q, part=part, dden=dden, sums=sums)
        self.reduce(sums=sums, k=k, dZ=dZ, dk=dk)
        return dq, dsoft, dlse, dZ, dk


def forward(
    q: Tensor, soft: Tensor, lse: Tensor, Z: Tensor, k: Tensor, softplus: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Forward`."""
    q, soft, lse, Z, k = readable(q), *(x.contiguous() for x in (soft, lse, Z, k))
    kind = (
        TABLE.state(), q.shape, q.stride(), q.dtype, q.device, soft.shape, soft.dtype, Z.dtype,
        k.dtype, softplus, keep,
    )  # fmt: skip
    run = _kinds.get(kind)
    if run is None:
        run = _kinds[kind] = Forward(q, soft, Z, softplus, keep)
    out, share, part = run(q, soft, lse, Z, k)
    return out, share, part


def backward(
    dout: Tensor, q: Tensor, soft: Tensor, Z: Tensor, k: Tensor, share: Tensor, part: Tensor,
    softplus: bool, wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `Backward`."""
    dout, q, soft, Z, k = readable(dout), readable(q), *(x.contiguous() for x in (soft, Z, k))
    kind = (
        TABLE.state(), q.shape, q.stride(), q.dtype, q.device, dout.stride(), soft.shape, Z.dtype,
        k.dtype, softplus, wanted,
    )  # fmt: skip
    run = _kinds.get(kind)
    if run is None:
        run = _kinds[kind] = Backward(dout, q, soft, Z, softplus, wanted)
    dq, dsoft, dlse, dZ, dk = run(dout, q, soft, Z, k, share, part)
    return dq, dsoft, dlse, dZ, dk
