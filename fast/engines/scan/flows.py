"""Flowformer's outputs without a gradient, on Triton: a few launches, known calls replayed.

Each token is read as often as the chain of sums demands, and nothing of the tokens' size is written
but the output: features, flows and weights are formed from the tiles.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import load, unobserved
from attnspec.fast.engines.scan.api import WIDEST
from attnspec.fast.engines.scan.replay import kind as kind_of
from attnspec.fast.engines.scan.replay import known
from attnspec.fast.engines.scan.running import KINDS


@cache
def _kernels() -> ModuleType:
    """The implementation, imported on first use."""
    return load("attnspec.fast.engines.scan.triton_flows_host")


class DirectFlows:
    """One call, by its tensors (q, k and v first) and options, that nothing but its caller sees.

    `known` are the outputs of a call of a kind that has passed all checks before, computed before
    any check; it is None for a new kind.
    """

    def __init__(
        self, name: str, tensors: Sequence[Tensor | None], backend: str | None, *options: Any
    ) -> None:
        self.tensors = tensors
        self.key: Hashable = None
        self.known: tuple[Tensor, ...] | None = None
        q = tensors[0]
        direct = unobserved(*tensors) and q is not None and (q.is_cuda or backend == "triton")
        if direct:
            self.key = kind_of(tensors, (name, backend, *options))
            replay = known(self.key)
            self.known = None if replay is None else replay(tensors)

    def serves(self) -> bool:
        """Whether the kernels take the tensors, all checks of which have been passed."""
        q, k, v = self.tensors[:3]
        if self.key is None or q is None or k is None or v is None:
            return False
        # Triton's interpreter has no bfloat16.
        whole = q.dtype in (torch.float32, torch.float16)
        served = whole or (q.dtype == torch.bfloat16 and q.is_cuda)
        widths = 1 <= q.shape[3] <= WIDEST and 1 <= v.shape[3] <= WIDEST
        return served and widths and min(q.numel(), k.numel()) > 0

    def attend(self, eps: float, kind: str, clamp: tuple[float, float] | None) -> Tensor:
        """out (batch, heads, n, dv) of q, k, v, key_mask and query_mask."""
        q = self.tensors[0]
        assert q is not None
        with torch.cuda.device_of(q):
            made: Tensor = _kernels().attend(
                *self.tensors, float(eps), KINDS[kind], clamp, self.key
            )
        return made

    def attend_in_order(
        self, first: Sequence[Tensor] | None, eps: float, kind: str,
        clamp: tuple[float, float] | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """out (batch, heads, tokens, dv) and the parts of the last state, of q, k and v, from the
        parts of a `first` one in float32, if any. Those given, in any dtype, are the other tensors.
        """
        q = self.tensors[0]
        assert q is not None
        with torch.cuda.device_of(q):
            made: tuple[Tensor, ...] = _kernels().attend_in_order(
                self.tensors, first, float(eps), KINDS[kind], clamp, self.key
            )
        return made
