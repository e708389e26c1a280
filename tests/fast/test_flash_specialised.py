"""The host side of the flash engine's specialised kernel, on a driver that compiles nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnspec.fast.engines.flash import flash, plans, triton_launch
from attnspec.fast.engines.flash.configs import APART, SPECIALISED, TOGETHER, use_config
from attnspec.fast.engines.flash.rules import Rules

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

from attnspec.fast.engines.flash import triton_specialised_backward as backward  # noqa: E402
from attnspec.fast.engines.flash import triton_specialised_host as specialised  # noqa: E402

PLAIN = Rules(*[None] * len(Rules._fields))._replace(causal=True)  # type: ignore[arg-type]


def test_programs_are_equally_busy_where_tiles_divide_evenly() -> None:
    # Two rounds, the second dealt backwards: a long tile and a short one for each program.
    assert specialised.imbalance(tiles=8, sequences=1, width=1, programs=4) == 1.0
    assert specialised.imbalance(tiles=2, sequences=1, width=1, programs=2) == 3.5 / 3.0


@pytest.mark.parametrize(("tiles", "sequences", "width"), [(5, 3, 1), (5, 3, 2), (7, 4, 4)])
def test_all_work_is_dealt_out_once(tiles: int, sequences: int, width: int) -> None:
    """One program does all there is, whatever the order."""
    assert specialised.imbalance(tiles, sequences, width, programs=1) == 1.0


def test_heads_go_together_where_they_would_not_be_shared_out_evenly() -> None:
    uneven = {"tiles": 32, "sequences": 8, "section": 5}
    assert specialised.section(uneven, 132, 1, PLAIN) == 8
    even = {"tiles": 32, "sequences": 32, "section": 5}
    assert specialised.section(even, 132, 1, PLAIN) == 1
    assert specialised.section(even, 132, 1, PLAIN._replace(window=9)) == 5
    assert specialised.section({**even, "tiles": 10**6}, 132, 4, PLAIN) == 4


def test_lists_are_known_by_blocks_that_fill_tiles_and_counts_of_whole_ones() -> None:
    lists = dict.fromkeys(("block_index", "block_count"), torch.zeros(1, 1, 1, 1))
    whole = torch.zeros(1, 1, 1)
    for q_block, k_block, fit in (
        (128, 64, True),
        (256, 128, True),
        (64, 64, False),
        (128, 32, False),
    ):
        listed = PLAIN._replace(**lists, q_block=q_block, k_block=k_block)
        assert not listed.known
        assert listed._replace(block_full=whole).known == fit
        assert not listed._replace(block_full=whole).plain


def test_later_calls_launch_the_same_with_other_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.launches import launches

    monkeypatch.setattr(triton_launch, "can_specialise", lambda q, v, rules: rules.plain)
    device = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which: device)
    shape = (1, 4, 700, 64)
    options: dict[str, Any] = {"causal": True, "window": 100, "sinks": 4, "backend": "triton"}
    kernels = [specialised.specialised_forward_kernel]
    with launches(monkeypatch, kernels, plans.plans) as found, use_config(forward=SPECIALISED[0]):
        for _ in range(3):
            q, k, v = (torch.ones(shape, dtype=torch.float16) for _ in range(3))
            out, lse = flash(q, k, v, **options)
            assert (out.shape, lse.shape) == (shape, shape[:3])
    assert found.compiled == 1
    names = [(name, how) for name, how, _ in found]
    assert names[0] == ("specialised_forward_kernel", "looked up")
    assert len(names) == 3
    first, *later = (len(values) for _, _, values in found)
    assert later == [first, first]


@pytest.mark.parametrize(
    ("rows", "keys", "d", "options", "chosen"),
    [
        (4096, 4096, 128, {}, TOGETHER),
        (4096, 4096, 128, {"window": 128, "sinks": 4}, APART),
        (16384, 16384, 64, {"window": 1024, "sinks": 4}, TOGETHER),
        (4096, 4096, 128, {"mask": torch.ones(1)}, APART),
        (4096, 4096, 128, {"q_offsets": torch.ones(1)}, APART),
        (4096, 4095, 128, {}, APART),
        (1000, 99999, 128, {}, APART),
        (4096, 4096, 126, {}, APART),
        (2048, 2048, 128, {}, APART),
    ],
)
def test_long_calls_of_plain_rules_are_differentiated_together(
    rows: int, keys: int, d: int, options: dict[str, Any], chosen: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(triton_launch, "can_specialise", lambda q, v, rules: True)
    q, v = (torch.empty(1, 32, tokens, d, device="meta") for tokens in (rows, keys))
    rules = PLAIN._replace(scale=1.0, **options)
    assert triton_launch.backward_choice(q, v, rules) == chosen
    with use_config(backward=APART):
        assert triton_launch.backward_choice(q, v, rules) == APART


def test_few_programs_walk_behind_a_sink() -> None:
    q, v = (torch.empty(1, 32, 131072, 128, device="meta", dtype=torch.float16) for _ in range(2))
    windowed = PLAIN._replace(window=1024)
    assert backward.section(q, v, windowed, share=1, programs=132) == 12
    assert backward.section(q, v, windowed, share=4, programs=132) == 4
    assert backward.section(q, v, PLAIN, share=1, programs=132) == 1
    assert backward.section(q[:, :, :4096], v, PLAIN, share=1, programs=132) == 12


def test_gradients_together_launch_the_same_with_other_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.launches import launches

    monkeypatch.setattr(triton_launch, "can_specialise", lambda q, v, rules: rules.plain)
    device = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which: device)
    shape = (1, 4, 700, 64)
    options: dict[str, Any] = {"causal": True, "window": 100, "sinks": 4, "backend": "triton"}
    kernels = [backward.specialised_backward_kernel, backward.round_sums_kernel]
    with launches(monkeypatch, kernels, plans.plans) as found, use_config(backward=TOGETHER):
        for _ in range(3):
            q, k, v = (torch.ones(shape, dtype=torch.float16, requires_grad=True) for _ in range(3))
            out, _ = flash(q, k, v, **options)
            out.backward(torch.ones_like(out))
            assert q.grad is not None
            assert k.grad is not None
    names = [name for name, _, _ in found]
    each = ["specialised_backward_kernel", "round_sums_kernel"]
    assert [name for name in names if name in each] == 3 * each
