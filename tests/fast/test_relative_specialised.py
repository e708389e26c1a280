"""The host side of the relative engine's specialised kernel, on a driver that compiles nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from attnspec.fast.engines import prepared
from attnspec.fast.engines.relative import configs, relative, triton_launch

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

from attnspec.fast.engines.relative import triton_specialised_host as specialised  # noqa: E402


def test_a_forced_configuration_is_that_of_the_other_kernel() -> None:
    assert configs.specialises(65)
    assert not configs.specialises(64)
    with configs.use_config(specialised=configs.RelativeConfig(128, 8, 2)):
        assert configs.specialises(65)
    for forced in (
        configs.use_config(forward=configs.RelativeConfig(64, 4, 2)),
        configs.use_config(configs.RelativeConfig(64, 4, 2)),
    ):
        with forced:
            assert not configs.specialises(65)


def test_later_calls_launch_the_same_with_other_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.launches import launches

    monkeypatch.setattr(triton_launch, "can_specialise", lambda q, v: True)
    monkeypatch.setattr(triton_launch.flash_host, "arch", lambda x: 90)
    device = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which: device)
    kernels = [specialised.specialised_relative_kernel]
    with launches(monkeypatch, kernels, prepared._compiled) as found:
        for _ in range(3):
            q, k, v = (torch.ones(1, 4, 700, 64, dtype=torch.float16) for _ in range(3))
            table = torch.ones(4, 100, 64, dtype=torch.float16)
            out, lse = relative(q, k, v, table, zero=99, causal=True, backend="triton")
            assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    assert found.compiled == 1
    assert [(name, how) for name, how, _ in found] == [
        ("specialised_relative_kernel", "looked up"),
        *[("specialised_relative_kernel", "direct")] * 2,
    ]


@pytest.mark.parametrize("entries", [4, 5, 6, 7])
@pytest.mark.parametrize("slack", [0, 1, 2, 3])
def test_numbers_lie_as_descriptors_want_them(entries: int, slack: int) -> None:
    bias = torch.randn(2, 3, entries)
    found = specialised.numbers_of(bias, slack)
    lines, room = found.shape
    assert lines == 6
    assert room % 4 == found.strides[0] % 4 == found.base.data_ptr() % 16 == 0
    expected = torch.zeros(6, room)
    expected[:, slack : slack + entries] = bias.view(6, entries)
    assert torch.equal(found.base, expected)
    moved = torch.randn(25)[1:].view(6, 4)
    assert specialised.numbers_of(moved, 0).base.data_ptr() % 16 == 0
    assert specialised.numbers_of(None, slack) is None


@pytest.mark.parametrize("before", [0, 1, 2, 3])
@pytest.mark.parametrize("zero", [96, 97, 98, 99])
def test_chunks_of_numbers_begin_at_multiples_of_four(
    monkeypatch: pytest.MonkeyPatch, before: int, zero: int
) -> None:
    asked = {}
    monkeypatch.setattr(triton_launch.flash_host, "arch", lambda x: 90)
    device = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which: device)
    monkeypatch.setattr(prepared, "launch", lambda kernel, programs, **named: asked.update(named))
    q, k = torch.ones(1, 2, 200, 64).half(), torch.ones(1, 2, 200 + before, 64).half()
    table, bias = torch.ones(2, 100, 64).half(), torch.ones(2, 100)
    specialised.forward(q, k, k, table, bias, None, zero, 1.0, True, None)
    # The oldest chunk of rows 0 to 127, whose keys begin at 0.
    assert (zero - before - 127 + asked["slack"]) % 4 == 0
    assert asked["table_bias"].base[0].tolist()[: asked["slack"] + 1] == [0] * asked["slack"] + [1]
    assert asked["key_bias"] is None


def test_the_specialised_kernel_is_for_sixteen_bits_on_hopper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def known(dtype: torch.dtype = torch.float16, d: int = 128, tokens: int = 65) -> bool:
        q = SimpleNamespace(
            shape=(1, 1, tokens, d), element_size=lambda: dtype.itemsize, is_cuda=True
        )
        return triton_launch.can_specialise(q, q)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_launch.flash_host, "arch", lambda x: 90)
    monkeypatch.setattr(triton_launch.flash_host, "SPEAKS_GLUON", True)
    assert known()
    assert not known(torch.float32)
    assert not known(d=129)
    assert not known(tokens=64)
    q = torch.ones(1, 1, 65, 64, dtype=torch.float16)
    assert not triton_launch.can_specialise(q, q)
    monkeypatch.setattr(triton_launch.flash_host, "arch", lambda x: 100)
    assert not known()
