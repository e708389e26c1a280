"""Tuning: which of its candidates a kernel should choose on this device.

A kernel's `Tuner` says which choices a call asks for and lets one be forced. Each candidate of each
choice is timed as ``attnspec bench`` times, on every benchmark that asks for it, while all other
choices stay as they are. It counts only if its answer is the present one, up to rounding, on all of
them; the one that is fastest in the geometric mean is chosen if it gains more than noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from statistics import geometric_mean
from typing import Any

from attnspec.conformance.bench.model import Benchmark
from attnspec.conformance.bench.run import provenance
from attnspec.conformance.bench.timing import time_call
from attnspec.conformance.kernel import Kernel, Tuner

LEAST_GAIN = 1.02
"""What a candidate must gain to replace the configuration in force."""
WHOLE, ROW = 4.0, 16.0
"""Differences allowed over a whole output and in one of its rows, in units of rounding."""
FINEST = 2.0**-18
"""Sums of many float32 numbers differ by more than one rounding from order to order."""

Pair = tuple[Benchmark, Kernel, Tuner]


def pairs(benchmarks: Iterable[Benchmark], kernels: Iterable[Kernel]) -> list[Pair]:
    """Each benchmark with every kernel of its operation, device and dtype that has a tuner."""
    kernels = list(kernels)
    return [
        (benchmark, kernel, kernel.tuner)
        for benchmark in benchmarks
        for kernel in kernels
        if kernel.tuner is not None
        and (kernel.operation, kernel.device) == (benchmark.operation, benchmark.device)
        and benchmark.dtype in kernel.dtypes
    ]


def tune_kernels(
    chosen: Sequence[Pair], *, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Time all candidates of what the chosen pairs ask for. The result is plain JSON data:
    ``choices`` by key and the ``capability`` they hold for, then all that was ``measured``, of the
    benchmarks that ended if the run is ``interrupted``.
    """
    rows: list[dict[str, Any]] = []
    interrupted = False
    try:
        for benchmark, kernel, tuner in chosen:
            rows += _measure(benchmark, kernel, tuner, progress or (lambda what: None))
    except KeyboardInterrupt:
        interrupted = True
    summary = summarise(rows)
    return {
        **_device(),
        **provenance(),
        "interrupted": interrupted,
        "choices": {row["key"]: row["candidate"] for row in summary if row["chosen"]},
        "summary": summary,
        "measured": rows,
    }


def _measure(
    benchmark: Benchmark, kernel: Kernel, tuner: Tuner, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each candidate of each key; one with an ``error`` if the benchmark fails today."""
    about = {
        "operation": benchmark.operation,
        "benchmark": benchmark.name,
        "kernel": kernel.name,
        "dtype": benchmark.dtype,
    }
    where = f"{benchmark.operation} {benchmark.name}"
    progress(where)
    try:
        with tuner.watch() as keys:
            expected = _prepare(benchmark, kernel)()
        call = _prepare(benchmark, kernel)
        if changed := difference(expected, call(), benchmark.dtype):
            raise ValueError(f"a second call differs from the first: {changed}")
        before = time_call(call, benchmark.device).median
    except Exception as error:
        return [about | {"error": _said(error)}]
    rows: list[dict[str, Any]] = []
    for key in sorted(keys):
        in_force, *others = tuner.candidates(key)
        of_key: list[dict[str, Any]] = []
        for candidate in others:
            progress(f"{where}: {key}")
            row: dict[str, Any] = about | {
                "key": key,
                "candidate": dict(candidate),
                "in_force": False,
            }
            with tuner.force(key, candidate):
                row |= _trial(benchmark, kernel, expected)
            of_key.append(row)
        # The configuration in force is timed on both sides of the others: clocks and loads drift.
        # That fails if a candidate broke the device for the rest of the process.
        try:
            after = time_call(call, benchmark.device).median
        except Exception as error:
            return [*rows, about | {"error": f"after candidates of {key}: {_said(error)}"}]
        before, present = after, min(before, after)
        for row in of_key:
            if "seconds" in row:
                row["ratio"] = present / row["seconds"]
        rows.append(
            about
            | {"key": key, "candidate": dict(in_force), "in_force": True}
            | {"seconds": present, "ratio": 1.0}
        )
        rows += of_key
    return rows


def _trial(benchmark: Benchmark, kernel: Kernel, expected: Any) -> dict[str, Any]:
    """The ``seconds`` of a call whose answer is as expected, or why it has no number: ``wrong`` if
    it is another answer, ``refused`` if there is none, as when a tile does not fit on chip.
    """
    try:
        call = _prepare(benchmark, kernel)
        if wrong := difference(expected, call(), benchmark.dtype):
            return {"wrong": wrong}
        return {"seconds": time_call(call, benchmark.device).median}
    except Exception as error:
        return {"refused": _said(error)}


def _prepare(benchmark: Benchmark, kernel: Kernel) -> Callable[[], Any]:
    """A call on arguments of its own: it may update them, or plan ahead under the configuration."""
    import torch

    torch.manual_seed(0)
    call: Callable[[], Any] = benchmark.timed(
        kernel.call, benchmark.make(benchmark.device, benchmark.dtype)
    )
    return call


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def summarise(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each candidate of each key over all benchmarks: ``ratio``, how many times faster than the one
    in force it is, or a ``note`` why it has none; and which is ``chosen``.
    """
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if "key" in row:
            candidates = found.setdefault(row["key"], {})
            candidates.setdefault(json.dumps(row["candidate"]), []).append(row)
    summary = []
    for key, candidates in sorted(found.items()):
        lines = []
        for measured in candidates.values():
            line: dict[str, Any] = {
                "key": key,
                "candidate": measured[0]["candidate"],
                "benchmarks": len(measured),
                "in_force": measured[0]["in_force"],
                "chosen": False,
            }
            notes = [f"{n}: {row[n]}" for row in measured for n in ("wrong", "refused") if n in row]
            if notes:
                line["note"] = notes[0]
            else:
                line["ratio"] = geometric_mean(row["ratio"] for row in measured)
            lines.append(line)
        best = max((line for line in lines if "ratio" in line), key=lambda line: line["ratio"])
        if best["ratio"] < LEAST_GAIN:
            best = next(line for line in lines if line["in_force"])
        best["chosen"] = True
        summary += lines
    return summary


def difference(expected: Any, got: Any, dtype: str) -> str:
    """What differs between two answers by more than rounding in `dtype`; "" if nothing does."""
    import torch

    unit = max(torch.finfo(getattr(torch, dtype)).eps, FINEST)
    first, second = list(_tensors(expected)), list(_tensors(got))
    if [(x.shape, x.dtype) for x in first] != [(x.shape, x.dtype) for x in second]:
        return "outputs of other shapes or dtypes"
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"output {number}: {int((a != b).sum())} of {a.numel()} entries differ"
            continue
        if not a.numel():
            continue
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()) or not torch.allclose(
            a[~finite], b[~finite], equal_nan=True
        ):
            return f"output {number}: other infinities or NaN"
        a, b = (
            x.where(finite, 0).float().reshape(-1, x.shape[-1] if x.dim() else 1) for x in (a, b)
        )
        errors, norms = (a - b).norm(dim=1), a.norm(dim=1)
        typical = norms.square().mean().sqrt()
        whole = errors.square().mean().sqrt() / (WHOLE * unit * typical)
        row = (errors / (ROW * unit * norms.clamp(min=typical))).amax()
        if max(float(whole), float(row)) > 1:
            return f"output {number}: relative error {float(errors.norm() / a.norm()):.2g}"
    return ""


def _tensors(value: Any) -> Iterable[Any]:
    """Every tensor in an answer, in order."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value.detach()
    elif isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _device() -> dict[str, str | None]:
    """The GPU, and its compute capability as tables name it; None without one."""
    import torch

    if not torch.cuda.is_available():
        return {"gpu": None, "capability": None}
    major, minor = torch.cuda.get_device_capability()
    return {"gpu": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}
