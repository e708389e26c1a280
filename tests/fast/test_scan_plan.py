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
