"""Timing: medians with quartiles, by device events on CUDA and by the clock on CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the quartiles and how many calls they come from."""

    median: float
    lower: float
    upper: float
    calls: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def time_call(call: Callable[[], Any], device: str, budget: float = 0.4) -> Timing:
    """Time `call` for about `budget` seconds after a warm-up, at least five times.

    On CUDA the cache is flushed between calls, so that data smaller than it are read from memory.
    """
    samples = _cuda_samples(call, budget) if device == "cuda" else _cpu_samples(call, budget)
    lower, median, upper = statistics.quantiles(samples, n=4)
    return Timing(median, lower, upper, len(samples))


def _cpu_samples(call: Callable[[], Any], budget: float) -> list[float]:
    call()
    samples: list[float] = []
    while len(samples) < 5 or (sum(samples) < budget and len(samples) < 1000):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


def _cuda_samples(call: Callable[[], Any], budget: float) -> list[float]:
    import torch

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    once = max(start.elapsed_time(end) / 1e3, 1e-6)
    count = int(min(max(budget / once, 5), 200))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for first, last in events:
        flush.zero_()
        first.record()
        call()
        last.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) / 1e3 for first, last in events]


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` as a CUDA graph to be replayed, after a warm-up on a stream of its own."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_memory(call: Callable[[], Any], device: str) -> int | None:
    """Bytes that one call holds at most beyond what was there before it; None where nobody counts.

    What it returns is among them.
    """
    if device != "cuda":
        return None
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do, measured in the same run: the roofline's two numbers."""

    flops_per_second: float
    bytes_per_second: float


def measure_ceilings(device: str, dtype: str) -> Ceilings:
    """A large copy (bytes read and written) and a large matrix product in `dtype`."""
    import torch

    kind = getattr(torch, dtype)
    n, length = (8192, 2**30) if device == "cuda" else (1024, 2**26)
    source = torch.empty(length, dtype=torch.int8, device=device).fill_(1)
    target = torch.empty_like(source)
    copied = time_call(lambda: target.copy_(source), device)
    a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
    product = time_call(lambda: a @ b, device)
    return Ceilings(2 * n**3 / product.median, 2 * length / copied.median)
