"""The plan of a scan on Triton: what it keeps on its way fits the memory there is."""

from __future__ import annotations

import pytest
import torch

from attnspec.fast.engines.scan import triton_plan
from attnspec.fast.engines.scan.configs import CANDIDATES, ScanConfig, use_config
from attnspec.fast.engines.scan.triton_plan import HOPPERS_ROOM, OTHERS_ROOM, Call


def plan(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, d: int, cfg: ScanConfig, hopper: bool
) -> Call:
    monkeypatch.setattr(triton_plan, "device_of", lambda x: (132, hopper))
    q = torch.empty(1, 1, 64, d, dtype=dtype)
    with use_config(cfg):
        return Call.plan(q, q, 1, None, None, None, 1.0, 0)


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stages_fit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, d: int, hopper: bool
) -> None:
    room = HOPPERS_ROOM if hopper else OTHERS_ROOM
    for cfg in CANDIDATES:
        call = plan(monkeypatch, dtype, d, cfg, hopper)
        tile = call.tile(cfg.walk_items, d, d)
        columns, state = 2 * d + tile + call.block, d * tile
        stages = call.stages(cfg.walk_stages, columns, state)
        each = call.block * columns * dtype.itemsize
        assert 1 <= stages <= cfg.walk_stages
        assert stages == 1 or stages * each + state * dtype.itemsize <= room
        assert stages == cfg.walk_stages or (stages + 1) * each + state * dtype.itemsize > room


def test_the_default_keeps_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The widest keys and values, under a decay per channel, as they run by default on Hopper."""
    call = plan(monkeypatch, torch.bfloat16, 256, ScanConfig(), True)
    tile = call.tile(call.cfg.walk_items, 256, 256)
    assert call.stages(call.cfg.walk_stages, 2 * 256 + tile + call.block, 256 * tile) == 2


@pytest.mark.parametrize(
    ("q_heads", "k_heads", "columns", "shared"),
    [(4, 4, 128, True), (4, 4, 64, False), (2, 2, 64, True), (2, 4, 64, False), (4, 4, 192, False)],
    ids=["one head", "two heads", "two of a group", "own keys", "a tile and the next head's"],
)
def test_what_two_consumers_share(
    monkeypatch: pytest.MonkeyPatch, q_heads: int, k_heads: int, columns: int, shared: bool
) -> None:
    """Tiles of 64 channels of v are dealt to two consumers, one of four heads after the other."""
    monkeypatch.setattr(triton_plan, "device_of", lambda x: (132, True))
    q, k = (torch.empty(1, heads, 64, 64, dtype=torch.bfloat16) for heads in (q_heads, k_heads))
    v = torch.empty(1, 4, 64, columns, dtype=torch.bfloat16)
    call = Call.plan(q, v, 4, None, None, None, 1.0, 0)
    assert call.shares(q, k, columns) is shared


def test_the_specialised_kernels_are_for_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a configuration says: not for a processor that has the memory, as newer ones do."""
    call = plan(monkeypatch, torch.bfloat16, 128, ScanConfig(specialised=3), True)
    q = torch.empty(1, 1, 64, 128, dtype=torch.bfloat16)
    assert not call.specialises(q, q)
