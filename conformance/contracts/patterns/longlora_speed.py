"""Benchmarks of LongLoRA: training steps and forward passes, beside dense and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from attnspec.conformance.bench.inputs import attention_cost, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark, Rival
from attnspec.conformance.bench.rivals import flex, sdpa, torch_sdpa, with_backward
from attnspec.reference.patterns.longlora_groups import group_starts


def pairs_of(tokens: int, G: int, shifted: bool, sinks: int = 0) -> float:
    """How many pairs a plain or a shifted head attends to, if `sinks` tokens are seen by all."""
    ends = [*group_starts(tokens, G, shifted).tolist(), tokens]
    return sum((b - a) * ((b - a + 1) / 2 + min(sinks, a)) for a, b in pairwise(ends))


def pairs_a_head(tokens: int, G: int) -> float:
    """How many pairs a head attends to, on average over plain and shifted ones."""
    return (pairs_of(tokens, G, False) + pairs_of(tokens, G, True)) / 2


def same_segment(G: int, plain: int) -> Callable[..., Any]:
    """Whether tokens i and j are together in head h, of which the first `plain` are not shifted."""
    moved = G - G // 2

    def together(h: Any, i: Any, j: Any) -> Any:
        first = (h >= plain) * moved
        return (i + first) // G == (j + first) // G

    return together


def groups(arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """The causal segments as a FlexAttention mask function."""
    together = same_segment(arguments["G"], arguments["q"].shape[1] // 2)
    return lambda batch, h, i, j: (j <= i) & together(h, i, j)


def attend_folded(q: Any, k: Any, v: Any, G: int, grouped: bool = False) -> Any:
    """Causal attention in groups of G tokens, a divisor of T, folded into the batch; `grouped` says
    that q has more heads than k and v.
    """
    import torch

    def fold(x: Any) -> Any:
        return x.unflatten(2, (-1, G)).transpose(1, 2).flatten(0, 1)

    out = torch.nn.functional.scaled_dot_product_attention(
        fold(q), fold(k), fold(v), is_causal=True, enable_gqa=grouped
    )
    return out.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3)


def rolled_sdpa(backward: bool) -> Rival:
    """The paper's way on torch's attention: roll half of the heads, fold groups into the batch.

    Its first rows differ, which costs the same. T must be a multiple of G.
    """

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        G, half = arguments["G"], q.shape[1] // 2

        def roll(x: Any, by: int) -> Any:
            return torch.cat([x[:, :half], x[:, half:].roll(by, 2)], dim=1)

        def rolled(x: Any) -> Any:
            if x.shape[1] < 2 * half:
                x = x.repeat_interleave(2 * half // x.shape[1], 1)
            return roll(x, -(G // 2))

        def forward() -> Any:
            return roll(attend_folded(rolled(q), rolled(k), rolled(v), G), G // 2)

        return with_backward(forward, (q, k, v)) if backward else forward

    return Rival("rolled-sdpa", prepare)


def training(
    device: str,
    tokens: int,
    heads: tuple[int, int],
    d: int,
    ratio: int = 4,
    backward: bool = False,
    rivals: Any = (),
) -> Benchmark:
    G = tokens // ratio
    return Benchmark(
        "longlora.grouped_attend",
        f"causal {tokens // 1024}k G={G} heads={heads[0]}/{heads[1]}"
        + (" forward+backward" if backward else ""),
        device,
        qkv(1, *heads, tokens, tokens, d, G=G),
        attention_cost(pairs=pairs_a_head(tokens, G), factor=3.5 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=forward_and_backward if backward else None,
        rivals=rivals,
        settings={"tokens": tokens, "d": d, "heads": list(heads), "G": G},
    )


def cuda(tokens: int, kv_heads: int, backward: bool, ratio: int = 4) -> Benchmark:
    rivals = (
        sdpa("flash", backward, causal=True),
        sdpa("cudnn", backward, causal=True),
        rolled_sdpa(backward),
        flex(groups, backward, per_head=True),
    )
    return training("cuda", tokens, (32, kv_heads), 128, ratio, backward, rivals)


CPU_RIVALS = (torch_sdpa(causal=True), rolled_sdpa(False))
BENCHMARKS = (
    cuda(8192, 32, backward=True),
    cuda(32768, 32, backward=True),
    cuda(32768, 8, backward=True),
    cuda(32768, 32, backward=False),
    cuda(65536, 32, backward=False),
    cuda(32768, 32, backward=False, ratio=16),
    training("cpu", 2048, (8, 8), 64, rivals=CPU_RIVALS),
    training("cpu", 2048, (8, 2), 64, rivals=CPU_RIVALS),
)
