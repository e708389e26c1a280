"""Titans as a drop-in layer: rows in, rows out, in one of the paper's layouts."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from attnspec.fast.backend import check_choice, check_integer, check_tensor
from attnspec.fast.linear.titans_checks import Layers
from attnspec.fast.linear.titans_deep import titans_chunk_mlp
from attnspec.fast.linear.titans_inputs import token_inputs, token_step_sizes
from attnspec.fast.linear.titans_layouts import mac_segment, mag, mal, persistent_prefix

LAYOUTS = ("mac", "mag", "mal", "memory")


class TitansBlock(nn.Module):
    """One head of attention and a memory that learns at test time, x + layer(x).

    `layout` is "mac", "mag", "mal", or "memory" for the memory alone, whose inputs then pass the
    activation, convolution and norm of the paper. `depth` layers of `hidden` channels make the
    memory, 1 the linear one; its gradient chunks have `chunk` tokens. MAC works through segments of
    `segment` tokens, MAG and MAL look `window` tokens back; `prefix` persistent tokens precede all.
    Rates are linear in the input. MAC is causal by token unless `tokenwise` is False.
    """

    def __init__(
        self, width: int, *, layout: str = "mag", memory_width: int = 64, depth: int = 2,
        hidden: int | None = None, chunk: int = 64, prefix: int = 4, window: int = 512,
        segment: int = 512, theta_max: float = 1.0, tokenwise: bool = True, filters: int = 4,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("layout", layout, LAYOUTS)
        for name, value in (
            ("width", width), ("memory_width", memory_width), ("depth", depth), ("chunk", chunk),
            ("window", window), ("segment", segment), ("filters", filters),
        ):  # fmt: skip
            check_integer(name, value, least=1)
        check_integer("prefix", prefix, least=0)
        self.layout, self.chunk, self.window, self.segment = layout, chunk, window, segment
        self.theta_max, self.tokenwise = theta_max, tokenwise
        inner = 4 * memory_width if hidden is None else hidden
        widths = [memory_width, *[inner] * (depth - 1), width]
        self.first = _matrices(*itertools.pairwise(widths))
        self.mem = _matrices((width, memory_width), (width, memory_width), (width, width))
        self.rates = _matrices((width, 1), (width, 1), (width, 1))
        self.out = nn.Linear(width, width, bias=False)
        self.norm = nn.RMSNorm(width)
        if prefix:
            self.prefix = nn.Parameter(0.02 * torch.randn(prefix, width))
        else:
            self.register_buffer("prefix", torch.zeros(0, width))
        if layout == "memory":
            sizes = (memory_width, memory_width, width)
            self.filters = nn.ParameterList(_own_token(filters, size) for size in sizes)
        else:
            self.attn = _matrices(*[(width, width)] * 3)
        if layout in ("mac", "mag"):
            self.gains = nn.ParameterList(torch.ones(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, T, width) plus what the layer adds to it."""
        check_tensor("x", x, ("batch", "T", "width"))
        return x + self.out(getattr(self, f"_{self.layout}")(self.norm(x)))

    def _steps(self, x: Tensor) -> tuple[Tensor, ...]:
        rates = token_step_sizes(x, *self.rates, theta_max=self.theta_max)
        return tuple(rate[:, 0] for rate in rates)

    def _mac(self, x: Tensor) -> Tensor:
        W: Layers = tuple(self.first)
        S, outputs = None, []
        for rows in x.split(self.segment, 1):
            o, W, S = mac_segment(
                rows, self.prefix, W, S, tuple(self.attn), tuple(self.mem), self._steps(rows),
                tuple(self.gains), self.chunk, tokenwise=self.tokenwise,
            )  # fmt: skip
            outputs.append(o)
        return torch.cat(outputs, 1)

    def _mag(self, x: Tensor) -> Tensor:
        rates = self._steps(persistent_prefix(self.prefix, x))
        return mag(
            x, self.prefix, tuple(self.first), None, tuple(self.attn), tuple(self.mem), rates,
            tuple(self.gains), self.window, self.chunk,
        )[0]  # fmt: skip

    def _mal(self, x: Tensor) -> Tensor:
        rates = self._steps(persistent_prefix(self.prefix, x))
        return mal(
            x, self.prefix, tuple(self.first), None, tuple(self.attn), tuple(self.mem), rates,
            self.window, self.chunk,
        )[0]  # fmt: skip

    def _memory(self, x: Tensor) -> Tensor:
        rows = persistent_prefix(self.prefix, x)
        q, k, v = (
            token_inputs(rows, matrix, filters, normalise=i < 2)[:, None]
            for i, (matrix, filters) in enumerate(zip(self.mem, self.filters, strict=True))
        )
        theta, eta, alpha = (rate[:, None] for rate in self._steps(rows))
        y, _, _ = titans_chunk_mlp(
            tuple(self.first), None, k, v, q, (theta, eta, alpha), self.chunk
        )
        return y[:, 0, self.prefix.shape[0] :]


def _matrices(*shapes: tuple[int, int]) -> nn.ParameterList:
    return nn.ParameterList(torch.randn(shape) / shape[0] ** 0.5 for shape in shapes)


def _own_token(filters: int, width: int) -> Tensor:
    """Filters that start as none: every token is itself."""
    weights = torch.zeros(filters, width)
    weights[-1] = 1
    return weights
