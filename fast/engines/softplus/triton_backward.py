"""The softplus engine's backward pass on Triton: three launches, four for sharpened weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.engines.flash import triton_launch as flash_host
from attnspec.fast.engines.flash.configs import FlashConfig
from attnspec.fast.engines.softplus import triton_launch as host
from attnspec.fast.engines.softplus.triton_gradients import (
    softplus_dkdv_kernel,
    softplus_rows_kernel,
)
from attnspec.fast.engines.softplus.triton_terms import row_terms


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    out: Tensor,
    rows: Tensor,
    factor: float,
    normalise: bool,
    eps: float,
    causal: bool,
    key_mask: Tensor | None,
    mask: Tensor | None,
    power: float,
    warm: int,
    second_eps: float,
    dead: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the inputs' dtype.

    An upstream gradient whose rows are not aligned is copied, as in the flash engine.
    """
    batch, heads, q_tokens, d = q.shape
    kv_heads, k_tokens = k.shape[1], k.shape[2]
    if not flash_host.aligned(dout):
        dout = dout.contiguous()
    key_scales = host.inverse_norms(k) if normalise else None
    token_bytes = (d + v.shape[3]) * q.element_size()

    stages = host.stage_arguments(q, eps, power, warm, second_eps, dead)
    terms = row_terms(dout, out, rows, counts, stages)

    def prepared(kind: str) -> tuple[FlashConfig, dict[str, Any]]:
        chosen = host.choose_config(kind, q, v)
        return chosen, {
            **host.operands(q, k, v, chosen, dout),
            **host.rule_arguments(causal, key_mask, mask),
            **host.shape_arguments(q, k, v, chosen),
            **{name: stages[name] for name in ("power", "PRECISE", "SHARP", "WHOLE")},
            "terms": terms,
            "terms_stride": terms.stride(-2),
        }

    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    for kind in ("rows", "dq") if power else ("dq",):
        chosen, arguments = prepared(kind)
        place = host.grid(q_tokens, chosen.rows, batch * heads, k_tokens * token_bytes)
        arguments |= {
            **place,
            "dq": dq,
            "key_bounds": host.key_bounds(key_mask),
            **host.scale_arguments(key_scales, chosen.keys, arguments["ACCESS"] == 2),
            "TERMS_ONLY": kind == "rows",
        }
        host.launch(softplus_rows_kernel, place["tiles"] * batch * heads, chosen, arguments)

    buffer = k.dtype if heads == kv_heads else torch.float32
    dk = k.new_empty((batch, heads, *k.shape[2:]), dtype=buffer)
    dv = v.new_empty((batch, heads, *v.shape[2:]), dtype=buffer)
    chosen, arguments = prepared("dkdv")
    place = host.grid(k_tokens, chosen.keys, batch * heads, q_tokens * token_bytes)
    described = flash_host.number_operands(("terms",), terms, chosen.rows, arguments["ACCESS"] == 2)
    scales = host.scale_arguments(key_scales, chosen.keys, False)
    arguments |= {**place, **scales, **described, "dk": dk, "dv": dv}
    host.launch(softplus_dkdv_kernel, place["tiles"] * batch * heads, chosen, arguments)
    if heads != kv_heads:
        dk = dk.unflatten(1, (kv_heads, -1)).sum(2).to(k.dtype)
        dv = dv.unflatten(1, (kv_heads, -1)).sum(2).to(v.dtype)
    return dq, dk, dv
