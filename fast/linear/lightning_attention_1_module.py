"""TransNormerLLM as modules: a block to put anywhere, and the small decoder made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnspec.fast.backend import check_integer, check_size, check_tensor
from attnspec.fast.linear.lightning_attention_1 import (
    layer_slopes,
    lrpe_frequencies,
    srms_norm,
    tnl_block,
)
from attnspec.fast.linear.lightning_attention_1_layers import Options, check_options, state_shape

WEIGHTS = ("Wqkvu", "Wo", "Wv", "Wu", "Wd")


class TransNormerBlock(nn.Module):
    """Layer `layer` of `n_layers`: x + GLA(norm(x)), then the same with SGLU of `hidden` channels.

    `lrpe` gives the layer its relative position, by default on layer 0 alone; its frequencies are
    parameters unless `train_lrpe` is False. Slopes are fixed. `width` is a multiple of `heads`;
    `hidden` is 8/3 of it, rounded up to a multiple of 8, unless given.
    """

    slopes: Tensor
    theta: Tensor | None

    def __init__(
        self, width: int, heads: int, *, layer: int = 0, n_layers: int = 1,
        hidden: int | None = None, lrpe: bool | None = None, train_lrpe: bool = True,
        base: float = 10000.0, decay_rule: str = "geometric", v_activation: bool = False,
        gate: str = "linear", norm: str = "srms", eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        check_integer("width", width, least=1)
        check_integer("heads", heads, least=1)
        if width % heads:
            raise ValueError(f"heads: got {heads}, expected a divisor of {width} (width)")
        if hidden is not None:
            check_integer("hidden", hidden, least=1)
        check_integer("n_layers", n_layers, least=1)
        check_integer("layer", layer, least=0)
        if layer >= n_layers:
            raise ValueError(f"layer: got {layer}, expected an integer below {n_layers} (n_layers)")
        slopes = layer_slopes(heads, layer, n_layers, decay_rule=decay_rule)
        check_options(Options(v_activation, gate, norm, eps))
        self.width = width
        inner = 8 * math.ceil(width / 3) if hidden is None else hidden
        shapes = {
            "Wqkvu": (width, 4 * width),
            "Wo": (width, width),
            "Wv": (width, inner),
            "Wu": (width, inner),
            "Wd": (inner, width),
        }
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) / shape[0] ** 0.5))
        self.register_buffer("slopes", slopes.float())
        theta = lrpe_frequencies(heads, width // heads, base).float()
        if not (layer == 0 if lrpe is None else lrpe):
            self.register_parameter("theta", None)
        elif train_lrpe:
            self.theta = nn.Parameter(theta)
        else:
            self.register_buffer("theta", theta)
        self.options: dict[str, Any] = {
            "v_activation": v_activation,
            "gate": gate,
            "norm": norm,
            "eps": eps,
        }

    def forward(
        self, x: Tensor, state: Tensor | None = None, offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        """x (batch, T, width) with what the layer adds to it, and the state behind the last token.

        The state of an earlier call continues it, with `offset` the tokens before this one.
        """
        params = {name: getattr(self, name) for name in (*WEIGHTS, "slopes", "theta")}
        return tnl_block(x, params, state, offset, **self.options)

    @torch.no_grad()
    def step(self, x: Tensor, state: Tensor | None, offset: int) -> tuple[Tensor, Tensor]:
        """One more token, x (batch, 1, width), behind `offset` others; without a gradient."""
        check_tensor("x", x, ("batch", "T", "width"))
        check_size("x", x.shape[1], 1, "one token")
        return self(x, state, offset)

    def state_size(self, tokens: int) -> int:
        """How many numbers the state of one sequence holds after `tokens` tokens: always as many.

        One matrix (d', d) a head, d = width / heads, d' = 2 d with LRPE.
        """
        params = {"slopes": self.slopes, "theta": self.theta}
        return math.prod(state_shape(params, self.width))


class TransNormer(nn.Module):
    """A decoder: embeddings times the root of the width, blocks, a norm, and the tokens' logits.

    The logits are products with the embeddings if `tied`. `lrpe` says which layers have a relative
    position, the first alone by default. Further options are those of `TransNormerBlock`.
    """

    def __init__(
        self, vocabulary: int, width: int, heads: int, n_layers: int, *,
        lrpe: Sequence[bool] | None = None, scale_embeddings: bool = True, tied: bool = False,
        eps: float = 1e-6, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        check_integer("vocabulary", vocabulary, least=1)
        check_integer("n_layers", n_layers, least=1)
        flags = [layer == 0 for layer in range(n_layers)] if lrpe is None else list(lrpe)
        check_size("lrpe", len(flags), n_layers, "one flag for each layer")
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.blocks = nn.ModuleList(
            TransNormerBlock(
                width, heads, layer=layer, n_layers=n_layers, lrpe=flag, eps=eps, **options,
            )
            for layer, flag in enumerate(flags)
        )  # fmt: skip
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.scale = width**0.5 if scale_embeddings else 1.0
        self.eps = eps

    def forward(
        self, tokens: Tensor, states: Sequence[Tensor] | None = None, offset: int = 0
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits (batch, T, vocabulary) of tokens (batch, T), and a state for each layer."""
        check_tensor("tokens", tokens, ("batch", "T"), (torch.int64, torch.int32))
        if states is not None:
            check_size("states", len(states), len(self.blocks), "one for each layer")
        x, last = self.scale * self.embedding(tokens), []
        for layer, block in enumerate(self.blocks):
            x, state = block(x, None if states is None else states[layer], offset)
            last.append(state)
        return self.head(srms_norm(x, self.eps)), tuple(last)

    @torch.no_grad()
    def step(
        self, tokens: Tensor, states: Sequence[Tensor] | None, offset: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits (batch, 1, vocabulary) of one more token (batch, 1), behind `offset` others."""
        check_tensor("tokens", tokens, ("batch", "T"), (torch.int64, torch.int32))
        check_size("tokens", tokens.shape[1], 1, "one token")
        return self(tokens, states, offset)
