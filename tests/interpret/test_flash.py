"""The flash engine's Triton kernels in the interpreter, against its CPU kernels in float64."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.flash import BlockLists, flash, triton_packing
from attnspec.fast.engines.flash.configs import FlashConfig, use_config

TILE = FlashConfig(rows=16, keys=16, warps=1, stages=1)
SMALL = {"forward": TILE, "dq": TILE, "dkdv": TILE}
UNEQUAL = {
    "forward": FlashConfig(rows=32, keys=16, warps=1, stages=1),
    "dq": FlashConfig(rows=16, keys=32, warps=1, stages=1),
    "dkdv": FlashConfig(rows=32, keys=16, warps=1, stages=1, early=True),
}
CAUSAL = {"causal": True}
OFFSETS = (torch.tensor([0, 5, 5, 30, 50]), torch.tensor([0, 9, 20, 41, 50]))
STARTS = torch.tensor([0] * 10 + [7] * 20 + [19] * 18)
ENDS = torch.tensor([-1] * 3 + [5] * 17 + [30] * 20 + [60] * 8)
PADDING = torch.arange(48) >= torch.tensor([[20], [3]])
HOLES = torch.rand(2, 48, generator=torch.Generator().manual_seed(1)) > 0.3
PAIRS = torch.rand(2, 1, 30, 40, generator=torch.Generator().manual_seed(2)) > 0.5


def listed(q_block: int, k_block: int, q_tokens: int, k_tokens: int) -> BlockLists:
    random = torch.Generator().manual_seed(q_block)
    shape = (1, 2, -(-q_tokens // q_block), -(-k_tokens // k_block))
    return BlockLists.from_mask(torch.rand(shape, generator=random) > 0.5, q_block, k_block)


def in_parts(q_block: int, k_block: int, q_tokens: int, k_tokens: int) -> BlockLists:
    """Lists whose first blocks are seen whole; the last, which may be short, never is."""
    random = torch.Generator().manual_seed(q_block)
    shape = (1, 2, -(-q_tokens // q_block), -(-k_tokens // k_block))
    kind = torch.randint(0, 3, shape, generator=random)
    kind[..., k_tokens // k_block :] = 1
    index = torch.argsort(torch.tensor([2, 1, 0])[kind], dim=-1, stable=True)
    count, full = ((kind >= least).sum(-1, dtype=torch.int32) for least in (1, 2))
    return BlockLists(index.int(), count, q_block, k_block, full)


CASES: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "all": ((17, 33), {}),
    "causal": ((40, 40), CAUSAL),
    "one query": ((1, 35), CAUSAL),
    "fewer queries": ((33, 47), CAUSAL),
    "fewer keys": ((47, 33), CAUSAL),
    "negative scale": ((20, 20), {"scale": -0.3, **CAUSAL}),
    "scale zero": ((20, 20), {"scale": 0.0, "window": 5, **CAUSAL}),
    "window": ((50, 50), {"window": 20, **CAUSAL}),
    "window and sinks": ((48, 70), {"window": 9, "sinks": 5, **CAUSAL}),
    "wide sinks": ((60, 60), {"window": 20, "sinks": 35, **CAUSAL}),
    "row starts": ((48, 48), {"row_start": STARTS}),
    "row starts and sinks": ((48, 48), {"row_start": STARTS, "sinks": 17, **CAUSAL}),
    "row ends": ((48, 48), {"row_end": ENDS}),
    "row ends and starts": ((48, 48), {"row_start": STARTS, "row_end": ENDS, "sinks": 3}),
    "row ends, causal": ((48, 40), {"row_end": ENDS, **CAUSAL}),
    "row ends and blocks": ((48, 50), {"row_end": ENDS, "blocks": listed(16, 16, 48, 50)}),
    "packed row ends": ((50, 50), {"offsets": OFFSETS, "row_end": torch.arange(50) // 2}),
    "padding": ((48, 48), {"key_mask": PADDING, **CAUSAL}),
    "padding and window": ((48, 48), {"key_mask": PADDING, "window": 9, "sinks": 18, **CAUSAL}),
    "holes": ((20, 48), {"key_mask": HOLES}),
    "mask": ((30, 40), {"mask": PAIRS}),
    "row mask": ((30, 40), {"mask": PAIRS[0, 0, :, :1], **CAUSAL}),
    "blocks": ((40, 50), {"blocks": listed(16, 16, 40, 50)}),
    "causal blocks": ((64, 70), {"blocks": listed(32, 32, 64, 70), **CAUSAL}),
    "odd blocks": ((33, 40), {"blocks": listed(10, 12, 33, 40), **CAUSAL}),
    "blocks in parts": (
        (80, 85),
        {"blocks": in_parts(32, 16, 80, 85), "row_start": torch.arange(80) // 2, **CAUSAL},
    ),
    "packed": ((50, 50), {"offsets": OFFSETS, **CAUSAL}),
    "packed, not causal": ((50, 50), {"offsets": OFFSETS}),
    "packed window": ((50, 50), {"offsets": OFFSETS, "window": 6, "sinks": 17, **CAUSAL}),
    "sink logit": ((20, 14), {"sink_logit": torch.tensor([0.5, -1.0]), **CAUSAL}),
    "slopes": ((33, 33), {"slopes": torch.tensor([0.5, 0.1]), **CAUSAL}),
    "slope positions": (
        (20, 33),
        {"slopes": torch.tensor([0.5, 0.1]), "slope_positions": 3 * torch.arange(20)},
    ),
}


def tensors(
    q_tokens: int,
    k_tokens: int,
    options: dict[str, Any],
    *,
    heads: int = 2,
    kv_heads: int = 1,
    d: int = 8,
    dv: int = 12,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Random q, k, v, dout and dlse that fit the options."""
    random = torch.Generator().manual_seed(q_tokens)
    masks = [options[name] for name in ("key_mask", "mask") if name in options]
    batch = max([mask.shape[0] for mask in masks if mask.dim() in (2, 4)], default=1)
    batch = 1 if batch not in (1, 2) else batch
    shapes = [
        (batch, heads, q_tokens, d),
        (batch, kv_heads, k_tokens, d),
        (batch, kv_heads, k_tokens, dv),
        (batch, heads, q_tokens, dv),
    ]
    made = [torch.randn(shape, generator=random).to(dtype) for shape in shapes]
    return [*made, torch.randn((batch, heads, q_tokens), generator=random)]


def run(given: list[Tensor], options: dict[str, Any], backend: str) -> list[Tensor]:
    """out, lse and the gradients of q, k, v and, if there is one, of the sink logit."""
    q, k, v, dout, dlse = given
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    if "sink_logit" in options:
        sink = options["sink_logit"].to(q.dtype).requires_grad_()
        inputs, options = [*inputs, sink], {**options, "sink_logit": sink}
    out, lse = flash(*inputs[:3], **options, backend=backend)
    # lse is -inf where nothing is seen, and the gradient that comes with it must not matter.
    gradients = torch.autograd.grad((out, lse), inputs, (dout, dlse.to(lse.dtype)))
    return [out.detach(), lse.detach(), *gradients]


def assert_close(got: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for x, exact in zip(got, expected, strict=True):
        assert torch.equal(x == -torch.inf, exact == -torch.inf)
        x, exact = (t.double().masked_fill(exact == -torch.inf, 0.0) for t in (x, exact))
        assert (x - exact).norm() <= bound * max(exact.norm(), 1e-3)


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    (q_tokens, k_tokens), options = CASES[name]
    given = tensors(q_tokens, k_tokens, options)
    expected = run([x.double() for x in given], options, "numba")
    with use_config(**SMALL):
        assert_close(run(given, options, "triton"), expected, 2e-6)


@pytest.mark.parametrize("name", ["causal", "wide sinks", "packed", "causal blocks"])
def test_unequal_tiles(name: str) -> None:
    (q_tokens, k_tokens), options = CASES[name]
    given = tensors(q_tokens, k_tokens, options)
    expected = run([x.double() for x in given], options, "numba")
    with use_config(**UNEQUAL):
        assert_close(run(given, options, "triton"), expected, 2e-6)


@pytest.mark.parametrize(
    ("dtype", "bound", "sizes"),
    [
        (torch.float32, 2e-6, {"heads": 4, "kv_heads": 2, "d": 80, "dv": 96}),
        (torch.float16, 2e-3, {"heads": 2, "kv_heads": 2, "d": 16, "dv": 8}),
    ],
)
def test_table_configurations(dtype: torch.dtype, bound: float, sizes: dict[str, int]) -> None:
    given = tensors(20, 37, {}, dtype=dtype, **sizes)
    expected = run([x.double() for x in given], CAUSAL, "numba")
    assert_close(run(given, CAUSAL, "triton"), expected, bound)


@pytest.mark.parametrize("layout", ["tokens before heads", "channels apart", "expanded upstream"])
def test_layouts(layout: str) -> None:
    given = tensors(33, 33, {}, d=16, dv=16)
    if layout == "tokens before heads":
        given = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    if layout == "channels apart":
        given[:4] = [x.repeat_interleave(2, 3)[..., ::2] for x in given[:4]]
    if layout == "expanded upstream":
        given[3] = torch.ones(()).expand(given[3].shape)
    options = {"window": 7, "sinks": 3, **CAUSAL}
    expected = run([x.double() for x in given], options, "numba")
    with use_config(**SMALL):
        assert_close(run(given, options, "triton"), expected, 2e-6)


@pytest.mark.parametrize(
    "name", ["padding", "mask", "packed", "window and sinks", "blocks in parts", "row ends"]
)
def test_nan_reaches_only_rows_that_see_it(name: str) -> None:
    (q_tokens, k_tokens), options = CASES[name]
    options = {**options, **CAUSAL}
    given = tensors(q_tokens, k_tokens, options)
    key = 12
    keys = torch.zeros(k_tokens, dtype=torch.bool)
    keys[key] = True
    # With key `key` hidden as well, a row changes if and only if it saw that key.
    seen = _seen(given, options, key)
    poisoned = [x.clone() for x in given]
    poisoned[1][:, :, key], poisoned[2][:, :, key] = torch.nan, torch.nan
    with use_config(**SMALL):
        clean = run(given, options, "triton")
        dirty = run(poisoned, options, "triton")
    for x, y in zip(clean[:3], dirty[:3], strict=True):
        assert torch.equal(x[~seen], y[~seen])
        assert y[seen].isnan().all()


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum of such a row
@pytest.mark.parametrize("backend", ["triton", "numba"])
@pytest.mark.parametrize(
    "name", ["padding", "mask", "packed", "window and sinks", "blocks in parts", "row ends"]
)
def test_nan_in_a_row_reaches_only_keys_that_it_sees(name: str, backend: str) -> None:
    (q_tokens, k_tokens), options = CASES[name]
    options = {**options, **CAUSAL}
    given = tensors(q_tokens, k_tokens, options)
    row, group = 7, given[0].shape[1] // given[1].shape[1]
    keys = [_seen(given, options, key)[:, :, row] for key in range(k_tokens)]
    seen = torch.stack(keys, -1).unflatten(1, (-1, group)).any(2)
    poisoned = [x.clone() for x in given]
    poisoned[0][:, :, row], poisoned[3][:, :, row] = torch.nan, torch.nan
    with use_config(**SMALL):
        clean, dirty = run(given, options, backend), run(poisoned, options, backend)
    for x, y in zip(clean[3:5], dirty[3:5], strict=True):
        # On the CPU other sums are made beside a NaN, in another order.
        torch.testing.assert_close(y[~seen], x[~seen])
        assert y[seen].isnan().all()


def _seen(given: list[Tensor], options: dict[str, Any], key: int) -> Tensor:
    """bool (batch, heads, q_tokens): which rows give `key` a weight, by the CPU kernels."""
    q, k, v = (x.double() for x in given[:3])
    v = torch.zeros_like(v)
    v[:, :, key] = 1.0
    return flash(q, k, v, **options, backend="numba")[0][..., 0] > 0


def test_gradients_repeat_bit_for_bit() -> None:
    given = tensors(33, 33, {}, heads=4, kv_heads=2)
    with use_config(**SMALL):
        first, second = run(given, CAUSAL, "triton"), run(given, CAUSAL, "triton")
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize(("tiles_at_once", "sequences_at_once"), [(64, 256), (4, 2)])
def test_tiles_of_a_sequence_stay_together_and_long_walks_come_first(
    rising: bool, tiles_at_once: int, sequences_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_packing, "TILES", tiles_at_once)
    monkeypatch.setattr(triton_packing, "SEQUENCES", sequences_at_once)
    lengths, walked = [5, 0, 33, 16, 20], [40, 9, 7, 40, 0]
    offsets, walks = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths, walked))
    table = triton_packing.TileTable(offsets, walks, 80, 100, 16, rising)(offsets, walks)
    # 74 tokens of 80 are in a sequence, and 80 could make ten tiles: three lie behind the last one.
    tiles = {0: [0], 2: [0, 1, 2], 3: [0], 4: [0, 1]}
    expected = [
        [sequence, tile]
        for sequence in (0, 3, 2, 4)
        for tile in (tiles[sequence] if rising else tiles[sequence][::-1])
    ]
    assert table[:7].tolist() == expected
    assert table[7:].tolist() == [[4, 2], [4, 3], [4, 4]]
