"""Sinks and sources as one pair: their flows, in torch or by the kernels of the scan engine."""

from __future__ import annotations

import torch
from torch import Tensor

from attnspec.fast.backend import check_choice, unobserved, wide
from attnspec.fast.engines.scan import elementwise, running_dots
from attnspec.fast.linear.flowformer_flows import KINDS, dot, wide_features, with_all

Two = tuple[Tensor, Tensor] | None
Flows = tuple[Tensor, Tensor, Tensor, Tensor]


class Pair:
    """Sinks q (batch, heads, n, d) and sources k (batch, heads, m, d), with what their sums need.

    x and y are the tokens for the kernels, which take the features of each tile they read; in torch
    they are the features, which several sums share.
    """

    def __init__(self, q: Tensor, k: Tensor, kind: str, eps: float, backend: str) -> None:
        check_choice("kind", kind, KINDS)
        self.kind, self.eps = kind, eps
        self.fused = backend == "triton" and q.dtype != torch.float64
        if self.fused:
            self.x, self.y = (q, k) if unobserved(q, k) else (wide(q), wide(k))
        else:
            self.x, self.y = wide_features(q, kind), wide_features(k, kind)

    def ones(self, sinks: Tensor | None, sources: Tensor | None) -> Two:
        """The weights of tokens of which those that are False (batch, 1, tokens) are padded."""
        if sinks is None and sources is None:
            return None
        one = wide(self.x.new_ones(()))
        made = [one if real is None else real.to(one.dtype) for real in (sinks, sources)]
        x, y = (w.expand(z.shape[:3]) for w, z in zip(made, (self.x, self.y), strict=True))
        return x, y

    def features(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The features of x or y, rounded once."""
        if not self.fused:
            return x.to(dtype)
        if x.dtype != dtype:
            return wide_features(x, self.kind).to(dtype)
        return torch.sigmoid(x) if self.kind == "sigmoid" else torch.relu(x) + 1e-6

    def flows(self, weights: Two, first: Two, causal: bool = True) -> Flows:
        """What the sinks and what the sources receive, and the last sums (batch, heads, d) of sinks
        and of sources, each of which counts by its weight.
        """
        if self.fused:
            return running_dots(
                self.x, self.y, weights, first, eps=self.eps, kind=self.kind, causal=causal
            )
        sides = (self.x, self.y)
        if weights is not None:
            sides = self.x * weights[0][..., None], self.y * weights[1][..., None]
        sums = []
        for i, side in enumerate(sides):
            total = side.cumsum(2) if causal else side.sum(2, keepdim=True)
            sums.append(total if first is None else total + first[i][:, :, None])
        if causal:
            into = dot(self.x + self.eps, sums[1] + self.eps)
            out_of = dot(self.y + self.eps, sums[0] + self.eps)
        else:
            into = with_all(self.x, sums[1][:, :, 0], self.eps)
            out_of = with_all(self.y, sums[0][:, :, 0], self.eps)
        last = [x[:, :, -1] if x.shape[2] else x.sum(2) for x in sums]
        return into, out_of, last[0], last[1]

    def running(self, first: Tensor, x: Tensor) -> Tensor:
        """`first` (batch, heads) and the sums of x (batch, heads, tokens) up to each token."""
        if not self.fused:
            return first[..., None] + x.cumsum(2)
        lines = x.flatten(0, 1)[..., None]
        ones = x.new_ones(()).expand(lines.shape)
        sums, _ = elementwise(ones, lines, first.flatten()[:, None], backend="triton")
        return sums.view(x.shape)
