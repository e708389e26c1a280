"""LongLoRA's plan against its mask, its mask functions, and adapters inside a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attnspec.fast.engines.flash import flash
from attnspec.fast.patterns import longlora as fast
from attnspec.fast.patterns.longlora_adapters import LoraLinear, adapt, merge
from attnspec.fast.patterns.longlora_flex import mask_mod
from attnspec.reference.patterns.longlora_groups import s2_mask

CASES: list[tuple[int, int, str, bool]] = [
    (70, 16, "segments", True),
    (33, 12, "segments", False),
    (20, 64, "segments", True),
    (9, 1, "segments", True),
    (64, 16, "roll", True),
    (48, 12, "roll", False),
    (16, 16, "roll", True),
]


def tensors(T: int, heads: int, kv_heads: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(T)
    shapes = [(2, heads, T, 8), (2, kv_heads, T, 8), (2, kv_heads, T, 5)]
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize(("T", "G", "variant", "causal"), CASES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1), (10, 2)])
def test_plans_are_one_pass_with_the_mask(
    T: int, G: int, variant: str, causal: bool, heads: int, kv_heads: int
) -> None:
    """Also in their gradients, where a kv head serves both halves, or one of five heads twice."""
    mask = torch.from_numpy(s2_mask(T, G, heads, variant, causal))
    given = [x.requires_grad_() for x in tensors(T, heads, kv_heads)]
    results = [
        fast.grouped_attend(*given, G, variant, None, causal),
        flash(*given, mask=mask[None]),
    ]
    upstream = [torch.randn_like(x) for x in results[0]]
    gradients = [torch.autograd.grad(result, given, upstream) for result in results]
    for x, y in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("T", "G", "variant", "causal"), CASES)
@pytest.mark.parametrize("heads", [4, 6])
def test_mask_functions_are_the_references_mask(
    T: int, G: int, variant: str, causal: bool, heads: int
) -> None:
    seen = mask_mod(T, G, heads, variant, None, causal)
    head, row, key = torch.arange(heads)[:, None, None], torch.arange(T)[:, None], torch.arange(T)
    got = seen(torch.tensor(0), head, row, key)
    np.testing.assert_array_equal(got.numpy(), s2_mask(T, G, heads, variant, causal))


def test_mask_functions_with_lengths_hide_padding() -> None:
    lengths = torch.tensor([9, 3, 0])
    seen = mask_mod(9, 4, 2, lengths=lengths)
    token = torch.arange(9)
    for b, length in enumerate(lengths.tolist()):
        got = seen(torch.tensor(b), torch.arange(2)[:, None, None], token[:, None], token)
        real = np.arange(9) < length
        np.testing.assert_array_equal(got.numpy(), s2_mask(9, 4, 2) & real[:, None] & real)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_the_mask_function_agrees() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (x.float() for x in tensors(40, 4, 2))
    block_mask = create_block_mask(mask_mod(40, 12, 4), None, 4, 40, 40, device="cpu")
    expected = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
    torch.testing.assert_close(fast.grouped_attend(q, k, v, 12)[0], expected)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_reaches_no_gradient(causal: bool) -> None:
    T, lengths = 30, torch.tensor([19, 0])
    q, k, v = tensors(T, 6, 2)
    padded = [x.clone() for x in (q, k, v)]
    for x in padded:
        x[0, :, 19:] = torch.nan
        x[1] = torch.nan
        x.requires_grad_()
    out, lse = fast.grouped_attend(*padded, 8, lengths=lengths, causal=causal)
    upstream = torch.randn(1, 6, 19, 5, dtype=torch.float64)
    gradients = torch.autograd.grad(out[:1, :, :19], padded, upstream)
    alone = [x[:1, :, :19].clone().requires_grad_() for x in (q, k, v)]
    expected = fast.grouped_attend(*alone, 8, causal=causal)
    torch.testing.assert_close(out[:1, :, :19], expected[0])
    torch.testing.assert_close(lse[:1, :, :19], expected[1])
    assert not out[0, :, 19:].any()
    assert not out[1].any()
    for whole, part in zip(
        gradients, torch.autograd.grad(expected[0], alone, upstream), strict=True
    ):
        torch.testing.assert_close(whole[:1, :, :19], part)
        assert not whole[0, :, 19:].any()
        assert not whole[1].any()


class Norm(nn.Module):
    def __init__(self, D: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return fast.rmsnorm(x, self.weight)


class Layer(nn.Module):
    """Attention between an embedding and a head, in which tokens see their groups."""

    def __init__(self, D: int = 16, heads: int = 2, vocab: int = 11) -> None:
        super().__init__()
        self.heads = heads
        self.embed_tokens = nn.Embedding(vocab, D)
        self.input_layernorm = Norm(D)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.input_layernorm(self.embed_tokens(ids))
        q, k, v = (
            project(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out, _ = fast.grouped_attend(q, k, v, 4)
        y: Tensor = self.lm_head(self.o_proj(out.transpose(1, 2).flatten(2)))
        return y


def test_adapters_are_trained_and_merged() -> None:
    torch.manual_seed(0)
    model, ids = Layer(), torch.randint(0, 11, (2, 13))
    before = model(ids)
    adapt(model, r=2, alpha=4.0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert trained == {
        "embed_tokens.weight",
        "input_layernorm.weight",
        *(f"{name}.lora_{half}" for name in projections for half in "AB"),
    }
    torch.testing.assert_close(model(ids), before)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    tuned = model(ids)
    frozen = model.q_proj.base.weight.clone()
    adapters = [child for child in model.children() if isinstance(child, LoraLinear)]
    assert len(adapters) == 4
    merge(model)
    assert not [m for m in model.modules() if isinstance(m, LoraLinear)]
    torch.testing.assert_close(model(ids), tuned, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(adapters[0].base.weight, frozen)


def test_dropout_is_in_training_only_and_spares_the_frozen_part() -> None:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(6, 5), r=2, dropout=0.5)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), layer.base(x))
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer.merged()(x))


BAD: list[tuple[Any, type, str]] = [
    (lambda: LoraLinear(nn.Linear(2, 2), r=0), ValueError, "r"),
    (lambda: adapt(nn.Sequential(nn.Linear(2, 2))), ValueError, "targets"),
    (lambda: mask_mod(8, 0, 2), ValueError, "G"),
    (lambda: mask_mod(8, 4, 3, "roll"), ValueError, "H"),
    (lambda: mask_mod(8, 4, 2, "roll", torch.tensor([3])), ValueError, "lengths"),
]


@pytest.mark.parametrize(("call", "error", "name"), BAD)
def test_bad_input_is_named(call: Any, error: type, name: str) -> None:
    with pytest.raises(error, match=f"^{name}: got"):
        call()
