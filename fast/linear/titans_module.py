"""Titans as a layer of a PyTorch model, in one of the paper's layouts."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from attnspec.fast.backend import check_choice, check_integer
from attnspec.fast.blocks import Block, numbers
from attnspec.fast.linear.titans_checks import Layers
from attnspec.fast.linear.titans_deep import titans_chunk_mlp
from attnspec.fast.linear.titans_inputs import token_inputs, token_step_sizes
from attnspec.fast.linear.titans_layouts import mac_segment, mag, mal, persistent_prefix
from attnspec.fast.linear.titans_steps import STEPS, TitansState, first_state

LAYOUTS = ("mac", "mag", "mal", "memory")
MOMENTUM, FORGETTING = 0.5, 0.01
"""What training begins with, and the step at a quarter of its most."""


class TitansBlock(Block):
    """One head of attention and a memory that learns at test time, x + layer(norm(x)).

    `layout` is "mac", "mag", "mal", or "memory" for the memory alone, whose inputs then pass the
    activation and convolution of the paper; queries and keys of a memory have norm 1. `depth`
    layers of `hidden` channels make the memory, 1 the linear one; its gradient chunks have `chunk`
    tokens. MAC works through segments of `segment` tokens, MAG and MAL look `window` tokens back;
    `prefix` persistent tokens precede all. Rates are the sigmoid of what is affine in the input,
    the step at most `theta_max`: 1 / chunk by default, because a chunk of equal keys takes as many
    steps at once and overshoots with more. MAC is causal by token unless `tokenwise` is False, and
    has no steps then.
    """

    def __init__(
        self, width: int, *, layout: str = "mag", memory_width: int = 64, depth: int = 2,
        hidden: int | None = None, chunk: int = 64, prefix: int = 4, window: int = 512,
        segment: int = 512, theta_max: float | None = None, tokenwise: bool = True,
        filters: int = 4,
    ) -> None:  # fmt: skip
        super().__init__(width)
        check_choice("layout", layout, LAYOUTS)
        inner = 4 * memory_width if hidden is None else hidden
        for name, value in (
            ("memory_width", memory_width), ("depth", depth), ("hidden", inner), ("chunk", chunk),
            ("window", window), ("segment", segment), ("filters", filters),
        ):  # fmt: skip
            check_integer(name, value, least=1)
        check_integer("prefix", prefix, least=0)
        self.layout, self.chunk, self.window, self.segment = layout, chunk, window, segment
        self.theta_max = 1 / chunk if theta_max is None else theta_max
        self.tokenwise = tokenwise
        widths = [memory_width, *[inner] * (depth - 1), width]
        self.first = _matrices(*itertools.pairwise(widths))
        self.mem = _matrices((width, memory_width), (width, memory_width), (width, width))
        self.rates = nn.ParameterList(_affine(width, x) for x in (0.25, MOMENTUM, FORGETTING))
        self.out = nn.Linear(width, width, bias=False)
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

    def init_state(self, batch: int) -> TitansState:
        """The state after the persistent tokens."""
        return first_state(self, batch)

    def state_size(self, tokens: int) -> int:
        rows = asked = 0
        if self.layout == "mac" and tokens:
            rows = 2 * ((tokens - 1) % self.segment + 1)
            asked = numbers(tuple(self.first))
        elif self.layout == "mag":
            rows = min(tokens, self.window)
        elif self.layout == "mal":
            prefix = self.prefix.shape[0]
            rows = min(tokens + prefix, self.window) - min(prefix, self.window)
        return super().state_size(tokens) + 2 * rows * self.width + asked

    def mix(self, x: Tensor, state: TitansState | None) -> tuple[Tensor, TitansState | None]:
        if state is None:
            return self.out(getattr(self, f"_{self.layout}")(x)), None
        outputs = []
        for row in x.split(1, 1):
            y, state = STEPS[self.layout](self, row, state)
            outputs.append(y)
        return self.out(torch.cat(outputs, 1) if outputs else x), state

    def step_sizes(self, x: Tensor) -> tuple[Tensor, ...]:
        """theta, eta and alpha (batch, tokens) of rows x (batch, tokens, width)."""
        ones = torch.ones_like(x[..., :1])
        rates = token_step_sizes(torch.cat([x, ones], -1), *self.rates, theta_max=self.theta_max)
        return tuple(rate[:, 0] for rate in rates)

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v (batch, 1, tokens, channels) of the memory alone."""
        return tuple(
            token_inputs(x, matrix, filters, normalise=i < 2)[:, None]
            for i, (matrix, filters) in enumerate(zip(self.mem, self.filters, strict=True))
        )

    def _mac(self, x: Tensor) -> Tensor:
        W: Layers = tuple(self.first)
        S, outputs = None, []
        for rows in x.split(self.segment, 1):
            o, W, S = mac_segment(
                rows, self.prefix, W, S, tuple(self.attn), tuple(self.mem), self.step_sizes(rows),
                tuple(self.gains), self.chunk, tokenwise=self.tokenwise, normalise=True,
            )  # fmt: skip
            outputs.append(o)
        return torch.cat(outputs, 1)

    def _mag(self, x: Tensor) -> Tensor:
        rates = self.step_sizes(persistent_prefix(self.prefix, x))
        return mag(
            x, self.prefix, tuple(self.first), None, tuple(self.attn), tuple(self.mem), rates,
            tuple(self.gains), self.window, self.chunk, normalise=True,
        )[0]  # fmt: skip

    def _mal(self, x: Tensor) -> Tensor:
        rates = self.step_sizes(persistent_prefix(self.prefix, x))
        return mal(
            x, self.prefix, tuple(self.first), None, tuple(self.attn), tuple(self.mem), rates,
            self.window, self.chunk, normalise=True,
        )[0]  # fmt: skip

    def _memory(self, x: Tensor) -> Tensor:
        rows = persistent_prefix(self.prefix, x)
        q, k, v = self.inputs(rows)
        theta, eta, alpha = (rate[:, None] for rate in self.step_sizes(rows))
        y, _, _ = titans_chunk_mlp(
            tuple(self.first), None, k, v, q, (theta, eta, alpha), self.chunk
        )
        return y[:, 0, self.prefix.shape[0] :]


def _matrices(*shapes: tuple[int, int]) -> nn.ParameterList:
    return nn.ParameterList(torch.randn(shape) / shape[0] ** 0.5 for shape in shapes)


def _affine(width: int, rate: float) -> Tensor:
    """Weights (width + 1, 1) that give every row the same rate, the last of them the bias."""
    weights = torch.zeros(width + 1, 1)
    weights[-1] = torch.logit(torch.tensor(rate))
    return weights


def _own_token(filters: int, width: int) -> Tensor:
    """Filters that start as none: every token is itself."""
    weights = torch.zeros(filters, width)
    weights[-1] = 1
    return weights
