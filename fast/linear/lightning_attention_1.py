"""TransNormerLLM on Numba and Triton: products outside, the rows engine, the scan engine inside.

A layer is one product for q, k, v and the gate, one pass that activates and lifts q and k, the scan
with a constant decay a head, one pass for the norm over all heads and the gate, and a product out.
Layers are differentiable in x, the state and all weights, slopes and theta included. With LRPE the
scan reads the lifted q and k, twice as wide, from memory, so heads are at most 128 wide. Values of
slopes and offsets are checked on the CPU only: on a GPU the check would stall it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_device, check_size, check_tensor, unobserved
from attnspec.fast.engines.rows import CANDIDATES, use_config
from attnspec.fast.engines.scan import scan, step
from attnspec.fast.growing import checkable
from attnspec.fast.linear.lightning_attention_1_decay import (
    decay_attend,
    decay_attend_backward,
    decay_attend_tiled,
    layer_slopes,
    norm_attention,
    slopes,
)
from attnspec.fast.linear.lightning_attention_1_layers import (
    BLOCK_WEIGHTS,
    Options,
    Params,
    check_channels,
    check_gla,
    inputs_of,
    output_of,
    state_shape,
)
from attnspec.fast.linear.lightning_attention_1_rows import (
    lrpe,
    lrpe_frequencies,
    sglu,
    srms_norm,
)
from attnspec.fast.linear.lightning_attention_2_batches import attend_padded
from attnspec.fast.linear.lightning_attention_2_chunks import as_state
from attnspec.fast.packing import check_offsets

__all__ = [
    "decay_attend",
    "decay_attend_backward",
    "decay_attend_tiled",
    "layer_slopes",
    "lrpe",
    "lrpe_frequencies",
    "norm_attention",
    "sglu",
    "slopes",
    "srms_norm",
    "tnl_block",
    "tnl_gla",
    "tnl_gla_packed",
    "tnl_gla_padded",
]

_CONFIGS = {str(c): functools.partial(use_config, c) for c in CANDIDATES}
CLAIMS: dict[str, dict[str, Any]] = {
    **{name: {"launches": None} for name in ("slopes", "layer_slopes", "lrpe_frequencies")},
    "sglu": {"launches": None, "gradient": True},
    "srms_norm": {
        "gradient": True,
        "compiled": True,
        "triton": {"graph": True, "configs": _CONFIGS},
    },
    "lrpe": {"gradient": True, "triton": {"graph": True, "configs": _CONFIGS}},
    "decay_attend": {"gradient": True, "compiled": True, "triton": {"graph": True}},
    "decay_attend_tiled": {"gradient": True},
    "norm_attention": {"gradient": True},
    "tnl_gla": {"gradient": True, "compiled": True, "triton": {"graph": True}},
    "tnl_gla_packed": {"gradient": True},
    "tnl_gla_padded": {"gradient": True},
    "tnl_block": {"gradient": True, "compiled": True, "triton": {"graph": True}},
}
"""What the suite is told beyond the defaults; what is tables or torch products launches nothing."""


def tnl_gla(
    x: Tensor,
    params: Params,
    state: Tensor | None = None,
    offset: int = 0,
    *,
    v_activation: bool = False,
    gate: str = "linear",
    norm: str = "srms",
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y (batch, T, D) and the state, float32 (batch, H, d', d), of x (batch, T, D), already normed.

    `params` maps Wqkvu (D, 4 D), Wo (D, D), slopes (H,) of this layer and theta (H, d), which is
    None or missing on layers without LRPE; the weights have the dtype of x, slopes, theta and the
    state may be float32 beside it. Differentiable. A single token takes the step kernel if no
    gradient is asked for.
    """
    options = Options(v_activation, gate, norm, eps)
    return _mix(x, params, check_gla(x, params, state, offset, options), offset, options, backend)


def _mix(
    x: Tensor,
    params: Params,
    S0: Tensor | None,
    offset: int,
    options: Options,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """`tnl_gla` of arguments that are known to be right."""
    q, k, v, u = inputs_of(x, params, options, backend, offset=offset)
    s = params["slopes"]
    if S0 is not None and x.shape[1] == 1 and unobserved(q, k, v, s, S0):
        o, last = step(S0, q, k, v, slopes=s, backend=backend)
    else:
        o, last = scan(q, k, v, slopes=s, state=S0, backend=backend)
    return output_of(o, u, params, options, backend), last


def tnl_gla_packed(
    x: Tensor,
    params: Params,
    offsets: Tensor,
    states: Tensor | None = None,
    starts: Tensor | None = None,
    *,
    v_activation: bool = False,
    gate: str = "linear",
    norm: str = "srms",
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y (total, D) and the states, float32 (sequences, H, d', d), of x (total, D), sequences end to
    end.

    offsets int (sequences + 1), increasing from 0 to the total; `starts` int (sequences,) are the
    positions of their first tokens, 0 by default. Differentiable.
    """
    check_tensor("x", x, ("total", "D"), FLOATS)
    options = Options(v_activation, gate, norm, eps)
    rows = x[None]
    check_gla(rows, params, None, 0, options)
    sequences = check_offsets(offsets, "x", x, x.shape[0])
    S0 = as_state("states", states, (sequences, *state_shape(params, x.shape[1])), x)
    if starts is not None:
        check_tensor("starts", starts, ("sequences",), (torch.int64, torch.int32))
        check_size("starts", starts.shape[0], sequences, "sequences, as in offsets")
        check_device("starts", starts, "x", x)
        if checkable(starts) and bool((starts < 0).any()):
            raise ValueError(f"starts: got {starts.tolist()}, expected integers >= 0")
    positions = None
    if params.get("theta") is not None:
        token = torch.arange(x.shape[0], device=x.device)
        own = torch.bucketize(token, offsets[1:].long(), right=True)
        positions = token - offsets.long()[own]
        if starts is not None:
            positions = positions + starts.long()[own]
    q, k, v, u = inputs_of(rows, params, options, backend, positions=positions)
    o, last = scan(q, k, v, slopes=params["slopes"], state=S0, offsets=offsets, backend=backend)
    return output_of(o, u, params, options, backend)[0], last


def tnl_gla_padded(
    x: Tensor,
    params: Params,
    valid: Tensor,
    state: Tensor | None = None,
    offset: int = 0,
    *,
    v_activation: bool = False,
    gate: str = "linear",
    norm: str = "srms",
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y (batch, T, D), 0 where `valid` (batch, T) is False, and the state of the real tokens.

    What is stored at a padded token is replaced by 0 in a copy of x. Differentiable.
    """
    options = Options(v_activation, gate, norm, eps)
    S0 = check_gla(x, params, state, offset, options)
    check_tensor("valid", valid, ("batch", "T"), (torch.bool,))
    if valid.shape != x.shape[:2]:
        raise ValueError(f"valid: got shape {tuple(valid.shape)}, expected {tuple(x.shape[:2])}")
    real = valid[..., None]
    x = torch.where(real, x, 0.0)
    q, k, v, u = inputs_of(x, params, options, backend, offset=offset)
    o, last = attend_padded(q, k, v, params["slopes"], valid, S0, backend=backend)
    return torch.where(real, output_of(o, u, params, options, backend), 0.0), last


def tnl_block(
    x: Tensor,
    params: Params,
    state: Tensor | None = None,
    offset: int = 0,
    *,
    v_activation: bool = False,
    gate: str = "linear",
    norm: str = "srms",
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y (batch, T, D) and the state, float32 (batch, H, d', d), norms and residuals inside.

    `params` as in `tnl_gla`, with Wv and Wu (D, F) and Wd (F, D). Differentiable.
    """
    options = Options(v_activation, gate, norm, eps)
    S0 = check_gla(x, params, state, offset, options)
    check_channels(x, params)
    mixed, last = _mix(srms_norm(x, eps, backend=backend), params, S0, offset, options, backend)
    x = x + mixed
    channels = [params[name] for name in BLOCK_WEIGHTS]
    return x + sglu(srms_norm(x, eps, backend=backend), *channels), last
