"""Run benchmarks: gate, ceilings, kernel and rivals side by side, a record of all of it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attnspec.conformance.bench.model import Benchmark, Unavailable
from attnspec.conformance.bench.timing import (
    Ceilings,
    Timing,
    captured,
    measure_ceilings,
    peak_memory,
    time_call,
)
from attnspec.conformance.certification import certify
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.report import environment


def run_benchmarks(
    benchmarks: Iterable[Benchmark],
    kernels: Iterable[Kernel],
    *,
    against: Sequence[str] | None = None,
    gates: Mapping[tuple[str, str, str], str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure every benchmark for every kernel of its operation and device.

    A kernel that fails the smoke profile in the benchmark's dtype gets no number ("red gate").
    `against` limits the rivals by name; `gates` are verdicts already known, "green" or not, by
    kernel, operation and dtype. The result is plain JSON data, of what was measured until then if
    the run is interrupted.
    """
    kernels = list(kernels)
    rows: list[dict[str, Any]] = []
    ceilings: dict[tuple[str, str], Ceilings] = {}
    known = dict(gates or {})
    interrupted = False
    try:
        for benchmark in benchmarks:
            key = (benchmark.device, benchmark.dtype)
            wanted = (benchmark.operation, benchmark.device)
            measured = [k for k in kernels if (k.operation, k.device) == wanted]
            try:
                if key not in ceilings:
                    ceilings[key] = measure_ceilings(*key)
                arguments = benchmark.make(benchmark.device, benchmark.dtype)
            except Exception as error:
                # Too large for the device, or the device is lost: what was measured must not be.
                rows += [_name(benchmark, kernel) | _said(error) for kernel in measured]
                continue
            for kernel in measured:
                if progress:
                    progress(f"{kernel.name} {benchmark.operation} {benchmark.name}")
                name = (kernel.name, kernel.operation, benchmark.dtype)
                if name not in known:
                    known[name] = _gate(kernel, benchmark.dtype)
                row = _describe(benchmark, kernel, arguments, ceilings[key])
                row["gate"] = known[name]
                if row["gate"] == "green":
                    _measure(row, benchmark, kernel, arguments, ceilings[key], against)
                rows.append(row)
            del arguments
    except KeyboardInterrupt:
        interrupted = True
    return {
        **provenance(),
        "interrupted": interrupted,
        "ceilings": [
            {
                "device": device,
                "dtype": dtype,
                "flops_per_second": c.flops_per_second,
                "bytes_per_second": c.bytes_per_second,
            }
            for (device, dtype), c in ceilings.items()
        ],
        "results": rows,
    }


def _gate(kernel: Kernel, dtype: str) -> str:
    if dtype not in kernel.dtypes:
        return f"{dtype} is not claimed"
    report = certify(kernel, profile="smoke", dtypes=[dtype])
    if report.interrupted:
        raise KeyboardInterrupt
    return "green" if report.passed else f"red: {report.failures[0] if report.failures else ''}"


def _said(error: Exception) -> dict[str, str]:
    return {"error": f"{type(error).__name__}: {error}"}


def _name(benchmark: Benchmark, kernel: Kernel) -> dict[str, Any]:
    return {
        "operation": benchmark.operation,
        "benchmark": benchmark.name,
        "settings": dict(benchmark.settings),
        "kernel": kernel.name,
        "backend": kernel.backend,
        "device": benchmark.device,
        "dtype": benchmark.dtype,
    }


def _describe(
    benchmark: Benchmark, kernel: Kernel, arguments: dict[str, Any], ceilings: Ceilings
) -> dict[str, Any]:
    cost = benchmark.cost(arguments)
    return {
        **_name(benchmark, kernel),
        "flops": cost.flops,
        "bytes": cost.bytes,
        "floor_seconds": cost.floor_seconds(ceilings.flops_per_second, ceilings.bytes_per_second),
    }


def _measure(
    row: dict[str, Any],
    benchmark: Benchmark,
    kernel: Kernel,
    arguments: dict[str, Any],
    ceilings: Ceilings,
    against: Sequence[str] | None,
) -> None:
    try:
        call = benchmark.timed(kernel.call, arguments)
        timing = _time(call, benchmark)
        memory = peak_memory(call, benchmark.device)
    except Exception as error:
        row |= _said(error)
        return
    row["timing"] = timing.to_dict()
    if memory is not None:
        row["peak_bytes"] = memory
    row["flops_per_second"] = row["flops"] / timing.median
    row["bytes_per_second"] = row["bytes"] / timing.median
    row["of_roofline"] = row["floor_seconds"] / timing.median
    row["rivals"] = []
    for rival in benchmark.rivals:
        if against and rival.name not in against:
            continue
        entry: dict[str, Any] = {"name": rival.name}
        try:
            call = rival.prepare(arguments)
            measured = _time(call, benchmark)
            memory = peak_memory(call, benchmark.device)
            entry["timing"] = measured.to_dict()
            if memory is not None:
                entry["peak_bytes"] = memory
            entry["ratio"] = measured.median / timing.median
        except Unavailable as reason:
            entry["unavailable"] = str(reason)
        except Exception as error:
            entry["unavailable"] = f"{type(error).__name__}: {str(error)[:200]}"
        row["rivals"].append(entry)


def _time(call: Callable[[], Any], benchmark: Benchmark) -> Timing:
    return time_call(captured(call) if benchmark.captured else call, benchmark.device)


def provenance() -> dict[str, Any]:
    """What a measurement depends on, and when and from which sources it was made."""
    return {
        "environment": environment() | _hardware(),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _hardware() -> dict[str, str]:
    try:
        import torch
    except ModuleNotFoundError:
        return {}
    found = {"threads": str(torch.get_num_threads()), "processor": _processor()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    """The CPU's name and, where Linux tells, the widest vectors it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    about = {}
    for line in lines:
        name, _, value = line.partition(":")
        about[name.strip()] = value.strip()
    wide = next((x for x in ("avx512f", "avx2") if x in about.get("flags", "").split()), "")
    return f"{about.get('model name', platform.processor())} {wide}".strip()


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()
