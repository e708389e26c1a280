"""How the Triton scan reads 16-bit operands: whole tiles of aligned rows, or a copy that has them.

Tiles that are loaded one number at a time pass through many registers, and the assembler of CUDA
12.8, which Triton 3.6 brings, then loses operands of Hopper's asynchronous products: addresses out
of bounds on a device. So rows start at multiples of 16 numbers, and heads are padded with zeros to
a multiple of 16 channels, which takes part in no sum.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

UNIT = 16


def narrow(q: Tensor, v: Tensor) -> bool:
    """Whether heads are to be padded."""
    return q.element_size() == 2 and (q.shape[-1] % UNIT != 0 or v.shape[-1] % UNIT != 0)


def padded(x: Tensor) -> Tensor:
    """x with zeros behind its channels, a multiple of 16 of them."""
    missing = -x.shape[-1] % UNIT
    return pad(x, (0, missing)) if missing else x


def padded_decay(log_decay: Tensor | None) -> Tensor | None:
    """A decay per channel padded, any other as it is."""
    return padded(log_decay) if log_decay is not None and log_decay.dim() == 4 else log_decay


def padded_state(state: Tensor) -> Tensor:
    """A state (..., d, dv) padded both ways."""
    return pad(state, (0, -state.shape[-1] % UNIT, 0, -state.shape[-2] % UNIT))


def tiled(*operands: Tensor) -> tuple[Tensor, ...]:
    """`operands` whose 16-bit rows are contiguous and start at multiples of 16 numbers."""
    return tuple(x if x.element_size() == 4 or _aligned(x) else _copy(x) for x in operands)


def _aligned(x: Tensor) -> bool:
    rows_apart = all(stride > 0 and stride % UNIT == 0 for stride in x.stride()[:-1])
    return rows_apart and x.stride(-1) == 1 and x.data_ptr() % 16 == 0


def _copy(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
