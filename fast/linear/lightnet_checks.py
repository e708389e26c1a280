"""What LightNet's operations check, and heads of k and v for all of q."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnspec.fast.linear.lightning_attention_2_chunks import as_state


def repeated(x: Tensor, heads: int) -> Tensor:
    """x (batch, kv_heads, ...) for each of the query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def given_state(name: str, x: Any, shape: tuple[int, ...], q: Tensor) -> Tensor:
    """A state of this shape, which may not be absent, in the dtype of states."""
    state = as_state(name, x, shape, q)
    if state is None:
        raise TypeError(f"{name}: got NoneType, expected torch.Tensor")
    return state


def check_channels(name: str, x: Tensor) -> None:
    """As many channels as the kernels take."""
    if not 1 <= x.shape[-1] <= 256:
        raise ValueError(f"{name}: got {x.shape[-1]} channels, expected 1 to 256")


def check_scale(scale: Any) -> None:
    """A positive number."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {type(scale).__name__}, expected a number > 0")
    if not scale > 0:
        raise ValueError(f"scale: got {scale}, expected a number > 0")
