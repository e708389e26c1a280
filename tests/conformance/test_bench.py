"""``attnspec bench``: what it records, and that an interrupted run keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from attnspec.conformance import Kernel
from attnspec.conformance.bench import Benchmark, Cost, commands, run
from attnspec.conformance.bench.model import Rival, Unavailable
from attnspec.conformance.bench.rivals import counted_in_32_bits
from attnspec.conformance.bench.timing import Ceilings, Timing, captured

OPERATION = "tempscale.temper"


def benchmark(name: str, *rivals: Rival) -> Benchmark:
    return Benchmark(
        OPERATION,
        name,
        "cpu",
        lambda device, dtype: {"scores": torch.randn(3, 5), "tau": 0.5},
        lambda arguments: Cost(flops=15.0, bytes=120.0),
        "float32",
        rivals=rivals,
    )


def kernel(scale: float = 1.0) -> Kernel:
    def temper(scores: torch.Tensor, tau: float | torch.Tensor = 1.0) -> torch.Tensor:
        if isinstance(tau, torch.Tensor):
            tau = tau[..., None, None]
        return scores * scale / tau

    return Kernel("mine", OPERATION, temper, array="torch", dtypes=("float32",))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """A clock on which every call takes a second, and a hook that runs before each."""
    before: list[Callable[[], Any]] = []

    def time_call(call: Callable[[], Any], device: str) -> Timing:
        for hook in before:
            hook()
        call()
        return Timing(1.0, 1.0, 1.0, 5)

    monkeypatch.setattr(run, "time_call", time_call)
    monkeypatch.setattr(run, "peak_memory", lambda call, device: 5)
    monkeypatch.setattr(run, "measure_ceilings", lambda *key: Ceilings(150.0, 120.0))
    return before.append


def gates(verdict: str = "green") -> dict[tuple[str, str, str], str]:
    return {("mine", OPERATION, "float32"): verdict}


def missing(arguments: Any) -> Any:
    raise Unavailable("not installed")


def test_a_row_has_rates_roofline_and_rivals(clock: Any) -> None:
    rivals = (Rival("same", lambda arguments: lambda: None), Rival("missing", missing))
    result = run.run_benchmarks([benchmark("one", *rivals)], [kernel()], gates=gates())
    (row,) = result["results"]
    assert (row["flops_per_second"], row["bytes_per_second"]) == (15.0, 120.0)
    assert row["floor_seconds"] == row["of_roofline"] == 1.0
    same, other = row["rivals"]
    assert same["ratio"] == 1.0
    assert row["peak_bytes"] == same["peak_bytes"] == 5
    assert other == {"name": "missing", "unavailable": "not installed"}
    assert not result["interrupted"]


def test_a_wrong_kernel_gets_no_number(clock: Any) -> None:
    (row,) = run.run_benchmarks([benchmark("one")], [kernel(scale=1.01)])["results"]
    assert row["gate"].startswith("red: mine breaks ")
    assert "timing" not in row


def test_arguments_that_cannot_be_made_cost_no_other_row(clock: Any) -> None:
    def too_large(device: str, dtype: str) -> dict[str, Any]:
        raise MemoryError("16 GiB")

    broken = replace(benchmark("two"), make=too_large)
    rows = run.run_benchmarks([benchmark("one"), broken], [kernel()], gates=gates())["results"]
    assert [row["benchmark"] for row in rows] == ["one", "two"]
    assert "timing" in rows[0]
    assert rows[1]["error"] == "MemoryError: 16 GiB"


def test_an_interrupted_run_keeps_its_rows(
    clock: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = iter(range(2))

    def interrupt_second() -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    clock(interrupt_second)
    whole = run.run_benchmarks
    monkeypatch.setattr(commands, "_benchmarks", lambda *_: [benchmark("one"), benchmark("two")])
    monkeypatch.setattr(commands, "_kernels", lambda: [kernel()])
    monkeypatch.setattr(
        commands, "run_benchmarks", lambda *given, **named: whole(*given, gates=gates(), **named)
    )
    app = commands.typer.Typer()
    app.command()(commands.bench)
    result = CliRunner().invoke(app, ["--json", str(tmp_path / "bench.json")])
    assert result.exit_code == 1
    assert "interrupted" in result.output
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert kept["interrupted"]
    assert [row["benchmark"] for row in kept["results"]] == ["one"]


def test_an_interrupted_gate_is_not_a_red_one(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        passed, failures, interrupted = False, (), True

    monkeypatch.setattr(run, "certify", lambda *_, **__: Interrupted())
    result = run.run_benchmarks([benchmark("one")], [kernel()])
    assert result["interrupted"]
    assert result["results"] == []


def test_in_a_graph_both_sides_are_replayed(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[Callable[[], Any]] = []

    def capture(call: Callable[[], Any]) -> Callable[[], Any]:
        captures.append(call)
        return call

    monkeypatch.setattr(run, "captured", capture)
    twice = Rival("twice", lambda arguments: lambda: arguments["scores"] * 2)
    plain = benchmark("small", twice)
    with pytest.raises(ValueError, match="captured: got True on cpu"):
        plain.in_a_graph()
    case = replace(plain, device="cuda", make=lambda device, dtype: plain.make("cpu", dtype))
    cases = [case, case.in_a_graph()]
    record = run.run_benchmarks(cases, [replace(kernel(), device="cuda")], gates=gates())
    assert [row["benchmark"] for row in record["results"]] == ["small", "small, in a graph"]
    assert all("timing" in row["rivals"][0] for row in record["results"])
    assert len(captures) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")
def test_a_graph_repeats_the_call() -> None:
    x = torch.zeros(3, device="cuda")
    replay = captured(lambda: x.add_(1))
    before = x.clone()
    replay()
    replay()
    assert torch.equal(x, before + 2)


def test_what_counts_with_32_bits_is_not_led_astray() -> None:
    counted_in_32_bits(2**31)
    with pytest.raises(Unavailable, match="2147483649 products, and FlexAttention's lookups count"):
        counted_in_32_bits(2**31 + 1)
