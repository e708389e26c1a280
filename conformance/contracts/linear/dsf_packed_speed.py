"""Benchmarks of the packed operations of `dsf`: against one sequence after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from attnspec.conformance.bench.model import Benchmark, Rival
from attnspec.conformance.bench.rivals import with_backward
from attnspec.conformance.contracts.linear.dsf_speed import (
    drawn,
    matrix_flops,
    s6_flops,
    scan_cost,
)

SHARED = ("A", "D", "a", "offsets")


def lengths(tokens: int, sequences: int) -> list[int]:
    """Offsets of sequences as unequal as those of a corpus: a few hold most of the tokens."""
    import numpy as np

    cuts = np.sort(np.random.default_rng(0).beta(0.5, 1.5, sequences - 1)) * tokens
    return [0, *(int(cut) for cut in cuts), tokens]


def laid(shapes: Mapping[str, tuple[int, ...]], positive: str, ends: list[int]) -> Any:
    """`drawn` and the offsets."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        return {**drawn(shapes, positive)(device, dtype), "offsets": torch.tensor(ends).to(device)}

    return make


def floats(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(x for x in arguments.values() if x.is_floating_point())


def differentiated(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Forward and backward in every argument but the offsets."""
    return with_backward(lambda: function(**arguments), floats(arguments))


def one_by_one(operation: str, axis: int, ends: list[int], backward: bool) -> Rival:
    """The operation for one sequence on each of them."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import importlib

        import torch

        alone = getattr(importlib.import_module("attnspec.fast.linear.dsf"), operation)

        def forward() -> Any:
            outputs = []
            for first, last in pairwise(ends):
                own = {
                    name: x if name in SHARED else x.narrow(axis, first, last - first)[None]
                    for name, x in arguments.items()
                    if name != "offsets"
                }
                outputs.append(alone(**own)[0][0])
            return torch.cat(outputs, axis)

        return with_backward(forward, floats(arguments)) if backward else forward

    return Rival("attnspec, one by one", prepare)


def packed(
    operation: str, alone: str, device: str, shapes: Mapping[str, tuple[int, ...]],
    positive: str, out: str, flops: Any, sequences: int, backward: bool,
) -> Benchmark:  # fmt: skip
    axis = len(shapes[out]) - 2
    ends = lengths(shapes[out][axis], sequences)
    name = f"{shapes[out][axis]} tokens, {sequences} sequences, {shapes[out]}"
    return Benchmark(
        f"dsf.{operation}",
        f"{name} forward+backward" if backward else name,
        device,
        laid(shapes, positive, ends),
        scan_cost(out, flops, 3.0 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=differentiated if backward else None,
        rivals=(one_by_one(alone, axis, ends, backward),),
        settings={"tokens": ends[-1], "sequences": sequences},
    )


def benchmarks(device: str, tokens: int, wide: int, sequences: int) -> list[Benchmark]:
    cells = dict.fromkeys(("f", "i", "o", "z"), (tokens, wide))
    rows = {"Delta": (tokens, wide), "A": (wide, 16), "b": (tokens, 16), "c": (tokens, 16),
            "u": (tokens, wide), "D": (wide,)}  # fmt: skip
    heads = wide // 64
    keys = (heads, tokens, 128)
    ssd = {"Delta": keys[:2], "a": (heads,), "b": keys, "c": keys, "u": (heads, tokens, 64)}
    kinds = (
        ("qlstm_packed", "qlstm", cells, "", "z", lambda a: 30.0 * a["z"].numel()),
        ("s6_packed", "s6_scan", rows, "Delta A", "u", s6_flops),
        ("ssd_packed", "ssd_scan", ssd, "Delta a", "u", matrix_flops("b", "u")),
    )
    return [
        packed(operation, alone, device, shapes, positive, out, flops, sequences, backward)
        for operation, alone, shapes, positive, out, flops in kinds
        for backward in (False, True)
    ]


BENCHMARKS = (*benchmarks("cuda", 65536, 2048, 128), *benchmarks("cpu", 2048, 128, 16))
