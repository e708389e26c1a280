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

    monkeypatch.setattr(triton_launch, "can_specialise", lambda q, v, *biases: True)
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


def test_the_specialised_kernel_is_for_plain_calls_of_sixteen_bits_on_hopper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def known(dtype: torch.dtype = torch.float16, d: int = 128, tokens: int = 65) -> bool:
        q = SimpleNamespace(
            shape=(1, 1, tokens, d), element_size=lambda: dtype.itemsize, is_cuda=True
        )
        return triton_launch.can_specialise(q, q, None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_launch.flash_host, "arch", lambda x: 90)
    monkeypatch.setattr(triton_launch.flash_host, "SPEAKS_GLUON", True)
    assert known()
    assert not known(torch.float32)
    assert not known(d=129)
    assert not known(tokens=64)
    q = torch.ones(1, 1, 65, 64, dtype=torch.float16)
    assert not triton_launch.can_specialise(q, q, None, None)
    monkeypatch.setattr(triton_launch.flash_host, "arch", lambda x: 100)
    assert not known()
