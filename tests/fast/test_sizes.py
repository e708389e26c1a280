"""Sizes on the host are those that Triton computes."""

from __future__ import annotations

import pytest

from attnspec.fast.engines.sizes import cdiv, next_power_of_2, tile_width

triton = pytest.importorskip("triton")


def test_they_are_tritons() -> None:
    for n in [*range(300), 2**20 - 1, 2**20, 2**20 + 1, 2**40 + 1]:
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        for b in (1, 2, 3, 64, 2**33):
            assert cdiv(n, b) == triton.cdiv(n, b)


def test_a_tile_is_wide_enough_for_a_matrix_product() -> None:
    assert [tile_width(n) for n in (0, 1, 16, 17, 64, 65)] == [16, 16, 16, 32, 64, 128]
    assert [tile_width(n, 64) for n in (1, 80)] == [64, 128]
    assert tile_width(3, 1) == 4
