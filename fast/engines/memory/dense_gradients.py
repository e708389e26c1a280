"""The gradients of a memory by batched products: groups of pieces from the last to the first.

Each group is walked again from the weights that entered it, then first its reads and after them its
pieces are gone through backwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnspec.fast.engines.memory.dense import (
    GROUP,
    Deep,
    Walk,
    Walked,
    gelu,
    gelu_curvature,
    gelu_slope,
    scalar_kernels,
    turn_over,
)
from attnspec.fast.engines.memory.packed import Ends
from attnspec.fast.engines.memory.plan import Rates, Scalars


def backward(
    call: Deep, dy: Tensor, dW: Tensor, dS: Tensor, saved: Tensor, W: Tensor, S: Tensor, k: Tensor,
    v: Tensor, q: Tensor, rates: Rates, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dW, dS (memories, numbers), dk, dv, dq, and drates (3, heads, tokens)."""
    if not call.pieces.count:
        dk, dv, dq = (torch.zeros_like(x) for x in (k, v, q))
        return dW.clone(), dS.clone(), dk, dv, dq, rates.theta.new_zeros(3, *rates.theta.shape)
    walk = Walk(call, W, S, k, v, q, rates, backend)
    sequences = walk.ends(dW, dS)
    if walk.packed is not None:
        nothing, last = torch.zeros_like(saved[0, 0]), walk.packed.ends(call.pieces.count - 1)
        dW, dS = (ends.enter(last, nothing) for ends in sequences)
    folded = walk.fold(dy.to(rates.theta.dtype))
    d = walk.of.zeros()
    dbase = torch.zeros_like(dW)
    parts = []
    for number in reversed(range(saved.shape[0])):
        part = slice(number * GROUP, min((number + 1) * GROUP, call.pieces.count))
        walked, _ = walk.group(saved[number], part)
        dA, reads = _read_backward(walk, walked, part, folded[:, part], d)
        dk_part, dv_part, dW, dS, dbase = _walk_backward(
            walk, walked, part, reads, dW, dS, dbase, d, sequences
        )
        parts.append((dk_part, dv_part, dA))
    dk, dv, dq = (torch.cat(x[::-1], 1) for x in zip(*parts, strict=True))
    if walk.packed is not None:
        dW, dS = (ends.left for ends in sequences)
    drates = scalar_kernels(backend).scalars_backward(rates, call.pieces, call.before, d)
    return (
        dW, dS,
        call.pieces.join(dk, 1).view(k.shape).to(k.dtype),
        call.pieces.join(dv, 1).view(v.shape).to(v.dtype),
        walk.unfold(dq, q), drates,
    )  # fmt: skip


@dataclass
class Reads:
    """What the read adds to gradients of a group: weights, momentum, H and Delta by layer."""

    W: Tensor
    S: Tensor
    H: list[Tensor]
    Delta: list[Tensor]


def _read_backward(
    walk: Walk, walked: Walked, part: slice, dZ: Tensor, d: Scalars
) -> tuple[Tensor, Reads]:
    """Back through the reads of a group: dQ, gradients of the read coefficients into `d`."""
    product, call = torch.matmul, walk.call
    beta, f = (walk.of_group(walk.of.rows, part)[..., i, None] for i in (0, 2))
    G, A = walk.of_group(walk.of.G, part), walk.q[:, part]
    W, S = call.layers(walked.W), call.layers(walked.S)
    depth = len(W)
    inputs, products = [], []
    for layer in range(depth):
        inputs.append(A)
        scores = product(A, walked.H[layer].mT)
        in_W, in_S = product(A, W[layer]), product(A, S[layer])
        z = None
        if layer + 1 < depth:
            z = beta * in_W + f * in_S - product(scores * G, walked.Delta[layer])
            A = gelu(z)
        products.append((in_W, in_S, scores, z))
    dbeta, df, dG = torch.zeros_like(beta), torch.zeros_like(f), torch.zeros_like(G)
    dW: list[Tensor] = []
    dS: list[Tensor] = []
    dH: list[Tensor] = []
    dDelta: list[Tensor] = []
    for layer in reversed(range(depth)):
        A, (in_W, in_S, scores, z) = inputs[layer], products[layer]
        if z is not None:
            dZ = dZ * gelu_slope(z)
        dscores = -product(dZ, walked.Delta[layer].mT)
        dbeta += (dZ * in_W).sum(-1, keepdim=True)
        df += (dZ * in_S).sum(-1, keepdim=True)
        dG += dscores * scores
        width = dZ.shape[-1]
        both = product(A.mT, torch.cat([beta * dZ, f * dZ], -1))
        dW.insert(0, both[..., :width].flatten(2))
        dS.insert(0, both[..., width:].flatten(2))
        dDelta.insert(0, -product((scores * G).mT, dZ))
        dH.insert(0, product((dscores * G).mT, A))
        dZ = (
            beta * product(dZ, W[layer].mT) + f * product(dZ, S[layer].mT)
            + product(dscores * G, walked.H[layer])
        )  # fmt: skip
    size = (call.group, call.pieces.size)
    d.rows[:, part, :, 0] = dbeta[..., 0].unflatten(2, size).sum(2)
    d.rows[:, part, :, 2] = df[..., 0].unflatten(2, size).sum(2)
    d.G[:, part] = dG.unflatten(2, size).sum(2)
    return dZ, Reads(torch.cat(dW, -1), torch.cat(dS, -1), dH, dDelta)


def _walk_backward(
    walk: Walk, walked: Walked, part: slice, reads: Reads, dW: Tensor, dS: Tensor, dbase: Tensor,
    d: Scalars, sequences: list[Ends],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Pieces from the last to the first: dk, dv (heads, pieces, size, width), dW, dS, dbase."""
    call, product, of = walk.call, torch.matmul, walk.of
    dks, dvs = [], []
    for n in reversed(range(part.start, part.stop)):
        i = n - part.start
        H, z, Delta = ([x[:, i] for x in y] for y in (walked.H, walked.z, walked.Delta))
        G, other = of.end_G[:, n, :, None], of.end_n[:, n, :, None]
        beta, m, f = (x[:, None] for x in of.end[:, n].unbind(-1))
        W, S = walked.W[:, i], walked.S[:, i]
        for place, (x, u) in enumerate(((W, dW), (S, dS), (S, dW))):
            d.end[:, n, place] = (x * u).sum(-1)
        dH, dDelta = [], []
        for layer, (uW, uS) in enumerate(zip(call.layers(dW), call.layers(dS), strict=True)):
            in_W, in_S = product(H[layer], uW), product(H[layer], uS)
            dDelta.append(reads.Delta[layer][:, i] - G * in_W - other * in_S)
            d.end_G[:, n] -= (Delta[layer] * in_W).sum(-1)
            d.end_n[:, n] -= (Delta[layer] * in_S).sum(-1)
            dH.append(
                reads.H[layer][:, i] - product(G * Delta[layer], uW.mT)
                - product(other * Delta[layer], uS.mT)
            )  # fmt: skip
        dk, dv, more = _inner_backward(walk, walked.base[:, i], H, z, Delta, dH, dDelta)
        dks.append(dk)
        dvs.append(dv)
        dbase = dbase + more
        dW, dS = beta * dW + reads.W[:, i], f * dW + m * dS + reads.S[:, i]
        if walk.packed is not None:
            enters = walk.packed.table[n, 2] == 0
            dW, dbase = torch.where(enters, dW + dbase, dW), torch.where(enters, 0.0, dbase)
            here, before = walk.packed.begins(n), walk.packed.ends(n - 1)
            dW, dS = turn_over(sequences, (dW, dS), here, before)
        elif n % call.pieces.per == 0:
            dW, dbase = dW + dbase, torch.zeros_like(dbase)
    return torch.stack(dks[::-1], 1), torch.stack(dvs[::-1], 1), dW, dS, dbase


def _inner_backward(
    walk: Walk, base: Tensor, H: list[Tensor], z: list[Tensor], Delta: list[Tensor],
    dH: list[Tensor], dDelta: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Back through the inner gradient: dk, dv and the gradient of the base weights."""
    call, product = walk.call, torch.matmul
    W, depth = call.layers(base), len(H)
    dbase: list[Tensor] = [torch.empty(0)] * depth
    dz: list[Tensor] = []
    for i in range(depth - 1):
        back = product(Delta[i + 1], W[i + 1].mT)
        dback = dDelta[i] * gelu_slope(z[i])
        dz.append(dDelta[i] * back * gelu_curvature(z[i]))
        dDelta[i + 1] = dDelta[i + 1] + product(dback, W[i + 1])
        dbase[i + 1] = product(dback.mT, Delta[i + 1])
    dz.append(call.loss_scale * dDelta[-1])
    for i in reversed(range(depth)):
        if i + 1 < depth:
            dz[i] = dz[i] + dH[i + 1] * gelu_slope(z[i])
        more = product(H[i].mT, dz[i])
        dbase[i] = dbase[i] + more if i else more
        dH[i] = dH[i] + product(dz[i], W[i].mT)
    return dH[0], -dz[-1], torch.cat([x.flatten(1) for x in dbase], -1)
