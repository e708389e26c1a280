"""What the flash engine's host side launches, on a driver that compiles and runs nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast import kept
from attnspec.fast.engines.flash import flash, plans, triton_launch
from attnspec.fast.engines.flash.configs import FlashConfig, use_config

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from triton.runtime.jit import JITFunction

    from attnspec.fast.engines.flash import triton_bounds, triton_forward, triton_gradients
    from tests.launches import launches

    kernels = [
        x
        for module in (triton_bounds, triton_forward, triton_gradients)
        for x in vars(module).values()
        if isinstance(x, JITFunction)
    ]
    with launches(monkeypatch, kernels, plans.plans) as found:
        yield found


def inputs(gradient: bool = False) -> list[Tensor]:
    """q, k and v of 4 query heads over 2 kv heads, 70 tokens of 16 bits."""
    shapes = (1, 4, 70, 32), (1, 2, 70, 32), (1, 2, 70, 32)
    return [torch.ones(shape, dtype=torch.float16).requires_grad_(gradient) for shape in shapes]


STARTS = (torch.arange(70, dtype=torch.int32) // 20) * 20
OPTIONS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "dense": ({"causal": True}, [], []),
    "row_start": ({"causal": True, "row_start": STARTS}, [], ["rows_before_kernel"]),
    "key_mask": (
        {"key_mask": torch.ones(1, 70, dtype=torch.bool)},
        ["key_bounds_kernel"],
        [],
    ),
    "sinks": ({"causal": True, "window": 9, "sinks": 2}, [], []),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_second_call_is_the_first_without_the_look_up(journal: Any, name: str) -> None:
    options, before, _ = OPTIONS[name]
    given = inputs()
    for _ in range(2):
        flash(*given, **options, backend="triton")
    half = len(journal) // 2
    assert [kernel for kernel, _, _ in journal] == 2 * [*before, "flash_forward_kernel"]
    assert [how for _, how, _ in journal] == ["looked up"] * half + ["direct"] * half
    slow, fast = journal[half - 1][2], journal[-1][2]
    names = flash_arguments()
    # The outputs of the two calls lie where they may.
    free = {names.index(x) for x in ("out", "lse", "key_bounds")}
    assert len(slow) == len(fast) == len(names)
    assert all(a == b for i, (a, b) in enumerate(zip(slow, fast, strict=True)) if i not in free)


def flash_arguments() -> list[str]:
    from attnspec.fast.engines.flash.triton_forward import flash_forward_kernel

    return list(flash_forward_kernel.arg_names)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_launch_few_kernels(journal: Any, name: str) -> None:
    options, before, bounds = OPTIONS[name]
    given = inputs(gradient=True)
    for _ in range(2):
        out, _ = flash(*given, **options, backend="triton")
        torch.autograd.grad(out, given, torch.ones_like(out))
    half = len(journal) // 2
    assert [kernel for kernel, _, _ in journal[half:]] == [
        *before, "flash_forward_kernel", "flash_rows_kernel", *before, "flash_dq_kernel", *bounds,
        "flash_dkdv_kernel", "head_sums_kernel", "head_sums_kernel",
    ]  # fmt: skip
    assert {how for _, how, _ in journal[half:]} == {"direct"}


def test_what_is_computed_differently_is_planned_anew(journal: Any) -> None:
    q, k, v = inputs()
    for _ in range(2):
        flash(q, k, v, backend="triton")
    assert [how for _, how, _ in journal] == ["looked up", "direct"]
    flash(q, k, v, scale=2.0, backend="triton")
    flash(q, k, v.mT.contiguous().mT, backend="triton")
    shifted = torch.ones(v.numel() + 1, dtype=v.dtype)[1:].view_as(v)
    flash(q, k, shifted, backend="triton")
    with use_config(forward=FlashConfig(16, 16, 4, 1)):
        flash(q, k, v, backend="triton")
    assert [how for _, how, _ in journal[2:]] == ["looked up"] * 4
    flash(q, k, v, backend="triton")
    assert journal[-1][1] == "direct"
    wrong: list[dict[str, Any]] = [
        {"causal": 1}, {"window": 2.0, "causal": True}, {"blocks": ()}, {"offsets": (None, None)},
        {"offsets": 3},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises((TypeError, ValueError)):
            flash(q, k, v, **options, backend="triton")


def test_offsets_on_the_cpu_are_read_every_time(journal: Any) -> None:
    given = inputs()
    right, wrong = torch.tensor([0, 30, 70]), torch.tensor([0, 80, 70])
    for backend_name in ("triton", "numba"):
        options = {"scale": 0.5, "backend": backend_name}
        flash(*given, offsets=(right, right), **options)
        with pytest.raises(ValueError, match="offsets"):
            flash(*given, offsets=(wrong, wrong), **options)


def test_plans_keep_no_tensor(journal: Any) -> None:
    given = inputs(gradient=True)
    out = flash(*given, causal=True, row_start=STARTS.clone(), backend="triton")[0]
    torch.autograd.grad(out, given, torch.ones_like(out))
    held = [weakref.ref(x) for x in (*given, out)]
    journal.clear()
    del given, out
    gc.collect()
    assert not any(ref() is not None for ref in held)


def test_kept_tensors_are_made_once() -> None:
    calls = []

    def make(device: torch.device, count: int) -> tuple[Tensor]:
        calls.append(count)
        return (torch.arange(count, device=device),)

    device = torch.device("cpu")
    with torch.inference_mode():
        (first,) = kept.kept(make, device, 3)
    assert not first.is_inference()
    assert kept.kept(make, device, 3)[0] is first
    assert kept.kept(make, device, 4)[0].shape == (4,)
    kept.kept(make, device, kept.LARGEST + 1)
    kept.kept(make, device, kept.LARGEST + 1)
    assert calls == [3, 4, kept.LARGEST + 1, kept.LARGEST + 1]


def test_numbers_come_by_descriptors_where_these_may_write() -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    numbers = triton_launch.empty_numbers((2, 3, 70), torch.device("cpu"))
    found = triton_launch.number_operands(("a", "b"), numbers, 32, described=True)
    assert found["DESCRIBED"]
    assert isinstance(found["a"], TensorDescriptor)
    assert (found["a"].shape, found["a"].strides) == ([6, 70], [72, 1])
    # Tiles of 64 bytes would lie in a pipeline where no descriptor writes.
    for rows, described in ((16, True), (32, False)):
        found = triton_launch.number_operands(("a", "b"), numbers, rows, described)
        assert found["a"] is found["b"] is numbers
        assert not found["DESCRIBED"]
