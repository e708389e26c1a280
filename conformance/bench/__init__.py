"""Measured speed: cost models, rivals in the same run, and no number behind a red gate."""

from attnspec.conformance.bench.model import Benchmark, Cost, Rival, benchmarks
from attnspec.conformance.bench.run import run_benchmarks

__all__ = ["Benchmark", "Cost", "Rival", "benchmarks", "run_benchmarks"]
