"""H2O's step on Triton, in the interpreter, beside that of the CPU: the same rows stay."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from attnspec.fast.patterns import sinklora as fast


@pytest.mark.parametrize(("hh", "rec", "rope_base"), [(4, 6, None), (0, 5, None), (7, 0, 100.0)])
def test_steps(hh: int, rec: int, rope_base: float | None) -> None:
    torch.manual_seed(hh)
    states = {}
    for tokens in (12, 1, 3, 1):
        q, k = torch.randn(1, 6, tokens, 8), torch.randn(1, 2, 8, tokens).mT
        v = torch.randn(1, tokens, 2, 5).transpose(1, 2)
        made = []
        for backend in ("triton", "numba"):
            state = states.get(backend, fast.init_state(k, v))
            out, states[backend] = fast.h2o_step(
                q, k, v, state, hh, rec, -0.5, rope_base=rope_base, backend=backend
            )
            made.append([out, *states[backend][:4]])
        for got, expected in zip(*made, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert states["triton"].seen == states["numba"].seen


def test_ties_stay_by_index() -> None:
    k = torch.zeros(1, 2, 40, 4)
    v = torch.arange(40.0).expand(1, 2, 4, 40).mT
    state = fast.State(k, v, torch.ones(2, 40), torch.arange(40).expand(2, 40), 40)
    _, after = fast.h2o_step(k[:, :, :1], k[:, :, :1], v[:, :, :1], state, 5, 3, backend="triton")
    assert after.pos.tolist() == [[0, 1, 2, 3, 4, 38, 39, 40]] * 2
    assert after.v[0, 0, :, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 38.0, 39.0, 0.0]
