"""Benchmarks of MASFormer: a layer of each span, and a stack of them, beside dense attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from attnspec.conformance.bench.inputs import attention_cost, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark, Cost, Rival, Unavailable
from attnspec.conformance.bench.rivals import flex, sdpa, torch_sdpa, with_backward
from attnspec.conformance.contracts.patterns.longlora_speed import attend_folded
from attnspec.reference.patterns.masformer_spans import layer_spans

Span = tuple[Any, ...]
LAYERS, FULL_LAYERS, BLOCK = 24, 4, 1024
"""The paper's model has as many layers as GPT-Neo 1.3B; texts of 8192 tokens are its longest."""


def pairs_a_head(tokens: int, span: Span) -> float:
    """How many pairs a head of a causal layer attends to."""
    t = np.arange(tokens)
    before = t
    if span[0] == "block":
        before = np.minimum(t, t % span[1] + span[1] * span[2])
    elif span[0] == "window":
        before = np.minimum(t, span[1])
    return float(np.sum(before + 1))


def in_span(arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """The span as a FlexAttention mask function."""
    span = arguments["span"]

    def visible(batch: Any, h: Any, i: Any, j: Any) -> Any:
        if span[0] == "block":
            return (j <= i) & (i // span[1] - j // span[1] <= span[2])
        return (j <= i) & (i - j <= span[1])

    return visible


def folded_sdpa(backward: bool) -> Rival:
    """Blocks folded into the batch of torch's attention; there are no neighbours in it."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        kind, *sizes = arguments["span"]
        if kind != "block" or sizes[1] or q.shape[2] % sizes[0]:
            raise Unavailable("only blocks that divide the text, without neighbours, can be folded")
        grouped = q.shape[1] != k.shape[1]

        def forward() -> Any:
            return attend_folded(q, k, v, sizes[0], grouped)

        return with_backward(forward, (q, k, v)) if backward else forward

    return Rival("folded-sdpa", prepare)


def layer(
    device: str,
    tokens: int,
    heads: tuple[int, int],
    d: int,
    span: Span,
    backward: bool = False,
    rivals: Any = (),
) -> Benchmark:
    return Benchmark(
        "masformer.layer_attend",
        f"causal {tokens // 1024}k {'-'.join(map(str, span))} heads={heads[0]}/{heads[1]}"
        + (" forward+backward" if backward else ""),
        device,
        qkv(1, *heads, tokens, tokens, d, span=span),
        attention_cost(pairs=pairs_a_head(tokens, span), factor=3.5 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=forward_and_backward if backward else None,
        rivals=rivals,
        settings={"tokens": tokens, "d": d, "heads": list(heads), "span": list(span)},
    )


def cuda(tokens: int, heads: tuple[int, int], span: Span, backward: bool = False) -> Benchmark:
    rivals = (
        sdpa("flash", backward, causal=True),
        sdpa("cudnn", backward, causal=True),
        folded_sdpa(backward),
        flex(in_span, backward),
    )
    return layer("cuda", tokens, heads, 128, span, backward, rivals)


def stack_of(spans: Sequence[Span]) -> Callable[..., Callable[[], Any]]:
    """The timed call: the attention of every layer of a stack."""

    def call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[], Any]:
        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        return lambda: [function(q, k, v, span) for span in spans]

    return call


def repeated(rival: Rival, times: int) -> Rival:
    """A stack of `times` layers of one rival."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        once = rival.prepare(arguments)
        return lambda: [once() for _ in range(times)]

    return Rival(f"{rival.name} in all layers", prepare)


def stack(device: str, tokens: int, heads: int, d: int, rivals: tuple[Rival, ...]) -> Benchmark:
    """The paper's schedule: full layers at the bottom, blocks in all others."""
    spans: list[Span] = [
        ("full",) if full else ("block", BLOCK, 0) for full in layer_spans(LAYERS, FULL_LAYERS)
    ]
    one_layer = attention_cost(pairs=sum(pairs_a_head(tokens, span) for span in spans))

    def cost(arguments: Mapping[str, Any]) -> Cost:
        whole: Cost = one_layer(arguments)
        return Cost(whole.flops, whole.bytes * LAYERS)

    return Benchmark(
        "masformer.layer_attend",
        f"causal {tokens // 1024}k {FULL_LAYERS} full of {LAYERS} layers, heads={heads}",
        device,
        qkv(1, heads, heads, tokens, tokens, d),
        cost,
        dtype="bfloat16" if device == "cuda" else "float32",
        call=stack_of(spans),
        rivals=tuple(repeated(rival, LAYERS) for rival in rivals),
        settings={"tokens": tokens, "d": d, "heads": [heads, heads], "block": BLOCK},
    )


DENSE = (sdpa("flash", causal=True), sdpa("cudnn", causal=True))
CPU_RIVALS = (torch_sdpa(causal=True), folded_sdpa(False))
BENCHMARKS = (
    cuda(8192, (16, 16), ("block", BLOCK, 0)),
    cuda(8192, (16, 16), ("block", BLOCK, 0), backward=True),
    cuda(32768, (32, 8), ("block", BLOCK, 0), backward=True),
    cuda(32768, (32, 8), ("block", BLOCK, 1)),
    cuda(32768, (32, 8), ("window", 1023)),
    cuda(32768, (32, 8), ("window", 1023), backward=True),
    stack("cuda", 8192, 16, 128, DENSE),
    layer("cpu", 2048, (8, 8), 64, ("block", 256, 0), rivals=CPU_RIVALS),
    layer("cpu", 2048, (8, 2), 64, ("window", 255), rivals=CPU_RIVALS),
)
