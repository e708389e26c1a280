"""Benchmarks of Flowformer: time in proportion to the tokens, and constant work a decoded one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import bytes_of, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark, Cost, Rival, Unavailable
from attnspec.conformance.bench.rivals import sdpa, torch_sdpa


def linear_cost(factor: float = 1.0) -> Any:
    """q, k, v read and the output written once; two products with the state a token."""

    def cost(arguments: Mapping[str, Any]) -> Cost:
        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        batch, heads, tokens, d = q.shape
        dv = v.shape[3]
        moved = bytes_of(q, k, v) + batch * heads * tokens * dv * q.element_size()
        flops = 2.0 * batch * heads * (tokens + k.shape[2]) * d * dv
        return Cost(flops * factor, moved * factor)

    return cost


def authors(causal: bool, compiled: bool = False) -> Rival:
    """The published form in plain torch: with causal order it keeps every state in memory."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        batch, heads, tokens, d = q.shape
        if causal and batch * heads * tokens * d * v.shape[3] * 4 > 2**35:
            raise Unavailable("the states of all tokens are larger than 32 GiB")
        eps = 1e-6

        def normal(q: Any, k: Any, v: Any) -> Any:
            a, b = torch.sigmoid(q.float()), torch.sigmoid(k.float())
            into = 1 / ((a + eps) * (b.sum(2, keepdim=True) + eps)).sum(-1)
            out_of = 1 / ((b + eps) * (a.sum(2, keepdim=True) + eps)).sum(-1)
            sink = ((a + eps) * ((b * out_of[..., None]).sum(2, keepdim=True) + eps)).sum(-1)
            source = ((b + eps) * ((a * into[..., None]).sum(2, keepdim=True) + eps)).sum(-1)
            c = torch.softmax(source.clamp(-1, 1), -1) * k.shape[2]
            gate = torch.sigmoid(sink * (q.shape[2] / k.shape[2]))
            state = b.mT @ (v.float() * c[..., None])
            return (((a * into[..., None]) @ state) * gate[..., None]).to(q.dtype)

        def ordered(q: Any, k: Any, v: Any) -> Any:
            a, b = torch.sigmoid(q.float()), torch.sigmoid(k.float())
            N = torch.arange(1, tokens + 1, device=q.device, dtype=torch.float32)
            into = 1 / ((a + eps) * (b.cumsum(2) + eps)).sum(-1)
            out_of = 1 / ((b + eps) * (a.cumsum(2) + eps)).sum(-1)
            weighed = (b * (out_of * N)[..., None]).cumsum(2), (a * (into * N)[..., None]).cumsum(2)
            sink = ((a + eps) * (weighed[0] + eps)).sum(-1) / N
            source = (((b + eps) * (weighed[1] + eps)).sum(-1) / N).clamp(-1, 1).exp()
            u = v.float() * (source / source.cumsum(-1) * N)[..., None]
            states = torch.einsum("bhtd,bhte->bhtde", b, u).cumsum(2)
            out = torch.einsum("bhtd,bhtde->bhte", a * into[..., None], states)
            return (out * torch.sigmoid(sink)[..., None]).to(q.dtype)

        function: Callable[..., Any] = ordered if causal else normal
        if compiled:
            function = torch.compile(function)
        return lambda: function(q, k, v)

    return Rival("authors' form" + (", torch.compile" if compiled else " in torch"), prepare)


def flow(
    device: str, heads: int, d: int, tokens: int, causal: bool, backward: bool, rivals: Any
) -> Benchmark:
    return Benchmark(
        f"flowformer.flow_attend{'_causal' if causal else ''}",
        f"{tokens // 1024}k tokens d={d}" + (" forward+backward" if backward else ""),
        device,
        qkv(1, heads, heads, tokens, tokens, d),
        linear_cost(3.0 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=forward_and_backward if backward else None,
        rivals=rivals,
        settings={"tokens": tokens, "d": d, "heads": heads},
    )


PLAIN = (authors(False), authors(False, compiled=True))
BENCHMARKS = (
    flow("cuda", 16, 64, 16384, False, False, (*PLAIN, sdpa("flash", causal=False))),
    flow("cuda", 16, 64, 131072, False, False, PLAIN),
    flow("cuda", 16, 64, 4096, True, False, (authors(True), sdpa("flash", causal=True))),
    flow("cuda", 16, 64, 16384, True, False, (authors(True), sdpa("flash", causal=True))),
    flow("cuda", 16, 64, 131072, True, False, (authors(True),)),
    flow("cuda", 16, 64, 1048576, True, False, ()),
    flow("cuda", 16, 64, 16384, True, True, (sdpa("flash", True, causal=True),)),
    flow("cpu", 8, 64, 4096, False, False, (authors(False), torch_sdpa(causal=False))),
    flow("cpu", 8, 32, 2048, True, False, (authors(True), torch_sdpa(causal=True))),
)
