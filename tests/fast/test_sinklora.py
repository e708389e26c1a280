"""SinkLoRA's plan against its mask, its mask functions, a model that trains, and H2O's stream."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attnspec.fast.engines.flash import flash
from attnspec.fast.patterns import sinklora as fast
from attnspec.fast.patterns.longlora_adapters import adapt
from attnspec.fast.patterns.sinklora_flex import mask_mod
from attnspec.reference.patterns import sinklora as reference
from attnspec.reference.patterns import sinklora_h2o

CASES: list[tuple[int, int, int, float, bool, bool]] = [
    (70, 16, 4, 0.5, False, True),
    (70, 16, 4, 0.0, False, False),
    (33, 12, 15, 0.0, False, True),
    (33, 12, 15, 0.5, False, False),
    (20, 64, 4, 0.0, False, True),
    (20, 30, 4, 0.0, False, False),
    (9, 1, 2, 0.0, False, True),
    (9, 4, 12, 0.0, False, False),
    (64, 16, 4, 0.0, True, True),
    (64, 16, 11, 0.5, True, True),
    (48, 12, 4, 0.0, True, False),
    (48, 12, 9, 0.0, True, False),
    (48, 12, 45, 0.0, True, False),
    (16, 16, 2, 0.0, True, False),
    (16, 16, 12, 0.0, True, True),
    (48, 12, 0, 0.0, True, False),
    (40, 8, 0, 1.0, True, True),
]


def tensors(T: int, heads: int, kv_heads: int, batch: int = 2) -> list[Tensor]:
    random = torch.Generator().manual_seed(T)
    shapes = [(batch, heads, T, 8), (batch, kv_heads, T, 8), (batch, kv_heads, T, 5)]
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize(("T", "G", "s", "rho", "wrap", "causal"), CASES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_plans_are_one_pass_with_the_mask(
    T: int, G: int, s: int, rho: float, wrap: bool, causal: bool, heads: int, kv_heads: int
) -> None:
    """Also in their gradients: all groups add to the sinks, and both kinds to kv heads."""
    mask = torch.from_numpy(reference.sf_mask(T, G, heads, s, rho, wrap, causal))
    given = [x.requires_grad_() for x in tensors(T, heads, kv_heads)]
    results = [
        fast.sf_attend(*given, G, s, rho, wrap, causal, 0.4),
        flash(*given, mask=mask[None], scale=0.4),
    ]
    upstream = [torch.randn_like(x) for x in results[0]]
    gradients = [torch.autograd.grad(result, given, upstream) for result in results]
    for x, y in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("T", "G", "s", "rho", "wrap", "causal"), CASES)
def test_mask_functions_are_the_references_mask(
    T: int, G: int, s: int, rho: float, wrap: bool, causal: bool
) -> None:
    for heads in (4, 5):
        seen = mask_mod(T, G, heads, s, rho, wrap, causal)
        head, row = torch.arange(heads)[:, None, None], torch.arange(T)[:, None]
        got = seen(torch.tensor(0), head, row, torch.arange(T))
        want = reference.sf_mask(T, G, heads, s, rho, wrap, causal)
        np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_the_mask_function_agrees() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (x.float() for x in tensors(40, 4, 2))
    block_mask = create_block_mask(mask_mod(40, 12, 4, rho=0.0), None, 4, 40, 40, device="cpu")
    expected = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
    torch.testing.assert_close(fast.sf_attend(q, k, v, 12, rho=0.0)[0], expected)


def test_sinks_collect_gradient_from_every_group() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(48, 4, 4))
    out, _ = fast.sf_attend(q, k, v, 8, s=2)
    dk, dv = torch.autograd.grad(out[:, :, 40:].sum(), (k, v))
    for gradient in (dk, dv):
        touched = gradient.abs().sum((0, 1, 3)) > 0
        assert touched[:2].all()
        assert touched[40:].all()
        assert not touched[2:36].any()


class Block(nn.Module):
    """One attention layer of a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 16)
        self.input_layernorm = nn.RMSNorm(16)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(16, 16, bias=False))
        self.mlp = nn.Linear(16, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        h = self.input_layernorm(x)
        q, k, v = (
            getattr(self, name)(h).unflatten(2, (4, 4)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        out, _ = fast.sf_attend(q, k, v, 8, s=2)
        y: Tensor = self.mlp(x + self.o_proj(out.transpose(1, 2).flatten(2)))
        return y


def test_adapters_embeddings_and_norms_are_fine_tuned() -> None:
    torch.manual_seed(0)
    model = Block()
    adapt(model, 2, 4.0)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    trained = [name for name, x in model.named_parameters() if x.requires_grad]
    assert len(trained) == 2 + 4 * 2
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=0.02)
    ids = torch.randint(0, 11, (2, 33))
    losses = []
    for _ in range(12):
        logits = model(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, x in model.named_parameters():
        assert torch.equal(x, before[name]) != (name in trained), name


@pytest.mark.parametrize("rope_base", [None, 100.0])
@pytest.mark.parametrize(("heads", "kv_heads", "hh", "rec"), [(4, 2, 3, 5), (2, 2, 6, 0),
                                                             (3, 1, 0, 4)])  # fmt: skip
def test_a_stream_is_the_references(
    heads: int, kv_heads: int, hh: int, rec: int, rope_base: float | None
) -> None:
    q, k, v = tensors(60, heads, kv_heads, batch=1)
    arrays = [x.numpy() for x in (q, k, v)]
    state, want = fast.init_state(k, v), sinklora_h2o.init_state(*arrays[1:])
    ends = [0, 40, 41, 42, 45, *range(46, 61)]
    for first, last in pairwise(ends):
        parts = [x[:, :, first:last] for x in (q, k, v)]
        out, state = fast.h2o_step(*parts, state, hh, rec, rope_base=rope_base)
        parts = [x[:, :, first:last] for x in arrays]
        expected, want = sinklora_h2o.h2o_step(*parts, want, hh, rec, rope_base=rope_base)
        np.testing.assert_allclose(out.numpy(), expected, atol=1e-9)
        np.testing.assert_array_equal(state.pos.numpy(), want.pos)
        for x, y in zip(state[:3], want[:3], strict=True):
            np.testing.assert_allclose(x.numpy(), y, atol=1e-9)
        assert state.seen == want.seen == last


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_do_not_stall_in_sixteen_bits(dtype: torch.dtype) -> None:
    """A weight of 1/4 is below half a unit of 600 in float16."""
    x = torch.zeros(1, 1, 1, 8, dtype=dtype)
    state = fast.init_state(x, x)
    for _ in range(4):
        _, state = fast.h2o_step(x, x, x, state, 2, 1)
    assert state.a.dtype == torch.float32
    state = state._replace(a=state.a + 600.0)
    after = fast.h2o_step(x, x, x, state, 2, 1)[1]
    torch.testing.assert_close(after.a[:, :2] - 600.0, state.a[:, :2] - 600.0 + 0.25)
