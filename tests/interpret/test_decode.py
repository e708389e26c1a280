"""The decode engine's Triton kernels in the interpreter, against a plain softmax in float64."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import pytest
import torch

from attnspec.fast.engines.decode import DecodeConfig, decode, use_config
from attnspec.fast.parallel import lean_attention
from tests.decode_cases import CASES, check, check_values_apart, compare, draw, plain

HALF = ("one token", "paired", "ragged, three workers", "gathered, pages of 16", "paged", "fused")


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    check(name, torch.float32, backend="triton", tile=16)


@pytest.mark.parametrize("name", HALF)
def test_cases_in_half_precision(name: str) -> None:
    check(name, torch.float16, backend="triton", tile=16)


def test_a_batch_too_large_to_be_scanned_at_once() -> None:
    q, k, v = draw(260, 1, 1, 1, 20, 16, 16)
    lengths = torch.randint(0, 20, (260,))
    for n, options in (
        (260, {"lengths": lengths, "workers": 3}),
        (33, {"lengths": lengths[:33, None], "workers": 5}),
    ):
        call: Any = (q[:n], k[:n], v[:n])
        got = decode(*call, **options, tile=16, backend="triton")
        compare(got, plain(*call, **options), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_of_one_key_head_do_not_meet(dtype: torch.dtype) -> None:
    check_values_apart(dtype, backend="triton", tile=16)


def test_large_logits_do_not_overflow() -> None:
    q, k, v = draw(1, 2, 1, 1, 70, 16, 16)
    out, lse = decode(1e4 * q, k, v, workers=3, tile=16, backend="triton")
    expected = plain(1e4 * q, k, v)
    torch.testing.assert_close(out.double(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected[1], atol=0, rtol=1e-6)


def test_forced_configurations_agree() -> None:
    q, k, v = draw(1, 4, 2, 3, 90, 16, 16)
    expected = plain(q, k, v)
    for tile, rows in ((16, 6), (32, 4), (64, 1)):
        with use_config(DecodeConfig(tile, rows, workers=1, warps=4, stages=2)):
            compare(decode(q, k, v, backend="triton"), expected, torch.float32)


def test_lean_attention() -> None:
    q, k, v = draw(2, 4, 2, 5, 40, 16, 16)
    lengths = torch.tensor([40, 7])
    expected = plain(q, k, v, lengths=lengths)
    for N, G, M, order in ((1, 3, None, "natural"), (20, 5, 2, "paired"), (256, 1, 1, "paired")):
        got = lean_attention.attend(q, k, v, lengths, N, G, None, True, M, order, backend="triton")
        compare(got, expected, torch.float32)


def test_tiles_must_be_powers_of_two() -> None:
    with pytest.raises(ValueError, match="tile: got 24"):
        decode(*draw(1, 1, 1, 1, 9, 16, 16), tile=24, backend="triton")
