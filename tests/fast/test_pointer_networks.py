"""The pointer network's fast path against its chapter: the pointer itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from attnspec.fast.scores import pointer_networks as fast
from attnspec.reference.scores import pointer_networks as spec

BATCH, SLOTS, STEPS, D, A = 2, 9, 4, 6, 5


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", ["no", "slots", "pairs"])
def test_loss_and_gradients(biased: bool, masked: str) -> None:
    torch.manual_seed(0)
    e, d = torch.randn(BATCH, SLOTS, D), torch.randn(BATCH, STEPS, D)
    mask = None
    if masked != "no":
        shape = (BATCH, SLOTS) if masked == "slots" else (BATCH, STEPS, SLOTS)
        mask = torch.rand(shape) > 0.4
        mask[..., 0] = True
    if masked == "slots":
        mask[:, 5] = False
        e[:, 5] = math.nan
    targets = torch.zeros(BATCH, STEPS, dtype=torch.long)
    real = torch.ones(BATCH, STEPS, dtype=torch.bool)
    real[0, 2:] = False
    targets[0, 3] = -7
    d[0, 3] = math.nan
    tensors = [e.requires_grad_(), d.requires_grad_(), leaf(A, D), leaf(A, D), leaf(A)]
    biases = {"b1": leaf(A), "b2": leaf(A)} if biased else {}

    fused = fast.pointer_cross_entropy(*tensors, targets, mask=mask, target_mask=real, **biases)
    scores = fast.pointer_scores(*tensors, **biases)
    staged = fast.pointer_loss(fast.pointer_log_probs(scores, mask), targets, real)
    given = [array(x) for x in tensors]
    options: dict[str, Any] = {name: array(x) for name, x in biases.items()}
    options |= {"mask": None if mask is None else mask.numpy(), "target_mask": real.numpy()}
    expected = spec.pointer_cross_entropy(*given, targets.numpy(), **options)
    gradients = spec.pointer_cross_entropy_backward(*given, targets.numpy(), 1.0, **options)
    for loss in (fused, staged):
        np.testing.assert_allclose(array(loss), expected, atol=1e-5)
        got = torch.autograd.grad(loss, [*tensors, *biases.values()], retain_graph=True)
        for gradient, want in zip(got, gradients, strict=False):
            np.testing.assert_allclose(array(gradient), want, atol=1e-5)


def test_glimpse() -> None:
    torch.manual_seed(0)
    e, W1, b1 = torch.randn(1, SLOTS, D), torch.randn(A, D), torch.randn(A)
    mask = torch.arange(SLOTS)[None] != 3
    e[:, 3] = math.nan
    logp = fast.pointer_log_probs(torch.randn(1, STEPS, SLOTS), mask)
    expected = spec.glimpse(array(e), array(logp), array(W1), b1=array(b1))
    np.testing.assert_allclose(array(fast.glimpse(e, logp, W1, b1=b1)), expected, atol=1e-5)


E, S = torch.zeros(1, 3, 2), torch.zeros(1, 2, 3)
W, V = torch.zeros(4, 2), torch.zeros(4)
NOTHING = torch.tensor([[False, False, False]])
TARGETS = torch.zeros(1, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: fast.pointer_scores(E, E, W, W[:, :1], V), ValueError, "W2"),
        (lambda: fast.pointer_scores(E, E, W, W, V[:2]), ValueError, "v"),
        (lambda: fast.pointer_scores(E, E.double(), W, W, V), TypeError, "d"),
        (lambda: fast.pointer_scores(E, E, W, W, V, b1=V[:1]), ValueError, "b1"),
        (lambda: fast.pointer_log_probs(S, NOTHING), ValueError, "mask"),
        (lambda: fast.pointer_log_probs(S, S), TypeError, "mask"),
        (lambda: fast.pointer_log_probs(S[..., :0], None), ValueError, "scores"),
        (lambda: fast.pointer_loss(S, TARGETS + 3, None), ValueError, "targets"),
        (lambda: fast.pointer_loss(S, TARGETS, TARGETS > 0), ValueError, "target_mask"),
        (lambda: fast.pointer_loss(S, TARGETS[:, :1], None), ValueError, "targets"),
        (lambda: fast.glimpse(E, S[..., :2], W), ValueError, "logp"),
        (lambda: fast.glimpse(E, S.to("meta"), W), ValueError, "logp"),
        (lambda: fast.pointer_log_probs(S, ~NOTHING.to("meta")), ValueError, "mask"),
        (lambda: fast.pointer_loss(S, TARGETS.to("meta"), None), ValueError, "targets"),
        (
            lambda: fast.pointer_loss(S, TARGETS, (TARGETS == 0).to("meta")),
            ValueError,
            "target_mask",
        ),
        (
            lambda: fast.pointer_cross_entropy(E, E[:, :2], W, W, V, TARGETS.to("meta")),
            ValueError,
            "targets",
        ),
    ],
)
def test_bad_input(call: Any, error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=f"^{argument}: got "):
        call()
