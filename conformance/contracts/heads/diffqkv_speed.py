"""Benchmarks of DiffQKV attention: prefill, training and decode, beside grouped heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import attention_cost, bytes_of, forward_and_backward
from attnspec.conformance.bench.model import Benchmark, Cost, Rival
from attnspec.conformance.bench.rivals import flex, with_backward
from attnspec.reference.dense.attention import State


def unequal(
    heads: tuple[int, int, int], queries: int, keys: int, d: int, dv: int, **parameters: Any
) -> Callable[[str, str], dict[str, Any]]:
    """Random q, k and v with (Hq, Hk, Hv) heads."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        generator = torch.Generator(device).manual_seed(0)
        shapes = zip("qkv", heads, (queries, keys, keys), (d, d, dv), strict=True)
        arrays = {
            name: torch.randn(1, n, tokens, width, generator=generator, device=device)
            for name, n, tokens, width in shapes
        }
        return {n: x.to(getattr(torch, dtype)) for n, x in arrays.items()} | parameters

    return make


def cached(
    heads: tuple[int, int, int], keys: int, d: int, dv: int
) -> Callable[[str, str], dict[str, Any]]:
    """One new token, and the state of those before it: `keys` tokens in all."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        whole = unequal(heads, 1, keys, d, dv)(device, dtype)
        k, v = whole["k"], whole["v"]
        token = {"q": whole["q"], "k": k[:, :, -1:], "v": v[:, :, -1:]}
        return {"state": State(k[:, :, :-1], v[:, :, :-1]), **token}

    return make


def step_cost(arguments: Mapping[str, Any]) -> Cost:
    """The cache read once."""
    q, state = arguments["q"], arguments["state"]
    widths = state.k.shape[3] + state.v.shape[3]
    flops = 2.0 * q.shape[0] * q.shape[1] * (state.k.shape[2] + 1) * widths
    return Cost(flops, bytes_of(q, state.k, state.v))


def decoding(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Each call is the step after the last one, as a decoder takes them."""
    held = [arguments["state"]]
    token = {name: arguments[name] for name in ("q", "k", "v")}

    def call() -> Any:
        out, held[0] = function(held[0], **token)
        return out

    return call


def grouped() -> Rival:
    """A step of grouped attention, of as many key as value heads: torch's, on the cache it would
    hold, behind which the token is written in place.
    """

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        q, k, v, state = (arguments[name] for name in ("q", "k", "v", "state"))
        K, V = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        K, k = (x.repeat_interleave(V.shape[1] // K.shape[1], 1) for x in (K, k))

        def step() -> Any:
            K[:, :, -1:], V[:, :, -1:] = k, v
            return torch.nn.functional.scaled_dot_product_attention(q, K, V, enable_gqa=True)

        return step

    return Rival("torch-sdpa, grouped heads", prepare)


def selective_cost(arguments: Mapping[str, Any]) -> Cost:
    """All of k and, of each query head, c rows of v."""
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    batch, heads, queries, d = q.shape
    rows = batch * heads * queries
    read = rows * min(arguments["c"], v.shape[2]) * v.shape[3]
    pairs = rows * k.shape[2]
    moved = bytes_of(q, k) + min(read, v.numel()) * v.element_size()
    return Cost(2.0 * (pairs * d + read), moved)


def repeated(backward: bool = False) -> Rival:
    """torch's attention on keys and values repeated for every query head."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        causal = bool(arguments.get("causal")) and q.shape[2] == k.shape[2]

        def forward() -> Any:
            K, V = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, K, V, is_causal=causal)

        return with_backward(forward, (q, k, v)) if backward else forward

    return Rival("torch-sdpa, repeated heads", prepare)


def expanded(backward: bool = False) -> Rival:
    """FlexAttention, which knows one count of kv heads: the keys repeated beforehand."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        k, v = arguments["k"], arguments["v"]
        K = k.repeat_interleave(v.shape[1] // k.shape[1], 1)
        return flex(lambda a: _ordered, backward).prepare({**arguments, "k": K})

    return Rival("flex, repeated keys", prepare)


def _ordered(b: Any, h: Any, i: Any, j: Any) -> Any:
    return j <= i


def prefill(
    device: str, heads: tuple[int, int, int], tokens: int, d: int, dv: int, backward: bool = False
) -> Benchmark:
    return Benchmark(
        "diffqkv.diffqkv_attend",
        f"causal {tokens // 1024}k d={d} dv={dv} heads={'/'.join(map(str, heads))}"
        + (" forward+backward" if backward else ""),
        device,
        unequal(heads, tokens, tokens, d, dv, causal=True),
        attention_cost(factor=3.5 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=forward_and_backward if backward else None,
        rivals=(repeated(backward), *((expanded(backward),) if device == "cuda" else ())),
        settings={"tokens": tokens, "d": d, "dv": dv, "heads": list(heads)},
    )


def decode(device: str, heads: tuple[int, int, int], keys: int, d: int, dv: int) -> Benchmark:
    return Benchmark(
        "diffqkv.step",
        f"one token, {keys // 1024}k keys, d={d} dv={dv} heads={'/'.join(map(str, heads))}",
        device,
        cached(heads, keys, d, dv),
        step_cost,
        dtype="bfloat16" if device == "cuda" else "float32",
        call=decoding,
        rivals=(grouped(),),
        settings={"keys": keys, "d": d, "dv": dv, "heads": list(heads)},
    )


def selective(device: str, heads: tuple[int, int, int], keys: int, c: int) -> Benchmark:
    return Benchmark(
        "diffqkv.selective_attend",
        f"one query, {keys // 1024}k keys, c={c}, heads={'/'.join(map(str, heads))}",
        device,
        unequal(heads, 1, keys, 128, 128, c=c, causal=True),
        selective_cost,
        dtype="bfloat16" if device == "cuda" else "float32",
        rivals=(repeated(),),
        settings={"keys": keys, "c": c, "heads": list(heads)},
    )


STEPS = (
    decode("cuda", (32, 4, 16), 32768, 128, 128),
    decode("cuda", (32, 4, 16), 131072, 128, 128),
    decode("cuda", (32, 4, 16), 131072, 64, 128),
    selective("cuda", (32, 4, 16), 32768, 100),
    selective("cuda", (32, 4, 16), 131072, 100),
)
BENCHMARKS = (
    prefill("cuda", (32, 4, 16), 8192, 128, 128),
    prefill("cuda", (32, 4, 16), 32768, 128, 128),
    prefill("cuda", (32, 4, 16), 32768, 64, 128),
    prefill("cuda", (32, 4, 16), 8192, 128, 128, backward=True),
    *STEPS,
    *(each.in_a_graph() for each in STEPS),
    prefill("cpu", (8, 2, 4), 1024, 64, 64),
    decode("cpu", (8, 2, 4), 8192, 64, 64),
    selective("cpu", (8, 2, 4), 8192, 100),
)
