"""Benchmarks of SnapKV: what scoring and selection add to a prefill, and the smaller cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnspec.conformance.bench.inputs import attention_cost, bytes_of, qkv
from attnspec.conformance.bench.model import Benchmark, Cost, Rival
from attnspec.conformance.bench.rivals import sdpa, torch_sdpa


def keys_once(arguments: Mapping[str, Any]) -> Cost:
    """Window scores read the keys once and write one weight for each row and key."""
    q, k, w = arguments["q"], arguments["k"], arguments["w"]
    rows = q.shape[0] * q.shape[1] * w * k.shape[2]
    return Cost(2.0 * rows * k.shape[3], bytes_of(k) + rows * k.element_size())


def window_inputs(device: str, dtype: str) -> dict[str, Any]:
    arguments = qkv(1, 32, 8, 131072, 131072, 128)(device, dtype)
    return {"q": arguments["q"], "k": arguments["k"], "w": 64}


def sums_cost(arguments: Mapping[str, Any]) -> Cost:
    """Scores read the keys once and write one number for each head and key of the prefix."""
    q, k, w = arguments["q"], arguments["k"], arguments["w"]
    heads = q.shape[0] * q.shape[1]
    written = 4.0 * heads * (k.shape[2] - w)
    return Cost(2.0 * heads * w * k.shape[2] * k.shape[3], bytes_of(k) + written)


def window_logits(q: Any, k: Any) -> Any:
    """Scores (1, heads, w, T) of q, the last w queries, by the definition, in float32."""
    import torch

    w, group = q.shape[2], q.shape[1] // k.shape[1]
    keys = k.repeat_interleave(group, 1) if group > 1 else k
    scores = (q @ keys.mT).float() * k.shape[3] ** -0.5
    scores[..., -w:] += torch.full((w, w), -torch.inf, device=q.device).triu(1)
    return scores


def scored_inputs(kv_heads: int, given: bool) -> Any:
    """The last 64 queries of 131072 tokens, all keys, and the rows' log denominators if `given`."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        arguments = qkv(1, 32, kv_heads, 64, 131072, 128)(device, dtype)
        q, k = arguments["q"], arguments["k"]
        return {
            "q": q,
            "k": k,
            "w": 64,
            "lse": window_logits(q, k).logsumexp(-1) if given else None,
        }

    return make


def read_of_keys(arguments: Mapping[str, Any]) -> Any:
    """What any kernel needs to look at all keys."""
    import torch

    k = arguments["k"]
    return lambda: torch.sum(k, dtype=torch.float32)


def softmax_sums(arguments: Mapping[str, Any]) -> Any:
    """The definition in torch: products, softmax and sums, through memory."""
    q, k, w = arguments["q"], arguments["k"], arguments["w"]
    return lambda: window_logits(q, k).softmax(-1)[..., : k.shape[2] - w].sum(2)


def scored(kv_heads: int, given: bool) -> Benchmark:
    return Benchmark(
        "snapkv.window_scores",
        f"last 64 rows of 128k tokens, heads 32/{kv_heads}{', lse given' if given else ''}",
        "cuda",
        scored_inputs(kv_heads, given),
        sums_cost,
        rivals=(Rival("torch sum of k", read_of_keys), Rival("torch", softmax_sums)),
        settings={"tokens": 131072, "d": 128, "heads": 32, "kv_heads": kv_heads, "w": 64},
    )


BENCHMARKS = (
    *(scored(kv_heads, given) for kv_heads in (32, 8) for given in (True, False)),
    Benchmark(
        "snapkv.prefill",
        "32k tokens to 2k slots, heads 32/8",
        "cuda",
        qkv(1, 32, 8, 32768, 32768, 128, w=32, C=2048, p=7, pool="max"),
        attention_cost(pairs=32768 * 32769 / 2),
        rivals=(sdpa("flash", causal=True), sdpa("cudnn", causal=True)),
        settings={"tokens": 32768, "d": 128, "heads": 32, "kv_heads": 8, "w": 32, "C": 2048},
    ),
    Benchmark(
        "snapkv.window_attention",
        "last 64 rows of 128k tokens, heads 32/8",
        "cuda",
        window_inputs,
        keys_once,
        settings={"tokens": 131072, "d": 128, "heads": 32, "kv_heads": 8, "w": 64},
    ),
    Benchmark(
        "snapkv.prefill",
        "4k tokens to 512 slots, heads 8/2",
        "cpu",
        qkv(1, 8, 2, 4096, 4096, 64, w=32, C=512),
        attention_cost(pairs=4096 * 4097 / 2),
        dtype="float32",
        rivals=(torch_sdpa(causal=True),),
        settings={"tokens": 4096, "d": 64, "heads": 8, "kv_heads": 2, "w": 32, "C": 512},
    ),
)
