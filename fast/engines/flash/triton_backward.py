"""The flash engine's backward pass on Triton: three launches, and small ones for the bounds of rows
and for sums over heads.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.engines.flash import triton_launch as host
from attnspec.fast.engines.flash.blocks import transposed, transposed_parts
from attnspec.fast.engines.flash.configs import FlashConfig
from attnspec.fast.engines.flash.rules import Rules
from attnspec.fast.engines.flash.triton_bounds import head_sums_kernel, rows_before_kernel
from attnspec.fast.engines.flash.triton_gradients import (
    flash_dkdv_kernel,
    flash_dq_kernel,
    flash_rows_kernel,
)
from attnspec.fast.engines.prepared import Prepared
from attnspec.fast.engines.sizes import tile_width
from attnspec.fast.recent import Recent

MANY_KEYS = 1 << 15
"""So many keys, over all kv heads, give every multiprocessor two tiles of them."""
MOST_UPSTREAMS = 16
"""Layouts of upstream gradients that are kept for a kind of call."""
SMALL = FlashConfig(0, 0, 4, 1)


class Backward:
    """The backward pass of calls of one kind, for each layout of the upstream gradient."""

    def __init__(self) -> None:
        self.known: Recent[Hashable, Launches] = Recent(MOST_UPSTREAMS)

    def __call__(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *options: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk and dv in the inputs' dtype, and dsink (heads,) float32 if there is a sink.

        An upstream gradient whose rows are not aligned, such as the expanded one of a sum, is
        copied: it must not force q, k and v off the fast path.
        """
        rules = Rules(*options)
        ready = host.aligned(dout)
        if not ready:
            dout = dout.contiguous()
            ready = host.aligned(dout)
        layout = dout.stride(), ready, dlse is None
        launches = self.known.get(layout)
        if launches is None:
            launches = self.known[layout] = Launches(dout, dlse, q, k, v, out, lse, rules)
        sums = launches.row_sums(dout, dlse, out, lse)
        if launches.copies:
            q, k, v, dout = host.readable(q, k, v, dout)
        dq, dk, dv = launches.differentiate(dout, q, k, v, sums, rules)
        dsink = None
        if rules.sink_logit is not None:
            weight = torch.exp(rules.sink_logit.float()[:, None] - lse)
            dsink = -torch.where(lse == -float("inf"), 0.0, weight * sums[1]).sum((0, 2))
        return dq, dk, dv, dsink


def prepare_backward(*arguments: Any) -> Backward:
    """What computes the gradients of every call of the kind of this one."""
    return Backward()


def row_arguments(
    dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, lse2: Tensor, delta: Tensor
) -> tuple[int, dict[str, Any]]:
    """Programs and arguments of `flash_rows_kernel`."""
    batch, heads, q_tokens, dv = dout.shape
    rows, block = batch * heads * q_tokens, 64
    strides = {f"dout_stride_{axis}": n for axis, n in zip("bhtd", dout.stride(), strict=True)}
    return -(-rows // block), {
        "dout": dout, "out": out, "lse": lse, "dlse": dlse, "lse2": lse2, "delta": delta,
        **strides, "rows": rows, "q_tokens": q_tokens, "HEADS": heads, "DV": dv,
        "sums_stride": lse2.stride(1), "WIDTH_V": tile_width(dv), "ROWS": block,
    }  # fmt: skip


def row_sums(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the other kernels need of each row, as `flash_rows_kernel` defines it."""
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    dlse = None if dlse is None else dlse.contiguous()
    programs, arguments = row_arguments(dout, out.contiguous(), lse, dlse, lse2, delta)
    host.launch(flash_rows_kernel, programs, SMALL, arguments)
    return lse2, delta


def rows_before(q: Tensor, k: Tensor, rules: Rules) -> Prepared:
    """The launch that counts for each key the rows whose bounds are at or before it."""
    sequences = 0 if rules.k_offsets is None else rules.k_offsets.shape[0] - 1
    arguments = {
        "row_start": rules.row_start, "row_end": rules.row_end, "q_offsets": rules.q_offsets,
        "k_offsets": rules.k_offsets, "started": rules.row_start, "ended": rules.row_end,
        "q_tokens": q.shape[2], "k_tokens": k.shape[2], "sequences": sequences,
        "steps": max(q.shape[2], sequences).bit_length(), "KEYS": 128,
    }  # fmt: skip
    return host.prepare(rows_before_kernel, -(-k.shape[2] // 128), SMALL, arguments, q.device)


class Launches:
    """The kernels of the backward pass for one layout of everything it reads.

    A program sums dk and dv over the query heads of its kv head; with too few kv heads to fill the
    device, or with sinks, whose tiles see every row, it takes one query head and the sums follow.
    Where one kernel computes all gradients, those for dq and for dk and dv compute them again if
    there is a NaN, since they know who has seen it.
    """

    def __init__(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        rules: Rules,
    ) -> None:
        batch, heads, k_tokens = q.shape[0], q.shape[1], k.shape[2]
        kv_heads, group = k.shape[1], heads // k.shape[1]
        few = batch * kv_heads * k_tokens < MANY_KEYS
        share = 1 if few or rules.kept_sinks is not None else group
        self.owners = heads // share
        self.group = 1 if share == group else group
        both = host.empty_numbers((2, *lse.shape), lse.device)
        sums = both[0]
        programs, arguments = row_arguments(dout, out, lse, dlse, sums, sums)
        self.rows = host.prepare(flash_rows_kernel, programs, SMALL, arguments, q.device)

        self.key_bounds = None if rules.key_mask is None else host.KeyBounds(rules.key_mask)
        self.bounds = None
        if rules.row_start is not None or rules.row_end is not None:
            self.bounds = rows_before(q, k, rules)
        self.copies = not host.readable_as_they_are(q, k, v, dout)
        q, k, v, dout = host.readable(q, k, v, dout)
        chosen, self.together, when = host.backward_choice(q, v, rules), None, None
        if chosen.specialised:
            from attnspec.fast.engines.flash.triton_specialised_backward import Together

            self.together = Together(dout, q, k, v, both, rules, share, chosen)
            when = q
        chosen, arguments = operands("dq", dout, q, k, v, rules, heads)
        self.row_table = host.Tiles("dq", chosen, q, k, rules)
        arguments |= {
            **host.list_arguments(host.readable_lists(*rules[8:11])),
            "lse2": sums,
            "delta": sums,
            "sums_stride": sums.stride(1),
            "dq": q,
            "when": when,
            "key_bounds": rules.key_mask,
            "ALL_EDGE": host.all_key_edges(rules, chosen),
        }
        self.dq = host.prepare(
            flash_dq_kernel, arguments["tiles"] * batch * heads, chosen, arguments,
            q.device,
        )  # fmt: skip

        chosen, arguments = operands("dkdv", dout, q, k, v, rules, self.owners)
        self.key_table = host.Tiles("dkdv", chosen, q, k, rules)
        # Tiles of listed blocks begin where the blocks do.
        listed_anywhere = rules.q_block % 4 > 0 or (rules.q_block and rules.q_offsets is not None)
        described = arguments["ACCESS"] == 2 and not listed_anywhere
        arguments |= {
            **host.list_arguments(self.transposed_lists(k, rules)),
            **host.number_operands(("lse2", "delta"), sums, chosen.rows, described),
            "sums_stride": sums.stride(1),
            "dk": k,
            "dv": v,
            "when": when,
            "started": rules.row_start,
            "ended": rules.row_end,
            "SHARE": share,
            "ALL_EDGE": host.all_row_edges(rules, chosen),
            "EARLY": chosen.early,
        }
        programs = arguments["tiles"] * batch * self.owners
        self.dkdv = host.prepare(flash_dkdv_kernel, programs, chosen, arguments, q.device)
        self.head_sums = head_sums(k, self.group), head_sums(v, self.group)

    def row_sums(self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
        """What the other kernels need of each row, lse2 and delta as `flash_rows_kernel` defines
        them.
        """
        sums = host.empty_numbers((2, *lse.shape), lse.device)
        dlse = None if dlse is None else dlse.contiguous()
        self.rows(dout=dout, out=out, lse=lse, dlse=dlse, lse2=sums[0], delta=sums[1])
        return sums

    def differentiate(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sums: Tensor, rules: Rules
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv."""
        dq = q.new_empty(q.shape)
        buffer = k.dtype if self.group == 1 else torch.float32
        dk, dv = (
            x.new_empty((x.shape[0], self.owners, *x.shape[2:]), dtype=buffer) for x in (k, v)
        )
        doubtful = None
        if self.together is not None:
            doubtful = self.together(dout, q, k, v, sums, dq, dk, dv)
        lse2, delta = sums
        given: dict[str, Tensor | None] = {
            "when": doubtful, "q": q, "k": k, "v": v, "dout": dout, "lse2": lse2, "delta": delta,
        }  # fmt: skip
        self.differentiate_rows(given, dq, rules)
        self.differentiate_keys(given, k, dk, dv, rules)
        if self.group == 1:
            return dq, dk, dv
        whole = k.new_empty(k.shape), v.new_empty(v.shape)
        for launch, parts, each in zip(self.head_sums, (dk, dv), whole, strict=True):
            launch(parts=parts, sums=each)
        return dq, *whole

    def differentiate_rows(self, given: dict[str, Tensor | None], dq: Tensor, rules: Rules) -> None:
        """dq, by tiles of rows."""
        index, count, full = host.readable_lists(*rules[8:11])
        key_bounds = None
        if self.key_bounds is not None and rules.key_mask is not None:
            key_bounds = self.key_bounds(rules.key_mask)
        self.dq(
            **given, dq=dq, **host.changing(rules), block_index=index, block_count=count,
            block_full=full, key_bounds=key_bounds, table=self.row_table(rules),
        )  # fmt: skip

    def differentiate_keys(
        self, given: dict[str, Tensor | None], k: Tensor, dk: Tensor, dv: Tensor, rules: Rules
    ) -> None:
        """dk and dv, by tiles of keys."""
        started, ended = (
            None if bound is None else bound.new_empty(k.shape[2], dtype=torch.int32)
            for bound in (rules.row_start, rules.row_end)
        )
        if self.bounds is not None:
            self.bounds(
                row_start=rules.row_start, row_end=rules.row_end, q_offsets=rules.q_offsets,
                k_offsets=rules.k_offsets, started=started, ended=ended,
            )  # fmt: skip
        index, count, full = self.transposed_lists(k, rules)
        self.dkdv(
            **given, dk=dk, dv=dv, started=started, ended=ended,
            **host.changing(rules, by_keys=True), block_index=index, block_count=count,
            block_full=full, table=self.key_table(rules),
        )  # fmt: skip

    def transposed_lists(self, k: Tensor, rules: Rules) -> host.Lists:
        """The lists of the query blocks that see each key block."""
        index, count, full = rules.block_index, rules.block_count, rules.block_full
        if index is None or count is None:
            return None, None, None
        k_blocks = -(-k.shape[2] // rules.k_block)
        if full is None:
            return host.readable_lists(*transposed(index, count, k_blocks), None)
        return host.readable_lists(*transposed_parts(index, count, full, k_blocks))


def head_sums(x: Tensor, group: int) -> Prepared:
    """The launch that sums the gradients of `group` query heads to those of `x`, a kv operand."""
    numbers, size = x.shape[2] * x.shape[3], 1024
    blocks = -(-numbers // size)
    arguments = {
        "parts": x, "sums": x, "numbers": numbers, "blocks": blocks, "GROUP": group, "SIZE": size,
    }  # fmt: skip
    return host.prepare(
        head_sums_kernel, blocks * x.shape[0] * x.shape[1], SMALL, arguments, x.device
    )


def operands(
    kind: str, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, rules: Rules, heads: int
) -> tuple[FlashConfig, dict[str, Any]]:
    """The configuration and the arguments that both gradient kernels take."""
    chosen = host.choose_config(kind, q, v, rules)
    how = host.access(q, k, v, dout)
    return chosen, {
        **host.operand("q", q, chosen.rows, how),
        **host.operand("dout", dout, chosen.rows, how),
        **host.operand("k", k, chosen.keys, how),
        **host.operand("v", v, chosen.keys, how),
        **host.rule_arguments(rules, by_keys=kind == "dkdv"),
        **host.grid_arguments(kind, chosen, q, k, v, rules, heads),
        **host.shape_arguments(q, k, v, chosen),
        "ACCESS": how,
    }
