"""A right kernel that fails is worse than a wrong one that passes: no false alarms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from attnspec.conformance import Kernel, certify
from attnspec.conformance.contract import contracts
from attnspec.reference import mechanisms
from attnspec.reference.conventions import check_attention_inputs

# Measuring coverage takes as long again, and all that runs here is covered by the mutants' tests.
pytestmark = pytest.mark.no_cover


def naive_loop(q, k, v, *, causal=False, mask=None, scale=None):
    """Attention row by row with an online softmax, in the input's own precision."""
    check_attention_inputs(q, k, v)
    if mask is not None and mask.dtype != bool:
        raise TypeError("mask: expected bool")
    batch, heads, queries, d = q.shape
    keys, group = k.shape[-2], heads // k.shape[1]
    scale = np.asarray(1 / math.sqrt(d) if scale is None else scale, np.float64)
    out = np.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    lse = np.full(q.shape[:-1], -np.inf, q.dtype)
    for b, h, i in np.ndindex(batch, heads, queries):
        top, total, row = -np.inf, 0.0, np.zeros(v.shape[-1])
        for j in range(keys):
            if causal and j > i + keys - queries:
                break
            if (
                mask is not None
                and not np.broadcast_to(mask, (batch, 1, queries, keys))[b, 0, i, j]
            ):
                continue
            score = float(scale * np.dot(q[b, h, i], k[b, h // group, j]))
            new = max(top, score)
            fade, weight = math.exp(top - new), math.exp(score - new)
            row = row * fade + weight * v[b, h // group, j]
            total, top = total * fade + weight, new
        if total:
            out[b, h, i], lse[b, h, i] = row / total, top + math.log(total)
    return out, lse


def check_tensors(q, k, v, mask):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise TypeError(f"{name}: expected a float tensor")
        if x.dim() != 4 or x.dtype != q.dtype:
            raise ValueError(f"{name}: expected four axes and the dtype of q")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError("k: expected a number of heads that divides the query heads")
    if k.shape[2] != v.shape[2] or v.shape[0] != q.shape[0]:
        raise ValueError("v: expected the shape of k")
    if k.shape[3] != q.shape[3]:
        raise ValueError("k: expected the head size of q")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError("mask: expected bool")


def bottom_right(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def sdpa(q, k, v, *, causal=False, mask=None, scale=None):
    """torch's own attention, with lse from its parts."""
    check_tensors(q, k, v, mask)
    shape = (q.shape[0], 1, q.shape[2], k.shape[2])
    allowed = torch.ones(shape, dtype=torch.bool)
    if causal:
        allowed = allowed & bottom_right(*shape[2:])
    if mask is not None:
        allowed = allowed & mask
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    unread = ~allowed.any(-2)[..., None]
    k, v = k.masked_fill(unread, 0), v.masked_fill(unread, 0)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)
    scores = (q.float() @ k.float().mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    lse = torch.logsumexp(scores.masked_fill(~allowed, -torch.inf), -1)
    return torch.where(torch.isneginf(lse)[..., None], 0, out), lse


def flex(q, k, v, *, causal=False, mask=None, scale=None):
    """FlexAttention, uncompiled, on the CPU."""
    check_tensors(q, k, v, mask)
    offset = k.shape[2] - q.shape[2]

    def score_mod(score, b, h, i, j):
        allowed = (j <= i + offset) if causal else (j >= 0)
        if mask is not None:
            allowed = allowed & mask[b, 0, i, j]
        return torch.where(allowed, score, -torch.inf)

    out, aux = flex_attention(
        q, k, v, score_mod=score_mod, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    return out, aux.lse.float()


SIZES = {"queries": range(1, 25), "keys": range(1, 25)}

KERNELS = [
    Kernel("naive-loop", "attention.attend", naive_loop, largest=33),
    Kernel("naive-loop-64", "attention.attend", naive_loop, dtypes=("float64",), largest=33),
    Kernel("torch-sdpa", "attention.attend", sdpa, array="torch", gradient=True, largest=65,
           dtypes=("float32", "float16", "bfloat16")),
]  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_right_kernels_pass(kernel):
    report = certify(kernel, profile="smoke" if kernel.array == "numpy" else "ci")
    assert report.passed, "\n".join(str(failure) for failure in report.failures)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_passes():
    kernel = Kernel("flex", "attention.attend", flex, array="torch", limits=SIZES)
    laws = ["agreement", "lengths", "heads", "magnitude", "permutation", "split"]
    report = certify(kernel, profile="smoke", laws=laws)
    assert report.passed, "\n".join(str(failure) for failure in report.failures)


@pytest.mark.parametrize("slug", list(mechanisms()))
def test_the_reference_passes_its_own_suite(slug):
    kernels = [
        Kernel("reference", name, contract.spec.function, backward=contract.spec.gradient,
               dtypes=("float32", "float64"))
        for name, contract in contracts().items()
        if name.startswith(f"{slug}.")
    ]  # fmt: skip
    assert kernels, f"{slug} has no contract"
    report = certify(kernels, profile="smoke")
    assert report.passed, "\n".join(str(failure) for failure in report.failures)
