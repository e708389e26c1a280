"""The suite is tested too: its arithmetic, its isolation, its ledger, its counterexamples."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from attnspec.conformance import (
    Kernel,
    Known,
    SavedCase,
    certification,
    certify,
    find_contract,
    isolate,
)
from attnspec.conformance.choices import between, judge_selection
from attnspec.conformance.contract import Output, Ranking
from attnspec.conformance.dtypes import EPS, TINY, round_to
from attnspec.conformance.judge import expect
from attnspec.conformance.layouts import LAYOUTS, place
from attnspec.conformance.rounding import SORTED, Model, Rounded, rounded_arithmetic
from attnspec.conformance.runner import Profile, replay
from attnspec.reference.dense.attention import attend
from attnspec.reference.primitives.gelu import normal_cdf

QUICK = Profile("quick", examples=8)


@pytest.mark.parametrize("dtype", list(EPS))
def test_rounding_is_nearest_even(dtype):
    x = np.linspace(-3, 3, 1001)
    rounded = round_to(x, dtype).astype(np.float64)
    assert np.all(np.abs(rounded - x) <= EPS[dtype] / 2 * np.abs(x))
    assert np.array_equal(round_to(rounded, dtype), round_to(x, dtype))


def test_bfloat16_matches_torch():
    x = np.random.default_rng(0).standard_normal(2000).astype(np.float32) * 1e3
    x[:4] = np.inf, -np.inf, np.nan, 0.0
    expected = torch.from_numpy(x).bfloat16().float().numpy()
    np.testing.assert_array_equal(round_to(x, "bfloat16"), expected)


def test_a_rounded_run_is_wrong_by_about_one_ulp():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 40, 40))
    with rounded_arithmetic("bfloat16", 0):
        got = np.asarray(Rounded.wrap(a) @ Rounded.wrap(b)).view(np.ndarray)
    error = np.abs(got - a @ b).max()
    assert EPS["bfloat16"] / 100 < error < 40 * EPS["bfloat16"]


def test_a_rounded_run_keeps_float32_where_nothing_is_contracted():
    x = np.linspace(1, 2, 100)
    with rounded_arithmetic("float16", 0):
        got = np.asarray(np.exp(Rounded.wrap(x) * 2)).view(np.ndarray)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.exp(2 * x), rtol=5e-7)


def test_a_rounded_run_loses_what_an_error_function_loses():
    x = np.full((1, 64), -3.0)
    with rounded_arithmetic("float32", 0):
        got = np.asarray(normal_cdf(Rounded.wrap(x))).view(np.ndarray)
    errors = np.abs(got - normal_cdf(x))
    assert 0.25 < np.sqrt(np.mean(errors**2)) / EPS["float32"] < 2


def test_operands_too_small_for_a_dtype_are_off_by_its_smallest_unit():
    model = Model("float16", np.random.default_rng(0))
    x = np.array([1e-9, -1e-9, 2.0**-26, 0.0])
    assert np.all(np.abs(model.operand(x) - x) <= 0.5 * TINY["float16"])
    assert model.operand(x)[-1] == 0


def test_operands_fall_alike_where_they_are_equal():
    one, third = np.ones((1, 1)), np.full((1, 64), 1 / 3)
    for alike in (False, True):
        with rounded_arithmetic("bfloat16", 0, alike):
            got = np.asarray(Rounded.wrap(one) @ Rounded.wrap(third)).view(np.ndarray)
        errors = np.abs(got - 1 / 3) / (EPS["bfloat16"] / 4)
        assert np.all((errors > 0.14) & (errors < 0.41))
        assert (np.ptp(got) < 1e-6) == alike


def test_so_they_do_among_more_than_are_sorted():
    """Above that a hash tells equal entries; errors are as large, of either sign, and apart."""
    model = Model("bfloat16", np.random.default_rng(0), alike=True)
    values = np.random.default_rng(1).uniform(1.01, 1.99, SORTED // 4).astype(np.float32)
    got = model.operand(np.tile(values, 5)).reshape(5, -1)
    assert np.all(got == got[0])
    errors = (got[0] - values)[round_to(values, "bfloat16") != values] / EPS["bfloat16"]
    assert np.all((np.abs(errors) > 0.14) & (np.abs(errors) < 0.41))
    assert 0.48 < np.mean(errors > 0) < 0.52
    assert len(np.unique(np.round(errors, 9))) > 0.8 * errors.size
    again = model.operand(np.tile(values, 5))[: values.size]
    assert 0.48 < np.mean((again > values) == (got[0] > values)) < 0.52


def test_half_of_the_runs_flush_subnormals():
    x = np.array([[1e-39]])
    for alike in (False, True):
        with rounded_arithmetic("float32", 0, alike):
            got = np.asarray(Rounded.wrap(x) @ Rounded.wrap(np.ones((1, 1)))).view(np.ndarray)
        assert (got[0, 0] == 0) == alike


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_look_gives_the_same_budget_with_less_luck(dtype):
    rng = np.random.default_rng(0)
    arguments = {n: round_to(rng.standard_normal((2, 2, 12, 16)), dtype) for n in ("q", "k", "v")}
    arguments = {name: x.astype(np.float64) for name, x in arguments.items()}
    expectation = expect(attend, arguments, find_contract("attention.attend").outputs, dtype)
    first, second = expectation.spread["out"][0], expectation.confirm()["out"][0]
    assert 0.9 < np.mean(second / first) < 1.1
    assert np.std(second / second.mean()) < np.std(first / first.mean())


def test_weights_are_compared_as_logits():
    logits = np.array([[0.0, 1.0, 3.0], [1e5, 1e5 - 30.0, 0.0]])
    exact = np.exp(logits - logits.max(-1, keepdims=True))
    exact /= exact.sum(-1, keepdims=True)
    low, high = between(Ranking(logits, threshold=0.2, softmax=True), 0.0)
    np.testing.assert_allclose(low, exact, atol=1e-15)
    np.testing.assert_allclose(high, exact, atol=1e-15)
    low, high = between(Ranking(logits, threshold=0.2, softmax=True), 40.0)
    assert np.all(low[1, :2] < 1e-6)
    assert np.all(high[1, :2] > 0.999)
    assert high[1, 2] < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_numbers(layout):
    x = np.arange(24.0).reshape(2, 3, 2, 2)
    if layout == "expanded":
        x = np.repeat(x[:1], 2, axis=0)
    placed = place(x, layout)
    strides = [s * placed.buffer.itemsize for s in placed.strides]
    view = np.lib.stride_tricks.as_strided(placed.buffer[placed.start :], placed.shape, strides)
    assert np.array_equal(view, x)
    assert np.isnan(placed.buffer).sum() >= 128


def test_budgets_shrink_with_the_dtype():
    rng = np.random.default_rng(2)
    arguments = {"q": rng.standard_normal((1, 4, 8)), "k": rng.standard_normal((1, 9, 8))}
    arguments["v"] = rng.standard_normal((1, 9, 3))
    outputs = (Output("out"), Output("lse", dtype="float32", row_axes=0))
    sizes = [
        expect(attend, arguments, outputs, dtype).spread["out"][0].max()
        for dtype in ("bfloat16", "float16", "float32", "float64")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-14 < sizes[2] < 1e-5 < sizes[0]


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ([0, 1], None),
        ([0, 2], None),
        ([1, 0], "sorted"),
        ([1, 1], "twice"),
        ([0, 4], "range"),
        ([0, 3], "beats"),
    ],
)
def test_selections_are_judged_by_score(got, message):
    ranking = Ranking(np.array([3.0, 2.0, 2.0, 1.0]), k=2)
    violation = judge_selection("idx", np.array(got), ranking, tau=1e-6, strict=False)
    assert (violation is None) if message is None else (message in violation.message)


def test_strict_ties_go_to_the_lower_index():
    ranking = Ranking(np.array([3.0, 2.0, 2.0, 1.0]), k=2)
    assert judge_selection("idx", np.array([0, 1]), ranking, 0.0, strict=True) is None
    assert judge_selection("idx", np.array([0, 2]), ranking, 0.0, strict=True) is not None


def test_nothing_run_is_not_a_pass():
    report = certify(Kernel("k", "attention.attend", attend), laws=["no such law"])
    assert not report.passed


def crash(q, k, v, **options):
    os.abort()


def hang(q, k, v, **options):
    time.sleep(600)


@pytest.mark.parametrize(("call", "reason"), [(crash, "killed"), (hang, "within")])
def test_a_crash_or_hang_is_a_result(call, reason, tmp_path):
    kernel = Kernel("bad", "attention.attend", call)
    report = certify(kernel, profile=QUICK, laws=["agreement"], isolate=True, timeout=8,
                     cases=tmp_path)  # fmt: skip
    assert not report.passed
    assert report.results[0].verdict == "crash"
    assert reason in report.results[0].note
    assert list(tmp_path.glob("*.json")), "the case it died on is kept"


def test_an_isolated_run_passes_a_right_kernel():
    report = certify(Kernel("k", "attention.attend", attend), profile=QUICK,
                     laws=["agreement"], isolate=True)  # fmt: skip
    assert report.passed


def on_a_gpu_of_two(q, k, v, **options):
    assert os.environ[isolate.DEVICES] in ("3", "5")
    return attend(q, k, v, **options)


def test_processes_share_the_gpus(monkeypatch):
    monkeypatch.setattr(isolate, "gpus", lambda: ["3", "5"])
    children = []
    make = isolate.Child
    monkeypatch.setattr(
        certification, "Child", lambda *a: children.append(make(*a)) or children[-1]
    )
    kernels = [Kernel(name, "attention.attend", on_a_gpu_of_two) for name in "abc"]
    report = certify(kernels, profile=QUICK, dtypes=["float32"], laws=["agreement"], jobs=3)
    assert report.passed, report.failures[0]
    assert [child.gpu for child in children] == ["3", "5", "3"]


@pytest.mark.parametrize(
    ("many", "named", "found"),
    [(0, "", []), (1, "", []), (2, "", ["0", "1"]), (2, "GPU-a,GPU-b", ["GPU-a", "GPU-b"])],
)
def test_gpus_are_those_that_are_visible(monkeypatch, many, named, found):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: many)
    monkeypatch.setenv(isolate.DEVICES, named)
    assert isolate.gpus() == found


def grouped_wrong(q, k, v, **options):
    return attend(q, np.roll(k, 1, axis=1), v, **options)


def test_a_failure_says_when_and_replays(tmp_path):
    kernel = Kernel("rolled", "attention.attend", grouped_wrong)
    report = certify(kernel, profile="smoke", laws=["heads"], cases=tmp_path)
    failure = report.failures[0]
    assert "kv_heads > 1" in failure.when
    saved = SavedCase.load(next(tmp_path.glob("*.json")))
    assert saved.case == failure.case
    assert replay(kernel, saved) is not None
    assert replay(Kernel("rolled", "attention.attend", attend), saved) is None
    again = certify(kernel, profile="smoke", laws=["heads"], cases=tmp_path)
    assert again.results[0].cases < 20, "the saved case is run first"


def test_known_failures_are_tolerated_until_they_pass(tmp_path):
    wrong = Kernel("rolled", "attention.attend", grouped_wrong)
    certify(wrong, profile="smoke", laws=["heads"], cases=tmp_path)
    witness = str(next(tmp_path.glob("*.json")))
    known = (Known("heads", "#1", lambda case: case.sizes["kv_heads"] > 1, witness),)
    tolerated = Kernel("rolled", "attention.attend", grouped_wrong, known=known)
    assert certify(tolerated, profile="smoke", laws=["heads"]).passed
    mended = Kernel("rolled", "attention.attend", attend, known=known)
    report = certify(mended, profile="smoke", laws=["heads"])
    assert [result.verdict for result in report] == ["pass", "unexpected pass"]
    assert not report.passed


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        ({"call": 3}, TypeError, "call"),
        ({"array": "jax"}, ValueError, "array"),
        ({"device": "tpu"}, ValueError, "device"),
        ({"dtypes": ("int8",)}, ValueError, "dtypes"),
        ({"dtypes": ("bfloat16",)}, ValueError, "dtypes"),
        ({"operation": "attention.nothing"}, ValueError, "operation"),
        ({"operation": "nothing"}, ValueError, "operation"),
        ({"ties": "random"}, ValueError, "ties"),
    ],
)
def test_kernels_are_validated(changes, error, name):
    fields = {"name": "k", "operation": "attention.attend", "call": attend, **changes}
    with pytest.raises(error, match=name):
        Kernel(**fields)


def test_unknown_profile_is_refused():
    with pytest.raises(ValueError, match="profile"):
        certify(Kernel("k", "attention.attend", attend), profile="slow")


def test_poisoned_memory_does_not_spoil_the_compiler():
    script = """
import torch
from attnspec.conformance.arrays import TorchArrays

def call(x):
    return torch.empty_like(x).fill_(1)

with TorchArrays("cpu").poisoned():
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))
print(torch.compile(call, fullgraph=True, backend="aot_eager")(torch.zeros(1)).item())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "1.0", done.stderr
