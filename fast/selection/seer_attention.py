"""SeerAttention on Numba and Triton: a learned gate chooses blocks, flash attention stays in them.

The gate's tiny attention, the selection and the lists of blocks are kernels of the select engine;
the attention itself skips every block that is not listed. Only the gate is trained, but the
attention inside a given mask is differentiable too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import check_attention_inputs, check_integer, check_size, check_tensor
from attnspec.fast.engines.flash import SPECIALISED_CONFIGS, flash
from attnspec.fast.engines.select import mask_lists
from attnspec.fast.selection.seer_attention_decode import (
    State,
    decode_attend,
    decode_select,
    init_state,
    step,
)
from attnspec.fast.selection.seer_attention_decode_gate import (
    GateCache,
    compress_step,
    decode_gate,
    init_cache,
)
from attnspec.fast.selection.seer_attention_gate import (
    gate_kinds,
    gate_rope,
    gate_scores,
    pool_blocks,
    rope,
)
from attnspec.fast.selection.seer_attention_selection import (
    ratio_to_k,
    select_blocks,
    select_ratio,
    select_threshold,
)
from attnspec.fast.selection.seer_attention_training import (
    attend_with_block_max,
    decode_target,
    distill_loss,
    normalise_gt,
)

__all__ = [
    "GateCache",
    "State",
    "attend",
    "attend_with_block_max",
    "block_sparse_attend",
    "compress_step",
    "decode_attend",
    "decode_gate",
    "decode_select",
    "decode_target",
    "distill_loss",
    "gate_kinds",
    "gate_rope",
    "gate_scores",
    "init_cache",
    "init_state",
    "normalise_gt",
    "pool_blocks",
    "ratio_to_k",
    "select_blocks",
    "select_ratio",
    "select_threshold",
    "step",
]


CLAIMS: dict[str, dict[str, Any]] = {
    "attend": {"compiled": True, "triton": {"configs": SPECIALISED_CONFIGS}},
    "block_sparse_attend": {
        "gradient": True,
        "compiled": True,
        "triton": {"configs": SPECIALISED_CONFIGS},
    },
    "gate_scores": {"gradient": True, "compiled": True},
    "distill_loss": {"gradient": True, "launches": None, "compiled": True},
    "gate_rope": {"launches": None, "dtypes": ("float32",), "triton": None},
    "ratio_to_k": {"launches": None, "dtypes": ("float32",), "triton": None},
    **{
        name: {"launches": None}
        for name in (
            "compress_step",
            "decode_gate",
            "decode_select",
            "normalise_gt",
            "select_threshold",
        )
    },
}
"""What the suite is told beyond the defaults: the loss, the thresholds and the decode gate are
torch operations, and two functions take numbers only."""


def block_sparse_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    M: Tensor,
    b: int,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, T, dv) and lse float32 (batch, heads, T), causal, inside the block mask.

    q (batch, heads, T, d) and k (batch, kv_heads, T, d), both rotated, v (batch, kv_heads, T, dv);
    M bool (batch, heads, ceil(T/b), ceil(T/b)). Differentiable in q, k and v.
    """
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[2], k.shape[2], "tokens, as in k")
    check_integer("b", b, least=1)
    check_tensor("M", M, ("batch", "heads", "nb", "nb"), (torch.bool,))
    nb = -(-q.shape[2] // b)
    if tuple(M.shape) != (*q.shape[:2], nb, nb):
        raise ValueError(f"M: got shape {tuple(M.shape)}, expected {(*q.shape[:2], nb, nb)}")
    blocks = mask_lists(M.tril(), b, b, backend=backend)
    if b % 16 == 0:
        # Rows see their diagonal block in part, and whole those before it.
        before = blocks.count - M.diagonal(dim1=-2, dim2=-1).to(torch.int32)
        blocks = replace(blocks, full=before)
    return flash(q, k, v, causal=True, blocks=blocks, scale=scale, backend=backend)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    Wq: Tensor | None,
    Wk: Tensor,
    *,
    b: int = 64,
    q_kinds: Sequence[str] = ("avg",),
    k_kinds: Sequence[str] = ("max", "min", "avg"),
    base: float = 10000.0,
    tau: float | None = None,
    rho: float | None = None,
    last_dense: bool = True,
    force_diagonal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (batch, heads, T, dv), lse (batch, heads, T) and the mask M (batch, heads, nb, nb).

    q (batch, heads, T, d) and k (batch, kv_heads, T, d) before their rotation, v (batch, kv_heads,
    T, dv); the keywords are those of `select_blocks`.
    """
    check_attention_inputs(q, k, v)
    M = select_blocks(
        q,
        k,
        Wq,
        Wk,
        b=b,
        q_kinds=q_kinds,
        k_kinds=k_kinds,
        base=base,
        tau=tau,
        rho=rho,
        last_dense=last_dense,
        force_diagonal=force_diagonal,
        backend=backend,
    )
    rotated_q, rotated_k = rope(q, k, None, base, backend)
    out, lse = block_sparse_attend(rotated_q, rotated_k, v, M, b, scale=scale, backend=backend)
    return out, lse, M
