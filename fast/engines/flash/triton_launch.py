"""The flash engine on the host side of Triton: operands, tile tables, grids and launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from attnspec.fast.engines import prepared
from attnspec.fast.engines.flash.configs import (
    APART,
    L2_BYTES,
    FlashConfig,
    backward_config,
    config,
    specialises,
)
from attnspec.fast.engines.flash.rules import Rules
from attnspec.fast.engines.flash.triton_bounds import key_bounds_kernel
from attnspec.fast.engines.flash.triton_packing import TileTable
from attnspec.fast.engines.prepared import Prepared
from attnspec.fast.engines.sizes import tile_width

SPEAKS_GLUON = triton.__version__.startswith("3.6.")
"""Whether this Triton has the language of the specialised kernel as it is written: it is
experimental, and changes from release to release."""
SPECIALISED_WIDTH = 128
"""Channels that the specialised kernel has registers for."""
SHORTEST_DESCRIBED = 32
"""Numbers that fill 128 bytes, to whose multiples descriptors copy: a pipeline lays shorter tiles
closer together."""


def arch(x: Tensor) -> int:
    """The architecture of a tensor's device; the interpreter is treated as Hopper."""
    if not x.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def can_specialise(q: Tensor, v: Tensor, rules: Rules) -> bool:
    """Whether the specialised kernel, which is for Hopper, takes a call."""
    narrow = q.element_size() == 2 and max(q.shape[3], v.shape[3]) <= SPECIALISED_WIDTH
    return narrow and rules.known and q.is_cuda and arch(q) == 90 and SPEAKS_GLUON


def backward_choice(q: Tensor, v: Tensor, rules: Rules) -> FlashConfig:
    """How the gradients of a call are computed: by one specialised kernel if it knows the rules,
    each row sees a key, and rows of dq in float32 begin at multiples of 16 bytes, or else apart.
    """
    seeing = rules.plain and q.shape[2] <= v.shape[2] and q.shape[3] % 4 == 0
    if not seeing or not can_specialise(q, v, rules):
        return APART
    seen = v.shape[2] if rules.window is None else min(rules.window, v.shape[2])
    width = tile_width(max(q.shape[3], v.shape[3]))
    return backward_config(q.shape[2], q.shape[:3].numel() * seen, width)


def choose_config(kind: str, q: Tensor, v: Tensor, rules: Rules) -> FlashConfig:
    """The configuration of a call, with tiles cut to fit its blocks."""
    width = tile_width(max(q.shape[3], v.shape[3]))
    walk = rules.walk(q.shape[2])
    packs = 1 if rules.q_offsets is None else max(1, rules.q_offsets.shape[0] - 1)
    if specialises(kind, q.shape[2] // packs, q.shape[:3].numel()) and can_specialise(q, v, rules):
        walk = "specialised"
    chosen = config(kind, walk, arch(q), q.element_size(), width, q.shape[2])
    keys, stages = fit(chosen.keys, rules.k_block), chosen.stages
    if chosen.specialised:
        stages *= chosen.keys // keys
    return replace(chosen, rows=fit(chosen.rows, rules.q_block), keys=keys, stages=stages)


def fit(tile: int, block: int) -> int:
    """The largest tile up to `tile` that divides `block`, at least 16; any fits no block at all."""
    while tile > 16 and block % tile:
        tile //= 2
    return tile


def aligned(x: Tensor) -> bool:
    """Whether the rows of `x` start at multiples of 16 bytes and are contiguous."""
    unit = 16 // x.element_size()
    rows_apart = all(
        stride > 0 and stride % unit == 0
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
        if size > 1
    )
    return rows_apart and x.stride(3) == 1 and x.data_ptr() % 16 == 0


def readable(*operands: Tensor) -> tuple[Tensor, ...]:
    """`operands` for the matrix units: a 16-bit one whose rows are not aligned is copied.

    With Triton 3.6 on Hopper, products of tiles that came through registers were wrong now and
    then; tiles that come by descriptors or asynchronous copies were not.
    """
    return tuple(x if readable_as_they_are(x) else _aligned(x) for x in operands)


def readable_as_they_are(*operands: Tensor) -> bool:
    """Whether `readable` copies none of `operands`."""
    return all(x.element_size() == 4 or aligned(x) for x in operands)


def _aligned(x: Tensor) -> Tensor:
    """A copy of `x` (batch, heads, tokens, d) with rows that start at multiples of 16 bytes."""
    unit = 16 // x.element_size()
    *rows, d = x.shape
    copy = x.new_empty(*rows, -(-d // unit) * unit)[..., :d]
    return copy.copy_(x)


def access(*operands: Tensor) -> int:
    """How the kernels read `operands`: 2 tensor descriptors, 1 aligned rows, 0 any strides."""
    if not all(aligned(x) for x in operands):
        return 0
    return 2 if arch(operands[0]) >= 90 else 1


def operand(name: str, x: Tensor, rows: int, how: int) -> dict[str, Any]:
    """The kernel arguments of one operand that is read `rows` rows at a time."""
    unit = 16 // x.element_size()
    # The stride of an axis of size 1 is never used, but a descriptor wants a valid one.
    strides = [x.stride(axis) if x.shape[axis] > 1 else unit for axis in range(3)]
    strides.append(x.stride(3))
    if how == 2:
        block = [1, 1, rows, tile_width(x.shape[3])]
        described = TensorDescriptor(x, list(x.shape), strides, block)
        return {name: described, **{f"{name}_stride_{axis}": 1 for axis in "bhtd"}}
    if how == 1:
        strides = [*(stride // unit for stride in strides[:3]), strides[3]]
    return {name: x, **{f"{name}_stride_{a}": s for a, s in zip("bhtd", strides, strict=True)}}


def empty_numbers(shape: Sequence[int], device: torch.device) -> Tensor:
    """Room for float32 numbers (..., tokens), with lines apart by multiples of 16 bytes, as
    descriptors want them."""
    *lines, tokens = shape
    room = torch.empty(*lines, -(-tokens // 4) * 4, dtype=torch.float32, device=device)
    return room[..., :tokens]


def number_operands(names: Sequence[str], x: Tensor, rows: int, described: bool) -> dict[str, Any]:
    """The kernel arguments of `empty_numbers`, all like `x`, that are read `rows` tokens at a time:
    by descriptors if tiles begin at multiples of four tokens, unless they are too short.
    """
    described = described and rows >= SHORTEST_DESCRIBED
    operand: Tensor | TensorDescriptor = x
    if described:
        lines, tokens = math.prod(x.shape[:-1]), x.shape[-1]
        operand = TensorDescriptor(x, [lines, tokens], [x.stride(-2), 1], [1, rows])
    return {**dict.fromkeys(names, operand), "DESCRIBED": described}


class Tiles:
    """The table of the tiles of packed sequences, which each launch makes from its own offsets."""

    def __init__(self, kind: str, chosen: FlashConfig, q: Tensor, k: Tensor, rules: Rules) -> None:
        self.by_keys = kind == "dkdv"
        self.table = None
        tokens, walked = q.shape[2], k.shape[2]
        if rules.q_offsets is None or rules.k_offsets is None:
            return
        own, other = rules.q_offsets, rules.k_offsets
        if self.by_keys:
            own, other, tokens, walked = other, own, walked, tokens
        tile = chosen.keys if self.by_keys else chosen.rows
        self.table = TileTable(own, other, tokens, walked, tile, self.by_keys)

    def __call__(self, rules: Rules) -> Tensor | None:
        """int32 (tiles, 2), or None if sequences are not packed."""
        if self.table is None or rules.q_offsets is None or rules.k_offsets is None:
            return None
        if self.by_keys:
            return self.table(rules.k_offsets, rules.q_offsets)
        return self.table(rules.q_offsets, rules.k_offsets)


def grid_arguments(
    kind: str, chosen: FlashConfig, q: Tensor, k: Tensor, v: Tensor, rules: Rules, heads: int
) -> dict[str, Any]:
    """Tiles, their order, and the arguments that place a tile, for a program a tile and head.

    The `table` of packed sequences is for each launch to fill in.
    """
    batch, q_tokens, k_tokens = q.shape[0], q.shape[2], k.shape[2]
    by_keys = kind == "dkdv"
    tile, tokens = (chosen.keys, k_tokens) if by_keys else (chosen.rows, q_tokens)
    block = rules.k_block if by_keys else rules.q_block
    packed = rules.q_offsets is not None
    if rules.q_offsets is not None:
        tiles = tokens // tile + rules.q_offsets.shape[0] - 1
    elif block:
        tiles = math.ceil(tokens / block) * math.ceil(block / tile)
    else:
        tiles = math.ceil(tokens / tile)
    group = q.shape[1] // k.shape[1]
    walked = q_tokens if by_keys else k_tokens
    head_bytes = max(1, walked * (q.shape[3] + v.shape[3]) * q.element_size())
    sharing = 1 if by_keys else group
    lead = 0
    if by_keys and rules.kept_sinks is not None and not packed:
        lead = min(tiles, math.ceil(rules.kept_sinks / tile))
    return {
        "table": rules.q_offsets,
        "q_tokens": q_tokens,
        "k_tokens": k_tokens,
        "tiles": tiles,
        "sequences": batch * heads,
        "section": min(batch * heads, max(1, L2_BYTES // head_bytes) * sharing),
        "lead": lead,
    }


def changing(rules: Rules, by_keys: bool = False) -> dict[str, Tensor | None]:
    """Those arguments of a kernel that are a launch's own tensors, but for lists. A kernel that
    goes by keys takes the ranges of rows as counts of its own.
    """
    ranges = {} if by_keys else {"row_start": rules.row_start, "row_end": rules.row_end}
    return {
        **ranges,
        "mask": rules.mask,
        "key_mask": rules.key_mask,
        "slopes": rules.slopes,
        "slope_positions": rules.slope_positions,
        "q_offsets": rules.q_offsets,
        "k_offsets": rules.k_offsets,
    }


def rule_arguments(rules: Rules, by_keys: bool = False) -> dict[str, Any]:
    """The arguments every kernel takes for the element rules, but for lists and bounds."""
    mask_strides = (0, 0, 0, 0) if rules.mask is None else rules.mask.stride()
    key_strides = (0, 0) if rules.key_mask is None else rules.key_mask.stride()
    return {
        **changing(rules, by_keys),
        **{f"mask_stride_{a}": s for a, s in zip("bhqk", mask_strides, strict=True)},
        **{f"key_mask_stride_{a}": s for a, s in zip("bk", key_strides, strict=True)},
        "window": rules.window,
        "sinks": rules.kept_sinks,
        "scale": rules.scale,
        "CAUSAL": rules.causal,
        "Q_BLOCK": rules.q_block,
        "K_BLOCK": rules.k_block,
    }


Lists = tuple[Tensor | None, Tensor | None, Tensor | None]


def readable_lists(index: Tensor | None, count: Tensor | None, full: Tensor | None) -> Lists:
    """Block lists as the kernels read them: contiguous along the last axis, counts all alike."""
    if index is None or count is None:
        return None, None, None
    index = index if index.stride(3) == 1 else index.contiguous()
    alike = full is None or full.stride() == count.stride()
    if count.stride(2) != 1 or not alike:
        count, full = count.contiguous(), None if full is None else full.contiguous()
    return index, count, full


def list_arguments(lists: Lists) -> dict[str, Any]:
    """The arguments of block lists that can be read."""
    index, count, full = lists
    strides: tuple[int, ...] = (0, 0, 0, 0, 0)
    if index is not None and count is not None:
        strides = (*index.stride()[:3], *count.stride()[:2])
    names = ("index_stride_b", "index_stride_h", "index_stride_q", "count_stride_b",
             "count_stride_h")  # fmt: skip
    return {
        "block_index": index,
        "block_count": count,
        "block_full": full,
        **dict(zip(names, strides, strict=True)),
    }


class KeyBounds:
    """The launch that finds the bounds of the kept keys, for key masks (batch, k_tokens) alike."""

    def __init__(self, key_mask: Tensor) -> None:
        self.batch, tokens = key_mask.shape
        arguments = {
            "key_mask": key_mask, "bounds": key_mask, "stride_b": key_mask.stride(0),
            "stride_k": key_mask.stride(1), "tokens": tokens, "KEYS": 4096,
        }  # fmt: skip
        chosen = FlashConfig(0, 0, 8, 1)
        self.launch = prepare(key_bounds_kernel, self.batch, chosen, arguments, key_mask.device)

    def __call__(self, key_mask: Tensor) -> Tensor:
        """int32 (batch, 3): the first kept key, the end of the kept keys, and whether all between
        are kept, as with padding on one side.
        """
        bounds = key_mask.new_empty(self.batch, 3, dtype=torch.int32)
        self.launch(key_mask=key_mask, bounds=bounds)
        return bounds


def key_bounds(key_mask: Tensor) -> Tensor:
    """The bounds of the kept keys of one mask."""
    return KeyBounds(key_mask)(key_mask)


def all_key_edges(rules: Rules, chosen: FlashConfig) -> bool:
    """Whether every key tile must be looked at element by element."""
    listed_in_part = bool(rules.k_block) and (
        (rules.ranged and rules.block_full is None)
        or rules.key_mask is not None
        or rules.k_block % chosen.keys > 0
    )
    return rules.mask is not None or listed_in_part


def all_row_edges(rules: Rules, chosen: FlashConfig) -> bool:
    """Whether every row tile must be looked at element by element."""
    listed_in_part = bool(rules.q_block) and (
        (rules.ranged and rules.block_full is None) or rules.q_block % chosen.rows > 0
    )
    return rules.mask is not None or listed_in_part


def shape_arguments(q: Tensor, k: Tensor, v: Tensor, chosen: FlashConfig) -> dict[str, Any]:
    """The sizes a compilation depends on."""
    return {
        "HEADS": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[3],
        "DV": v.shape[3],
        "WIDTH": tile_width(q.shape[3]),
        "WIDTH_V": tile_width(v.shape[3]),
        "ROWS": chosen.rows,
        "KEYS": chosen.keys,
        # float32 means IEEE float32 (K10); products of 16-bit numbers are exact in either mode.
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def launch(kernel: Any, programs: int, chosen: FlashConfig, arguments: dict[str, Any]) -> None:
    """Start `programs` programs, unless there are none."""
    prepared.launch(kernel, programs, **arguments, num_warps=chosen.warps, num_stages=chosen.stages)


def prepare(
    kernel: Any, programs: int, chosen: FlashConfig, arguments: dict[str, Any], device: torch.device
) -> Prepared:
    """`programs` programs, for launches of one kind."""
    return Prepared(
        kernel, programs, arguments, device, num_warps=chosen.warps, num_stages=chosen.stages
    )
