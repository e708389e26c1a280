"""The memory engine's Triton kernels over packed sequences, in the interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import itertools
from typing import Any

import pytest
import torch

from attnspec.conformance import Kernel, Profile, certify
from attnspec.fast.engines.memory import MemoryConfig, memory, use_config
from attnspec.fast.linear import titans

FEW = Profile("few", examples=3, shrink=False)
SMALL = MemoryConfig(piece=16, walk_items=512, tile=16, deep_piece=16, deep_tile=16, deep_read=16)
LINEAR, TWO, THREE, WIDE = (16, 20), (5, 20, 8), (4, 5, 5, 3), (4, 5, 130)


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in buffers that nobody has written."""
    empty = torch.empty

    def spoiled(*shape: Any, **options: Any) -> torch.Tensor:
        out = empty(*shape, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", spoiled)


@pytest.mark.usefixtures("unwritten")
@pytest.mark.parametrize(
    ("widths", "lengths", "b", "group", "before", "dtype"),
    [
        (LINEAR, [5, 0, 11, 20], 8, 1, False, torch.float32),
        (LINEAR, [0, 35, 1, 0], 24, 2, True, torch.float16),
        (LINEAR, [35, 3], 200, 1, False, torch.float32),
        (TWO, [5, 0, 11, 7], 8, 1, False, torch.float32),
        (TWO, [0, 25, 1, 0], 24, 2, True, torch.float16),
        (TWO, [130, 3, 0], 200, 1, False, torch.float32),  # a chunk longer than a group of pieces
        (THREE, [5, 0, 11], 8, 1, False, torch.float32),
        (WIDE, [0, 20, 7], 24, 1, False, torch.float32),
    ],
)
def test_values_and_gradients(
    widths: tuple[int, ...], lengths: list[int], b: int, group: int, before: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Those of each sequence alone, in float64 on the CPU."""
    total, depth = sum(lengths), len(widths) - 1
    torch.manual_seed(total)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    shapes = [(len(lengths), 2, *pair) for pair in itertools.pairwise(widths)] * 2
    layers = [torch.randn(shape) / shape[2] ** 0.5 for shape in shapes]
    d, dv = widths[0], widths[-1]
    rows = [torch.randn(1, heads, total, n) / n**0.5
            for heads, n in ((2, d), (2, dv), (2 * group, d))]  # fmt: skip
    rates = [torch.rand(1, 2, total) * top for top in (0.1 / min(b, total) ** 0.5, 1.0, 0.5)]
    given = [*layers, *(x.to(dtype) for x in (*rows, *rates))]

    wide = [x.double().requires_grad_() for x in given]
    parts = []
    for n, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        states = [x[n : n + 1] for x in wide[: 2 * depth]]
        k, v, q = (x[:, :, start:end] for x in wide[2 * depth : 2 * depth + 3])
        three = tuple(x[..., start:end] for x in wide[2 * depth + 3 :])
        y, W, S = memory(
            states[:depth], states[depth:], k, v, q, three, b, before=before, backend="numba"
        )
        parts.append((y, *W, *S))
    expected = [torch.cat(x, 2 if i == 0 else 0) for i, x in enumerate(zip(*parts, strict=True))]
    up = [x.detach().cos() for x in expected]
    expected += torch.autograd.grad(expected, wide, up)

    narrow = [x.clone().requires_grad_() for x in given]
    with use_config(SMALL):
        y, W, S = memory(
            narrow[:depth], narrow[depth : 2 * depth], *narrow[2 * depth : 2 * depth + 3],
            tuple(narrow[2 * depth + 3 :]), b, before=before, offsets=offsets, backend="triton",
        )  # fmt: skip
        got = [y, *W, *S]
        got += torch.autograd.grad(
            got, narrow, [u.to(x.dtype) for u, x in zip(up, got, strict=True)]
        )
    loose = 2e-5 if dtype == torch.float32 else 2e-2 if widths == LINEAR else 4e-3
    for x, z in zip(got, expected, strict=True):
        bound = loose * (1e-3 + float(z.detach().abs().max()))
        torch.testing.assert_close(x.detach().double(), z.detach(), atol=bound, rtol=0)


@pytest.mark.parametrize("name", ["titans_packed_linear", "titans_packed_mlp"])
def test_the_suite_certifies_them(name: str) -> None:
    def call(*given: Any, **options: Any) -> Any:
        return getattr(titans, name)(*given, **options, backend="triton")

    kernel = Kernel(
        "interpreted", f"titans.{name}", call, array="torch", dtypes=("float32",), gradient=True
    )
    laws = ["agreement", "gradient", "alone", "continued"]
    with use_config(SMALL):
        report = certify(kernel, profile=FEW, laws=laws)
    assert report.passed, report.failures[0]
