"""The flash engine's specialised backward kernel on the host: descriptors, marks, launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.engines.flash import triton_launch as host
from attnspec.fast.engines.flash.configs import L2_BYTES, TOGETHER, FlashConfig
from attnspec.fast.engines.flash.rules import Rules
from attnspec.fast.engines.flash.triton_bounds import round_sums_kernel
from attnspec.fast.engines.flash.triton_specialised_gradients import specialised_backward_kernel
from attnspec.fast.engines.flash.triton_specialised_host import tiles_of
from attnspec.fast.engines.flash.triton_specialised_order import ADDED, KEYS, OWN
from attnspec.fast.engines.prepared import Prepared
from attnspec.fast.engines.sizes import tile_width

ROWS, COLUMNS, MARKS = OWN.value, KEYS.value, ADDED.value
PLACED = ("q_tokens", "k_tokens", "tiles", "sequences", "lead")
ROUNDED = 2048
"""Numbers of dq that a program rounds."""


class Together:
    """All gradients of calls of one kind in one kernel, whose rules it knows. A program sums dk and
    dv over `share` query heads.
    """

    def __init__(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sums: Tensor,
        rules: Rules,
        share: int,
        chosen: FlashConfig,
    ) -> None:
        batch, heads, q_tokens, d = q.shape
        group = heads // k.shape[1]
        place = host.grid_arguments("dkdv", TOGETHER, q, k, v, rules, heads // share)
        total = place["tiles"] * place["sequences"]
        units = torch.cuda.get_device_properties(q.device).multi_processor_count
        programs = min(units, total)
        self.marks = MARKS + batch * heads * -(-q_tokens // ROWS)
        # dq before it is scaled and rounded, and the numbers of rows, lie as these do.
        wide, lines = q.new_empty(q.shape, dtype=torch.float32), sums.flatten(0, 2)[None, None]
        width, width_v = tile_width(d, 64), tile_width(v.shape[3], 64)
        partial = k.dtype if share == group else torch.float32
        arguments: dict[str, Any] = {
            "q_tiles": tiles_of(q, ROWS),
            "k_tiles": tiles_of(k, COLUMNS),
            "v_tiles": tiles_of(v, COLUMNS),
            "dout_tiles": tiles_of(dout, ROWS),
            "sums": tiles_of(lines, 1, ROWS),
            "dq_tiles": tiles_of(wide, ROWS, width // 2),
            "dk": k.new_empty(0, dtype=partial),
            "dv": v.new_empty(0, dtype=partial),
            "marks": q.new_empty(0, dtype=torch.int32),
            **{name: place[name] for name in PLACED},
            "section": min(place["sequences"], section(q, v, rules, share, programs)),
            "window": rules.window,
            "sinks": rules.kept_sinks,
            "scale": rules.scale,
            "total": total,
            "HEADS": heads,
            "GROUP": group,
            "SHARE": share,
            "D": d,
            "DV": v.shape[3],
            "WIDTH": width,
            "WIDTH_V": width_v,
            "STAGES": chosen.stages,
            "CAUSAL": rules.causal,
        }
        self.launch = Prepared(
            specialised_backward_kernel, programs, arguments, q.device, num_warps=4
        )
        arguments = {
            "sums": wide, "out": q, "marks": q, "numbers": q.numel(), "scale": rules.scale,
            "SIZE": ROUNDED,
        }  # fmt: skip
        self.round = Prepared(
            round_sums_kernel, -(-q.numel() // ROUNDED), arguments, q.device, num_warps=4
        )

    def __call__(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sums: Tensor, dq: Tensor, dk: Tensor,
        dv: Tensor,
    ) -> Tensor:  # fmt: skip
        """Fill dq, dk and dv; a number that is not 0 if there is a NaN in them, which may have come
        to keys and rows that do not see where it comes from.
        """
        marks = q.new_zeros(self.marks, dtype=torch.int32)
        wide = q.new_empty(q.shape, dtype=torch.float32)
        self.launch(
            q_tiles=q, k_tiles=k, v_tiles=v, dout_tiles=dout, sums=sums, dq_tiles=wide, dk=dk,
            dv=dv, marks=marks,
        )  # fmt: skip
        self.round(sums=wide, out=dq, marks=marks)
        return marks


def section(q: Tensor, v: Tensor, rules: Rules, share: int, programs: int) -> int:
    """How many sequences of keys are gone through together: those whose rows the L2 cache holds.

    Of a window it holds the rows of many; there no more programs are to go through one sequence
    than its sinks, which one program walks through, can be ahead of.
    """
    if rules.window is not None:
        steps = -(-(rules.window + COLUMNS - 1) // ROWS)
        return -(-2 * programs // (share * steps + 5))
    head_bytes = q.shape[2] * (q.shape[3] + v.shape[3]) * q.element_size()
    return max(1, L2_BYTES // (share * head_bytes))
