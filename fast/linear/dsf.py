"""The Dynamical Systems Framework on the scan engine.

Linear and normalised attention and SSD are its chunked scan of matrix products, S6 its selective
scan, gated RNNs its elementwise scan with or without the gates, which any system written out is
too; softmax is the flash engine. Maps,
matrices and the task are torch. Values of decays are checked on the CPU only: on a GPU the check
would stall it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_size, check_tensor, wide
from attnspec.fast.engines.scan import (
    ELEMENTWISE,
    GATED,
    SELECTIVE,
    LaneConfig,
    elementwise,
    use_config,
)
from attnspec.fast.growing import checkable
from attnspec.fast.linear.dsf_batches import (
    linear_attention_packed,
    qlstm_packed,
    rg_lru_packed,
    s6_packed,
    ssd_packed,
)
from attnspec.fast.linear.dsf_maps import (
    from_attention,
    from_normalised_attention,
    from_qlstm,
    from_rg_lru,
    from_s6,
    from_ssd,
    taylor_features,
)
from attnspec.fast.linear.dsf_mixers import (
    linear_attention,
    normalised_attention,
    softmax_attention,
)
from attnspec.fast.linear.dsf_recall import mqar_accuracy, mqar_batch, mqar_sequences
from attnspec.fast.linear.dsf_rnn import elementwise_scan, qlstm, qlstm_layer, rg_lru
from attnspec.fast.linear.dsf_ssm import (
    is_ssd,
    s6_scan,
    ssd_as_attention,
    ssd_as_normalised,
    ssd_scan,
)
from attnspec.fast.linear.lightning_attention_2_chunks import as_state, check_upstream

__all__ = [
    "dsf_matrix",
    "dsf_scan",
    "elementwise_scan",
    "from_attention",
    "from_normalised_attention",
    "from_qlstm",
    "from_rg_lru",
    "from_s6",
    "from_ssd",
    "gauge",
    "is_ssd",
    "linear_attention",
    "linear_attention_packed",
    "mqar_accuracy",
    "mqar_batch",
    "mqar_sequences",
    "normalised_attention",
    "qlstm",
    "qlstm_layer",
    "qlstm_packed",
    "rg_lru",
    "rg_lru_packed",
    "s6_packed",
    "s6_scan",
    "softmax_attention",
    "ssd_as_attention",
    "ssd_as_normalised",
    "ssd_packed",
    "ssd_scan",
    "taylor_features",
]

TORCH = (
    "dsf_matrix", "gauge", "from_attention", "from_normalised_attention", "from_s6", "from_ssd",
    "from_qlstm", "from_rg_lru", "taylor_features", "is_ssd", "ssd_as_attention",
    "ssd_as_normalised", "mqar_sequences", "mqar_accuracy",
)  # fmt: skip


def _tuned(candidates: tuple[LaneConfig, ...]) -> dict[str, Any]:
    """What is claimed on a GPU, for each candidate alone too."""
    return {"graph": True, "configs": {str(c): partial(use_config, c) for c in candidates}}


TRAINED: dict[str, Any] = {"gradient": True, "compiled": True, "triton": {"graph": True}}
CHUNKED = {**TRAINED, "triton": {"graph": True, "exact_prefix": False}}
CLAIMS = {
    **{name: {"launches": None} for name in TORCH},
    "dsf_matrix": {"launches": None, "blocks": (4, 8)},
    "dsf_scan": TRAINED,
    "elementwise_scan": {**TRAINED, "blocks": (32, 256), "triton": _tuned(ELEMENTWISE)},
    "s6_scan": {**TRAINED, "blocks": (16, 64), "triton": _tuned(SELECTIVE)},
    "qlstm": {
        **TRAINED,
        "blocks": (16, 256),
        "triton": {**_tuned(GATED), "draws": {"N": (*range(1, 25), 64, 70)}},
    },
    "rg_lru": TRAINED,
    "qlstm_layer": CHUNKED,
    "softmax_attention": CHUNKED,
    "linear_attention": CHUNKED,
    "normalised_attention": CHUNKED,
    "ssd_scan": CHUNKED,
    "linear_attention_packed": CHUNKED,
    "s6_packed": {**TRAINED, "blocks": (16, 64), "triton": _tuned(SELECTIVE)},
    "ssd_packed": CHUNKED,
    "qlstm_packed": {
        **TRAINED,
        "blocks": (16, 256),
        "triton": {**_tuned(GATED), "draws": {"N": (*range(1, 25), 64, 70)}},
    },
    "rg_lru_packed": TRAINED,
}
"""What the suite is told beyond the defaults; what is torch launches no kernel of ours."""


def dsf_scan(
    Lam: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    u: Tensor,
    h0: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y (batch, T, dv) and the last h (batch, N) in float32.

    Lam (batch, T, N), B (batch, T, N, dv), C (batch, T, dv, N), D (batch, T, dv, dv) or None, u
    (batch, T, dv), h0 (batch, N) in any float dtype. Differentiable. B and C are read as they are:
    a mixer whose matrices have structure has a function of its own.
    """
    check_system(Lam, B, C, D)
    check_upstream("u", u, (*Lam.shape[:-1], B.shape[-1]), Lam)
    h0 = as_state("h0", h0, (Lam.shape[0], Lam.shape[2]), Lam)
    x = torch.einsum("btnv,btv->btn", wide(B), wide(u))
    states, last = elementwise(Lam, x, h0, backend=backend)
    y = torch.einsum("btvn,btn->btv", wide(C), states)
    if D is not None:
        y = y + torch.einsum("btwv,btv->btw", wide(D), wide(u))
    return y.to(u.dtype), last


def dsf_matrix(
    Lam: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Phi (batch, T, T, dv, dv); quadratic in the tokens, to be looked at."""
    check_system(Lam, B, C, D)
    batch, T, _, dv = B.shape
    Phi = torch.zeros(batch, T, T, dv, dv, dtype=wide(B).dtype, device=B.device)
    reached = wide(B[:, :0])
    for i in range(T):
        reached = torch.cat([wide(Lam[:, i, None, :, None]) * reached, wide(B[:, i : i + 1])], 1)
        Phi[:, i, : i + 1] = wide(C[:, i : i + 1]) @ reached
        if D is not None:
            Phi[:, i, i] += wide(D[:, i])
    return Phi.to(B.dtype)


def gauge(
    Lam: Tensor, B: Tensor, C: Tensor, T: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Lam, B, C of the state T h; T (batch, T, N) has no zeros and counts as 1 before token 0."""
    check_system(Lam, B, C, None)
    check_upstream("T", T, tuple(Lam.shape), Lam)
    if checkable(T) and bool((T == 0).any()):
        raise ValueError("T: got a 0, expected numbers that can be divided by")
    own = wide(T)
    before = torch.cat([torch.ones_like(own[:, :1]), own[:, :-1]], 1)[:, : T.shape[1]]
    made = own * wide(Lam) / before, own[..., None] * wide(B), wide(C) / own[:, :, None]
    return made[0].to(Lam.dtype), made[1].to(B.dtype), made[2].to(C.dtype)


def check_system(Lam: Any, B: Any, C: Any, D: Any) -> None:
    """The matrices of a system fit one another."""
    check_tensor("Lam", Lam, ("batch", "T", "N"), FLOATS)
    check_tensor("B", B, ("batch", "T", "N", "dv"), FLOATS)
    check_size("B", B.shape[2], Lam.shape[2], "N, as in Lam")
    check_upstream("B", B, (*Lam.shape, B.shape[3]), Lam)
    check_upstream("C", C, (*Lam.shape[:2], B.shape[3], Lam.shape[2]), Lam)
    if D is not None:
        check_upstream("D", D, (*Lam.shape[:2], B.shape[3], B.shape[3]), Lam)
