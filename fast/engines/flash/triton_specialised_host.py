"""The flash engine's specialised kernel on the host: descriptors, the order of tiles, launches."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from attnspec.fast.engines.descriptors import Described, described, descriptor
from attnspec.fast.engines.flash import triton_launch as host
from attnspec.fast.engines.flash.configs import FlashConfig
from attnspec.fast.engines.flash.rules import Rules
from attnspec.fast.engines.flash.triton_specialised import specialised_forward_kernel
from attnspec.fast.engines.prepared import Prepared
from attnspec.fast.engines.sizes import tile_width
from attnspec.fast.recent import Recent

KNOWN = (
    "window", "sinks", "scale", "row_start", "row_end", "q_offsets", "k_offsets", "CAUSAL",
    "Q_BLOCK", "K_BLOCK",
)  # fmt: skip
PLACED = ("q_tokens", "k_tokens", "tiles", "sequences", "table")
KINDS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
MANY_ROUNDS = 64
"""Programs that own so many tiles are about equally busy in any order."""

_described: Recent[Hashable, Described] = Recent()


def tiles_of(x: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """`x` (batch, heads, tokens, d) by tiles of rows, of all channels, padded to what the matrix
    units take, or of so many.
    """
    key = (x.shape, x.stride(), x.dtype, rows, columns)
    how = None if x.data_ptr() & 15 else _described.get(key)
    if how is not None:
        return descriptor(how, x)
    unit = 16 // x.element_size()
    strides = [x.stride(axis) if x.shape[axis] > 1 else unit for axis in range(3)]
    block = [1, 1, rows, columns or tile_width(x.shape[3], 64)]
    layout = gl.NVMMASharedLayout.get_default_for(block, KINDS[x.dtype])
    made = TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)
    how = described(made)
    assert how is not None
    _described[key] = how
    return made


def section(place: dict[str, Any], programs: int, group: int, rules: Rules) -> int:
    """How many heads are gone through together.

    Those that read the same keys find them in the L2 cache; but tiles of a causal order differ in
    length, and few of each are not shared out evenly. The former is worth 5 per cent.
    """
    tiles, sequences = place["tiles"], place["sequences"]
    if not rules.plain or not rules.causal or rules.window is not None:
        return int(place["section"])
    return balanced(tiles, sequences, group, programs)


@lru_cache
def balanced(tiles: int, sequences: int, width: int, programs: int) -> int:
    """`width` heads together if causal tiles are about as evenly shared out then, or else all."""
    if tiles * sequences > MANY_ROUNDS * programs:
        return width
    apart, together = (imbalance(tiles, sequences, each, programs) for each in (width, sequences))
    return width if apart <= 1.05 * together else sequences


def imbalance(tiles: int, sequences: int, width: int, programs: int) -> float:
    """How much longer the busiest program works than the mean, for causal tiles as `plan`
    deals them out. What a tile takes beside its keys is that of one and a half tiles of keys.
    """
    place = np.arange(tiles * sequences)
    turn, program = place // programs, place % programs
    program = np.where(turn % 2 == 0, program, programs - 1 - program)
    first = place // (tiles * width) * width
    tile = place % (tiles * width) // np.minimum(sequences - first, width)
    work = np.bincount(program, weights=tiles - tile + 1.5, minlength=programs)
    return float(work.max() / work.mean())


class Specialised:
    """The forward pass of calls of one kind whose rules the kernel knows: tensors of the same
    shapes, strides and dtypes, at multiples of 16 bytes alike, and the same options.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rules: Rules, chosen: FlashConfig) -> None:
        batch, heads, q_tokens, _ = q.shape
        self.out_shape, self.lse_shape = (batch, heads, q_tokens, v.shape[3]), q.shape[:3]
        self.copies = not host.readable_as_they_are(q, k, v)
        q, k, v = host.readable(q, k, v)
        self.tiles = host.Tiles("forward", chosen, q, k, rules)
        place = host.grid_arguments("forward", chosen, q, k, v, rules, heads)
        units = torch.cuda.get_device_properties(q.device).multi_processor_count
        programs = min(units, place["tiles"] * place["sequences"])
        named = {"q": q, "k": k, "v": v}
        known = host.rule_arguments(rules)
        arguments: dict[str, Any] = {
            "q_tiles": tiles_of(q, chosen.rows // 2),
            "k_tiles": tiles_of(k, chosen.keys),
            "v_tiles": tiles_of(v, chosen.keys),
            **named,
            "out": q,
            "lse": q,
            "sink_logit": rules.sink_logit,
            **{
                f"{name}_stride_{axis}": x.stride(at)
                for name, x in named.items()
                for at, axis in enumerate("bht")
            },
            **{name: known[name] for name in KNOWN},
            **{name: place[name] for name in PLACED},
            **host.list_arguments(host.readable_lists(*rules[8:11])),
            "section": section(place, programs, heads // k.shape[1], rules),
            "HEADS": heads,
            "GROUP": heads // k.shape[1],
            "D": q.shape[3],
            "DV": v.shape[3],
            "WIDTH": tile_width(q.shape[3], 64),
            "WIDTH_V": tile_width(v.shape[3], 64),
            "ROWS": chosen.rows // 2,
            "KEYS": chosen.keys,
            "STAGES": chosen.stages,
        }
        self.launch = Prepared(
            specialised_forward_kernel, programs, arguments, q.device, num_warps=4
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        """out (batch, heads, q_tokens, dv) in q's dtype, lse (batch, heads, q_tokens) float32."""
        rules = Rules(*options)
        out = q.new_empty(self.out_shape)
        lse = q.new_empty(self.lse_shape, dtype=torch.float32)
        if self.copies:
            q, k, v = host.readable(q, k, v)
        index, count, full = host.readable_lists(*rules[8:11])
        self.launch(
            q_tiles=q, k_tiles=k, v_tiles=v, q=q, k=k, v=v, out=out, lse=lse,
            sink_logit=rules.sink_logit, row_start=rules.row_start, row_end=rules.row_end,
            q_offsets=rules.q_offsets, k_offsets=rules.k_offsets, table=self.tiles(rules),
            block_index=index, block_count=count, block_full=full,
        )  # fmt: skip
        return out, lse
