"""``attnspec tune`` on kernels that only pretend to take time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from attnspec.conformance import Kernel, registry
from attnspec.conformance.__main__ import app
from attnspec.conformance.bench import Benchmark, Cost, commands, tuning
from attnspec.conformance.bench.timing import Timing
from attnspec.conformance.bench.tuning import difference, pairs, tune_kernels

OPERATION = "tempscale.temper"
TILES = (16, 32, 64, 128)


class Tuner:
    """Two choices of a tile size; those a call asks for are its `asked`."""

    def __init__(self) -> None:
        self.tiles = {"inner": 16, "outer": 16}
        self.watching: set[str] = set()

    def ask(self, key: str) -> int:
        self.watching.add(key)
        return self.tiles[key]

    @contextmanager
    def watch(self) -> Iterator[set[str]]:
        self.watching = set()
        yield self.watching

    def candidates(self, key: str) -> Sequence[Mapping[str, Any]]:
        return [{"tile": tile} for tile in TILES]

    @contextmanager
    def force(self, key: str, fields: Mapping[str, Any]) -> Iterator[None]:
        before, self.tiles[key] = self.tiles[key], fields["tile"]
        try:
            yield
        finally:
            self.tiles[key] = before


SECONDS: dict[str, dict[int, float]] = {}
"""What the clock shows by benchmark and tile of the inner choice; the outer costs nothing."""


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> Tuner:
    made = Tuner()

    def clock(call: Callable[[], Any], device: str) -> Timing:
        call()
        seconds = SECONDS[current[0]][made.tiles["inner"]]
        return Timing(seconds, seconds, seconds, 5)

    monkeypatch.setattr(tuning, "time_call", clock)
    return made


current = [""]


def benchmark(name: str, keys: tuple[str, ...] = ("inner",)) -> Benchmark:
    def make(device: str, dtype: str) -> dict[str, Any]:
        current[0] = name
        return {"scores": torch.randn(3, 5), "keys": keys}

    return Benchmark(OPERATION, name, "cpu", make, lambda arguments: Cost(1.0, 1.0), "float32")


def kernel(tuner: Tuner, broken: Mapping[int, Callable[[Tensor], Tensor]] | None = None) -> Kernel:
    """A kernel that is right, but for what `broken` does with the answer of a tile."""

    def call(scores: Tensor, keys: tuple[str, ...]) -> Tensor:
        tile = min(tuner.ask(key) for key in keys)
        return (broken or {}).get(tile, lambda x: x)(scores * 2)

    return Kernel("mine", OPERATION, call, array="torch", tuner=tuner)


def refuse(x: Tensor) -> Tensor:
    raise RuntimeError("out of resource:\n shared memory")


def notes(result: Mapping[str, Any]) -> dict[int, str]:
    return {line["candidate"]["tile"]: line["note"] for line in result["summary"] if "note" in line}


def test_the_fastest_right_candidate_is_chosen(tuner: Tuner) -> None:
    SECONDS["one"] = {16: 1.0, 32: 0.5, 64: 0.25, 128: 0.1}
    broken = {64: lambda x: x + 1e-3, 128: refuse}
    result = tune_kernels(pairs([benchmark("one")], [kernel(tuner, broken)]))
    assert result["choices"] == {"inner": {"tile": 32}}
    assert [row.get("ratio") for row in result["measured"]] == [1.0, 2.0, None, None]
    said = notes(result)
    assert said.keys() == {64, 128}
    assert said[64].startswith("wrong: output 0: relative error 0.000")
    assert said[128] == "refused: RuntimeError: out of resource: shared memory"
    assert tuner.tiles["inner"] == 16


def test_all_benchmarks_count(tuner: Tuner) -> None:
    """32 gains 2 and loses 3, 64 gains 1.5 on one only; what is wrong anywhere counts nowhere."""
    SECONDS["one"] = {16: 6.0, 32: 3.0, 64: 4.0, 128: 1.0}
    SECONDS["two"] = {16: 1.0, 32: 3.0, 64: 1.0, 128: 1.0}
    made = kernel(tuner, {128: lambda x: x if current[0] == "one" else -x})
    result = tune_kernels(pairs([benchmark("one"), benchmark("two")], [made]))
    assert result["choices"] == {"inner": {"tile": 64}}
    ratios = {line["candidate"]["tile"]: line.get("ratio") for line in result["summary"]}
    assert ratios == pytest.approx({16: 1.0, 32: (2 / 3) ** 0.5, 64: 1.5**0.5, 128: None})
    assert {line["benchmarks"] for line in result["summary"]} == {2}


def test_noise_changes_nothing(tuner: Tuner) -> None:
    SECONDS["one"] = {16: 1.0, 32: 0.99, 64: 1.2, 128: 1.2}
    both = benchmark("one", ("inner", "outer"))
    result = tune_kernels(pairs([both], [kernel(tuner)]))
    assert result["choices"] == {"inner": {"tile": 16}, "outer": {"tile": 16}}
    chosen = [line for line in result["summary"] if line["chosen"]]
    assert all(line["in_force"] for line in chosen)


def test_a_call_without_a_fixed_answer_is_not_tuned(tuner: Tuner) -> None:
    count = iter(range(9))
    drifting = kernel(tuner, {16: lambda x: x + next(count)})
    result = tune_kernels(pairs([benchmark("one")], [drifting]))
    assert result["choices"] == {}
    assert "a second call differs from the first" in result["measured"][0]["error"]


def test_a_candidate_that_breaks_the_device_ends_the_benchmark(tuner: Tuner) -> None:
    SECONDS["one"] = {16: 1.0, 32: 0.5, 64: 0.25, 128: 0.1}
    broken: dict[int, Callable[[Tensor], Tensor]] = {}
    broken[64] = lambda x: broken.update(dict.fromkeys(TILES, refuse)) or x
    result = tune_kernels(pairs([benchmark("one")], [kernel(tuner, broken)]))
    assert result["choices"] == {}
    (row,) = result["measured"]
    assert row["error"].startswith("after candidates of inner: RuntimeError: out of resource")


def test_pairs_are_of_one_operation_device_and_dtype(tuner: Tuner) -> None:
    one = benchmark("one")
    mine = kernel(tuner)
    others = [
        Kernel("untuned", OPERATION, mine.call, array="torch"),
        Kernel("elsewhere", OPERATION, mine.call, array="torch", device="cuda", tuner=tuner),
        Kernel("half", OPERATION, mine.call, array="torch", dtypes=("float16",), tuner=tuner),
        Kernel("other", "attention.attend", mine.call, array="torch", tuner=tuner),
    ]
    assert pairs([one], [mine, *others]) == [(one, mine, tuner)]


X = torch.linspace(-2, 3, 40).reshape(4, 10)
INFINITE = X.clone()
INFINITE[1, 2] = float("inf")


@pytest.mark.parametrize(
    ("expected", "got", "dtype", "found"),
    [
        (X, X * (1 + 1e-6), "float32", ""),
        (X, X * (1 + 1e-4), "float32", "output 0: relative error 0.0001"),
        (X, X * (1 + 1e-4), "bfloat16", ""),
        ((X, [X]), (X, [-X]), "bfloat16", "output 1: relative error 2"),
        ({"a": INFINITE}, {"a": INFINITE.clone()}, "float32", ""),
        (INFINITE, X, "float32", "output 0: other infinities or NaN"),
        (INFINITE, -INFINITE, "float32", "output 0: other infinities or NaN"),
        (X, X.half(), "float32", "outputs of other shapes or dtypes"),
        (X.int(), X.int() + (X > 2.5), "float32", "output 0: 4 of 40 entries differ"),
        (X * 0, X * 0, "float32", ""),
        (X * 0, X * 1e-9, "float32", "output 0: relative error inf"),
        (X[:0], X[:0], "float32", ""),
        (torch.tensor(1.0), torch.tensor(2.0), "float32", "output 0: relative error 1"),
        (None, None, "float32", ""),
    ],
)
def test_difference(expected: Any, got: Any, dtype: str, found: str) -> None:
    assert difference(expected, got, dtype) == found


def test_one_wrong_row_of_many_is_seen() -> None:
    x = torch.ones(4096, 8)
    y = x.clone()
    y[17] = 1.5
    assert difference(x, y, "bfloat16").startswith("output 0")


def test_the_command(tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SECONDS["one"] = {16: 1.0, 32: 0.5, 64: 0.25, 128: 0.1}
    made = {"right": kernel(tuner, {128: refuse}), "wrong": kernel(tuner, {64: lambda x: -x})}
    monkeypatch.setattr(commands, "benchmarks", lambda: (benchmark("one"),))
    path = tmp_path / "build" / "table.json"
    words = ["tune", "tempscale", "--device", "cpu", "--json", str(path)]
    for name, status, tile in (("right", 0, 64), ("wrong", 1, 128)):
        monkeypatch.setattr(registry, "registered_kernels", lambda name=name: [made[name]])
        result = CliRunner().invoke(app, words)
        assert result.exit_code == status, result.output
        assert "1 choices, 1 changed" in result.output
        table = json.loads(path.read_text())
        assert table["choices"] == {"inner": {"tile": tile}}
        assert {"gpu", "capability", "environment"} <= set(table)


def test_nothing_to_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, message in (
        (["nothing"], "select: got ['nothing']"),
        (["attention", "--device", "cpu"], "--device: got 'cpu', for which no kernel chosen is"),
        (["attention"], "--device: got 'cuda', but torch finds no GPU"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        result = CliRunner().invoke(app, ["tune", *words])
        assert result.exit_code == 2, result.output
        assert message in result.output


def test_an_interrupted_run_keeps_the_benchmarks_that_ended(tuner: Tuner) -> None:
    SECONDS["one"] = {16: 1.0, 32: 0.5, 64: 2.0, 128: 2.0}

    def interrupt(arguments: Any, dtype: Any) -> Any:
        raise KeyboardInterrupt

    second = Benchmark(OPERATION, "two", "cpu", interrupt, lambda a: Cost(1.0, 1.0), "float32")
    result = tune_kernels(pairs([benchmark("one"), second], [kernel(tuner)]))
    assert result["interrupted"]
    assert result["choices"] == {"inner": {"tile": 32}}
